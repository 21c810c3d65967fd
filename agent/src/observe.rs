//! From the API to the node's snapshot: list, watch, compile, keep.
//!
//! Works without the API: the last snapshot is on disk and comes first. Nobody may delete anything by it;
//! [`Desired::synced`] says when all kinds have been listed.

use std::fmt::Debug;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::{
    ConfigMap, Container, Namespace, Node, Pod, PodSpec, PodStatus, Secret, Service,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::{Ingress, NetworkPolicy};
use kube::runtime::reflector::{self, Store};
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Resource};
use mesh_model::compile::is_restricted;
use mesh_model::containers::lasting;
use mesh_model::{ClusterConfig, Compiler, NodeName, Objects, Snapshot, wellknown};
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

use crate::errors::chain;
use crate::paths::outlook::Outlook;
use crate::preshared::Keyring;
use crate::saved::Saved;

/// Changes that come within this time are compiled together: a rollout touches many objects at once.
const DEBOUNCE: Duration = Duration::from_millis(10);

/// What the node should do, and how sure that is.
#[derive(Debug, Clone)]
pub(crate) struct Desired {
    /// The desired state.
    pub(crate) snapshot: Arc<Snapshot>,
    /// What the paths to other nodes allow: measured here, not wanted by anybody.
    pub(crate) outlook: Arc<Outlook>,
    /// Whether it follows from complete lists of all kinds. While it does not, nothing may be deleted.
    pub(crate) synced: bool,
    /// The keys that the node shares with its peers.
    pub(crate) preshared: Arc<Keyring>,
}

/// What the observer needs.
pub(crate) struct Observer {
    pub(crate) client: kube::Client,
    pub(crate) node: NodeName,
    /// The address plan until the API's own is there.
    pub(crate) cluster: ClusterConfig,
    /// Where the last snapshot is kept.
    pub(crate) saved: Saved,
}

impl Observer {
    /// Watches for ever and sends each new snapshot.
    pub(crate) async fn run(self, desired: watch::Sender<Option<Desired>>) {
        let Self { client, node, cluster, saved } = self;
        let stores = Stores::start(&client, &node);
        let everybody = |news: &Arc<Notify>| ClusterPods::watch(&client, news);
        follow(stores, Desk::new(node, saved, desired), &cluster, everybody).await;
    }
}

/// Publishes what follows from the stores, for ever. `everybody` watches the pods of the whole cluster.
async fn follow(
    stores: Stores,
    desk: Desk,
    fallback: &ClusterConfig,
    everybody: impl Fn(&Arc<Notify>) -> ClusterPods,
) {
    stores.wait_until_listed().await;
    tracing::info!("all kinds listed");
    let mut all_pods: Option<ClusterPods> = None;
    let desk = Arc::new(Mutex::new(desk));
    loop {
        let restricted = {
            let objects = &mut lock(&desk).objects;
            stores.refresh(objects, fallback);
            is_restricted(objects.network_policies.len(), &objects.namespaces)
        };
        if restricted {
            let pods = all_pods.get_or_insert_with(|| everybody(&stores.news));
            pods.0.wait_until_listed().await;
            pods.0.refresh(&mut lock(&desk).objects.cluster_pods);
        } else {
            all_pods = None;
            lock(&desk).objects.cluster_pods.clear();
        }
        let work = Arc::clone(&desk);
        let published = tokio::task::spawn_blocking(move || lock(&work).publish()).await;
        if let Err(panic) = published {
            tracing::error!(%panic, "the objects made no snapshot; the last one stays");
            lock(&desk).forget();
        }
        stores.news.notified().await;
        tokio::time::sleep(DEBOUNCE).await;
    }
}

/// Where objects become the desired state.
struct Desk {
    node: NodeName,
    objects: Objects,
    compiler: Compiler,
    saved: Saved,
    desired: watch::Sender<Option<Desired>>,
}

fn lock(desk: &Mutex<Desk>) -> MutexGuard<'_, Desk> {
    desk.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Desk {
    fn new(node: NodeName, saved: Saved, desired: watch::Sender<Option<Desired>>) -> Self {
        let compiler = Compiler::new(node.clone());
        Self { node, objects: Objects::default(), compiler, saved, desired }
    }

    /// What was made is not to be relied on any more.
    fn forget(&mut self) {
        self.compiler = Compiler::new(self.node.clone());
    }

    fn publish(&mut self) {
        let snapshot = Arc::new(self.compiler.compile(&self.objects));
        let same = |old: &Desired| old.synced && *old.snapshot == *snapshot;
        if self.desired.borrow().as_ref().is_some_and(same) {
            return;
        }
        // Not even an assigned block: the control service has just forgotten us, or we are new. What runs, runs.
        let known = !snapshot.node.blocks.is_empty();
        if known && let Err(error) = self.saved.save(&snapshot) {
            tracing::warn!(%error, "snapshot not saved");
        }
        self.desired.send_modify(|desired| {
            let before = desired.take();
            let (outlook, preshared) =
                before.map(|before| (before.outlook, before.preshared)).unwrap_or_default();
            *desired = Some(Desired { snapshot, outlook, synced: true, preshared });
        });
        if let Err(error) = self.saved.tidy() {
            tracing::warn!(%error, "saved snapshot not made short");
        }
    }
}

