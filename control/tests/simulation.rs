//! The controllers against a real registry and pretended nodes: what people see when they scale, roll out, lose a
//! node, delete, and restart the control service in the middle.

#![allow(missing_docs, clippy::unwrap_used)]

#[path = "simulation/daemons.rs"]
mod daemons;
#[path = "simulation/deletion.rs"]
mod deletion;
#[path = "simulation/deployments.rs"]
mod deployments;
#[path = "simulation/harness.rs"]
mod harness;
#[path = "simulation/jobs.rs"]
mod jobs;
#[path = "simulation/named.rs"]
mod named;
#[path = "simulation/placement.rs"]
mod placement;
#[path = "simulation/services.rs"]
mod services;
