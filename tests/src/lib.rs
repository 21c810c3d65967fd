//! A cluster on one machine: `cargo xtask up` and the end-to-end tests use the same one.
//!
//! ```text
//!   root namespace                 mesh-control on 10.213.N.1:6443
//!        |
//!   mesh-ID  (bridge, stands for the underlay)  10.213.N.0/24  fd00:213:N::/64
//!        |---- mesh-ID-1 ==veth== eth0  network namespace mesh-ID-node-1   containerd, mesh-agent + workers, pods
//!        |---- mesh-ID-2 ==veth== eth0  network namespace mesh-ID-node-2   the same
//!       ...
//! ```
//!
//! Every process of a cluster is in the control group `mesh-ID`, every file below two folders with the cluster's id,
//! and every device and namespace carries the id in its name. So teardown needs no memory: it works after any
//! crash, and touches nothing else.
//!
//! Owns: what stands for machines (namespaces, cables, control groups, containerd) and starting the programs in them.
//! Never does: what an agent must do on a real machine (forwarding, routes to pods, programs).
//! Entry type: [`Cluster`].
#![forbid(unsafe_code)]

pub mod artifacts;
pub mod capture;
pub mod cgroups;
pub mod cluster;
pub mod command;
pub mod containerd;
pub mod containers;
pub mod documented;
pub mod faults;
pub mod folders;
pub mod image;
pub mod kubectl;
pub mod layout;
pub mod load;
pub mod marks;
pub mod node;
pub mod pod;
pub mod policy_table;
pub mod process;
pub mod rig;
pub mod runner;
pub mod teardown;
pub mod underlay;

pub use artifacts::Artifacts;
pub use cluster::{Cluster, Spec};
pub use kubectl::Kubectl;
pub use layout::Layout;
pub use node::Node;
