//! A client of the Kubernetes Container Runtime Interface (CRI v1), as containerd and CRI-O serve it.
//!
//! Owns: the messages ([`v1`], made from `proto/cri.proto`), the connection over a Unix socket, the time limit
//! of every call, and one error type that says whether the thing was missing, the runtime was away, or it
//! refused.
//!
//! Of containerd's own interface it has the few calls without which a deletion can fail for ever (`leftover`).
//!
//! Never does: decisions about pods, retries, caching. A call that fails has failed; the pod runner of the agent
//! knows when to try again.
//!
//! Entry type: [`Client`]. Source: Kubernetes CRI, package `runtime.v1`.
#![forbid(unsafe_code)]

mod client;
mod error;
mod leftover;

pub use client::Client;
pub use error::{CallError, Fault};

/// The messages of CRI v1, as far as they are used. Field meanings are in `proto/cri.proto`.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}
