//! `mesh-cni`: what containerd executes when a pod's network comes or goes.
//!
//! Owns: reading the environment and standard input, refusing what the specification forbids ([`input`],
//! [`config`]), the one request to the agent ([`wire`], [`call`]), the result in the version that was asked for
//! ([`result`]), and the queue of releases for an agent that is down ([`queue`]). The agent uses [`wire`] and
//! [`queue`] as the other side.
//!
//! Never does: anything with the network. It opens one unix socket, or writes one file.
//!
//! Specification: CNI 1.1.0, results for 0.3.1, 0.4.0, 1.0.0 and 1.1.0.
#![forbid(unsafe_code)]

pub mod call;
pub mod config;
pub mod input;
pub mod queue;
pub mod result;
pub mod version;
pub mod wire;
pub mod wishes;

mod run;

pub use run::{Outcome, run};
