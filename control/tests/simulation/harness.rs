//! A registry on a temporary store, the real controllers, and nodes that only pretend to run pods.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures_util::StreamExt as _;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, MicroTime, Time};
use k8s_openapi::jiff::Timestamp;
use mesh_control::controllers::{self, Handle, Options};
use mesh_control::error::ApiError;
use mesh_control::registry::{Event, Object, Part, Registry, WriteOptions};
use mesh_control::store::RedbStore;
use mesh_model::ClusterConfig;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

/// Short enough for a test, long enough for a busy machine.
const LEASE_EVERY: Duration = Duration::from_millis(250);
const PATIENCE: Duration = Duration::from_secs(60);

/// The default plan, with two addresses for load balancers.
fn plan() -> ClusterConfig {
    let load_balancer_cidrs = vec!["192.0.2.240/30".parse().unwrap()];
    ClusterConfig { load_balancer_cidrs, ..ClusterConfig::default() }
}

pub(crate) struct Cluster {
    pub(crate) registry: Registry,
    controllers: Option<Handle>,
    _dir: tempfile::TempDir,
}

impl Cluster {
    /// Controllers run; there are no nodes yet.
    pub(crate) async fn start() -> Self {
        let mut cluster = Self::stopped().await;
        cluster.start_controllers();
        cluster
    }

    /// As [`start`](Self::start), but the controllers wait for [`start_controllers`](Self::start_controllers).
    pub(crate) async fn stopped() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(RedbStore::open(&dir.path().join("store")).unwrap());
        let registry = Registry::new(store, plan()).unwrap();
        for name in ["default", "kube-node-lease"] {
            registry
                .create(&object::<Namespace>(json!({"metadata": {"name": name}})))
                .await
                .unwrap();
        }
        Self { registry, controllers: None, _dir: dir }
    }

    pub(crate) fn start_controllers(&mut self) {
        let options = Options {
            node_grace: Duration::from_secs(3),
            eviction_patience: Duration::from_millis(300),
            ..Options::default()
        };
        let cluster = plan();
        self.controllers = Some(controllers::start_with(self.registry.clone(), cluster, options));
    }

    pub(crate) async fn stop_controllers(&mut self) {
        if let Some(handle) = self.controllers.take() {
            handle.stop().await;
        }
    }

    pub(crate) async fn nodes(&self, count: usize) -> Vec<FakeNode> {
        let mut nodes = Vec::new();
        for n in 1..=count {
            nodes.push(FakeNode::start(&self.registry, &format!("node-{n}")).await);
        }
        nodes
    }

    pub(crate) fn get<K: Object>(&self, name: &str) -> Option<K> {
        match self.registry.get::<K>(Some("default"), name) {
            Ok(object) => Some(object),
            Err(ApiError::NotFound { .. }) => None,
            Err(error) => panic!("{error}"),
        }
    }

    pub(crate) fn list<K: Object>(&self) -> Vec<K> {
        self.registry.list::<K>(None).unwrap().items
    }

    /// Pods that are neither ended nor going.
    pub(crate) fn active_pods(&self) -> Vec<Pod> {
        let mut pods = self.list::<Pod>();
        pods.retain(|pod| pod.metadata.deletion_timestamp.is_none());
        pods
    }

    pub(crate) fn ready_pods(&self) -> Vec<Pod> {
        let mut pods = self.active_pods();
        pods.retain(is_ready);
        pods
    }

    pub(crate) async fn edit<K: Object>(&self, name: &str, change: impl Fn(&mut K)) -> K {
        let options = WriteOptions::default();
        let edited = |old: &K| {
            let mut new = old.clone();
            change(&mut new);
            Ok(new)
        };
        self.registry.modify(Some("default"), name, Part::Main, &options, edited).await.unwrap()
    }

    pub(crate) async fn delete<K: Object>(&self, name: &str, policy: &str) {
        let options = DeleteOptions {
            propagation_policy: Some(policy.to_owned()),
            ..DeleteOptions::default()
        };
        self.registry.delete::<K>(Some("default"), name, &options).await.unwrap();
    }

    pub(crate) async fn scale(&self, name: &str, replicas: i32) {
        self.edit::<Deployment>(name, |d| d.spec.as_mut().unwrap().replicas = Some(replicas)).await;
    }

    pub(crate) async fn set_image(&self, name: &str, image: &str) {
        self.edit::<Deployment>(name, |d| {
            let template = &mut d.spec.as_mut().unwrap().template;
            template.spec.as_mut().unwrap().containers[0].image = Some(image.to_owned());
        })
        .await;
    }

    /// As `kubectl rollout status` decides.
    pub(crate) fn is_rolled_out(&self, name: &str) -> bool {
        let deployment: Deployment = self.get(name).unwrap();
        let wanted = deployment.spec.as_ref().unwrap().replicas.unwrap();
        let status = deployment.status.clone().unwrap_or_default();
        status.observed_generation >= deployment.metadata.generation
            && status.updated_replicas == Some(wanted)
            && status.replicas == Some(wanted)
            && status.available_replicas == Some(wanted)
    }

    pub(crate) async fn rolled_out(&self, name: &str) {
        self.eventually("rolled out", || self.is_rolled_out(name)).await;
    }

    /// Waits until `condition` holds; fails with what is there when it never does.
    pub(crate) async fn eventually(&self, what: &str, condition: impl Fn() -> bool) {
        let end = tokio::time::Instant::now() + PATIENCE;
        while !condition() {
            if tokio::time::Instant::now() > end {
                let pods: Vec<_> = self.list::<Pod>().iter().map(describe).collect();
                let deployments: Vec<_> =
                    self.list::<Deployment>().into_iter().map(|d| d.status).collect();
                panic!("never: {what}\npods: {pods:#?}\ndeployments: {deployments:#?}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn describe(pod: &Pod) -> String {
    let going = if pod.metadata.deletion_timestamp.is_some() { " going" } else { "" };
    let node = pod.spec.as_ref().and_then(|s| s.node_name.clone()).unwrap_or_default();
    let ready = if is_ready(pod) { " ready" } else { "" };
    format!("{} on {node:?}{ready}{going}", pod.metadata.name.clone().unwrap_or_default())
}

pub(crate) fn per_node(pods: &[Pod]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for node in pods.iter().filter_map(|pod| pod.spec.as_ref()?.node_name.clone()) {
        *counts.entry(node).or_default() += 1;
    }
    counts
}

pub(crate) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|s| s.conditions.iter().flatten());
    conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True")
}

pub(crate) fn object<K: Object>(value: Value) -> K {
    serde_json::from_value(value).unwrap()
}

pub(crate) fn deployment(name: &str, replicas: i32, strategy: Value) -> Deployment {
    object(json!({
        "metadata": {"namespace": "default", "name": name},
        "spec": {"replicas": replicas, "strategy": strategy,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}},
                "spec": {"containers": [{"name": "main", "image": "one"}]}}},
    }))
}

