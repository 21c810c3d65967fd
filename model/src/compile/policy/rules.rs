//! What NetworkPolicies allow, as entries of a table.

use std::collections::BTreeMap;

use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::blocks::Blocks;
use super::endpoint::Endpoint;
use super::{Cluster, Labels};
use crate::policy::{Ports, matches};
use crate::snapshot::Protocol;

/// Which way a rule looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    /// Whether a policy says anything about it (NetworkPolicySpec, policyTypes): without a list of types, ingress always, and
    /// egress when there are rules for it.
    pub(super) fn is_of(self, policy: &NetworkPolicy) -> bool {
        let Some(spec) = &policy.spec else { return false };
        match spec.policy_types.as_deref() {
            Some(types) if !types.is_empty() => types.iter().any(|one| one == self.name()),
            _ => self == Self::Ingress || spec.egress.as_ref().is_some_and(|e| !e.is_empty()),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Ingress => "Ingress",
            Self::Egress => "Egress",
        }
    }
}

/// Whether the policy selects a pod of its namespace with these labels.
pub(super) fn selects(policy: &NetworkPolicy, labels: &Labels) -> bool {
    let Some(spec) = &policy.spec else { return false };
    spec.pod_selector.as_ref().is_none_or(|selector| matches(selector, labels))
}

/// One rule of either direction.
struct Rule<'a> {
    name: String,
    peers: &'a [NetworkPolicyPeer],
    ports: &'a [NetworkPolicyPort],
}

fn rules<'a>(name: &str, policy: &'a NetworkPolicy, direction: Direction) -> Vec<Rule<'a>> {
    let namespace = policy.metadata.namespace.as_deref().unwrap_or_default();
    let Some(spec) = &policy.spec else { return vec![] };
    let list: Vec<_> = match direction {
        Direction::Ingress => {
            let all = spec.ingress.iter().flatten();
            all.map(|rule| (rule.from.as_deref(), rule.ports.as_deref())).collect()
        }
        Direction::Egress => {
            let all = spec.egress.iter().flatten();
            all.map(|rule| (rule.to.as_deref(), rule.ports.as_deref())).collect()
        }
    };
    let word = direction.name().to_lowercase();
    let one = |(index, (peers, ports)): (usize, (Option<&'a [_]>, Option<&'a [_]>))| Rule {
        name: format!("NetworkPolicy {namespace}/{name} {word}[{index}]"),
        peers: peers.unwrap_or_default(),
        ports: ports.unwrap_or_default(),
    };
    list.into_iter().enumerate().map(one).collect()
}

/// All peers of a policy.
pub(super) fn peers(policy: &NetworkPolicy) -> impl Iterator<Item = &NetworkPolicyPeer> {
    let directions = [Direction::Ingress, Direction::Egress];
    directions.into_iter().flat_map(|direction| rules("", policy, direction)).flat_map(|r| r.peers)
}

/// All ports of a policy's ingress rules.
pub(super) fn ingress_ports(policy: &NetworkPolicy) -> impl Iterator<Item = &NetworkPolicyPort> {
    rules("", policy, Direction::Ingress).into_iter().flat_map(|rule| rule.ports)
}

/// All ports of a policy's egress rules.
pub(super) fn egress_ports(policy: &NetworkPolicy) -> impl Iterator<Item = &NetworkPolicyPort> {
    rules("", policy, Direction::Egress).into_iter().flat_map(|rule| rule.ports)
}

/// The policies that apply to a pod in a direction. Pods with equal ones share their entries.
pub(super) struct Applied<'a> {
    pub(super) direction: Direction,
    pub(super) namespace: String,
    pub(super) policies: Vec<(&'a str, &'a NetworkPolicy)>,
    pub(super) isolated: bool,
    /// Ports of the pod that ingress rules call by name.
    pub(super) named_ports: BTreeMap<(&'a str, Protocol), u16>,
}

/// Policy, other side (nobody in particular: everybody), ports.
pub(super) type Key = (String, Option<String>, Ports);
/// The rule that allows, by what it allows. Of several, the first by name.
pub(super) type Table = BTreeMap<Key, String>;

impl<'a> Applied<'a> {
    /// What people call it.
    pub(super) fn name(&self) -> String {
        let isolation = self.isolated.then(|| format!("isolation of namespace {}", self.namespace));
        let policies = self.policies.iter().map(|(name, _)| format!("{}/{name}", self.namespace));
        let all: Vec<String> = isolation.into_iter().chain(policies).collect();
        format!("{} policies: {}", self.direction.name().to_lowercase(), all.join(", "))
    }

    /// What tells it from others.
    pub(super) fn text(&self) -> String {
        let ports = self.named_ports.iter();
        let ports: Vec<String> =
            ports.map(|((name, protocol), port)| format!(" {name}:{port}/{protocol}")).collect();
        self.name() + &ports.concat()
    }

