//! The control service: the API, address assignment, the scheduler and the controllers.
#![forbid(unsafe_code)]

pub mod api;
pub mod bootstrap;
pub mod controllers;
mod cron;
pub mod discovery;
pub mod error;
pub mod fields;
mod indexes;
pub mod ipam;
mod objects;
pub mod openapi;
pub mod pki;
pub mod preshared;
pub mod registry;
pub mod scheduler;
pub mod server;
pub mod store;
pub mod strategy;
pub mod table;
pub mod tokens;
