//! PodDisruptionBudgets: how many pods may be evicted now, kept in their status. The eviction subresource counts it down.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::jiff::Timestamp;
use mesh_model::ObjectKey;

use self::plan::{Seen, status};
use super::mirror::Mirror;
use super::queue::WorkQueue;
use super::runtime::{Context, Reconcile, key, queue_of, until};
use crate::error::ApiError;
use crate::objects;
use crate::registry::{Object, Part, WriteOptions};

pub(crate) mod plan;

pub(super) struct Controller {
    context: Arc<Context>,
}

impl Controller {
    pub(super) fn new(context: Arc<Context>) -> (Arc<Self>, Arc<WorkQueue<ObjectKey>>) {
        let queue = queue_of(&context.budgets);
        let (sink, budgets) = (queue.clone(), context.budgets.clone());
        context.pods.listen(move |old, new| {
            for pod in old.into_iter().chain(new) {
                let all = budgets.in_namespace(objects::namespace(&pod.metadata));
                all.iter()
                    .filter(|budget| plan::covers(budget, pod))
                    .for_each(|budget| sink.add(key(&**budget)));
            }
        });
        // How many pods there should be changes with what owns them.
        let (sink, budgets) = (queue.clone(), context.budgets.clone());
        context.sets.listen(move |old, new| {
            if let Some(set) = new.or(old) {
                let all = budgets.in_namespace(objects::namespace(&set.metadata));
                all.iter().for_each(|budget| sink.add(key(&**budget)));
            }
        });
        follow(&context, &context.stateful, &queue, pods_of);
        follow(&context, &context.daemons, &queue, nodes_of);
        (Arc::new(Self { context }), queue)
    }

    /// How many pods there should be: what the owners of these want, and each pod without an owner.
    fn expected(&self, ns: &str, pods: &[Arc<Pod>]) -> i32 {
        let mut owners = BTreeMap::new();
        let mut alone = 0;
        for pod in pods {
            match objects::controller_of(&pod.metadata) {
                Some(owner) if owner.kind == "ReplicaSet" => {
                    let (name, count) = self.scale(ns, &owner.name);
                    owners.insert(name, count);
                }
                Some(owner) if owner.kind == "StatefulSet" => {
                    let set = self.context.stateful.get(ns, &owner.name);
                    let count = set.map_or(0, |set| pods_of(&set));
                    owners.insert(format!("statefulset/{}", owner.name), count);
                }
                Some(owner) if owner.kind == "DaemonSet" => {
                    let set = self.context.daemons.get(ns, &owner.name);
                    let count = set.map_or(0, |set| nodes_of(&set));
                    owners.insert(format!("daemonset/{}", owner.name), count);
                }
                _ => alone += 1,
            }
        }
        owners.values().fold(alone, |sum: i32, count| sum.saturating_add(*count))
    }

    /// Who decides on the size of a set, and what it is.
    fn scale(&self, ns: &str, set: &str) -> (String, i32) {
        let found: Option<Arc<ReplicaSet>> = self.context.sets.get(ns, set);
        let owner = found.as_ref().and_then(|set| objects::controller_of(&set.metadata));
        let deployment: Option<Arc<Deployment>> = owner
            .filter(|owner| owner.kind == "Deployment")
            .and_then(|owner| self.context.deployments.get(ns, &owner.name));
        match (deployment, found) {
            (Some(deployment), _) => {
                let replicas = deployment.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
                (format!("d/{}", objects::name(&deployment.metadata)), replicas)
            }
            (None, Some(set)) => {
                let replicas = set.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
                (format!("s/{}", objects::name(&set.metadata)), replicas)
            }
            // Its pods are deleted with it.
            (None, None) => (format!("s/{set}"), 0),
        }
    }
}

#[async_trait]
impl Reconcile for Controller {
    type Key = ObjectKey;
    const NAME: &'static str = "disruption";

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, ApiError> {
        let (ns, name) = (key.namespace.as_str(), key.name.as_str());
        let Some(budget) = self.context.budgets.get(ns, name) else { return Ok(None) };
        let mut pods = self.context.pods.in_namespace(ns);
        pods.retain(|pod| plan::covers(&budget, pod) && objects::is_active(pod));
        let expected = self.expected(ns, &pods);
        let now = Timestamp::now();
        let written = self
            .context
            .registry
            .modify::<PodDisruptionBudget>(
                Some(ns),
                name,
                Part::Status,
                &WriteOptions::default(),
                // What evictions have noted meanwhile is in the stored object.
                |stored| Ok(status(stored, &Seen { pods: &pods, expected, now })),
            )
            .await;
        let written = match written {
            Err(ApiError::NotFound { .. }) => return Ok(None),
            other => other?,
        };
        let again = plan::forgets_at(&written).map(until);
        self.context.budgets.wrote(written);
        Ok(again)
    }

    fn all(&self) -> Vec<ObjectKey> {
        self.context.budgets.all().iter().map(|budget| key(&**budget)).collect()
    }
}

/// Has the budgets of a namespace looked at when what owns pods there wants another number of them.
fn follow<K: Object>(
    context: &Context,
    owners: &Mirror<K>,
    queue: &Arc<WorkQueue<ObjectKey>>,
    wanted: fn(&K) -> i32,
) {
    let (sink, budgets) = (queue.clone(), context.budgets.clone());
    owners.listen(move |old, new| {
        let Some(owner) = new.or(old) else { return };
        if old.map(|owner| wanted(owner)) != new.map(|owner| wanted(owner)) {
            let all = budgets.in_namespace(objects::namespace(owner.metadata()));
            all.iter().for_each(|budget| sink.add(key(&**budget)));
        }
    });
}

fn pods_of(set: &StatefulSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)
}

/// On how many nodes a set wants a pod.
fn nodes_of(set: &DaemonSet) -> i32 {
    set.status.as_ref().map_or(0, |status| status.desired_number_scheduled)
}
