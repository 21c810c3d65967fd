//! What all controllers share: the mirrors, the way of running, and the way of writing.

use std::hash::Hash;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::FutureExt as _;
use k8s_openapi::api::apps::v1::{
    ControllerRevision, DaemonSet, Deployment, ReplicaSet, StatefulSet,
};
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Endpoints, Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::Ingress;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, Preconditions};
use k8s_openapi::jiff::Timestamp;
use mesh_model::{ClusterConfig, ObjectKey};
use tokio::task::JoinSet;

use super::Options;
use super::availability::LostNodes;
use super::mirror::Mirror;
use super::owned::Owned;
use super::queue::WorkQueue;
use super::recorder::Recorder;
use crate::error::ApiError;
use crate::objects;
use crate::registry::{Object, Registry};

/// Everything that a controller works with. Shared.
pub(crate) struct Context {
    pub(crate) registry: Registry,
    pub(crate) cluster: ClusterConfig,
    pub(crate) options: Options,
    pub(crate) recorder: Recorder,
    pub(crate) nodes: Arc<Mirror<Node>>,
    pub(crate) leases: Arc<Mirror<Lease>>,
    pub(crate) pods: Arc<Mirror<Pod>>,
    pub(crate) services: Arc<Mirror<Service>>,
    pub(crate) slices: Arc<Mirror<EndpointSlice>>,
    pub(crate) endpoints: Arc<Mirror<Endpoints>>,
    pub(super) owned: Arc<Owned<Pod>>,
    pub(crate) revisions: Arc<Mirror<ControllerRevision>>,
    pub(crate) daemons: Arc<Mirror<DaemonSet>>,
    pub(crate) sets: Arc<Mirror<ReplicaSet>>,
    pub(crate) stateful: Arc<Mirror<StatefulSet>>,
    pub(crate) deployments: Arc<Mirror<Deployment>>,
    pub(crate) jobs: Arc<Mirror<Job>>,
    pub(crate) cron_jobs: Arc<Mirror<CronJob>>,
    pub(crate) ingresses: Arc<Mirror<Ingress>>,
    pub(crate) namespaces: Arc<Mirror<Namespace>>,
    pub(crate) budgets: Arc<Mirror<PodDisruptionBudget>>,
}

impl Context {
    pub(super) fn new(
        registry: Registry,
        cluster: ClusterConfig,
        options: Options,
        recorder: Recorder,
    ) -> Self {
        let pods = Mirror::new();
        Self {
            registry,
            cluster,
            options,
            recorder,
            nodes: Mirror::new(),
            leases: Mirror::new(),
            owned: Owned::of(&pods),
            pods,
            services: Mirror::new(),
            slices: Mirror::new(),
            endpoints: Mirror::new(),
            revisions: Mirror::new(),
            daemons: Mirror::new(),
            sets: Mirror::new(),
            stateful: Mirror::new(),
            deployments: Mirror::new(),
            jobs: Mirror::new(),
            cron_jobs: Mirror::new(),
            ingresses: Mirror::new(),
            namespaces: Mirror::new(),
            budgets: Mirror::new(),
        }
    }

    /// Fills all mirrors, then keeps them up to date in `tasks`. Nothing may act before this succeeds.
    pub(super) fn mirror(&self, tasks: &mut JoinSet<()>) -> Result<(), ApiError> {
        self.start(tasks, &self.nodes)?;
        self.start(tasks, &self.leases)?;
        self.start(tasks, &self.pods)?;
        self.start(tasks, &self.services)?;
        self.start(tasks, &self.slices)?;
        self.start(tasks, &self.endpoints)?;
        self.start(tasks, &self.revisions)?;
        self.start(tasks, &self.daemons)?;
        self.start(tasks, &self.sets)?;
        self.start(tasks, &self.stateful)?;
        self.start(tasks, &self.deployments)?;
        self.start(tasks, &self.jobs)?;
        self.start(tasks, &self.cron_jobs)?;
        self.start(tasks, &self.ingresses)?;
        self.start(tasks, &self.namespaces)?;
        self.start(tasks, &self.budgets)
    }

    fn start<K: Object>(
        &self,
        tasks: &mut JoinSet<()>,
        mirror: &Arc<Mirror<K>>,
    ) -> Result<(), ApiError> {
        let from = mirror.load(&self.registry)?;
        tasks.spawn(mirror.clone().follow(self.registry.clone(), from));
        Ok(())
    }

