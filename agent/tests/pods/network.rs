//! The CNI plugin as others than our own runner use it: in chains with the stock plugins, from `ctr`, next to other networks; and
//! an agent that is killed at any of its steps. The real agent, the real plugin, the real kernel.
//!
//! ```text
//!   machine's network:   up0 192.0.2.1   mesh-agent   mvHASH   (cni-other 10.99.0.1)
//!                                                       |            |
//!   container's network:                     eth0 10.244.1.N     eth1 10.99.0.N
//! ```

mod beside;
mod chains;
mod ctr;
mod kills;
mod node;
mod reboot;
mod reset;
mod runtime;
mod versions;
