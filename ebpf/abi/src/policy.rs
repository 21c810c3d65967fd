//! Maps of network policy: who is who, who may speak to whom, and which connections are under way.
//!
//! ```text
//!   interface -> PodPolicy { ingress, egress }          what applies to a pod of this node
//!   address   -> identity                               pods of the cluster, and nodes
//!   address   -> identity (longest prefix)              addresses in ipBlocks
//!   policy, identity, protocol, port (longest prefix) -> PolicyRule
//! ```
//!
//! Rules only ever allow, so any match decides. A range of ports is a few prefixes. A packet asks at most three times: by
//! the pod's identity, by that of the ipBlocks around its address, and by [`ANYBODY`].

use crate::{Address, plain};

/// Identity in rules that hold for everybody.
pub const ANYBODY: u32 = 0;
/// Identity of this node: always allowed, both ways.
pub const THIS_NODE: u32 = 1;
/// Identity of the other nodes.
pub const OTHER_NODE: u32 = 2;
/// Identities and policies from here on are handed out.
pub const FIRST_FREE: u32 = 16;

/// Policy of a pod that no NetworkPolicy selects in this direction.
pub const OPEN: u32 = 0;
/// Policy of a pod about which nothing is known yet: nobody but this node may speak to it.
pub const PENDING: u32 = u32::MAX;

/// Whether there is anything to enforce, and since when.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PolicyState {
    /// 0: no pod of this node has a policy, and nothing is looked up.
    pub active: u32,
    /// Increased after each change that may take a permission away; never 0 while active. Verdicts that were found under
    /// another one are found again.
    pub generation: u32,
}
plain!(PolicyState, 8);

/// The policies of a pod on this node, by the index of its host-side veth. Without an entry it is [`PENDING`].
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PodPolicy {
    /// What it may receive: a policy, or [`OPEN`], or [`PENDING`].
    pub ingress: u32,
    /// What it may send.
    pub egress: u32,
}
plain!(PodPolicy, 8);

impl PodPolicy {
    /// Nothing applies.
    pub const OPEN: Self = Self { ingress: OPEN, egress: OPEN };
    /// Nothing is known.
    pub const PENDING: Self = Self { ingress: PENDING, egress: PENDING };
}

/// Key of the longest-prefix table of ipBlocks: 96 bits longer for IPv4, as with blocks of nodes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockKey {
    /// Significant bits of `address`.
    pub prefix_len: u32,
    /// The block.
    pub address: Address,
}
plain!(BlockKey, 20);

/// What a rule matches. In the longest-prefix table the prefix ends behind the identity (all protocols), behind the
/// protocol (all ports), or somewhere in the port (a range).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleMatch {
    /// The policy that it belongs to.
    pub policy: u32,
    /// The other side.
    pub identity: u32,
    /// IP protocol number.
    pub protocol: u8,
    /// The port of the side that is connected to, high byte first.
    pub port: [u8; 2],
    /// Zero.
    pub pad: u8,
}
plain!(RuleMatch, 12);

/// [`RuleMatch`] with its prefix length.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleKey {
    /// Significant bits of `matches`: one of the constants here, or up to 16 more than [`PROTOCOL_BITS`](Self::PROTOCOL_BITS).
    pub prefix_len: u32,
    /// What it matches.
    pub matches: RuleMatch,
}
plain!(RuleKey, 16);

impl RuleKey {
    /// Prefix length of a rule for all protocols.
    pub const IDENTITY_BITS: u32 = 64;
    /// Prefix length of a rule for all ports of a protocol.
    pub const PROTOCOL_BITS: u32 = 72;
    /// Prefix length of a rule for one port.
    pub const PORT_BITS: u32 = 88;
}

/// Which rule allows.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PolicyRule {
    /// Number of the rule, for reports.
    pub number: u32,
}
plain!(PolicyRule, 4);

/// A connection, as its first packet had it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionKey {
    /// Who began it.
    pub source: Address,
    /// Who was spoken to.
    pub destination: Address,
    /// Port, or the identifier of an ICMP echo request; network order.
    pub source_port_be: u16,
    /// Port; network order. The identifier of an ICMP echo reply.
    pub destination_port_be: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub pad: [u8; 3],
}
plain!(ConnectionKey, 40);

impl ConnectionKey {
    /// The same connection as the other side sends it.
    #[inline(always)]
    pub const fn reversed(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port_be: self.destination_port_be,
            destination_port_be: self.source_port_be,
            protocol: self.protocol,
            pad: [0; 3],
        }
    }
}

/// What is known about a connection. Written by the programs.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Connection {
    /// Generation under which the policy of the side that began it was asked; 0 for never.
    pub egress: u32,
    /// Generation under which the policy of the side that was spoken to was asked; 0 for never.
    pub ingress: u32,
    /// Second of the last packet, by the monotonic clock.
    pub seen_secs: u32,
    /// One of [`ConnectionState`].
    pub state: u32,
}
plain!(Connection, 16);

/// How far a connection is, which says how long it is remembered.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ConnectionState {
    /// One side has spoken.
    Opening = 0,
    /// Both have.
    Established = 1,
    /// The side that began has said that it is done (TCP, SCTP).
    ClosingForth = 2,
    /// The other side has.
    ClosingBack = 3,
    /// Both have, or one has reset it.
    Closed = 4,
}

impl ConnectionState {
    /// How long a connection in this state is remembered after a packet, in seconds. TCP outlives the keepalives that
    /// Linux sends after two hours.
    #[inline(always)]
    pub const fn lifetime_secs(state: u32, protocol: u8) -> u32 {
        match (state, protocol) {
            (0, _) => 60,
            (1, 6 | 132) => 6 * 3600,
            (1, _) => 180,
            (2 | 3, _) => 3600,
            _ => 10,
        }
    }
}

/// The first fragment of a packet that was allowed: the others have no ports.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PieceKey {
    /// Source of the packet.
    pub source: Address,
    /// Its destination.
    pub destination: Address,
    /// Its identification, as it lies in the packet.
    pub id: u32,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub pad: [u8; 3],
}
plain!(PieceKey, 40);

/// A port of the node that pods may not speak to.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPort {
    /// Port in network order.
    pub port_be: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub pad: u8,
}
plain!(HostPort, 4);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_reversed_twice_is_itself() {
        let key = ConnectionKey {
            source: Address::v4(1),
            destination: Address::v4(2),
            source_port_be: 3,
            destination_port_be: 4,
            protocol: 6,
            pad: [0; 3],
        };
        assert_ne!(key.reversed(), key);
        assert_eq!(key.reversed().reversed(), key);
    }

    #[test]
    fn a_closed_connection_is_forgotten_before_an_established_one() {
        for protocol in [1, 6, 17, 58, 132] {
            let life =
                |state: ConnectionState| ConnectionState::lifetime_secs(state as u32, protocol);
            assert!(life(ConnectionState::Closed) < life(ConnectionState::Opening));
            assert!(life(ConnectionState::Opening) < life(ConnectionState::Established));
        }
    }
}
