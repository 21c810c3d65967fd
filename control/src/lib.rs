//! The control service: the API, address assignment, the scheduler and the controllers.
#![forbid(unsafe_code)]

pub mod controllers;
pub mod error;
pub mod ipam;
mod objects;
pub mod registry;
pub mod scheduler;
pub mod store;
pub mod strategy;
