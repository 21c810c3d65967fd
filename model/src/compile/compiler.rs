//! The compiler that remembers.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Service};

use super::changes::{Changes, follow};
use super::claims::Claims;
use super::directory::Directory;
use super::services::Made;
use super::{Objects, dns, edge, l7, nodes, pods, policy};
use crate::snapshot::{Frontend, LocalNode, Peer, Snapshot};
use crate::{NodeName, ObjectKey};

/// Compiles again and again, each time what changed. The result is that of [`compile`](super::compile()), always.
///
/// An object is taken to be as it was while it is at the same address.
pub struct Compiler {
    node: NodeName,
    /// What the last snapshot follows from.
    known: Objects,
    /// Whether there was one.
    begun: bool,
    local: LocalNode,
    peers: Arc<Vec<Peer>>,
    addresses: Vec<IpAddr>,
    directory: Directory,
    frontends: Claims<Frontend>,
    edge: edge::Memory,
    dns: dns::Memory,
    l7: l7::Memory,
    pods: pods::Memory,
    policy: policy::Memory,
}

impl fmt::Debug for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiler").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Compiler {
    /// One that has seen nothing yet.
    pub fn new(node: NodeName) -> Self {
        Self {
            local: nodes::local(&Objects::default(), &node),
            node,
            known: Objects::default(),
            begun: false,
            peers: Arc::default(),
            addresses: vec![],
            directory: Directory::default(),
            frontends: Claims::default(),
            edge: edge::Memory::default(),
            dns: dns::Memory::default(),
            l7: l7::Memory::default(),
            pods: pods::Memory::default(),
            policy: policy::Memory::default(),
        }
    }

    /// The desired state that follows from the objects. Total: never panics, whatever they say.
    pub fn compile(&mut self, objects: &Objects) -> Snapshot {
        let cluster = self.known.cluster != objects.cluster || !self.begun;
        let nodes = follow(&mut self.known.nodes, &objects.nodes).any();
        let services = follow(&mut self.known.services, &objects.services);
        let slices = follow(&mut self.known.endpoint_slices, &objects.endpoint_slices);
        let config_maps = follow(&mut self.known.config_maps, &objects.config_maps);
        let secrets = follow(&mut self.known.secrets, &objects.secrets);
        let ingresses = follow(&mut self.known.ingresses, &objects.ingresses).any();
        let own_pods = follow(&mut self.known.pods, &objects.pods);
        let all_pods = follow(&mut self.known.cluster_pods, &objects.cluster_pods);
        let policies = follow(&mut self.known.network_policies, &objects.network_policies);
        let namespaces = follow(&mut self.known.namespaces, &objects.namespaces);
        self.known.cluster = objects.cluster.clone();
        let restart = !std::mem::replace(&mut self.begun, true);

        let moved = (cluster || nodes) && self.follow_nodes();
        let mut changed = self.directory.follow(&services, &slices);
        if cluster || moved {
            changed = self.directory.keys().cloned().collect();
        }
        let made = self.follow_services(&changed);
        self.edge.settle();
        self.dns.follow(&self.known, &self.directory, cluster || namespaces.any(), &made);
        let routes = ingresses || secrets.any();
        let routes = (routes, moved || restart);
        self.l7.follow(&self.known, &self.directory, routes, &self.local, &changed);
        let touched = touched(&services, &config_maps, &secrets);
        let mine = own_pods.any();
        self.pods.follow(&self.known, &self.directory, &self.node, mine, &touched, &changed);
        let news = policy::News {
            nodes: restart || nodes || moved,
            namespaces: &namespaces,
            pods: &own_pods,
            cluster_pods: &all_pods,
            policies: &policies,
        };
        self.policy.follow(&news, &self.known, &self.local);
        Snapshot {
            cluster: self.known.cluster.clone(),
            node: self.local.clone(),
            peers: Arc::clone(&self.peers),
            frontends: Arc::clone(self.frontends.winners()),
            edge: Arc::clone(self.edge.edge()),
            dns: Arc::clone(self.dns.zone()),
            l7: Arc::clone(self.l7.config()),
            pods: Arc::clone(self.pods.work()),
            node_addresses: self.addresses.clone(),
            revision: self.directory.revision(),
            policy: Arc::clone(self.policy.set()),
        }
    }

    /// Returns whether the node itself is another one.
    fn follow_nodes(&mut self) -> bool {
        let local = nodes::local(&self.known, &self.node);
        let moved = local != self.local;
        self.local = local;
        self.addresses = nodes::all_addresses(&self.known);
        share(&mut self.peers, nodes::peers(&self.known, &self.local));
        moved
    }

    /// Makes again what follows from these services. Returns those whose names mean something else than before.
    fn follow_services(&mut self, changed: &BTreeSet<ObjectKey>) -> Vec<ObjectKey> {
        let (mut gone, mut come) = (Made::default(), Made::default());
        let mut renamed = Vec::new();
        for key in changed {
            let (cluster, local) = (&self.known.cluster, &self.local);
            let before = self.directory.remake(key, |entry| Made::of(key, entry, cluster, local));
            let after = self.directory.entry(key).map(|entry| &entry.made);
            let nothing = Made::default();
            let after = after.unwrap_or(&nothing);
            if before.dns != after.dns {
                renamed.push(key.clone());
            }
            self.edge.follow(key, &before.edge, &after.edge);
            come.frontends.extend(after.frontends.iter().cloned());
            come.edge.services.extend(after.edge.services.iter().cloned());
            gone.frontends.extend(before.frontends);
            gone.edge.services.extend(before.edge.services);
        }
        self.frontends.change(&gone.frontends, &come.frontends);
        self.edge.change(&gone.edge.services, &come.edge.services);
        renamed
    }
}

/// Keeps what was there where it is equal.
pub(super) fn share<T: PartialEq>(kept: &mut Arc<T>, fresh: T) {
    if **kept != fresh {
        *kept = Arc::new(fresh);
    }
}

/// Namespaces whose pods may have to be told something else.
fn touched(
    services: &Changes<Service>,
    config_maps: &Changes<ConfigMap>,
    secrets: &Changes<k8s_openapi::api::core::v1::Secret>,
) -> pods::Touched {
    let everywhere = services.all().any(|service| pods::is_api(service));
    let services = services.all().map(|one| &one.metadata);
    let values = config_maps.all().map(|one| &one.metadata);
    let values = values.chain(secrets.all().map(|one| &one.metadata));
    let names = services.chain(values).filter_map(|metadata| metadata.namespace.clone());
    pods::Touched { everywhere, namespaces: names.collect() }
}

#[cfg(test)]
mod policies;
#[cfg(test)]
mod tests;
