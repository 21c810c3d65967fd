//! Nodes: their pod blocks, whether they live, and what happens to their pods when they do not.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use ipnet::IpNet;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::DeleteOptions;
use k8s_openapi::jiff::Timestamp;
use mesh_model::wellknown::{ANNOTATION_BLOCKS_WANTED, LEASE_NAMESPACE};
use tokio::time::Instant;

use self::eviction::evictions;
use self::health::{Life, Monitor, Sign, judged};
use super::queue::WorkQueue;
use super::recorder::Recorder;
use super::runtime::{Context, Reconcile, until};
use crate::error::ApiError;
use crate::ipam::NodeBlocks;
use crate::objects;
use crate::registry::{Part, WriteOptions};

mod eviction;
mod health;

/// How long pods of a node without an object are left alone: the node may be registering.
const QUARANTINE: Duration = Duration::from_secs(5);

/// No node gets more blocks of a family, whatever it asks for.
const MOST_BLOCKS: usize = 64;

pub(super) struct Controller {
    context: Arc<Context>,
    recorder: Recorder,
    monitor: Mutex<Monitor>,
    blocks: Arc<Mutex<NodeBlocks>>,
    missing: Mutex<HashMap<String, Instant>>,
}

impl Controller {
    pub(super) fn new(context: Arc<Context>) -> (Arc<Self>, Arc<WorkQueue<String>>) {
        let queue = WorkQueue::new();
        let blocks = Arc::new(Mutex::new(observed_blocks(&context)));
        let (sink, freed) = (queue.clone(), blocks.clone());
        context.nodes.listen(move |old, new| {
            let Some(node) = new.or(old) else {
                return;
            };
            let name = objects::name(&node.metadata);
            let mut blocks = freed.lock().unwrap_or_else(PoisonError::into_inner);
            match (old, new) {
                (_, None) => blocks.release(name),
                (None, Some(node)) => observe(&mut blocks, node),
                _ => {}
            }
            sink.add(name.to_owned());
        });
        let sink = queue.clone();
        context.leases.listen(move |_, new| {
            let lease = new.filter(|l| objects::namespace(&l.metadata) == LEASE_NAMESPACE);
            if let Some(lease) = lease {
                sink.add(objects::name(&lease.metadata).to_owned());
            }
        });
        let sink = queue.clone();
        context.pods.listen(move |old, new| {
            let node = |pod: Option<&Arc<Pod>>| {
                pod.and_then(|pod| objects::node_of(pod)).map(str::to_owned)
            };
            if let Some(node) = node(new).filter(|n| node(old).as_ref() != Some(n)) {
                sink.add(node);
            }
        });
        let recorder = context.recorder.of("node-controller");
        let controller = Self {
            context,
            recorder,
            monitor: Mutex::default(),
            blocks,
            missing: Mutex::default(),
        };
        (Arc::new(controller), queue)
    }

    /// Gives the node its pod blocks if it has none, and more when it asks for them. What it has stays, in its order.
    async fn assign_blocks(&self, node: Arc<Node>) -> Result<Arc<Node>, ApiError> {
        let name = objects::name(&node.metadata);
        let present = blocks_of(&node);
        let wanted = wanted_blocks(&node);
        let assigned = {
            let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
            if !present.is_empty() && blocks.count(name) >= wanted {
                return Ok(node);
            }
            blocks.assign_up_to(name, wanted)
        };
        let mut blocks = present.clone();
        match assigned {
            Ok(assigned) => {
                let texts = assigned.iter().map(ToString::to_string);
                blocks.extend(texts.filter(|block| !present.contains(block)));
            }
            Err(error) => {
                tracing::error!(node = name, %error, "no pod block assigned");
                self.recorder.warning(&*node, "CIDRNotAvailable", error.to_string());
                return Ok(node);
            }
        }
        if blocks == present {
            let message = format!("no free pod block for node {name}, which has {}", present.len());
            self.recorder.warning(&*node, "CIDRNotAvailable", message);
            return Ok(node);
        }
        tracing::info!(node = name, blocks = blocks.join(","), "pod blocks assigned");
        let mut new = (*node).clone();
        let spec = new.spec.get_or_insert_default();
        spec.pod_cidr = blocks.first().cloned();
        spec.pod_cidrs = Some(blocks);
        self.write(Part::Main, new).await
    }

