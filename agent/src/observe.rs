//! From the API to the node's snapshot: list, watch, compile, keep.
//!
//! Works without the API: the last snapshot is on disk and comes first. Nobody may delete anything by it;
//! [`Desired::synced`] says when all kinds have been listed.

use std::fmt::Debug;
use std::hash::{BuildHasher as _, RandomState};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::{
    ConfigMap, Container, Namespace, Node, Pod, PodSpec, PodStatus, Secret, Service,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::{Ingress, NetworkPolicy};
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Resource};
use mesh_model::compile::is_restricted;
use mesh_model::{ClusterConfig, NodeName, Objects, Snapshot, compile, wellknown};
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

use crate::errors::chain;
use crate::join::write_private;
use crate::paths::outlook::Outlook;
use crate::preshared::Keyring;

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
    pub(crate) file: PathBuf,
}

/// The snapshot of an earlier run, if it can be read.
pub(crate) fn saved(file: &Path) -> Option<Snapshot> {
    let bytes = std::fs::read(file).ok()?;
    match serde_json::from_slice(&bytes) {
        Ok(snapshot) => Some(snapshot),
        Err(error) => {
            tracing::warn!(path = %file.display(), %error, "saved snapshot malformed, waiting for the API");
            None
        }
    }
}

impl Observer {
    /// Watches for ever and sends each new snapshot.
    pub(crate) async fn run(self, desired: watch::Sender<Option<Desired>>) {
        let stores = Stores::start(&self.client, &self.node);
        stores.wait_until_listed().await;
        tracing::info!("all kinds listed");
        let mut everybody: Option<ClusterPods> = None;
        loop {
            let mut objects = stores.objects(&self.cluster);
            if is_restricted(objects.network_policies.len(), &objects.namespaces) {
                let pods = everybody
                    .get_or_insert_with(|| ClusterPods::watch(&self.client, &stores.changed));
                objects.cluster_pods = pods.list().await;
            } else {
                everybody = None;
            }
            let node = self.node.clone();
            let compiled = tokio::task::spawn_blocking(move || compile(&objects, &node)).await;
            if let Ok(snapshot) = compiled {
                self.publish(snapshot, &desired);
            }
            stores.changed.notified().await;
            tokio::time::sleep(DEBOUNCE).await;
        }
    }

    fn publish(&self, snapshot: Snapshot, desired: &watch::Sender<Option<Desired>>) {
        let same = |old: &Desired| old.synced && *old.snapshot == snapshot;
        if desired.borrow().as_ref().is_some_and(same) {
            return;
        }
        // Not even an assigned block: the control service has just forgotten us, or we are new. What runs, runs.
        let known = !snapshot.node.blocks.is_empty();
        if known && let Err(error) = save(&self.file, &snapshot) {
            tracing::warn!(path = %self.file.display(), %error, "snapshot not saved");
        }
        desired.send_modify(|desired| {
            let before = desired.take();
            let (outlook, preshared) =
                before.map(|before| (before.outlook, before.preshared)).unwrap_or_default();
            let snapshot = Arc::new(snapshot);
            *desired = Some(Desired { snapshot, outlook, synced: true, preshared });
        });
    }
}

fn save(file: &Path, snapshot: &Snapshot) -> std::io::Result<()> {
    write_private(file, &serde_json::to_vec(snapshot)?)
}

/// A cache of each kind that the snapshot follows from.
struct Stores {
    nodes: Store<Node>,
    namespaces: Store<Namespace>,
    pods: Store<Pod>,
    services: Store<Service>,
    endpoint_slices: Store<EndpointSlice>,
    config_maps: Store<ConfigMap>,
    secrets: Store<Secret>,
    ingresses: Store<Ingress>,
    network_policies: Store<NetworkPolicy>,
    changed: Arc<Notify>,
}

impl Stores {
    fn start(client: &kube::Client, node: &NodeName) -> Self {
        let changed = Arc::new(Notify::new());
        let everything = watcher::Config::default();
        let mine = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
        Self {
            nodes: cache(client, everything.clone(), &changed),
            namespaces: cache(client, everything.clone(), &changed),
            pods: cache(client, mine, &changed),
            services: cache(client, everything.clone(), &changed),
            endpoint_slices: cache(client, everything.clone(), &changed),
            config_maps: cache(client, everything.clone(), &changed),
            secrets: cache(client, everything.clone(), &changed),
            ingresses: cache(client, everything.clone(), &changed),
            network_policies: cache(client, everything, &changed),
            changed,
        }
    }

