//! What the scheduler knows of the cluster: kept up to date by changes, never summed up anew.

use std::collections::{BTreeMap, HashMap, HashSet};

use k8s_openapi::api::core::v1::{Node, Pod, PodAffinityTerm, Taint};

use super::fit::Request;
use super::resources::Resources;
use super::score;
use super::topology;
use crate::objects::{self, Labels};

/// What counts for a pod that asks for nothing, when nodes are compared: 100 mCPU and 200 MiB.
const LOAD_WITHOUT_REQUEST: (i64, i64) = (100, 200 << 20);
/// Pods per node where the node does not say how many it takes.
const DEFAULT_MAX_PODS: i64 = 110;

/// The nodes, what is placed on them, and nothing else.
#[derive(Debug, Default)]
pub struct ClusterState {
    pub(super) nodes: BTreeMap<String, NodeFacts>,
    pub(super) usage: HashMap<String, Usage>,
    pub(super) pods: HashMap<String, Placed>,
    pub(super) repelling: HashSet<String>,
    pub(super) namespaces: HashMap<String, Labels>,
    assumed: HashSet<String>,
    /// How many nodes and pods were looked at so far: the cost of scheduling, for tests and metrics.
    pub work: u64,
}

/// What a node says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NodeFacts {
    pub(super) labels: Labels,
    pub(super) taints: Vec<(String, String, String)>,
    pub(super) unschedulable: bool,
    pub(super) ready: bool,
    /// Nobody hears from it, or it is about to go: whatever a pod tolerates.
    pub(super) away: bool,
    pub(super) allocatable: Resources,
    pub(super) max_pods: i64,
}

/// What the pods of one node use together.
#[derive(Debug, Clone, Default)]
pub(super) struct Usage {
    pub(super) requested: Resources,
    pub(super) load: (i64, i64),
    pub(super) pods: i64,
    pub(super) ports: BTreeMap<HostPort, u32>,
    pub(super) owners: HashMap<String, i64>,
}

/// A port of the node that a pod occupies.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct HostPort {
    pub(super) protocol: String,
    pub(super) port: i32,
    /// Empty for every address.
    pub(super) address: String,
}

/// A pod with a node.
#[derive(Debug, Clone)]
pub(super) struct Placed {
    pub(super) node: String,
    pub(super) namespace: String,
    pub(super) labels: Labels,
    pub(super) terminating: bool,
    pub(super) repels: Vec<PodAffinityTerm>,
    requested: Resources,
    load: (i64, i64),
    ports: Vec<HostPort>,
    owner: Option<String>,
}

/// No node takes the pod.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Unschedulable {
    /// The Kubernetes message: how many nodes, and how many of them for which reason.
    pub message: String,
}

impl ClusterState {
    /// Notes a new or changed node. Returns whether that could make a waiting pod fit.
    pub fn set_node(&mut self, node: &Node) -> bool {
        let facts = NodeFacts::new(node);
        let name = objects::name(&node.metadata).to_owned();
        let old = self.nodes.insert(name, facts.clone());
        old.as_ref() != Some(&facts)
    }

    /// Forgets a node; what is placed on it stays known until the pods go.
    pub fn remove_node(&mut self, name: &str) {
        self.nodes.remove(name);
    }

    /// Notes the labels of a namespace, which affinity terms may select by.
    pub fn set_namespace(&mut self, name: &str, labels: Labels) {
        self.namespaces.insert(name.to_owned(), labels);
    }

    /// Notes a new or changed pod. Returns whether that could make a waiting pod fit.
    pub fn set_pod(&mut self, pod: &Pod) -> bool {
        let uid = objects::uid(&pod.metadata);
        match objects::node_of(pod) {
            Some(node) if !objects::have_ended(pod) => {
                self.assumed.remove(uid);
                let placed = Placed::new(pod, node);
                let before = self.pods.get(uid).map(|p| (p.node == placed.node, p.labels.clone()));
                let same = before == Some((true, placed.labels.clone()));
                self.insert(uid, placed);
                !same
            }
            // The write that binds the pod is on its way.
            None if self.assumed.contains(uid) => false,
            _ => self.remove_pod(uid),
        }
    }

    /// Forgets a deleted pod. Returns whether it occupied anything.
    pub fn remove_pod(&mut self, uid: &str) -> bool {
        self.assumed.remove(uid);
        self.repelling.remove(uid);
        let Some(placed) = self.pods.remove(uid) else {
            return false;
        };
        self.work += 1;
        if let Some(usage) = self.usage.get_mut(&placed.node) {
            usage.subtract(&placed);
            if usage.pods == 0 {
                self.usage.remove(&placed.node);
            }
        }
        true
    }

    /// Counts the pod on `node` before the store knows; [`forget`](Self::forget) undoes it.
    pub fn assume(&mut self, pod: &Pod, node: &str) {
        let uid = objects::uid(&pod.metadata);
        self.insert(uid, Placed::new(pod, node));
        self.assumed.insert(uid.to_owned());
    }

    /// Undoes [`assume`](Self::assume) for a pod that could not be bound.
    pub fn forget(&mut self, uid: &str) {
        if self.assumed.contains(uid) {
            self.remove_pod(uid);
        }
    }

