//! The encrypted overlay between nodes: our WireGuard engine in user space, and what both kinds of device share.
//!
//! Owns: the engine's configuration and status ([`config`], [`status`]), the node's key ([`keys`]), the MTU
//! ([`mtu`]), which paths work ([`paths`]) and the relay that serves those that do not ([`relay`]), the pure protocol core ([`protocol`]), packet segmentation and joining ([`offload`]), the worker
//! process ([`worker`]), the kernel's device in the same terms ([`kernel_device`]), and the one type through which
//! the agent uses either ([`Overlay`]).
//!
//! Three layers: [`protocol`] and [`offload`] take bytes and a time and return bytes, `os` is TUN devices and
//! UDP sockets, `engine` is the threads that tie them together. Keys and ciphers are named in one module only
//! ([`protocol::noise`]).
//!
//! Never does: addresses, routes, eBPF programs, anything about pods or services. Nothing here sends a packet that
//! came from the device without sealing it: the only way from a device to a socket leads through
//! [`protocol::peer::seal`].
//!
//! Specification: the WireGuard paper, <https://www.wireguard.com/papers/wireguard.pdf>, named "WG" below.
//! Of the inner header's traffic class the outer one carries ECN ([`protocol::ecn`]), as the kernel's device does.

pub mod config;
pub mod counters;
mod engine;
pub mod facade;
mod handover;
pub mod kernel_device;
pub mod keys;
pub mod mtu;
pub mod offload;
mod os;
pub mod paths;
pub mod protocol;
pub mod relay;
pub mod status;
pub mod worker;

pub use config::{OverlayConfig, PeerConfig, PresharedKey};
pub use facade::{Kind, Overlay};
pub use kernel_device::KernelDevice;
pub use keys::NodeKey;
pub use status::{DropReason, PeerStatus, Status};
pub use worker::{RunError, WorkerOptions, run};
