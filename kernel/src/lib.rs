//! Everything that Mesh asks of the kernel: eBPF, netlink, network namespaces, sysctls, nftables, WireGuard devices.
//!
//! One module per concern, each with a small trait, a real and a fake implementation, and for what is
//! reconciled a pure `plan` between `observe` and `apply`:
//!
//! - [`bpf`]: load, pin, attach and replace the eBPF programs ([`Programs`]);
//! - [`services`]: frontends and backends in the maps of the socket hooks ([`ServiceTable`]);
//! - [`pods`]: a pod's veth pair, addresses, routes and TC program ([`PodNetwork`]);
//! - [`node`]: the node's own addresses, routes to other nodes, sysctls, masquerading ([`NodeNetwork`]);
//! - [`edge`]: services for clients outside, and the devices by which they come in ([`LinuxEdge`]);
//! - [`wireguard`]: the kernel's WireGuard device ([`WireGuardDevice`]);
//! - [`policy`]: which pods may speak to whom ([`PolicyTable`]);
//! - [`netns`]: doing things inside a network namespace;
//! - [`flows`]: events of connections and drops ([`FlowReader`]);
//! - [`capture`]: what passes on the node's links ([`Capture`]).
//!
//! Never does: decide. What should exist comes from the model; nothing here reads the API, the clock or a journal.
//! It touches only what carries its mark: interfaces with our alias, routes with our protocol numbers, the
//! nftables table `inet mesh`, and files below the given bpffs directory.
//!
//! All calls block, for micro- to milliseconds: from async code use `tokio::task::spawn_blocking`.
//! Everything takes explicit paths, because several nodes may share one machine.

pub mod bpf;
pub mod capture;
mod convert;
pub mod edge;
pub mod flows;
pub mod ifname;
pub mod netlink;
pub mod netns;
pub mod node;
pub mod pods;
pub mod policy;
pub mod services;
pub mod sockets;
pub mod steps;
pub mod sysctl;
pub mod traces;
pub mod wireguard;

pub use bpf::{LoadOptions, Programs};
pub use capture::Capture;
pub use edge::LinuxEdge;
pub use flows::FlowReader;
pub use ifname::IfName;
pub use netns::NetNs;
pub use node::NodeNetwork;
pub use pods::PodNetwork;
pub use policy::PolicyTable;
pub use services::ServiceTable;
pub use traces::Traces;
pub use wireguard::WireGuardDevice;