    /// Names of the nodes that nobody hears from.
    pub(super) fn lost_nodes(&self) -> LostNodes {
        let nodes = self.nodes.all();
        let lost = nodes.iter().filter(|node| objects::is_node_lost(node));
        lost.map(|node| objects::name(&node.metadata).to_owned()).collect()
    }

    /// Deletes a pod, if it is still the same one; `grace` overrides its own grace period.
    pub(super) async fn delete_pod(&self, pod: &Pod, grace: Option<i64>) -> Result<(), ApiError> {
        let options = DeleteOptions {
            grace_period_seconds: grace,
            preconditions: Some(Preconditions {
                uid: pod.metadata.uid.clone(),
                resource_version: None,
            }),
            ..DeleteOptions::default()
        };
        let ns = pod.metadata.namespace.as_deref();
        match self.registry.delete::<Pod>(ns, objects::name(&pod.metadata), &options).await {
            Ok(deleted) => {
                self.pods.deleted(deleted);
                Ok(())
            }
            Err(ApiError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// A controller: makes one object right, whatever happened to it.
#[async_trait]
pub(super) trait Reconcile: Send + Sync + 'static {
    /// What it works on.
    type Key: Clone + Eq + Hash + std::fmt::Debug + Send + Sync + 'static;
    /// Its name in logs.
    const NAME: &'static str;
    /// How many objects it works on at a time.
    const WORKERS: usize = 2;

    /// Makes the object right. `Some` asks to look again after that time although nothing changes.
    async fn reconcile(&self, key: &Self::Key) -> Result<Option<Duration>, ApiError>;

    /// All keys there are, for the periodic resync.
    fn all(&self) -> Vec<Self::Key>;
}

/// Runs a controller on its queue until the tasks are dropped.
pub(super) fn run<C: Reconcile>(
    tasks: &mut JoinSet<()>,
    controller: Arc<C>,
    queue: Arc<WorkQueue<C::Key>>,
    resync: Duration,
) {
    for _ in 0..C::WORKERS {
        tasks.spawn(work(controller.clone(), queue.clone()));
    }
    tasks.spawn(async move {
        loop {
            controller.all().into_iter().for_each(|key| queue.add(key));
            tokio::time::sleep(resync).await;
        }
    });
}

async fn work<C: Reconcile>(controller: Arc<C>, queue: Arc<WorkQueue<C::Key>>) {
    loop {
        let key = queue.next().await;
        match AssertUnwindSafe(controller.reconcile(&key)).catch_unwind().await {
            Ok(Ok(again)) => {
                queue.forget(&key);
                if let Some(delay) = again {
                    queue.add_after(key.clone(), delay);
                }
            }
            Ok(Err(error)) => {
                // Somebody else was faster: the mirror will show it in a moment.
                if is_race(&error) {
                    tracing::debug!(controller = C::NAME, ?key, %error, "will retry");
                } else {
                    tracing::warn!(controller = C::NAME, ?key, %error, "will retry");
                }
                queue.retry(key.clone());
            }
            Err(_) => {
                tracing::error!(controller = C::NAME, ?key, "controller panicked; will retry");
                queue.retry(key.clone());
            }
        }
        queue.done(&key);
    }
}

/// Whether the failure only says that the mirror lags behind.
fn is_race(error: &ApiError) -> bool {
    matches!(
        error,
        ApiError::Conflict { .. } | ApiError::NotFound { .. } | ApiError::AlreadyExists { .. }
    )
}

/// How long to wait for a point in time.
pub(super) fn until(at: Timestamp) -> Duration {
    let wait = at.duration_since(Timestamp::now());
    Duration::try_from(wait).unwrap_or(Duration::ZERO) + Duration::from_millis(1)
}

/// A queue that gets each object of one kind, when it appears and when it changes.
pub(super) fn queue_of<K: Object>(mirror: &Mirror<K>) -> Arc<WorkQueue<ObjectKey>> {
    let queue = WorkQueue::new();
    let sink = queue.clone();
    mirror.listen(move |_, new| {
        if let Some(object) = new {
            sink.add(key(&**object));
        }
    });
    queue
}

/// The key of a namespaced object.
pub(crate) fn key<K: Object>(object: &K) -> ObjectKey {
    let meta = object.metadata();
    ObjectKey::new(objects::namespace(meta), objects::name(meta))
}