    async fn wait_until_listed(&self) {
        // An error here means that the writer is gone, and it never ends.
        let _ = tokio::join!(
            self.nodes.wait_until_ready(),
            self.namespaces.wait_until_ready(),
            self.pods.wait_until_ready(),
            self.services.wait_until_ready(),
            self.endpoint_slices.wait_until_ready(),
            self.config_maps.wait_until_ready(),
            self.secrets.wait_until_ready(),
            self.ingresses.wait_until_ready(),
            self.network_policies.wait_until_ready(),
        );
    }

    fn objects(&self, fallback: &ClusterConfig) -> Objects {
        let config_maps = self.config_maps.state();
        Objects {
            cluster: cluster(&config_maps).unwrap_or_else(|| fallback.clone()),
            nodes: self.nodes.state(),
            namespaces: self.namespaces.state(),
            pods: self.pods.state(),
            services: self.services.state(),
            endpoint_slices: self.endpoint_slices.state(),
            config_maps,
            secrets: self.secrets.state(),
            ingresses: self.ingresses.state(),
            network_policies: self.network_policies.state(),
            cluster_pods: vec![],
        }
    }
}

/// The pods of the whole cluster, of each only what policies look at. Watched while somebody restricts something.
struct ClusterPods {
    store: Store<Pod>,
    watching: AbortHandle,
}

impl ClusterPods {
    fn watch(client: &kube::Client, changed: &Arc<Notify>) -> Self {
        tracing::info!("somebody restricts traffic: watching the pods of the whole cluster");
        let config = watcher::Config::default();
        let (store, watching) = cache_parts(client, config, changed, keep_identity);
        Self { store, watching }
    }

    /// All of them, once they have been listed.
    async fn list(&self) -> Vec<Arc<Pod>> {
        let _ = self.store.wait_until_ready().await;
        self.store.state()
    }
}

impl Drop for ClusterPods {
    fn drop(&mut self) {
        self.watching.abort();
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
        let container = |container: Container| {
            let Container { name, mut ports, .. } = container;
            ports.iter_mut().for_each(|ports| ports.retain(|port| port.name.is_some()));
            Container { name, ports, ..Container::default() }
        };
        pod.spec = Some(PodSpec {
            node_name: spec.node_name,
            host_network: spec.host_network,
            containers: spec.containers.into_iter().map(container).collect(),
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
fn cache<K>(client: &kube::Client, config: watcher::Config, changed: &Arc<Notify>) -> Store<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    // Who wrote which field is of no use here, and often larger than the rest.
    cache_parts(client, config, changed, |object: &mut K| object.meta_mut().managed_fields = None).0
}

/// The same, of each object only what `trim` leaves. The watch ends when it is aborted.
fn cache_parts<K>(
    client: &kube::Client,
    config: watcher::Config,
    changed: &Arc<Notify>,
    trim: impl FnMut(&mut K) + Send + 'static,
) -> (Store<K>, AbortHandle)
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let (store, writer) = reflector::store();
    let api: Api<K> = Api::all(client.clone());
    let changed = Arc::clone(changed);
    let events = watcher(api, config).modify(trim);
    let events = reflector::reflector(writer, events.backoff(Backoff::default()));
    let mut interrupted = false;
    let watching = tokio::spawn(events.for_each(move |event| {
        let kind = K::kind(&());
        match event {
            Ok(_) => {
                if std::mem::take(&mut interrupted) {
                    tracing::info!(%kind, "watching again");
                }
                changed.notify_one();
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
    (store, watching.abort_handle())
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
mod tests {
    use super::*;

    #[test]
    fn a_saved_snapshot_comes_back_and_a_torn_one_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("snapshot.json");
        assert_eq!(saved(&file), None);
        let snapshot = compile(&Objects::default(), &"node-1".parse().unwrap());
        save(&file, &snapshot).unwrap();
        assert_eq!(saved(&file), Some(snapshot));
        std::fs::write(&file, b"{\"cluster\":").unwrap();
        assert_eq!(saved(&file), None);
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
