//! What NetworkPolicies allow, as entries of a table.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::Labels;
use super::blocks::{Block, Blocks};
use super::crowd::Crowd;
use super::endpoint::{Endpoint, Kind, NamedPorts};
use super::laws::Laws;
use super::words;
use crate::policy::{NETWORK_POLICY, Ports, matches};
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

/// A rule: whom it means, and which ports.
type Side<'a> = (&'a [NetworkPolicyPeer], &'a [NetworkPolicyPort]);

fn sides(policy: &NetworkPolicy, direction: Direction) -> Vec<Side<'_>> {
    let Some(spec) = &policy.spec else { return vec![] };
    match direction {
        Direction::Ingress => {
            let all = spec.ingress.iter().flatten();
            all.map(|rule| side(rule.from.as_deref(), rule.ports.as_deref())).collect()
        }
        Direction::Egress => {
            let all = spec.egress.iter().flatten();
            all.map(|rule| side(rule.to.as_deref(), rule.ports.as_deref())).collect()
        }
    }
}

fn side<'a>(
    peers: Option<&'a [NetworkPolicyPeer]>,
    ports: Option<&'a [NetworkPolicyPort]>,
) -> Side<'a> {
    (peers.unwrap_or_default(), ports.unwrap_or_default())
}

/// All peers of a policy.
pub(super) fn peers(policy: &NetworkPolicy) -> impl Iterator<Item = &NetworkPolicyPeer> {
    let directions = [Direction::Ingress, Direction::Egress];
    directions.into_iter().flat_map(|direction| sides(policy, direction)).flat_map(|side| side.0)
}

/// All ports of a policy's rules of a direction.
pub(super) fn ports(
    policy: &NetworkPolicy,
    direction: Direction,
) -> impl Iterator<Item = &NetworkPolicyPort> {
    sides(policy, direction).into_iter().flat_map(|side| side.1)
}

/// The policies that apply to a pod in a direction. Pods with equal ones share their entries.
pub(super) struct Applied {
    /// What tells it from others.
    pub(super) text: String,
    /// What people call it.
    pub(super) name: String,
    direction: Direction,
    namespace: String,
    isolated: bool,
    policies: Vec<Arc<NetworkPolicy>>,
    /// Ports of the pod that ingress rules call by name.
    named_ports: NamedPorts,
    /// Names of all rules, in order.
    rules: Vec<String>,
}

/// One rule.
#[derive(Clone, Copy)]
struct Rule<'a> {
    name: &'a str,
    peers: &'a [NetworkPolicyPeer],
    ports: &'a [NetworkPolicyPort],
}

/// What rules are read against.
#[derive(Clone, Copy)]
pub(super) struct World<'a> {
    pub(super) laws: &'a Laws,
    pub(super) crowd: &'a Crowd,
    pub(super) blocks: &'a Blocks,
}

