//! The whole service over HTTPS: what clients see, from the first join to a crash in the middle of writes.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "api/access.rs"]
mod access;
#[path = "api/accounts.rs"]
mod accounts;
#[path = "api/agents.rs"]
mod agents;
#[path = "api/apply.rs"]
mod apply;
#[path = "api/certificates.rs"]
mod certificates;
#[path = "api/clients.rs"]
mod clients;
#[path = "api/crash.rs"]
mod crash;
#[path = "api/endpoints.rs"]
mod endpoints;
#[path = "api/jobs.rs"]
mod jobs;
#[path = "api/objects.rs"]
mod objects;
#[path = "api/pods.rs"]
mod pods;
#[path = "api/preshared.rs"]
mod preshared;
#[path = "api/refusals.rs"]
mod refusals;
#[path = "api/sets.rs"]
mod sets;
#[path = "api/support.rs"]
mod support;
#[path = "api/watches.rs"]
mod watches;
