//! What changed from one snapshot to the next, in the form that is saved.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_model::parts::Element as _;
use mesh_model::policy::{PodPolicy, PolicySet, Rule};
use mesh_model::snapshot::{
    Announced, DnsService, Edge, EdgeService, Frontend, HealthCheck, L7Config, LocalNode, Peer,
    PodWork, Protocol,
};
use mesh_model::{ClusterConfig, ObjectKey, Snapshot};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::differences::{self, Differences};

/// Small parts are whole where they differ; of long lists there is what differs.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Change {
    revision: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster: Option<ClusterConfig>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<LocalNode>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_addresses: Option<Vec<IpAddr>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peers: Option<Arc<Vec<Peer>>>,
    #[serde(skip_serializing_if = "ListChange::is_empty")]
    frontends: ListChange<Frontend>,
    #[serde(skip_serializing_if = "Option::is_none")]
    edge: Option<EdgeChange>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dns: Option<DnsChange>,
    #[serde(skip_serializing_if = "Option::is_none")]
    l7: Option<Arc<L7Config>>,
    #[serde(skip_serializing_if = "ListChange::is_empty")]
    pods: ListChange<PodWork>,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<PolicyChange>,
}

impl Change {
    /// Nothing where nothing changed.
    pub(super) fn between(old: &Snapshot, new: &Snapshot) -> Option<Self> {
        if old == new {
            return None;
        }
        Some(Self {
            revision: new.revision,
            cluster: (old.cluster != new.cluster).then(|| new.cluster.clone()),
            node: (old.node != new.node).then(|| new.node.clone()),
            node_addresses: (old.node_addresses != new.node_addresses)
                .then(|| new.node_addresses.clone()),
            peers: (old.peers != new.peers).then(|| Arc::clone(&new.peers)),
            frontends: ListChange::between(&old.frontends, &new.frontends),
            edge: (old.edge != new.edge).then(|| EdgeChange::between(&old.edge, &new.edge)),
            dns: (old.dns != new.dns).then(|| DnsChange {
                domain: new.dns.domain.clone(),
                namespaces: (old.dns.namespaces != new.dns.namespaces)
                    .then(|| new.dns.namespaces.clone()),
                pod_cidrs: new.dns.pod_cidrs.clone(),
                services: ListChange::between(&old.dns.services, &new.dns.services),
            }),
            l7: (old.l7 != new.l7).then(|| Arc::clone(&new.l7)),
            pods: ListChange::between(&old.pods, &new.pods),
            policy: (old.policy != new.policy)
                .then(|| PolicyChange::between(&old.policy, &new.policy)),
        })
    }

    pub(super) fn carry_out(self, snapshot: &mut Snapshot) {
        snapshot.revision = self.revision;
        replace(&mut snapshot.cluster, self.cluster);
        replace(&mut snapshot.node, self.node);
        replace(&mut snapshot.node_addresses, self.node_addresses);
        replace(&mut snapshot.peers, self.peers);
        self.frontends.carry_out(Arc::make_mut(&mut snapshot.frontends));
        if let Some(edge) = self.edge {
            edge.carry_out(Arc::make_mut(&mut snapshot.edge));
        }
        if let Some(change) = self.dns {
            let dns = Arc::make_mut(&mut snapshot.dns);
            dns.domain = change.domain;
            replace(&mut dns.namespaces, change.namespaces);
            dns.pod_cidrs = change.pod_cidrs;
            change.services.carry_out(&mut dns.services);
        }
        replace(&mut snapshot.l7, self.l7);
        self.pods.carry_out(Arc::make_mut(&mut snapshot.pods));
        if let Some(policy) = self.policy {
            policy.carry_out(Arc::make_mut(&mut snapshot.policy));
        }
    }
}

fn replace<T>(part: &mut T, new: Option<T>) {
    if let Some(new) = new {
        *part = new;
    }
}

/// What orders a list and names its elements.
trait Listed: PartialEq {
    type Key: Ord + Serialize + DeserializeOwned;

    fn key(&self) -> Self::Key;
}

impl Listed for Frontend {
    type Key = (IpAddr, Protocol, u16);

    fn key(&self) -> Self::Key {
        (self.vip, self.protocol, self.port)
    }
}

impl Listed for EdgeService {
    type Key = (IpAddr, Protocol, u16);

    fn key(&self) -> Self::Key {
        (self.vip, self.protocol, self.port)
    }
}

impl Listed for DnsService {
    type Key = ObjectKey;

    fn key(&self) -> ObjectKey {
        self.key.clone()
    }
}

