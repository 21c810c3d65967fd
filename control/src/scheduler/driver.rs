//! The scheduler at work: which pods wait, what changes could help them, and binding.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use mesh_model::ObjectKey;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::state::ClusterState;
use crate::controllers::{Context, Recorder, WorkQueue};
use crate::error::ApiError;
use crate::objects;

/// Name that pods carry which leave the choice to us.
const NAME: &str = "default-scheduler";
/// Bindings that are written at the same time.
const PARALLEL: usize = 32;
/// After so long a pod that fits nowhere is tried again although nothing changed.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

struct Scheduler {
    context: Arc<Context>,
    recorder: Recorder,
    state: Mutex<ClusterState>,
    queue: Arc<WorkQueue<ObjectKey>>,
    /// Pods that fit nowhere, and what was said about them.
    misfits: Mutex<HashMap<ObjectKey, String>>,
}

/// Starts the scheduler in `tasks`; the mirrors of `context` are filled.
pub(crate) fn start(context: Arc<Context>, tasks: &mut JoinSet<()>) {
    let scheduler = Arc::new(Scheduler {
        recorder: context.recorder.of(NAME),
        context,
        state: Mutex::default(),
        queue: WorkQueue::new(),
        misfits: Mutex::default(),
    });
    scheduler.clone().listen();
    tasks.spawn(scheduler.run());
}

impl Scheduler {
    fn listen(self: Arc<Self>) {
        let me = self.clone();
        self.context.namespaces.listen(move |old, new| {
            if let Some(namespace) = new.or(old) {
                let meta = &namespace.metadata;
                me.state().set_namespace(objects::name(meta), objects::labels(meta));
            }
        });
        let me = self.clone();
        self.context.nodes.listen(move |old, new| match (old, new) {
            (_, Some(node)) => {
                if me.state().set_node(node) {
                    me.try_all_again();
                }
            }
            (Some(node), None) => me.state().remove_node(objects::name(&node.metadata)),
            (None, None) => {}
        });
        let me = self.clone();
        self.context.pods.listen(move |old, new| {
            let helps = match (old, new) {
                (_, Some(pod)) => me.state().set_pod(pod),
                (Some(pod), None) => me.state().remove_pod(objects::uid(&pod.metadata)),
                (None, None) => false,
            };
            if let Some(pod) = new.filter(|pod| is_ours_to_place(pod)) {
                me.queue.add(crate::controllers::key(&**pod));
            }
            if helps {
                me.try_all_again();
            }
        });
    }

    async fn run(self: Arc<Self>) {
        let slots = Arc::new(Semaphore::new(PARALLEL));
        let mut bindings = JoinSet::new();
        loop {
            let key = self.queue.next().await;
            while bindings.try_join_next().is_some() {}
            let pod = self.context.pods.get(&key.namespace, &key.name);
            let pod = pod.filter(|pod| is_ours_to_place(pod));
            let Some(pod) = pod else {
                self.misfits().remove(&key);
                self.queue.done(&key);
                continue;
            };
            let placed = {
                let mut state = self.state();
                let placed = state.place(&pod);
                if let Ok(node) = &placed {
                    state.assume(&pod, node);
                }
                placed
            };
            let Ok(slot) = slots.clone().acquire_owned().await else {
                return;
            };
            let me = self.clone();
            bindings.spawn(async move {
                match placed {
                    Ok(node) => me.bind(&pod, &node).await,
                    Err(error) => me.report(&pod, error.message).await,
                }
                me.queue.done(&crate::controllers::key(&*pod));
                drop(slot);
            });
        }
    }

    async fn bind(&self, pod: &Pod, node: &str) {
        let key = crate::controllers::key(pod);
        match self.context.registry.bind(&key.namespace, &key.name, node).await {
            Ok(bound) => {
                self.misfits().remove(&key);
                self.queue.forget(&key);
                let message = format!("Successfully assigned {key} to {node}");
                self.recorder.normal(pod, "Scheduled", message);
                self.context.pods.wrote(bound);
            }
            Err(error) => {
                self.state().forget(objects::uid(&pod.metadata));
                if !matches!(error, ApiError::NotFound { .. } | ApiError::Conflict { .. }) {
                    tracing::warn!(pod = %key, node, %error, "not bound; will retry");
                }
                self.queue.retry(key);
            }
        }
    }

    /// Says why the pod fits nowhere, once for each reason; it is tried again when something changes.
    async fn report(&self, pod: &Pod, message: String) {
        let key = crate::controllers::key(pod);
        let before = self.misfits().insert(key.clone(), message.clone());
        self.queue.add_after(key.clone(), LOOK_AGAIN);
        if before.as_ref() == Some(&message) {
            return;
        }
        self.recorder.warning(pod, "FailedScheduling", message.clone());
        let old = objects::pod_condition(pod, "PodScheduled");
        if old.is_some_and(|c| c.status == "False" && c.message.as_ref() == Some(&message)) {
            return;
        }
        let since =
            old.filter(|c| c.status == "False").and_then(|c| c.last_transition_time.clone());
        let condition = PodCondition {
            type_: "PodScheduled".to_owned(),
            status: "False".to_owned(),
            reason: Some("Unschedulable".to_owned()),
            message: Some(message),
            last_transition_time: Some(since.unwrap_or_else(|| Time(Timestamp::now()))),
            ..PodCondition::default()
        };
        let mut new = pod.clone();
        let conditions = new.status.get_or_insert_default().conditions.get_or_insert_default();
        conditions.retain(|c| c.type_ != condition.type_);
        conditions.push(condition);
        match self.context.registry.update_status(&new).await {
            Ok(written) => self.context.pods.wrote(written),
            Err(error) => {
                tracing::debug!(pod = %key, %error, "condition not written; will retry");
                self.misfits().remove(&key);
                self.queue.retry(key);
            }
        }
    }

    fn try_all_again(&self) {
        for key in self.misfits().keys() {
            self.queue.add(key.clone());
        }
    }

    fn state(&self) -> MutexGuard<'_, ClusterState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn misfits(&self) -> MutexGuard<'_, HashMap<ObjectKey, String>> {
        self.misfits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the pod waits for us.
fn is_ours_to_place(pod: &Pod) -> bool {
    let spec = pod.spec.as_ref();
    let scheduler = spec.and_then(|s| s.scheduler_name.as_deref()).unwrap_or(NAME);
    let gates = spec.and_then(|s| s.scheduling_gates.as_ref());
    objects::node_of(pod).is_none()
        && objects::is_active(pod)
        && scheduler == NAME
        && gates.is_none_or(|gates| gates.is_empty())
}
