//! From NetworkPolicies to the tables of one node.
//!
//! What Kubernetes leaves open is decided so:
//! - a rule without ports allows every protocol, ICMP too; a rule with ports only those;
//! - an ipBlock means addresses, whoever has them, pods included; a named port means nothing for it;
//! - pods in the node's network are the node: no policy selects them and no peer means them;
//! - a pod's own node is always allowed, both ways. That is also where its DNS server is. Other nodes, with their proxies, are
//!   addresses like any other.
//!
//! The label `mesh.dev/isolation: namespace` on a Namespace stands for a NetworkPolicy that selects all its pods and lets them
//! receive from the namespace itself and from nodes. Other policies allow more, as usual.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::networking::v1::NetworkPolicy;

use super::{Objects, nodes};
use crate::ObjectKey;
use crate::cluster::node_overlay_address;
use crate::policy::{ANYBODY, OPEN, OTHER_NODE, PodPolicy, PolicySet, Rule, THIS_NODE};
use crate::snapshot::LocalNode;
use crate::wellknown::{
    ISOLATION_NAMESPACE, LABEL_ISOLATION, LABEL_NAMESPACE_NAME, NODE_LOCAL_ADDRESS,
    NODE_LOCAL_ADDRESS_V6,
};

mod blocks;
mod endpoint;
mod numbers;
mod rules;
#[cfg(test)]
mod tests;

use blocks::Blocks;
use endpoint::{Endpoint, Vocabulary};
use numbers::Numbers;
use rules::{Applied, Direction};

/// Stands for the other nodes where texts stand for identities.
const NODES: &str = "nodes";

pub(super) type Labels = BTreeMap<String, String>;

/// Whether an agent has to know the pods of the whole cluster: somebody restricts something.
pub fn is_restricted(policies: usize, namespaces: &[impl AsRef<Namespace>]) -> bool {
    policies > 0 || namespaces.iter().any(|namespace| is_isolated(namespace.as_ref()))
}

fn is_isolated(namespace: &Namespace) -> bool {
    let labels = namespace.metadata.labels.as_ref();
    labels.and_then(|labels| labels.get(LABEL_ISOLATION)).map(String::as_str)
        == Some(ISOLATION_NAMESPACE)
}

/// What the policies of a cluster say, prepared for lookups.
struct Cluster<'a> {
    /// Labels of namespaces, with the name as every namespace has it.
    namespaces: BTreeMap<&'a str, Labels>,
    isolated: BTreeSet<&'a str>,
    policies: BTreeMap<&'a str, Vec<(&'a str, &'a NetworkPolicy)>>,
}

impl<'a> Cluster<'a> {
    fn new(objects: &'a Objects) -> Self {
        let mut policies: BTreeMap<&str, Vec<(&str, &NetworkPolicy)>> = BTreeMap::new();
        for policy in &objects.network_policies {
            if let (Some(namespace), Some(name)) =
                (&policy.metadata.namespace, &policy.metadata.name)
            {
                policies.entry(namespace).or_default().push((name, policy));
            }
        }
        policies.values_mut().for_each(|list| list.sort_by_key(|(name, _)| *name));
        let named = || {
            let all = objects.namespaces.iter();
            all.filter_map(|namespace| Some((namespace.metadata.name.as_deref()?, &**namespace)))
        };
        let labels = |(name, namespace): (&'a str, &Namespace)| {
            let mut labels = namespace.metadata.labels.clone().unwrap_or_default();
            labels.insert(LABEL_NAMESPACE_NAME.to_owned(), name.to_owned());
            (name, labels)
        };
        Self {
            namespaces: named().map(labels).collect(),
            isolated: named().filter(|(_, ns)| is_isolated(ns)).map(|(name, _)| name).collect(),
            policies,
        }
    }

    fn all_policies(&self) -> impl Iterator<Item = &'a NetworkPolicy> {
        self.policies.values().flatten().map(|(_, policy)| *policy)
    }

    /// What restricts a pod in a direction; nothing when nothing does.
    fn applied(&self, pod: &Endpoint<'a>, direction: Direction) -> Option<Applied<'a>> {
        let policies = self.policies.get(pod.key.namespace.as_str()).into_iter().flatten();
        let policies: Vec<(&str, &NetworkPolicy)> = policies
            .filter(|(_, policy)| direction.is_of(policy))
            .filter(|(_, policy)| rules::selects(policy, pod.labels))
            .copied()
            .collect();
        let isolated =
            direction == Direction::Ingress && self.isolated.contains(pod.key.namespace.as_str());
        (isolated || !policies.is_empty()).then(|| Applied {
            direction,
            namespace: pod.key.namespace.clone(),
            named_ports: match direction {
                Direction::Ingress => pod.named_ports_of(&policies),
                Direction::Egress => BTreeMap::new(),
            },
            policies,
            isolated,
        })
    }
}