/// The objects of one kind.
struct Cache<K: Resource<DynamicType = ()> + 'static> {
    store: Store<K>,
    changed: Changed,
}

/// Where a watch tells that there are others.
#[derive(Clone)]
struct Changed {
    /// Since they were taken.
    others: Arc<AtomicBool>,
    news: Arc<Notify>,
}

impl Changed {
    fn new(news: &Arc<Notify>) -> Self {
        Self { others: Arc::new(AtomicBool::new(true)), news: Arc::clone(news) }
    }

    fn tell(&self) {
        self.others.store(true, Ordering::Release);
        self.news.notify_one();
    }
}

impl<K: Resource<DynamicType = ()> + Clone + 'static> Cache<K> {
    async fn wait_until_listed(&self) {
        // An error here means that the writer is gone, and it never ends.
        let _ = self.store.wait_until_ready().await;
    }

    /// Takes them, if there are others. Returns whether there are.
    fn refresh(&self, objects: &mut Vec<Arc<K>>) -> bool {
        let changed = self.changed.others.swap(false, Ordering::AcqRel);
        if changed {
            *objects = self.store.state();
        }
        changed
    }
}

/// A cache of each kind that the snapshot follows from.
struct Stores {
    nodes: Cache<Node>,
    namespaces: Cache<Namespace>,
    pods: Cache<Pod>,
    services: Cache<Service>,
    endpoint_slices: Cache<EndpointSlice>,
    config_maps: Cache<ConfigMap>,
    secrets: Cache<Secret>,
    ingresses: Cache<Ingress>,
    network_policies: Cache<NetworkPolicy>,
    news: Arc<Notify>,
}

impl Stores {
    fn start(client: &kube::Client, node: &NodeName) -> Self {
        let news = Arc::new(Notify::new());
        let everything = watcher::Config::default();
        let mine = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
        Self {
            nodes: cache(client, everything.clone(), &news),
            namespaces: cache(client, everything.clone(), &news),
            pods: cache(client, mine, &news),
            services: cache(client, everything.clone(), &news),
            endpoint_slices: cache(client, everything.clone(), &news),
            config_maps: cache(client, everything.clone(), &news),
            secrets: cache(client, everything.clone(), &news),
            ingresses: cache(client, everything.clone(), &news),
            network_policies: cache(client, everything, &news),
            news,
        }
    }

    async fn wait_until_listed(&self) {
        tokio::join!(
            self.nodes.wait_until_listed(),
            self.namespaces.wait_until_listed(),
            self.pods.wait_until_listed(),
            self.services.wait_until_listed(),
            self.endpoint_slices.wait_until_listed(),
            self.config_maps.wait_until_listed(),
            self.secrets.wait_until_listed(),
            self.ingresses.wait_until_listed(),
            self.network_policies.wait_until_listed(),
        );
    }

    /// Takes what has changed.
    fn refresh(&self, objects: &mut Objects, fallback: &ClusterConfig) {
        self.nodes.refresh(&mut objects.nodes);
        self.namespaces.refresh(&mut objects.namespaces);
        self.pods.refresh(&mut objects.pods);
        self.services.refresh(&mut objects.services);
        self.endpoint_slices.refresh(&mut objects.endpoint_slices);
        if self.config_maps.refresh(&mut objects.config_maps) {
            objects.cluster = cluster(&objects.config_maps).unwrap_or_else(|| fallback.clone());
        }
        self.secrets.refresh(&mut objects.secrets);
        self.ingresses.refresh(&mut objects.ingresses);
        self.network_policies.refresh(&mut objects.network_policies);
    }
}

/// The pods of the whole cluster, of each only what policies look at. Watched while somebody restricts something.
struct ClusterPods(Cache<Pod>, AbortHandle);

impl ClusterPods {
    fn watch(client: &kube::Client, news: &Arc<Notify>) -> Self {
        tracing::info!("somebody restricts traffic: watching the pods of the whole cluster");
        let (cache, watching) =
            cache_parts(client, watcher::Config::default(), news, keep_identity);
        Self(cache, watching)
    }
}

impl Drop for ClusterPods {
    fn drop(&mut self) {
        self.1.abort();
    }
}

/// Drops what no policy looks at: a cluster may have many pods, and a node little memory.
fn keep_identity(pod: &mut Pod) {
    let metadata = std::mem::take(&mut pod.metadata);
    pod.metadata.name = metadata.name;
    pod.metadata.namespace = metadata.namespace;
    pod.metadata.uid = metadata.uid;
    pod.metadata.resource_version = metadata.resource_version;
    pod.metadata.labels = metadata.labels;
    pod.metadata.creation_timestamp = metadata.creation_timestamp;
    if let Some(spec) = pod.spec.take() {
        let container = |container: &Container| {
            let ports = container.ports.iter().flatten().filter(|port| port.name.is_some());
            let ports = Some(ports.cloned().collect());
            Container { name: container.name.clone(), ports, ..Container::default() }
        };
        let containers = lasting(&spec).map(container).collect();
        pod.spec = Some(PodSpec {
            node_name: spec.node_name,
            host_network: spec.host_network,
            containers,
            ..PodSpec::default()
        });
    }
    if let Some(status) = pod.status.take() {
        let PodStatus { phase, pod_ip, pod_ips, .. } = status;
        pod.status = Some(PodStatus { phase, pod_ip, pod_ips, ..PodStatus::default() });
    }
}

