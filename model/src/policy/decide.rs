//! What a policy set means for a new connection: the same steps as the programs, with the reason.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{ANYBODY, OPEN, PodPolicy, PolicySet, Rule, THIS_NODE};
use crate::snapshot::Protocol;

/// A connection that somebody wants to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// Who begins it.
    pub source: IpAddr,
    /// Who is spoken to.
    pub destination: IpAddr,
    /// The protocol; absent for those without ports, such as ICMP.
    pub protocol: Option<Protocol>,
    /// The port that is connected to; 0 without ports.
    pub port: u16,
}

/// Whose policy is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Egress, of the pod that begins.
    Sender,
    /// Ingress, of the pod that is spoken to.
    Receiver,
}

/// What a policy says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// No NetworkPolicy selects the pod in this direction.
    Unrestricted,
    /// The other side is the pod's own node.
    Node,
    /// Allowed by the rule of that number.
    Allowed(u32),
    /// Selected by this policy, and no rule allows it.
    Denied(u32),
}

impl Decision {
    /// Whether packets pass.
    pub fn passes(self) -> bool {
        !matches!(self, Self::Denied(_))
    }
}

impl PolicySet {
    /// What the policy of one of the pods of this node says to a new connection.
    pub fn decide(&self, pod: &PodPolicy, side: Side, flow: &Flow) -> Decision {
        let (policy, other) = match side {
            Side::Sender => (pod.egress, flow.destination),
            Side::Receiver => (pod.ingress, flow.source),
        };
        if !self.active || policy == OPEN {
            return Decision::Unrestricted;
        }
        let identity = self.identities.get(&other).map(|(_, who)| *who);
        if identity == Some(THIS_NODE) {
            return Decision::Node;
        }
        let candidates = [identity, self.block(other), Some(ANYBODY)];
        let rule = candidates.into_iter().flatten().find_map(|who| self.rule(policy, who, flow));
        rule.map_or(Decision::Denied(policy), |rule| Decision::Allowed(rule.number))
    }

    /// The name of a policy or a rule.
    pub fn name(&self, number: u32) -> &str {
        self.names.get(&number).map_or("", String::as_str)
    }

    /// The identity of the longest range around an address.
    fn block(&self, address: IpAddr) -> Option<u32> {
        let longest = if address.is_ipv4() { 32 } else { 128 };
        (0..=longest).rev().find_map(|length| {
            let range = IpNet::new(address, length).ok()?.trunc();
            self.blocks.get(&range).copied()
        })
    }

    /// The most specific entry that matches; entries are ordered by policy and identity.
    fn rule(&self, policy: u32, identity: u32, flow: &Flow) -> Option<&Rule> {
        let rules = self.rules.part(policy);
        rules[rules.partition_point(|rule| rule.identity < identity)..]
            .iter()
            .take_while(|rule| rule.identity == identity)
            .filter(|rule| rule.ports.contain(flow.protocol, flow.port))
            .max_by_key(|rule| rule.ports.specificity())
    }
}