    /// The best node for the pod.
    pub fn place(&mut self, pod: &Pod) -> Result<String, Unschedulable> {
        if self.nodes.is_empty() {
            return Err(Unschedulable {
                message: "0/0 nodes are available: no nodes are registered.".to_owned(),
            });
        }
        let (topology, looked_at) = topology::Demands::new(pod, self);
        let request = Request::new(pod, topology);
        self.work += looked_at + self.nodes.len() as u64;
        let unused = Usage::default();
        let mut feasible = Vec::new();
        let mut tally: BTreeMap<String, usize> = BTreeMap::new();
        for (name, facts) in &self.nodes {
            let usage = self.usage.get(name).unwrap_or(&unused);
            let reasons = request.reasons_against(name, facts, usage);
            if reasons.is_empty() {
                feasible.push(score::Candidate { name, facts, usage });
            }
            for reason in reasons {
                *tally.entry(reason).or_default() += 1;
            }
        }
        score::best(&request, &feasible)
            .map(str::to_owned)
            .ok_or_else(|| Unschedulable { message: message(self.nodes.len(), &tally) })
    }

    fn insert(&mut self, uid: &str, placed: Placed) {
        self.remove_pod(uid);
        self.work += 1;
        self.usage.entry(placed.node.clone()).or_default().add(&placed);
        if !placed.repels.is_empty() {
            self.repelling.insert(uid.to_owned());
        }
        self.pods.insert(uid.to_owned(), placed);
    }
}

fn message(nodes: usize, tally: &BTreeMap<String, usize>) -> String {
    let mut parts: Vec<_> =
        tally.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    parts.sort();
    format!("0/{nodes} nodes are available: {}.", parts.join(", "))
}

impl NodeFacts {
    fn new(node: &Node) -> Self {
        let spec = node.spec.as_ref();
        let allocatable = Resources::allocatable(node);
        let taints = spec.iter().flat_map(|s| s.taints.iter().flatten());
        Self {
            labels: objects::labels(&node.metadata),
            taints: taints
                .map(|t| (t.key.clone(), t.value.clone().unwrap_or_default(), t.effect.clone()))
                .collect(),
            unschedulable: spec.and_then(|s| s.unschedulable) == Some(true),
            ready: objects::is_node_ready(node),
            away: objects::is_node_lost(node) || objects::is_terminating(&node.metadata),
            max_pods: match allocatable.of("pods") {
                0 => DEFAULT_MAX_PODS,
                pods => pods,
            },
            allocatable,
        }
    }

    pub(super) fn taints(&self) -> impl Iterator<Item = Taint> + '_ {
        self.taints.iter().map(|(key, value, effect)| Taint {
            key: key.clone(),
            value: Some(value.clone()),
            effect: effect.clone(),
            time_added: None,
        })
    }
}

impl Usage {
    fn add(&mut self, pod: &Placed) {
        self.requested.add(&pod.requested);
        self.load = (self.load.0 + pod.load.0, self.load.1 + pod.load.1);
        self.pods += 1;
        for port in &pod.ports {
            *self.ports.entry(port.clone()).or_default() += 1;
        }
        if let Some(owner) = &pod.owner
            && !pod.terminating
        {
            *self.owners.entry(owner.clone()).or_default() += 1;
        }
    }

    fn subtract(&mut self, pod: &Placed) {
        self.requested.subtract(&pod.requested);
        self.load = (self.load.0 - pod.load.0, self.load.1 - pod.load.1);
        self.pods -= 1;
        for port in &pod.ports {
            if let Some(count) = self.ports.get_mut(port) {
                *count -= 1;
                if *count == 0 {
                    self.ports.remove(port);
                }
            }
        }
        if let Some(owner) = pod.owner.as_ref().filter(|_| !pod.terminating)
            && let Some(count) = self.owners.get_mut(owner)
        {
            *count -= 1;
            if *count == 0 {
                self.owners.remove(owner);
            }
        }
    }
}

impl Placed {
    fn new(pod: &Pod, node: &str) -> Self {
        let requested = Resources::requested(pod);
        Self {
            node: node.to_owned(),
            namespace: objects::namespace(&pod.metadata).to_owned(),
            labels: objects::labels(&pod.metadata),
            terminating: objects::is_terminating(&pod.metadata),
            repels: topology::required_anti_terms(pod).to_vec(),
            load: load(&requested),
            requested,
            ports: host_ports(pod),
            owner: objects::controller_of(&pod.metadata).map(|owner| owner.uid.clone()),
        }
    }
}

/// CPU and memory for comparing nodes: pods that ask for nothing count as small ones.
pub(super) fn load(requested: &Resources) -> (i64, i64) {
    let or = |amount: i64, default: i64| if amount == 0 { default } else { amount };
    (
        or(requested.of("cpu"), LOAD_WITHOUT_REQUEST.0),
        or(requested.of("memory"), LOAD_WITHOUT_REQUEST.1),
    )
}

/// The ports of the node that the pod's containers occupy.
pub(super) fn host_ports(pod: &Pod) -> Vec<HostPort> {
    let Some(spec) = &pod.spec else {
        return Vec::new();
    };
    let on_host = spec.host_network == Some(true);
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let ports = containers.flat_map(|container| container.ports.iter().flatten());
    ports
        .filter_map(|port| {
            let implied = on_host.then_some(port.container_port);
            let number = port.host_port.filter(|n| *n > 0).or(implied)?;
            let address = port.host_ip.clone().unwrap_or_default();
            let every = matches!(address.as_str(), "0.0.0.0" | "::");
            Some(HostPort {
                protocol: port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
                port: number,
                address: if every { String::new() } else { address },
            })
        })
        .collect()
}
