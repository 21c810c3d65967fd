//! DaemonSets: one pod on each node that should have one.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::jiff::Timestamp;
use mesh_model::ObjectKey;

use self::eligibility::{Rule, new_pod};
use self::plan::{Plan, Seen, Step, plan};
use super::backoff::Backoffs;
use super::history::{self, POD_REVISION, Revised};
use super::ownership;
use super::queue::WorkQueue;
use super::recorder::Recorder;
use super::runtime::{Context, Reconcile, key, until};
use crate::error::ApiError;
use crate::objects;

mod eligibility;
mod plan;
mod rollout;

pub(super) struct Controller {
    context: Arc<Context>,
    recorder: Recorder,
    backoffs: Backoffs,
}

impl Controller {
    pub(super) fn new(context: Arc<Context>) -> (Arc<Self>, Arc<WorkQueue<ObjectKey>>) {
        let queue = ownership::queue_of_owners(&context, &context.daemons, selects);
        history::follow::<DaemonSet>(&context, &queue);
        let (sink, sets) = (queue.clone(), context.daemons.clone());
        context.nodes.listen(move |old, new| {
            if is_alike(old, new) {
                return;
            }
            let sets = sets.all();
            let concerned = sets.iter().filter(|set| concerns(set, old, new));
            concerned.for_each(|set| sink.add(key(&**set)));
        });
        let recorder = context.recorder.of("daemonset-controller");
        (Arc::new(Self { context, recorder, backoffs: Backoffs::default() }), queue)
    }

    fn plan(&self, set: &DaemonSet, revision: &str) -> Plan {
        let seen = Seen {
            nodes: &self.context.nodes.all(),
            pods: &self.context.owned.around(set),
            revision,
            lost: &self.context.lost_nodes(),
            backoff: &self.backoffs.of(&set.metadata),
            now: Timestamp::now(),
        };
        plan(set, &seen)
    }

    async fn apply(
        &self,
        set: &DaemonSet,
        revision: &str,
        steps: Vec<Step>,
    ) -> Result<(), ApiError> {
        let ns = objects::namespace(&set.metadata);
        let (mut deletions, mut pods) = (Vec::new(), Vec::new());
        for step in steps {
            tracing::debug!(namespace = ns, daemon_set = objects::name(&set.metadata), %step, "daemon set");
            match step {
                Step::Adopt(pod) => self.context.adopt(set, &self.context.pods, &pod).await?,
                Step::Release(pod) => self.context.release(set, &self.context.pods, &pod).await?,
                Step::Delete(pod) => deletions.push(pod),
                Step::Renew { pod, node } => {
                    self.backoffs.note(&set.metadata, &node, Timestamp::now());
                    let message = format!(
                        "Found failed daemon pod {ns}/{pod} on node {node}, will try to kill it"
                    );
                    self.recorder.warning(set, "FailedDaemonPod", message);
                    deletions.push(pod);
                }
                Step::Create(node) => pods.push(new_pod(set, &node, revision)),
            }
        }
        self.context.delete_pods(set, &deletions, &self.recorder).await?;
        self.context.create_pods(set, &pods, &self.recorder).await
    }

    async fn report(&self, set: &DaemonSet, plan: &Plan) -> Result<(), ApiError> {
        if set.status.as_ref() == Some(&plan.status) {
            return Ok(());
        }
        let new = DaemonSet { status: Some(plan.status.clone()), ..set.clone() };
        self.context.daemons.wrote(self.context.registry.update_status(&new).await?);
        Ok(())
    }

    /// Deletes revisions that no pod has and that are more than the set keeps.
    async fn forget(
        &self,
        set: &DaemonSet,
        revisions: &[Arc<ControllerRevision>],
    ) -> Result<(), ApiError> {
        let pods = self.context.owned.around(set);
        let labels = pods.iter().filter_map(|pod| pod.metadata.labels.as_ref()?.get(POD_REVISION));
        let labels: BTreeSet<&str> = labels.map(String::as_str).collect();
        let used = revisions.iter().filter(|r| labels.contains(history::hash::<DaemonSet>(r)));
        let used: BTreeSet<&str> = used.map(|revision| objects::name(&revision.metadata)).collect();
        let surplus = history::surplus(set, revisions, &used);
        self.context.forget_revisions(set, &surplus).await
    }
}

#[async_trait]
impl Reconcile for Controller {
    type Key = ObjectKey;
    const NAME: &'static str = "daemonset";

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, ApiError> {
        let Some(set) = self.context.daemons.get(&key.namespace, &key.name) else {
            self.backoffs.forget(key);
            return Ok(None);
        };
        if objects::is_terminating(&set.metadata) {
            let revisions =
                history::of(&*set, &self.context.revisions.in_namespace(&key.namespace));
            let newest = revisions.last().map_or("", |newest| history::hash::<DaemonSet>(newest));
            self.report(&set, &self.plan(&set, newest)).await?;
            return Ok(None);
        }
        let Some(revisions) = self.context.keep_history(&*set).await? else {
            return self.context.note_collision(&self.context.daemons, &*set).await;
        };
        let revision = revisions.last().map_or("", |newest| history::hash::<DaemonSet>(newest));
        let applied = self.apply(&set, revision, self.plan(&set, revision).steps).await;
        // What the steps did is in the mirror already.
        let after = self.plan(&set, revision);
        self.report(&set, &after).await?;
        applied?;
        self.forget(&set, &revisions).await?;
        Ok(after.look_again.map(until))
    }

    fn all(&self) -> Vec<ObjectKey> {
        self.context.daemons.all().iter().map(|set| key(&**set)).collect()
    }
}

fn selects(set: &DaemonSet, pod: &Pod) -> bool {
    let selector = set.selector();
    selector.is_some_and(|s| objects::selects(s, pod.metadata.labels.as_ref()))
}

/// Whether no set can care for what changed of a node: most changes are reports of its agent.
fn is_alike(old: Option<&Arc<Node>>, new: Option<&Arc<Node>>) -> bool {
    let part = |node: &Arc<Node>| {
        let taints = node.spec.as_ref().and_then(|spec| spec.taints.clone());
        let going = objects::is_terminating(&node.metadata);
        (node.metadata.labels.clone(), taints, objects::is_node_lost(node), going)
    };
    matches!((old, new), (Some(old), Some(new)) if part(old) == part(new))
}

/// Whether a change of a node is one for the set.
fn concerns(set: &DaemonSet, old: Option<&Arc<Node>>, new: Option<&Arc<Node>>) -> bool {
    let (Some(old), Some(new)) = (old, new) else {
        return true;
    };
    let rule = Rule::of(set);
    rule.fit(old) != rule.fit(new)
        || objects::is_node_lost(old) != objects::is_node_lost(new)
        || objects::is_terminating(&old.metadata) != objects::is_terminating(&new.metadata)
}
