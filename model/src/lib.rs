//! Names, addresses and API objects of a cluster, and [`compile`]: what one node has to do, as a pure function of them.
//!
//! Owns: the vocabulary that all programs share ([`names`], [`kinds`], [`wellknown`]), the cluster's
//! address plan ([`cluster`]), the node's desired state ([`snapshot`]), the joining messages ([`join`]), the
//! renewal of certificates ([`certificate`]), the keys that pairs of nodes share ([`preshared`]), network policy as a node
//! enforces it ([`policy`], [`parts`]), what agents report to people ([`report`], [`flow`], [`trace`], [`shortage`]) and what the check
//! of encryption says to them ([`encryption`]).
//!
//! Never does: I/O, clocks, randomness, logging. Nothing here knows eBPF, netlink, HTTP or DNS messages.
#![forbid(unsafe_code)]

pub mod certificate;
pub mod cluster;
pub mod compile;
pub mod containers;
pub mod encryption;
pub mod ephemeral;
pub mod flow;
pub mod join;
pub mod kinds;
pub mod names;
pub mod parts;
pub mod policy;
pub mod preshared;
pub mod report;
mod shared;
pub mod shortage;
pub mod snapshot;
pub mod sysctl;
pub mod trace;
pub mod wellknown;

pub use cluster::ClusterConfig;
pub use compile::{Compiler, Objects, compile};
pub use names::{NodeName, ObjectKey};
pub use snapshot::Snapshot;