    /// Marks the node as lost or found. Returns when to look again.
    async fn check_health(&self, node: Arc<Node>) -> Result<(Arc<Node>, Duration), ApiError> {
        let name = objects::name(&node.metadata);
        let sign = Sign {
            renewed: self
                .context
                .leases
                .get(LEASE_NAMESPACE, name)
                .and_then(|lease| lease.spec.as_ref()?.renew_time.as_ref().map(|t| t.0)),
            reported: objects::node_condition(&node, "Ready")
                .and_then(|c| c.last_heartbeat_time.as_ref())
                .map(|t| t.0),
        };
        let now = Instant::now();
        let (deadline, before) = {
            let mut monitor = self.monitor.lock().unwrap_or_else(PoisonError::into_inner);
            let deadline = monitor.deadline(name, sign, self.context.options.node_grace, now);
            monitor.note(&node);
            (deadline, monitor.before(name))
        };
        let lost = deadline <= now;
        let was_lost = objects::is_node_lost(&node);
        let life = if lost { Life::Lost } else { Life::Alive(before.as_deref()) };
        let mut new = judged(&node, life, Timestamp::now());
        if new.status != node.status {
            // The status first: taints alone would not take the node's pods out of rotation.
            let written = self.write(Part::Status, new.clone()).await?;
            new.metadata = written.metadata.clone();
        }
        let mut current = node;
        if new.spec != current.spec {
            current = self.write(Part::Main, new).await?;
        } else if let Some(latest) = self.context.nodes.get("", objects::name(&new.metadata)) {
            current = latest;
        }
        self.tell(was_lost, &current);
        let wait = deadline.saturating_duration_since(now);
        Ok((current, if lost { self.context.options.node_grace } else { wait }))
    }

    fn tell(&self, was_lost: bool, node: &Node) {
        let name = objects::name(&node.metadata);
        match (was_lost, objects::is_node_lost(node)) {
            (false, true) => {
                tracing::warn!(node = name, "node is lost");
                let message = format!("Node {name} status is now: NodeNotReady");
                self.recorder.warning(node, "NodeNotReady", message);
            }
            (true, false) => {
                tracing::info!(node = name, "node is back");
                let message = format!("Node {name} status is now: NodeReady");
                self.recorder.normal(node, "NodeReady", message);
            }
            _ => {}
        }
    }

    async fn write(&self, part: Part, node: Node) -> Result<Arc<Node>, ApiError> {
        let name = objects::name(&node.metadata).to_owned();
        let options = WriteOptions::default();
        let written =
            self.context.registry.modify(None, &name, part, &options, |_| Ok(node.clone())).await?;
        self.context.nodes.wrote(written.clone());
        Ok(Arc::new(written))
    }

    /// Deletes the pods that may no longer stay. Returns when the next one is due.
    async fn evict(&self, node: &Node) -> Result<Option<Timestamp>, ApiError> {
        let mut taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
        if !taints.any(|taint| taint.effect == "NoExecute") {
            return Ok(None);
        }
        let everybody_lost = {
            let nodes = self.context.nodes.all();
            !nodes.iter().any(|node| objects::is_node_ready(node))
        };
        let plan = {
            let pods = self.pods_of(objects::name(&node.metadata));
            let patience = self.context.options.eviction_patience;
            evictions(node, pods.iter().map(AsRef::as_ref), patience, Timestamp::now())
        };
        for (ns, name) in &plan.force {
            if let Some(pod) = self.context.pods.get(ns, name) {
                self.context.delete_pod(&pod, Some(0)).await?;
            }
        }
        if everybody_lost && objects::is_node_lost(node) {
            // Then it is more likely that this program is cut off; nobody could take the pods anyway.
            return Ok(plan.next);
        }
        for (ns, name) in &plan.delete {
            if let Some(pod) = self.context.pods.get(ns, name) {
                let message = format!("Marking for deletion Pod {ns}/{name}");
                self.recorder.normal(&*pod, "TaintManagerEviction", message);
                self.mark_disrupted(&pod).await?;
                self.context.delete_pod(&pod, None).await?;
            }
        }
        Ok(plan.next)
    }

