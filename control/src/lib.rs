//! The control service: the API, address assignment, the scheduler and the controllers.
#![forbid(unsafe_code)]

pub mod ipam;
mod objects;
pub mod scheduler;