impl Listed for PodWork {
    type Key = [Option<String>; 3];

    fn key(&self) -> Self::Key {
        let metadata = &self.pod.metadata;
        [metadata.namespace.clone(), metadata.name.clone(), metadata.uid.clone()]
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(bound = "T: Serialize + DeserializeOwned")]
struct ListChange<T: Listed> {
    gone: Vec<T::Key>,
    put: Vec<Arc<T>>,
}

impl<T: Listed> Default for ListChange<T> {
    fn default() -> Self {
        Self { gone: vec![], put: vec![] }
    }
}

impl<T: Listed> ListChange<T> {
    fn between(old: &[Arc<T>], new: &[Arc<T>]) -> Self {
        let Differences { gone, put } = differences::of_lists(old, new, T::key);
        Self { gone, put: put.into_iter().cloned().collect() }
    }

    fn is_empty(&self) -> bool {
        self.gone.is_empty() && self.put.is_empty()
    }

    fn carry_out(self, list: &mut Vec<Arc<T>>) {
        let place = |list: &[Arc<T>], key: &T::Key| list.binary_search_by(|one| one.key().cmp(key));
        for key in self.gone {
            if let Ok(place) = place(list, &key) {
                list.remove(place);
            }
        }
        for one in self.put {
            match place(list, &one.key()) {
                Ok(place) => list[place] = one,
                Err(place) => list.insert(place, one),
            }
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct EdgeChange {
    services: ListChange<EdgeService>,
    announced: Vec<Announced>,
    health_checks: Vec<HealthCheck>,
}

impl EdgeChange {
    fn between(old: &Edge, new: &Edge) -> Self {
        Self {
            services: ListChange::between(&old.services, &new.services),
            announced: new.announced.clone(),
            health_checks: new.health_checks.clone(),
        }
    }

    fn carry_out(self, edge: &mut Edge) {
        self.services.carry_out(Arc::make_mut(&mut edge.services));
        edge.announced = self.announced;
        edge.health_checks = self.health_checks;
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct DnsChange {
    domain: String,
    namespaces: Option<Vec<String>>,
    pod_cidrs: Vec<IpNet>,
    services: ListChange<DnsService>,
}

/// Elements of a map, each with its key.
#[derive(Debug, Serialize, Deserialize)]
struct MapChange<K, V> {
    gone: Vec<K>,
    put: Vec<(K, V)>,
}

impl<K: Ord + Clone, V: PartialEq + Clone> MapChange<K, V> {
    fn between(old: &BTreeMap<K, V>, new: &BTreeMap<K, V>) -> Self {
        let gone = old.keys().filter(|key| !new.contains_key(key)).cloned().collect();
        let put = new.iter().filter(|(key, value)| old.get(key) != Some(value));
        Self { gone, put: put.map(|(key, value)| (key.clone(), value.clone())).collect() }
    }

    fn carry_out(self, map: &mut BTreeMap<K, V>) {
        for key in &self.gone {
            map.remove(key);
        }
        map.extend(self.put);
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct PolicyChange {
    active: bool,
    pods: MapChange<ObjectKey, PodPolicy>,
    identities: MapChange<IpAddr, u32>,
    blocks: MapChange<IpNet, u32>,
    names: MapChange<u32, String>,
    gone: Vec<Rule>,
    put: Vec<Rule>,
}

impl PolicyChange {
    fn between(old: &PolicySet, new: &PolicySet) -> Self {
        let identities = new.identities.differences(&old.identities);
        let rules = new.rules.differences(&old.rules);
        Self {
            active: new.active,
            pods: MapChange::between(&old.pods, &new.pods),
            identities: MapChange {
                gone: identities.gone.into_iter().map(|(address, _)| address).collect(),
                put: identities.put,
            },
            blocks: MapChange::between(&old.blocks, &new.blocks),
            names: MapChange::between(&old.names, &new.names),
            gone: rules.gone,
            put: rules.put,
        }
    }

    fn carry_out(self, set: &mut PolicySet) {
        set.active = self.active;
        self.pods.carry_out(&mut set.pods);
        self.identities.gone.iter().for_each(|address| set.identities.remove(address));
        self.identities.put.into_iter().for_each(|one| set.identities.insert(one));
        self.blocks.carry_out(&mut set.blocks);
        self.names.carry_out(&mut set.names);
        self.gone.iter().for_each(|rule| set.rules.remove(&rule.key()));
        self.put.into_iter().for_each(|rule| set.rules.insert(rule));
    }
}
