//! The crate against a real kernel: programs, maps, namespaces, devices. Needs root; makes everything it uses, and
//! cleans up by `Drop`.
#![allow(clippy::unwrap_used, reason = "tests, and what they share")]

mod broken;
mod capture;
mod client;
mod edge;
mod flows;
mod lab;
mod loading;
mod node_network;
mod packets;
mod pod_extras;
mod pod_network;
mod policy;
mod programs;
mod service_scale;
mod socket_hooks;
mod traces;
mod versions;
mod wireguard_device;
