//! Network policy in the form that a node enforces, and the function that says what it means.
//!
//! A [`PolicySet`] is what [`compile`](crate::compile()) makes of the cluster's NetworkPolicies for one node: plain tables from
//! addresses to identities and from (policy, identity, protocol, port) to the rule that allows. The programs in the kernel
//! look up nothing else, and [`PolicySet::decide`] does what they do.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::ObjectKey;
use crate::parts::{self, Element, Parts};
use crate::snapshot::Protocol;

mod decide;
pub(crate) mod selector;
mod why;

pub use decide::{Decision, Flow, Side};
pub use selector::matches;
pub use why::{End, Opinion, WhyError, why};

/// Identity in rules that hold for everybody.
pub const ANYBODY: u32 = 0;
/// Identity of the node itself: always allowed, both ways.
pub const THIS_NODE: u32 = 1;
/// Identity of the other nodes.
pub const OTHER_NODE: u32 = 2;
/// Identities, policies and rules have numbers from here on.
pub const FIRST_FREE: u32 = 16;
/// With this the name of a rule of a NetworkPolicy begins; its key follows, and a blank.
pub(crate) const NETWORK_POLICY: &str = "NetworkPolicy ";
/// Policy of a pod that no NetworkPolicy selects.
pub const OPEN: u32 = 0;

/// The policies that one node enforces.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicySet {
    /// Whether any pod of the node has a policy. If not, only the nodes' addresses are listed.
    pub active: bool,
    /// The node's own pods.
    pub pods: BTreeMap<ObjectKey, PodPolicy>,
    /// Identities of pods in the whole cluster, and of nodes, by address.
    #[serde(with = "parts::map")]
    pub identities: Parts<(IpAddr, u32)>,
    /// Identities of ranges: which ipBlocks an address is in follows from the longest range around it.
    pub blocks: BTreeMap<IpNet, u32>,
    /// What is allowed, a part for each policy.
    #[serde(with = "parts::list")]
    pub rules: Parts<Rule>,
    /// Names of policies and rules, for people.
    pub names: BTreeMap<u32, String>,
}

impl PolicySet {
    /// The NetworkPolicy that a rule is of; nothing when the rule is none of a NetworkPolicy.
    pub fn policy_of(&self, rule: u32) -> Option<ObjectKey> {
        let name = self.names.get(&rule)?.strip_prefix(NETWORK_POLICY)?;
        let (key, _) = name.split_once(' ')?;
        ObjectKey::try_from(key.to_owned()).ok()
    }
}

/// What applies to a pod.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodPolicy {
    /// Who it is to others.
    pub identity: u32,
    /// The policy for what it receives, or [`OPEN`].
    pub ingress: u32,
    /// The policy for what it sends, or [`OPEN`].
    pub egress: u32,
}

/// An entry that allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rule {
    /// The policy that it belongs to.
    pub policy: u32,
    /// The other side: of a pod, of a range, or [`ANYBODY`].
    pub identity: u32,
    /// Which ports.
    pub ports: Ports,
    /// Number of the rule that it comes from.
    pub number: u32,
}

impl Element for Rule {
    type Key = (u32, u32, Ports);
    type Part = u32;

    fn key(&self) -> Self::Key {
        (self.policy, self.identity, self.ports)
    }

    fn part(key: &Self::Key) -> u32 {
        key.0
    }
}

/// Addresses that differ in their last eight bits only share a part: pods of one node, mostly.
impl Element for (IpAddr, u32) {
    type Key = IpAddr;
    type Part = (bool, u128);

    fn key(&self) -> IpAddr {
        self.0
    }

    fn part(key: &IpAddr) -> Self::Part {
        match key {
            IpAddr::V4(v4) => (false, u128::from(v4.to_bits() >> 8)),
            IpAddr::V6(v6) => (true, v6.to_bits() >> 8),
        }
    }
}

/// Ports of the side that is connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Ports {
    /// All protocols, also those without ports.
    Everything,
    /// Ports that share their first bits: 0 bits for all ports, 16 for one.
    Prefix {
        /// The protocol.
        protocol: Protocol,
        /// The first port.
        first: u16,
        /// How many bits count.
        bits: u8,
    },
}

impl Ports {
    /// All ports of a protocol.
    pub fn of(protocol: Protocol) -> Self {
        Self::Prefix { protocol, first: 0, bits: 0 }
    }

    /// The ports from `first` to `last`, both included, as the fewest prefixes.
    pub fn range(protocol: Protocol, first: u16, last: u16) -> Vec<Self> {
        let mut prefixes = Vec::new();
        let (mut at, end) = (u32::from(first), u32::from(last));
        while at <= end {
            let room = 31 - (end - at + 1).leading_zeros();
            let aligned = at.trailing_zeros().min(16).min(room);
            let first = u16::try_from(at).unwrap_or(u16::MAX);
            let bits = u8::try_from(16 - aligned).unwrap_or(16);
            prefixes.push(Self::Prefix { protocol, first, bits });
            at += 1 << aligned;
        }
        prefixes
    }

    /// Whether a packet of that protocol to that port is meant. Other protocols than those with ports have none.
    pub fn contain(&self, protocol: Option<Protocol>, port: u16) -> bool {
        match *self {
            Self::Everything => true,
            Self::Prefix { protocol: wanted, first, bits } => {
                let mask = u16::MAX.checked_shl(16 - u32::from(bits)).unwrap_or(0);
                protocol == Some(wanted) && port & mask == first & mask
            }
        }
    }

    /// How much is fixed: where several match, the highest decides.
    pub fn specificity(&self) -> u8 {
        match self {
            Self::Everything => 0,
            Self::Prefix { bits, .. } => 1 + bits,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_range_is_few_prefixes() {
        assert_eq!(Ports::range(Protocol::Tcp, 0, u16::MAX), [Ports::of(Protocol::Tcp)]);
        let one = Ports::Prefix { protocol: Protocol::Udp, first: 53, bits: 16 };
        assert_eq!(Ports::range(Protocol::Udp, 53, 53), [one]);
        assert_eq!(Ports::range(Protocol::Tcp, 30_000, 32_767).len(), 5);
        assert!(Ports::range(Protocol::Tcp, 2, 1).is_empty());
        assert_eq!(Ports::range(Protocol::Tcp, 1, u16::MAX - 1).len(), 30);
    }

    proptest! {
        #[test]
        fn prefixes_hold_exactly_the_range(first: u16, last: u16, port: u16, near in -2_i32..=2) {
            let prefixes = Ports::range(Protocol::Tcp, first, last);
            let edge = |at: u16| u16::try_from(i32::from(at) + near).unwrap_or(at);
            for port in [port, first, last, edge(first), edge(last)] {
                let inside = prefixes.iter().filter(|p| p.contain(Some(Protocol::Tcp), port)).count();
                prop_assert_eq!(inside, usize::from((first..=last).contains(&port)));
                prop_assert!(prefixes.iter().all(|p| !p.contain(Some(Protocol::Udp), port)));
            }
        }
    }
}
