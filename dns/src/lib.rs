//! The DNS server of a node: the cluster's names from memory, all other names from upstream servers, cached.
//!
//! Owns: the index of the zone ([`zone`]), the answer to one question ([`zone::Zone::answer`], pure), the
//! forwarder and the listening sockets. Entry: [`run`].
//!
//! Never does: talk to the API, or to netlink, or delete names on its own. It answers from its last saved
//! configuration when nobody is there to send a new one. No name below the cluster's domain, and no address
//! of its ranges, ever leaves the node.
//!
//! Specifications: Kubernetes DNS-Based Service Discovery 1.1.0; RFC 1034, 1035, 2308 (negative answers),
//! 6891 (EDNS), 7766 (TCP).
#![forbid(unsafe_code)]

mod answer;
mod forward;
mod listen;
mod server;
mod worker;
pub mod zone;

pub use listen::sockets;
pub use worker::{DnsConfig, DnsStatus, RunError, WorkerOptions, run};
