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

//!
//! [`Memory`] keeps what it made, and makes again what a change touches. Kept are: whom each policy selects among the node's own
//! pods ([`subjects`]), who has which address in the cluster ([`crowd`]), and the table itself, of which an entry depends on one
//! set of policies and one other side. Looked at in full are, when their number changes only: all pods, when policies begin or
//! cease to speak of a label; the ipBlocks of the node's own policies.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::networking::v1::NetworkPolicy;

use super::changes::Changes;
use super::{Objects, nodes};
use crate::cluster::node_overlay_address;
use crate::policy::{OTHER_NODE, PolicySet, THIS_NODE};
use crate::snapshot::LocalNode;
use crate::wellknown::{
    ISOLATION_NAMESPACE, LABEL_ISOLATION, NODE_LOCAL_ADDRESS, NODE_LOCAL_ADDRESS_V6,
};

mod blocks;
mod counted;
mod crowd;
mod endpoint;
mod laws;
mod numbers;
mod rules;
mod subjects;
mod table;
#[cfg(test)]
mod tests;
mod words;

use blocks::Blocks;
use crowd::{Crowd, Source};
use laws::Laws;
use rules::{Applied, World};
use subjects::Subjects;
use table::{Table, Touched};
use words::Vocabulary;

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

/// What policies depend on, as it changed.
pub(super) struct News<'a> {
    /// Nodes, or this node.
    pub(super) nodes: bool,
    pub(super) namespaces: &'a Changes<Namespace>,
    pub(super) pods: &'a Changes<Pod>,
    pub(super) cluster_pods: &'a Changes<Pod>,
    pub(super) policies: &'a Changes<NetworkPolicy>,
}

impl News<'_> {
    fn any(&self) -> bool {
        self.nodes
            || self.namespaces.any()
            || self.pods.any()
            || self.cluster_pods.any()
            || self.policies.any()
    }
}

/// The policies of a node, and what they were made of.
#[derive(Default)]
pub(super) struct Memory {
    laws: Laws,
    vocabulary: Vocabulary,
    crowd: Crowd,
    subjects: Subjects,
    blocks: Blocks,
    nodes: BTreeMap<IpAddr, u32>,
    table: Table,
}

impl Memory {
    /// One that numbers texts in another way.
    #[cfg(test)]
    pub(super) fn with_poor_numbers() -> Self {
        Self { table: Table::numbered(numbers::poor), ..Self::default() }
    }

    pub(super) fn set(&self) -> &Arc<PolicySet> {
        self.table.set()
    }

    /// Makes again what follows from the news. `objects` are read for nodes only.
    pub(super) fn follow(&mut self, news: &News<'_>, objects: &Objects, local: &LocalNode) {
        if !news.any() {
            return;
        }
        let policies = self.laws.follow_policies(news.policies, &mut self.vocabulary);
        let namespaces = self.laws.follow_namespaces(news.namespaces);
        let words = self.vocabulary.settle();
        self.crowd.respell(&words, &self.vocabulary);
        self.crowd.follow(Source::Node, news.pods, &self.vocabulary);
        self.crowd.follow(Source::Cluster, news.cluster_pods, &self.vocabulary);
        let moves = self.crowd.settle();
        let laws = (&policies, &namespaces);
        let before = self.subjects.follow(news.pods, laws, &self.laws, &local.name);
        let mut touched = Touched {
            addresses: moves.addresses,
            kinds_come: moves.come,
            kinds_gone: moves.gone,
            namespaces: namespaces.relabelled,
            ..Touched::default()
        };
        if news.nodes {
            touched.addresses.extend(self.follow_nodes(objects, local));
        }
        self.reapply(before, &mut touched);
        let world = World { laws: &self.laws, crowd: &self.crowd, blocks: &self.blocks };
        self.table.follow(touched, world, &self.subjects, &self.nodes);
    }

    /// Follows what applies: its texts, and the ipBlocks that it names.
    fn reapply(&mut self, before: BTreeMap<String, Option<Applied>>, touched: &mut Touched) {
        for (text, before) in before {
            let now = self.subjects.get(&text);
            for block in now.iter().flat_map(|now| now.blocks()) {
                self.blocks.add(block);
            }
            for block in before.iter().flat_map(|before| before.blocks()) {
                self.blocks.remove(&block.text().to_owned());
            }
            self.table.learn(now);
            self.table.forget(before.as_ref());
            touched.applied.insert(text);
        }
        let redrawn = self.blocks.settle();
        touched.blocks = redrawn.any;
        touched.classes_come = redrawn.come;
        touched.classes_gone = redrawn.gone;
        if !redrawn.blocks.is_empty() {
            let named = |one: &&Applied| one.blocks().any(|b| redrawn.blocks.contains(b.text()));
            let all = self.subjects.applied().filter(named);
            touched.applied.extend(all.map(|one| one.text.clone()));
        }
    }

    /// Returns the addresses that are nodes' now and were not, or the other way round.
    fn follow_nodes(&mut self, objects: &Objects, local: &LocalNode) -> BTreeSet<IpAddr> {
        let now = addresses_of_nodes(objects, local);
        let before = std::mem::replace(&mut self.nodes, now);
        let all = before.keys().chain(self.nodes.keys());
        all.filter(|address| before.get(address) != self.nodes.get(address)).copied().collect()
    }
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
