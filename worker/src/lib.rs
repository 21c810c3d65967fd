//! Plumbing that the worker processes of a node share: the control socket, the saved configuration, descriptors that
//! outlive them, privileges, memory.
//!
//! A worker (`mesh-agent dns`, `ingress`, `overlay`) outlives the agent that started it. The agent finds it
//! again by its identity file and its control socket ([`supervise`]), sends it a whole new configuration when something
//! changed ([`client`]), and the worker saves it, so that it can start again without the agent ([`server`]). The sockets
//! that it serves on belong to both ([`descriptors`]), so that nobody is refused while it is away. One that cannot serve
//! beside its successor hands over to it what it is busy with ([`predecessor`]).
//!
//! Never does: anything with packets, names or requests. Entry types: [`server::Handler`] and [`server::Control`] in a
//! worker, [`client::Client`] and [`supervise::keep`] in the agent.

mod attach;
pub mod client;
pub mod descriptors;
mod identity;
pub mod memory;
mod pace;
pub mod predecessor;
pub mod privileges;
mod process;
mod rights;
pub mod server;
pub mod sockets;
pub mod supervise;
mod wire;

pub use client::Client;
pub use descriptors::Descriptors;
pub use predecessor::Predecessor;
pub use server::{Control, Handler};
pub use sockets::{SocketSpec, Transport};