/// The other side of a connection.
#[derive(Clone, Copy)]
pub(super) enum Other<'a> {
    Everybody,
    Nodes,
    Pods(&'a Kind),
    /// Addresses that are in these ipBlocks.
    Class(&'a str),
}

/// The rule that allows, by what it allows. Of several, the first by policy and place in it.
pub(super) type Allowed<'a> = BTreeMap<Ports, &'a str>;

impl Applied {
    /// What restricts a pod in a direction; nothing when nothing does. `selecting` are the policies that select it, by name.
    pub(super) fn to(
        pod: &Endpoint<'_>,
        selecting: &BTreeSet<String>,
        direction: Direction,
        laws: &Laws,
    ) -> Option<Self> {
        let namespace = pod.key.namespace.clone();
        let policies =
            selecting.iter().filter_map(|name| Some((name, laws.policy(&namespace, name)?)));
        let policies: Vec<(&String, &Arc<NetworkPolicy>)> =
            policies.filter(|(_, policy)| direction.is_of(policy)).collect();
        let isolated = direction == Direction::Ingress && laws.is_isolated(&namespace);
        if policies.is_empty() && !isolated {
            return None;
        }
        let word = direction.name().to_lowercase();
        let isolation = isolated.then(|| isolation(&namespace));
        let names = policies.iter().map(|(name, _)| format!("{namespace}/{name}"));
        let names: Vec<String> = isolation.into_iter().chain(names).collect();
        let name = format!("{word} policies: {}", names.join(", "));
        let rules = policies.iter().flat_map(|(name, policy)| {
            let count = sides(policy, direction).len();
            let (word, namespace) = (&word, &namespace);
            let named = move |index| format!("{NETWORK_POLICY}{namespace}/{name} {word}[{index}]");
            (0..count).map(named)
        });
        let rules = rules.collect();
        let policies: Vec<_> = policies.into_iter().map(|(_, policy)| Arc::clone(policy)).collect();
        let named_ports = match direction {
            Direction::Ingress => named_ports(pod, &policies),
            Direction::Egress => NamedPorts::new(),
        };
        let ports = named_ports.iter();
        let ports: Vec<String> =
            ports.map(|((name, protocol), port)| format!(" {name}:{port}/{protocol}")).collect();
        let text = name.clone() + &ports.concat();
        Some(Self { text, name, direction, namespace, isolated, policies, named_ports, rules })
    }

    /// Whether the same policies, as they were, are behind the same text.
    pub(super) fn is_as(&self, other: &Self) -> bool {
        self.policies.len() == other.policies.len()
            && self.policies.iter().zip(&other.policies).all(|(a, b)| Arc::ptr_eq(a, b))
    }

    /// The names of all rules that may allow something.
    pub(super) fn rule_names(&self) -> impl Iterator<Item = String> {
        let isolation = self.isolated.then(|| isolation(&self.namespace));
        self.rules.iter().cloned().chain(isolation)
    }

    fn rules(&self) -> impl Iterator<Item = Rule<'_>> {
        let sides = self.policies.iter().flat_map(|policy| sides(policy, self.direction));
        let named = self.rules.iter().zip(sides);
        named.map(|(name, (peers, ports))| Rule { name, peers, ports })
    }

    /// All ipBlocks.
    pub(super) fn blocks(&self) -> impl Iterator<Item = Block> {
        let peers = self.rules().flat_map(|rule| rule.peers);
        peers.filter_map(|peer| Block::of(peer.ip_block.as_ref()?))
    }

    /// Everybody who may be allowed something.
    pub(super) fn others<'a>(&self, world: World<'a>) -> Vec<Other<'a>> {
        let peers = self.rules().flat_map(|rule| rule.peers);
        let blocks = peers.filter_map(|peer| peer.ip_block.as_ref());
        let classes: BTreeSet<&str> =
            blocks.flat_map(|block| world.blocks.containing(block)).collect();
        let kinds = world.crowd.namespaces().flat_map(|name| self.kinds(name, world));
        let others = [Other::Everybody, Other::Nodes].into_iter();
        others.chain(classes.into_iter().map(Other::Class)).chain(kinds.map(Other::Pods)).collect()
    }

    /// The kinds of pods of a namespace that may be allowed something.
    pub(super) fn kinds<'a>(&self, namespace: &str, world: World<'a>) -> Vec<&'a Kind> {
        let inside = self.isolated && namespace == self.namespace;
        if inside || self.rules().any(|rule| self.is_by_name(&rule)) {
            return world.crowd.kinds(namespace).map(|kind| &**kind).collect();
        }
        let peers = self.rules().flat_map(|rule| rule.peers);
        let there = peers.filter(|peer| self.is_there(peer, namespace, world.laws));
        let found = there
            .flat_map(|peer| world.crowd.candidates(namespace, peer.pod_selector.as_ref()))
            .map(|kind| &**kind);
        let mut kinds: Vec<&Kind> = found.collect();
        // There is one of each.
        kinds.sort_unstable_by_key(|kind| std::ptr::from_ref(*kind));
        kinds.dedup_by_key(|kind| std::ptr::from_ref(*kind));
        kinds
    }

    /// Whether it depends on the labels of namespaces who is meant.
    pub(super) fn looks_at_namespaces(&self) -> bool {
        let mut peers = self.rules().flat_map(|rule| rule.peers);
        peers.any(|peer| peer.namespace_selector.is_some())
    }

    /// Whether the ports of a rule for everybody depend on who it is.
    fn is_by_name(&self, rule: &Rule<'_>) -> bool {
        let mut ports = rule.ports.iter();
        self.direction == Direction::Egress
            && rule.peers.is_empty()
            && ports.any(|port| words::name(port).is_some())
    }

    /// What the other side is allowed.
    pub(super) fn allowed(&self, other: Other<'_>, world: World<'_>) -> Allowed<'_> {
        let mut allowed = Allowed::new();
        for rule in self.rules().filter(|rule| self.means(rule, other, world)) {
            for ports in self.ports(&rule, other) {
                allowed.entry(ports).or_insert(rule.name);
            }
        }
        allowed
    }

    /// Whether the isolation of the namespace lets the other side in.
    pub(super) fn lets_in(&self, other: Other<'_>) -> Option<String> {
        let inside = match other {
            Other::Nodes => true,
            Other::Pods(kind) => kind.namespace == self.namespace,
            Other::Everybody | Other::Class(_) => false,
        };
        (self.isolated && inside).then(|| isolation(&self.namespace))
    }

    fn means(&self, rule: &Rule<'_>, other: Other<'_>, world: World<'_>) -> bool {
        match other {
            Other::Nodes => false,
            Other::Everybody => rule.peers.is_empty(),
            Other::Class(class) => {
                let mut blocks = rule.peers.iter().filter_map(|peer| peer.ip_block.as_ref());
                blocks.any(|block| world.blocks.containing(block).any(|one| one == class))
            }
            Other::Pods(kind) => {
                let is_peer = |peer: &NetworkPolicyPeer| {
                    let selector = peer.pod_selector.as_ref();
                    self.is_there(peer, &kind.namespace, world.laws)
                        && selector.is_none_or(|selector| matches(selector, &kind.labels))
                };
                self.is_by_name(rule) || rule.peers.iter().any(is_peer)
            }
        }
    }

    /// Whether selectors mean pods of that namespace.
    fn is_there(&self, peer: &NetworkPolicyPeer, namespace: &str, laws: &Laws) -> bool {
        peer.ip_block.is_none()
            && match &peer.namespace_selector {
                None => namespace == self.namespace,
                Some(selector) => {
                    laws.labels(namespace).is_some_and(|labels| matches(selector, labels))
                }
            }
    }

    /// The ports of a rule, for that other side.
    fn ports(&self, rule: &Rule<'_>, other: Other<'_>) -> Vec<Ports> {
        if rule.ports.is_empty() {
            return vec![Ports::Everything];
        }
        let named = |name: &str, protocol| {
            let ports = match (self.direction, other) {
                (Direction::Ingress, _) => &self.named_ports,
                (Direction::Egress, Other::Pods(kind)) => &kind.named_ports,
                (Direction::Egress, _) => return None,
            };
            ports.get(&(name.to_owned(), protocol)).copied()
        };
        rule.ports.iter().flat_map(|port| one_port(port, named)).collect()
    }
}

fn isolation(namespace: &str) -> String {
    format!("isolation of namespace {namespace}")
}

/// The named ports that ingress rules of these policies refer to, as the pod has them.
fn named_ports(pod: &Endpoint<'_>, policies: &[Arc<NetworkPolicy>]) -> NamedPorts {
    let all = policies.iter().flat_map(|policy| ports(policy, Direction::Ingress));
    let names: BTreeSet<&str> = all.filter_map(words::name).collect();
    let ports = pod.named_ports.iter().filter(|((name, _), _)| names.contains(name));
    ports.map(|(&(name, protocol), port)| ((name.to_owned(), protocol), *port)).collect()
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