/// The policies of a node.
pub(super) fn set(objects: &Objects, local: &LocalNode) -> PolicySet {
    let cluster = Cluster::new(objects);
    let own: Vec<Endpoint> =
        objects.pods.iter().filter_map(|pod| Endpoint::on_node(pod, &local.name)).collect();
    let applied = |direction| -> BTreeMap<&ObjectKey, Applied> {
        own.iter().filter_map(|pod| Some((&pod.key, cluster.applied(pod, direction)?))).collect()
    };
    let (ingress, egress) = (applied(Direction::Ingress), applied(Direction::Egress));
    let mut set = PolicySet::default();
    if !ingress.is_empty() || !egress.is_empty() {
        let all: BTreeMap<String, &Applied> =
            ingress.values().chain(egress.values()).map(|one| (one.text(), one)).collect();
        let vocabulary = Vocabulary::of(cluster.all_policies());
        let numbers = fill(&mut set, objects, &cluster, &vocabulary, &all);
        let policy = |applied: Option<&Applied>| applied.map_or(OPEN, |a| numbers.of(&a.text()));
        for pod in &own {
            let found = PodPolicy {
                identity: numbers.of(&pod.identity(&vocabulary)),
                ingress: policy(ingress.get(&pod.key)),
                egress: policy(egress.get(&pod.key)),
            };
            set.pods.insert(pod.key.clone(), found);
        }
        set.active = true;
    }
    set.identities.extend(addresses_of_nodes(objects, local));
    set
}

/// Everything but the node's own pods.
fn fill(
    set: &mut PolicySet,
    objects: &Objects,
    cluster: &Cluster<'_>,
    vocabulary: &Vocabulary<'_>,
    applied: &BTreeMap<String, &Applied<'_>>,
) -> Numbers {
    let everybody = everybody(objects);
    let mut kinds: BTreeMap<String, &Endpoint> = BTreeMap::new();
    let mut identities: BTreeMap<IpAddr, String> = BTreeMap::new();
    for (address, endpoint) in &everybody {
        let text = endpoint.identity(vocabulary);
        identities.insert(*address, text.clone());
        kinds.entry(text).or_insert(endpoint);
    }
    let blocks = Blocks::of(applied.values().flat_map(|one| one.blocks()));
    let mut rules = BTreeMap::new();
    for (text, one) in applied {
        one.rules(text, cluster, &kinds, &blocks, &mut rules);
    }
    let texts = kinds.keys().map(String::as_str).chain(blocks.texts());
    let texts = texts.chain(applied.keys().map(String::as_str));
    let numbers = Numbers::assign(texts.chain(rules.values().map(String::as_str)));
    set.identities = identities.iter().map(|(ip, text)| (*ip, numbers.of(text))).collect();
    set.blocks = blocks.classes().map(|(net, text)| (net, numbers.of(text))).collect();
    let rule = |((policy, who, ports), text): (&rules::Key, &String)| Rule {
        policy: numbers.of(policy),
        identity: match who.as_deref() {
            None => ANYBODY,
            Some(NODES) => OTHER_NODE,
            Some(who) => numbers.of(who),
        },
        ports: *ports,
        number: numbers.of(text),
    };
    set.rules = rules.iter().map(rule).collect();
    set.rules.sort_unstable();
    let named = applied.iter().map(|(text, one)| (text, one.name()));
    let named = named.chain(rules.values().map(|text| (text, text.clone())));
    set.names = named.map(|(text, name)| (numbers.of(text), name)).collect();
    numbers
}

/// Pods that have an address, in the whole cluster. An address that two claim belongs to the one that was made last.
fn everybody(objects: &Objects) -> BTreeMap<IpAddr, Endpoint<'_>> {
    let pods = objects.pods.iter().chain(&objects.cluster_pods);
    let mut pods: Vec<(&Pod, Endpoint)> =
        pods.filter_map(|pod| Some((&**pod, Endpoint::of(pod)?))).collect();
    pods.sort_by(|(a, _), (b, _)| {
        let made = |pod: &Pod| pod.metadata.creation_timestamp.clone();
        (made(a), &a.metadata.namespace, &a.metadata.name).cmp(&(
            made(b),
            &b.metadata.namespace,
            &b.metadata.name,
        ))
    });
    let mut everybody = BTreeMap::new();
    for (pod, endpoint) in pods {
        everybody.extend(endpoint::addresses(pod).map(|address| (address, endpoint.clone())));
    }
    everybody
}

/// This node and the others, by all the addresses that are known of them.
fn addresses_of_nodes(objects: &Objects, local: &LocalNode) -> BTreeMap<IpAddr, u32> {
    let mut all = BTreeMap::new();
    for node in &objects.nodes {
        all.extend(nodes::addresses(node).into_iter().map(|address| (address, OTHER_NODE)));
        let overlay = nodes::blocks(node);
        all.extend(overlay.iter().map(|block| (node_overlay_address(block), OTHER_NODE)));
    }
    let own = local.addresses.iter().copied();
    let own = own.chain(local.blocks.iter().map(node_overlay_address));
    let own = own.chain([NODE_LOCAL_ADDRESS.into(), NODE_LOCAL_ADDRESS_V6.into()]);
    all.extend(own.map(|address| (address, THIS_NODE)));
    all
}
