//! The truth table of network policies: nine pods, what each may reach, and policies drawn by a seed.
//!
//! Pods a, b, c in namespaces x, y, z. [`policies`] draws NetworkPolicies, [`oracle`] reads them as their specification does and
//! knows nothing of how Mesh compiles them, [`Table`] holds one against what was seen.

pub mod oracle;
pub mod policies;
mod table;

use std::net::IpAddr;

pub use table::{Cell, Service, Table, Wrong};

/// Namespaces; each has the label `ns` with its name.
pub const NAMESPACES: [&str; 3] = ["x", "y", "z"];
/// Pods of each namespace; each has the label `pod` with its name, and `tier`.
pub const PODS: [&str; 3] = ["a", "b", "c"];
/// Ports that each pod serves.
pub const PORTS: [u16; 2] = [80, 81];

/// Seeds of the sets of policies that are tested.
pub const SEEDS: [u64; 4] = [1, 2, 3, 4];

/// One of the nine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its namespace.
    pub namespace: &'static str,
    /// Its name.
    pub name: &'static str,
    /// Its IPv4 and IPv6 address.
    pub addresses: [IpAddr; 2],
}

impl Member {
    /// The nine, in the order of the table, with the addresses that `address` knows: of namespace and name.
    pub fn all<E>(
        mut addresses: impl FnMut(&str, &str) -> Result<[IpAddr; 2], E>,
    ) -> Result<Vec<Self>, E> {
        let names = NAMESPACES.iter().flat_map(|ns| PODS.iter().map(move |pod| (*ns, *pod)));
        names
            .map(|(namespace, name)| {
                Ok(Self { namespace, name, addresses: addresses(namespace, name)? })
            })
            .collect()
    }

    /// Its host name, by which it answers.
    pub fn host(&self) -> String {
        format!("{}-{}", self.namespace, self.name)
    }

    /// Its labels.
    pub fn labels(&self) -> [(&'static str, &'static str); 2] {
        [("pod", self.name), ("tier", if self.name == "b" { "t1" } else { "t0" })]
    }

    /// The port that it calls `serve`, of TCP.
    pub fn named_port(&self) -> u16 {
        if self.name == "c" { 81 } else { 80 }
    }
}

/// Labels of a namespace.
pub fn namespace_labels(namespace: &'static str) -> [(&'static str, &'static str); 2] {
    [("ns", namespace), ("kubernetes.io/metadata.name", namespace)]
}

/// Transport protocols, as policies call them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP
    Tcp,
    /// UDP
    Udp,
    /// SCTP
    Sctp,
}

impl Protocol {
    /// As in a NetworkPolicy.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}
