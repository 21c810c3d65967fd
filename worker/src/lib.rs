//! Plumbing that the worker processes of a node share: the control socket, the saved configuration, privileges.
//!
//! A worker (`mesh-agent dns`, `ingress`, `overlay`) outlives the agent that started it. The agent finds it
//! again by its control socket, sends it a whole new configuration when something changed ([`client`]), and
//! the worker saves it, so that it can start again without the agent ([`server`]).
//!
//! Never does: anything with packets, names or requests. Entry types: [`server::Handler`], [`client::Client`].

pub mod client;
pub mod privileges;
pub mod server;
pub mod supervise;
mod wire;

pub use client::Client;
pub use server::{Handler, restore, serve};