    /// Says in a pod that it goes because of its node: policies of Jobs ask for that.
    async fn mark_disrupted(&self, pod: &Pod) -> Result<(), ApiError> {
        let marked = |old: &Pod| {
            let is_same = old.metadata.uid == pod.metadata.uid && objects::is_active(old);
            let message = "Taint manager: deleting due to NoExecute taint";
            let now = Timestamp::now();
            let marked = || objects::disrupted(old, "DeletionByTaintManager", message, now);
            Ok(if is_same { marked() } else { old.clone() })
        };
        let (ns, name) = (pod.metadata.namespace.as_deref(), objects::name(&pod.metadata));
        let options = WriteOptions::default();
        match self.context.registry.modify(ns, name, Part::Status, &options, marked).await {
            Ok(written) => {
                self.context.pods.wrote(written);
                Ok(())
            }
            Err(ApiError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Removes the pods and the lease of a node that no longer exists.
    async fn clean_up(&self, name: &str) -> Result<Option<Duration>, ApiError> {
        self.monitor.lock().unwrap_or_else(PoisonError::into_inner).forget(name);
        let pods = self.pods_of(name);
        let gone =
            matches!(self.context.registry.get::<Node>(None, name), Err(ApiError::NotFound { .. }));
        let since = {
            let mut missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
            let lease = self.context.leases.get(LEASE_NAMESPACE, name);
            if !gone || (pods.is_empty() && lease.is_none()) {
                missing.remove(name);
                return Ok(None);
            }
            *missing.entry(name.to_owned()).or_insert_with(Instant::now)
        };
        let quarantine = QUARANTINE.min(self.context.options.node_grace);
        let rest = quarantine.saturating_sub(since.elapsed());
        if !rest.is_zero() {
            return Ok(Some(rest));
        }
        for pod in pods {
            let message = format!("Deleting pod of the removed node {name}");
            self.recorder.normal(&*pod, "NodeRemoved", message);
            self.context.delete_pod(&pod, Some(0)).await?;
        }
        let options = DeleteOptions::default();
        match self.context.registry.delete::<Lease>(Some(LEASE_NAMESPACE), name, &options).await {
            Ok(deleted) => self.context.leases.deleted(deleted),
            Err(ApiError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        Ok(Some(quarantine))
    }

    fn pods_of(&self, node: &str) -> Vec<Arc<Pod>> {
        let mut pods = self.context.pods.all();
        pods.retain(|pod| objects::node_of(pod) == Some(node));
        pods
    }
}

#[async_trait]
impl Reconcile for Controller {
    type Key = String;
    const NAME: &'static str = "node";

    async fn reconcile(&self, name: &String) -> Result<Option<Duration>, ApiError> {
        let Some(node) = self.context.nodes.get("", name) else {
            return self.clean_up(name).await;
        };
        self.missing.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        let node = self.assign_blocks(node).await?;
        let (node, mut again) = self.check_health(node).await?;
        if let Some(due) = self.evict(&node).await? {
            again = again.min(until(due));
        }
        Ok(Some(again + Duration::from_millis(1)))
    }

    fn all(&self) -> Vec<String> {
        let nodes = self.context.nodes.all();
        nodes.iter().map(|node| objects::name(&node.metadata).to_owned()).collect()
    }
}

/// The blocks that the stored nodes have, the oldest node first: it keeps a block that two claim.
fn observed_blocks(context: &Context) -> NodeBlocks {
    let mut blocks = NodeBlocks::new(&context.cluster);
    let mut nodes = context.nodes.all();
    nodes.sort_by_key(|node| (objects::created(&node.metadata), node.metadata.name.clone()));
    for node in nodes {
        observe(&mut blocks, &node);
    }
    blocks
}

/// The node's blocks, as they are written, each once.
fn blocks_of(node: &Node) -> Vec<String> {
    let spec = node.spec.as_ref();
    let mut all: Vec<String> = vec![];
    for text in spec.iter().flat_map(|s| s.pod_cidrs.iter().flatten().chain(&s.pod_cidr)) {
        if !all.contains(text) {
            all.push(text.clone());
        }
    }
    all
}

/// How many blocks of each family the node asks for.
fn wanted_blocks(node: &Node) -> usize {
    let annotations = node.metadata.annotations.as_ref();
    let asked = annotations.and_then(|all| all.get(ANNOTATION_BLOCKS_WANTED)?.parse().ok());
    asked.unwrap_or(1).clamp(1, MOST_BLOCKS)
}

fn observe(blocks: &mut NodeBlocks, node: &Node) {
    let nets: Vec<IpNet> = blocks_of(node).iter().filter_map(|text| text.parse().ok()).collect();
    if let Err(error) = blocks.observe(objects::name(&node.metadata), &nets) {
        tracing::error!(%error, "a stored pod block is not right");
    }
}