/// The address plan as the API has it.
fn cluster(config_maps: &[Arc<ConfigMap>]) -> Option<ClusterConfig> {
    let ours = config_maps.iter().find(|map| {
        map.metadata.namespace.as_deref() == Some(wellknown::SYSTEM_NAMESPACE)
            && map.metadata.name.as_deref() == Some(wellknown::CLUSTER_CONFIG_MAP)
    })?;
    serde_json::from_str(ours.data.as_ref()?.get(wellknown::CLUSTER_CONFIG_KEY)?).ok()
}

/// Lists and watches one kind for ever, with back-off, into a cache.
fn cache<K>(client: &kube::Client, config: watcher::Config, news: &Arc<Notify>) -> Cache<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    // Who wrote which field is of no use here, and often larger than the rest.
    cache_parts(client, config, news, |object: &mut K| object.meta_mut().managed_fields = None).0
}

/// The same, of each object only what `trim` leaves. The watch ends when it is aborted.
fn cache_parts<K>(
    client: &kube::Client,
    config: watcher::Config,
    news: &Arc<Notify>,
    trim: impl FnMut(&mut K) + Send + 'static,
) -> (Cache<K>, AbortHandle)
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let (store, writer) = reflector::store();
    let api: Api<K> = Api::all(client.clone());
    let cache = Cache { store, changed: Changed::new(news) };
    let changed = cache.changed.clone();
    let events = watcher(api, config).modify(trim);
    let events = reflector::reflector(writer, events.backoff(Backoff::default()));
    let mut interrupted = false;
    let watching = tokio::spawn(events.for_each(move |event| {
        let kind = K::kind(&());
        match event {
            // The store takes a list over when it is complete.
            Ok(Event::Init | Event::InitApply(_)) => {}
            Ok(Event::InitDone | Event::Apply(_) | Event::Delete(_)) => {
                if std::mem::take(&mut interrupted) {
                    tracing::info!(%kind, "watching again");
                }
                changed.tell();
            }
            Err(error) if interrupted => {
                tracing::debug!(%kind, error = chain(&error), "still away")
            }
            Err(error) => {
                interrupted = true;
                tracing::warn!(%kind, error = chain(&error), "watch interrupted, trying again");
            }
        }
        std::future::ready(())
    }));
    (cache, watching.abort_handle())
}

/// Pauses between attempts: doubled up to 0.7 seconds, so that all kinds are watched again before a pod that a control
/// service lets end when it comes back has gone; spread a little, so that its nodes do not all come at once.
struct Backoff(Duration);

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_millis(700);

impl Default for Backoff {
    fn default() -> Self {
        Self(FIRST_PAUSE)
    }
}

impl Iterator for Backoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = self.0;
        self.0 = (pause * 2).min(LONGEST_PAUSE);
        let random = RandomState::new().hash_one(()) % 256;
        Some(pause + pause * u32::try_from(random).unwrap_or(0) / 1024)
    }
}

impl kube::runtime::utils::Backoff for Backoff {
    fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod scale;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_pod_elsewhere_its_named_ports_stay() {
        let ports = |name: &str| serde_json::json!([{"name": name, "containerPort": 80}, {"containerPort": 81}]);
        let mut pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"namespace": "n", "name": "p", "annotations": {"a": "b"}},
            "spec": {
                "containers": [{"name": "c", "image": "i", "ports": ports("web")}],
                "initContainers": [
                    {"name": "i", "ports": ports("once")},
                    {"name": "s", "restartPolicy": "Always", "ports": ports("metrics")}]}}))
        .unwrap();
        keep_identity(&mut pod);
        let kept = serde_json::to_value(&pod).unwrap();
        let container = |name: &str, port: &str| serde_json::json!({"name": name, "ports": [{"name": port, "containerPort": 80}]});
        assert_eq!(
            kept["spec"]["containers"],
            serde_json::json!([container("c", "web"), container("s", "metrics")])
        );
        assert_eq!(kept["spec"].get("initContainers"), None);
        assert_eq!(kept["metadata"].get("annotations"), None);
    }

    #[test]
    fn pauses_grow_up_to_a_bound_and_start_anew() {
        use kube::runtime::utils::Backoff as _;
        let mut backoff = Backoff::default();
        let pauses: Vec<Duration> = backoff.by_ref().take(20).collect();
        assert!(pauses[0] < Duration::from_millis(130));
        assert!(pauses.iter().all(|pause| *pause < LONGEST_PAUSE * 5 / 4));
        assert!(pauses[19] >= LONGEST_PAUSE);
        backoff.reset();
        assert!(backoff.next().unwrap() < Duration::from_millis(130));
    }
}