    /// All ipBlocks.
    pub(super) fn blocks(&self) -> impl Iterator<Item = &'a IPBlock> {
        let rules = self.policies.iter().flat_map(|(name, p)| rules(name, p, self.direction));
        rules.flat_map(|rule| rule.peers).filter_map(|peer| peer.ip_block.as_ref())
    }

    /// Adds everything that is allowed.
    pub(super) fn rules(
        &self,
        text: &str,
        cluster: &Cluster<'_>,
        kinds: &BTreeMap<String, &Endpoint<'_>>,
        blocks: &Blocks,
        table: &mut Table,
    ) {
        let mut allow = |who: Option<&str>, ports: Ports, rule: &str| {
            let key = (text.to_owned(), who.map(str::to_owned), ports);
            table.entry(key).or_insert_with(|| rule.to_owned());
        };
        for (name, policy) in &self.policies {
            for rule in rules(name, policy, self.direction) {
                for (who, endpoint) in self.others(&rule, cluster, kinds, blocks) {
                    for ports in self.ports(&rule, endpoint) {
                        allow(who, ports, &rule.name);
                    }
                }
            }
        }
        if self.isolated {
            let rule = format!("isolation of namespace {}", self.namespace);
            let same = kinds.iter().filter(|(_, one)| one.key.namespace == self.namespace);
            same.for_each(|(who, _)| allow(Some(who), Ports::Everything, &rule));
            allow(Some(super::NODES), Ports::Everything, &rule);
        }
    }

    /// The other sides that a rule means. Who has ports with names comes with them.
    fn others<'b>(
        &self,
        rule: &Rule<'_>,
        cluster: &Cluster<'_>,
        kinds: &'b BTreeMap<String, &'b Endpoint<'b>>,
        blocks: &'b Blocks,
    ) -> Vec<(Option<&'b str>, Option<&'b Endpoint<'b>>)> {
        let pods = kinds.iter().map(|(who, endpoint)| (Some(who.as_str()), Some(*endpoint)));
        if rule.peers.is_empty() {
            let by_name = self.direction == Direction::Egress && rule.ports.iter().any(is_named);
            return [(None, None)].into_iter().chain(pods.filter(|_| by_name)).collect();
        }
        let mut others = Vec::new();
        for peer in rule.peers {
            match &peer.ip_block {
                Some(block) => others.extend(blocks.containing(block).map(|who| (Some(who), None))),
                None => others.extend(pods.clone().filter(|(_, endpoint)| {
                    endpoint.is_some_and(|one| is_peer(peer, one, &self.namespace, cluster))
                })),
            }
        }
        others
    }

    /// The ports of a rule, for that other side.
    fn ports(&self, rule: &Rule<'_>, other: Option<&Endpoint<'_>>) -> Vec<Ports> {
        if rule.ports.is_empty() {
            return vec![Ports::Everything];
        }
        let named = |name: &str, protocol| match self.direction {
            Direction::Ingress => self.named_ports.get(&(name, protocol)).copied(),
            Direction::Egress => other?.named_ports.get(&(name, protocol)).copied(),
        };
        rule.ports.iter().flat_map(|port| one_port(port, named)).collect()
    }
}

fn is_named(port: &NetworkPolicyPort) -> bool {
    matches!(port.port, Some(IntOrString::String(_)))
}

fn one_port(port: &NetworkPolicyPort, named: impl Fn(&str, Protocol) -> Option<u16>) -> Vec<Ports> {
    let Some(protocol) = Protocol::parse(port.protocol.as_deref()) else { return vec![] };
    let number = |number: i32| u16::try_from(number).ok();
    let range = match &port.port {
        None => return vec![Ports::of(protocol)],
        Some(IntOrString::String(name)) => named(name, protocol).map(|port| (port, port)),
        Some(IntOrString::Int(first)) => {
            number(*first).zip(number(port.end_port.unwrap_or(*first)))
        }
    };
    range.map_or_else(Vec::new, |(first, last)| Ports::range(protocol, first, last))
}

/// Whether selectors mean the pod, in a policy of that namespace.
fn is_peer(
    peer: &NetworkPolicyPeer,
    pod: &Endpoint<'_>,
    namespace: &str,
    cluster: &Cluster<'_>,
) -> bool {
    let in_namespace = match &peer.namespace_selector {
        None => pod.key.namespace == namespace,
        Some(selector) => {
            let labels = cluster.namespaces.get(pod.key.namespace.as_str());
            labels.is_some_and(|labels| matches(selector, labels))
        }
    };
    in_namespace && peer.pod_selector.as_ref().is_none_or(|selector| matches(selector, pod.labels))
}