/// A node that reports and serves pods without running anything.
pub(crate) struct FakeNode {
    pub(crate) name: String,
    task: JoinHandle<()>,
}

impl FakeNode {
    pub(crate) async fn start(registry: &Registry, name: &str) -> Self {
        let node: Node = object(json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "status": {
                "addresses": [{"type": "InternalIP", "address": format!("192.168.0.{}", &name[5..])}],
                "allocatable": {"cpu": "4", "memory": "8Gi", "pods": "110"},
                "conditions": [{"type": "Ready", "status": "True", "reason": "AgentReady"}],
            },
        }));
        match registry.create(&node).await {
            Ok(_) | Err(ApiError::AlreadyExists { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        let task = tokio::spawn(run(registry.clone(), name.to_owned()));
        Self { name: name.to_owned(), task }
    }

    /// Silence, from one moment to the next.
    pub(crate) fn kill(&self) {
        self.task.abort();
    }
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(registry: Registry, name: String) {
    let mut lease = tokio::time::interval(LEASE_EVERY);
    let listed = registry.list::<Pod>(None).unwrap();
    let mut events = registry.watch::<Pod>(listed.revision);
    let known = Arc::new(Known::default());
    for pod in listed.items {
        known.look(&registry, &name, pod);
    }
    loop {
        tokio::select! {
            _ = lease.tick() => renew(&registry, &name).await,
            event = events.next() => match event {
                Some(Event::Added(pod) | Event::Modified(pod)) => known.look(&registry, &name, pod),
                Some(Event::Deleted(_)) => {}
                Some(Event::Gone) | None => panic!("the watch ended"),
            },
        }
    }
}

async fn renew(registry: &Registry, name: &str) {
    let mut lease: Lease =
        object(json!({"metadata": {"namespace": "kube-node-lease", "name": name},
        "spec": {"holderIdentity": name, "leaseDurationSeconds": 40}}));
    lease.spec.as_mut().unwrap().renew_time = Some(MicroTime(Timestamp::now()));
    if let Err(ApiError::NotFound { .. }) = registry.update(&lease).await {
        let _ = registry.create(&lease).await;
    }
}

/// What this life of the node has started to do.
#[derive(Default)]
struct Known {
    started: std::sync::Mutex<HashSet<String>>,
    stopped: std::sync::Mutex<HashSet<String>>,
    addresses: AtomicU32,
}

impl Known {
    fn look(self: &Arc<Self>, registry: &Registry, node: &str, pod: Pod) {
        let bound = pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(node);
        if !bound {
            return;
        }
        let uid = pod.metadata.uid.clone().unwrap();
        let pause = Duration::from_millis(10 + u64::from(uid.as_bytes()[0] % 30));
        let registry = registry.clone();
        if pod.metadata.deletion_timestamp.is_some() {
            if self.stopped.lock().unwrap().insert(uid) {
                tokio::spawn(async move {
                    tokio::time::sleep(pause).await;
                    stop(&registry, &pod).await;
                });
            }
        } else if self.started.lock().unwrap().insert(uid) {
            let known = self.clone();
            tokio::spawn(async move {
                tokio::time::sleep(pause).await;
                known.serve(&registry, &pod).await;
            });
        }
    }

    async fn serve(&self, registry: &Registry, pod: &Pod) {
        let name = pod.metadata.name.clone().unwrap();
        let n = self.addresses.fetch_add(1, Ordering::Relaxed) + 2;
        let node: Node =
            registry.get(None, pod.spec.as_ref().unwrap().node_name.as_deref().unwrap()).unwrap();
        let blocks = node.spec.and_then(|s| s.pod_cidrs).unwrap_or_default();
        let ips: Vec<Value> = blocks
            .iter()
            .map(|block| {
                let base = block.split('/').next().unwrap();
                let ip = match base.strip_suffix(".0") {
                    Some(v4) => format!("{v4}.{n}"),
                    None => format!("{base}{n:x}"),
                };
                json!({"ip": ip})
            })
            .collect();
        let status: PodStatus = serde_json::from_value(json!({
            "phase": "Running", "podIP": ips.first().map(|ip| ip["ip"].clone()), "podIPs": ips,
            "conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Ready", "status": "True", "lastTransitionTime": Time(Timestamp::now())}],
        }))
        .unwrap();
        let options = WriteOptions::default();
        let result = registry
            .modify(Some("default"), &name, Part::Status, &options, |old: &Pod| {
                let mut new = old.clone();
                new.status = Some(status.clone());
                Ok(new)
            })
            .await;
        match result {
            Ok(_) | Err(ApiError::NotFound { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

async fn stop(registry: &Registry, pod: &Pod) {
    let options = DeleteOptions { grace_period_seconds: Some(0), ..DeleteOptions::default() };
    let name = pod.metadata.name.as_deref().unwrap();
    match registry.delete::<Pod>(Some("default"), name, &options).await {
        Ok(_) | Err(ApiError::NotFound { .. }) => {}
        Err(error) => panic!("{error}"),
    }
}

/// Follows all pods and remembers the most that existed and the fewest that served.
pub(crate) struct Observer {
    task: JoinHandle<Extremes>,
    stop: tokio::sync::oneshot::Sender<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extremes {
    pub(crate) most: usize,
    pub(crate) fewest_ready: usize,
    pub(crate) created: usize,
}

impl Observer {
    pub(crate) fn start(registry: &Registry) -> Self {
        let listed = registry.list::<Pod>(None).unwrap();
        let mut events = registry.watch::<Pod>(listed.revision);
        let (stop, mut end) = tokio::sync::oneshot::channel();
        let task = tokio::spawn(async move {
            let mut pods: std::collections::HashMap<String, Pod> = listed
                .items
                .into_iter()
                .map(|pod| (pod.metadata.uid.clone().unwrap(), pod))
                .collect();
            let count = |pods: &std::collections::HashMap<String, Pod>| {
                let active = pods.values().filter(|p| p.metadata.deletion_timestamp.is_none());
                let ready = active.clone().filter(|p| is_ready(p)).count();
                (active.count(), ready)
            };
            let (most, fewest_ready) = count(&pods);
            let mut seen = Extremes { most, fewest_ready, created: 0 };
            let mut last = None;
            loop {
                let event = tokio::select! {
                    biased;
                    event = events.next() => event.expect("the watch goes on"),
                    until = &mut end, if last.is_none() => {
                        last = Some(until.unwrap_or(0));
                        continue;
                    }
                    () = std::future::ready(()), if last.is_some() => return seen,
                };
                match event {
                    Event::Added(pod) => {
                        seen.created += 1;
                        pods.insert(pod.metadata.uid.clone().unwrap(), pod);
                    }
                    Event::Modified(pod) => {
                        pods.insert(pod.metadata.uid.clone().unwrap(), pod);
                    }
                    Event::Deleted(pod) => {
                        pods.remove(pod.metadata.uid.as_ref().unwrap());
                    }
                    Event::Gone => panic!("the watch ended"),
                }
                let (active, ready) = count(&pods);
                seen.most = seen.most.max(active);
                seen.fewest_ready = seen.fewest_ready.min(ready);
            }
        });
        Self { task, stop }
    }

    /// What was seen so far.
    pub(crate) async fn finish(self) -> Extremes {
        let _ = self.stop.send(0);
        self.task.await.unwrap()
    }
}
