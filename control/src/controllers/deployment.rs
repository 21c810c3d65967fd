//! Deployments: roll from one template to the next by scaling ReplicaSets.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, Preconditions};
use k8s_openapi::jiff::Timestamp;
use mesh_model::ObjectKey;

use self::numbers::Bounds;
use self::plan::{Plan, Step, plan};
use super::queue::WorkQueue;
use super::recorder::Recorder;
use super::runtime::{Context, Reconcile, key, queue_of, until};
use crate::error::ApiError;
use crate::objects;

pub(super) mod numbers;
pub(super) mod plan;
pub(super) mod revision;
mod status;

pub(super) struct Controller {
    context: Arc<Context>,
    recorder: Recorder,
}

impl Controller {
    pub(super) fn new(context: Arc<Context>) -> (Arc<Self>, Arc<WorkQueue<ObjectKey>>) {
        let queue = queue_of(&context.deployments);
        let (sink, deployments) = (queue.clone(), context.deployments.clone());
        context.sets.listen(move |old, new| {
            for set in old.into_iter().chain(new) {
                let ns = objects::namespace(&set.metadata);
                match objects::controller_of(&set.metadata) {
                    Some(owner) if owner.kind == "Deployment" => {
                        sink.add(ObjectKey::new(ns, &owner.name));
                    }
                    Some(_) => {}
                    None => deployments
                        .in_namespace(ns)
                        .iter()
                        .filter(|deployment| selects(deployment, set))
                        .for_each(|deployment| sink.add(key(&**deployment))),
                }
            }
        });
        // A Recreate waits until the last pod of the old sets is really gone.
        let (sink, sets) = (queue.clone(), context.sets.clone());
        context.pods.listen(move |old, new| {
            let Some(pod) = old.filter(|_| new.is_none()) else {
                return;
            };
            let ns = objects::namespace(&pod.metadata);
            let owner = objects::controller_of(&pod.metadata);
            let set = owner.and_then(|owner| sets.get(ns, &owner.name));
            if let Some(owner) = set.as_ref().and_then(|s| objects::controller_of(&s.metadata)) {
                sink.add(ObjectKey::new(ns, &owner.name));
            }
        });
        let recorder = context.recorder.of("deployment-controller");
        (Arc::new(Self { context, recorder }), queue)
    }

    fn plan(&self, deployment: &Deployment) -> Plan {
        let ns = objects::namespace(&deployment.metadata);
        let pods = self.context.pods.in_namespace(ns);
        let running = |set: &ReplicaSet| {
            let uid = objects::uid(&set.metadata);
            let own = pods.iter().filter(|p| objects::is_controlled_by(&p.metadata, uid));
            own.filter(|pod| !objects::have_ended(pod)).count()
        };
        plan(deployment, &self.context.sets.in_namespace(ns), running, Timestamp::now())
    }

    /// Takes the step; returns the Deployment as it is stored afterwards.
    async fn apply(&self, deployment: Deployment, step: Step) -> Result<Deployment, ApiError> {
        let ns = objects::namespace(&deployment.metadata);
        tracing::debug!(namespace = ns, deployment = objects::name(&deployment.metadata), %step, "deployment");
        let bounds = Bounds::of(&deployment);
        match step {
            Step::Create(set) => return Box::pin(self.create(deployment, *set)).await,
            Step::Revision(revision) => {
                let mut new = deployment;
                let annotations = new.metadata.annotations.get_or_insert_default();
                annotations.insert(revision::REVISION.to_owned(), revision.to_string());
                let written = self.context.registry.update(&new).await?;
                self.context.deployments.wrote(written.clone());
                return Ok(written);
            }
            Step::Adopt(name) => {
                let fresh: Deployment =
                    self.context.registry.get(Some(ns), objects::name(&deployment.metadata))?;
                if fresh.metadata.uid == deployment.metadata.uid
                    && !objects::is_terminating(&fresh.metadata)
                {
                    self.edit(ns, &name, |set| {
                        let owners = set.metadata.owner_references.get_or_insert_default();
                        owners.push(revision::owner_reference(&deployment));
                    })
                    .await?;
                }
            }
            Step::Annotate(name, annotations) => {
                let wait = deployment.spec.as_ref().and_then(|s| s.min_ready_seconds);
                self.edit(ns, &name, |set| {
                    set.metadata.annotations = Some(annotations.clone());
                    if let Some(spec) = &mut set.spec {
                        spec.min_ready_seconds = wait;
                    }
                })
                .await?;
            }
            Step::Note(name) => self.edit(ns, &name, |set| plan::note(set, bounds)).await?,
            Step::Scale(name, from, to) => {
                self.edit(ns, &name, |set| {
                    plan::note(set, bounds);
                    if let Some(spec) = &mut set.spec {
                        spec.replicas = Some(to);
                    }
                })
                .await?;
                self.scaled(&deployment, &name, from, to);
            }
            Step::Delete(name) => self.delete(ns, &name).await?,
        }
        Ok(deployment)
    }

    async fn create(
        &self,
        deployment: Deployment,
        set: ReplicaSet,
    ) -> Result<Deployment, ApiError> {
        let (ns, name) = (objects::namespace(&deployment.metadata), objects::name(&set.metadata));
        match self.context.registry.create(&set).await {
            Ok(created) => {
                self.scaled(&deployment, name, 0, replicaset_size(&created));
                self.context.sets.wrote(created);
                Ok(deployment)
            }
            Err(ApiError::AlreadyExists { .. }) => {
                let present: ReplicaSet = self.context.registry.get(Some(ns), name)?;
                let uid = objects::uid(&deployment.metadata);
                if objects::is_controlled_by(&present.metadata, uid)
                    && revision::has_template(&present, &deployment)
                {
                    self.context.sets.wrote(present);
                    return Ok(deployment);
                }
                // Somebody else's set has the name: the next attempt hashes to another one.
                let mut new = deployment;
                let status = new.status.get_or_insert_default();
                status.collision_count = Some(status.collision_count.unwrap_or(0) + 1);
                let written = self.context.registry.update_status(&new).await?;
                self.context.deployments.wrote(written.clone());
                Ok(written)
            }
            Err(error) => {
                let message = format!("Failed to create new replica set {name:?}: {error}");
                self.recorder.warning(&deployment, "ReplicaSetCreateError", message);
                Err(error)
            }
        }
    }

    async fn delete(&self, ns: &str, name: &str) -> Result<(), ApiError> {
        let Some(set) = self.context.sets.get(ns, name) else {
            return Ok(());
        };
        let options = DeleteOptions {
            preconditions: Some(Preconditions {
                uid: set.metadata.uid.clone(),
                // Not if somebody scaled it up in the meantime.
                resource_version: set.metadata.resource_version.clone(),
            }),
            ..DeleteOptions::default()
        };
        match self.context.registry.delete::<ReplicaSet>(Some(ns), name, &options).await {
            Ok(deleted) => {
                self.context.sets.deleted(deleted);
                Ok(())
            }
            Err(ApiError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Changes the set as the mirror knows it; a conflict when it has changed since.
    async fn edit(
        &self,
        ns: &str,
        name: &str,
        change: impl Fn(&mut ReplicaSet),
    ) -> Result<(), ApiError> {
        let Some(set) = self.context.sets.get(ns, name) else {
            return Ok(());
        };
        let mut new = (*set).clone();
        change(&mut new);
        self.context.sets.wrote(self.context.registry.update(&new).await?);
        Ok(())
    }

    fn scaled(&self, deployment: &Deployment, set: &str, from: i32, to: i32) {
        if from != to {
            let direction = if to > from { "up" } else { "down" };
            let message = format!("Scaled {direction} replica set {set} from {from} to {to}");
            self.recorder.normal(deployment, "ScalingReplicaSet", message);
        }
    }
}

#[async_trait]
impl Reconcile for Controller {
    type Key = ObjectKey;
    const NAME: &'static str = "deployment";

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, ApiError> {
        let Some(deployment) = self.context.deployments.get(&key.namespace, &key.name) else {
            return Ok(None);
        };
        let plan = self.plan(&deployment);
        let mut current = (*deployment).clone();
        for step in plan.steps {
            current = Box::pin(self.apply(current, step)).await?;
        }
        let collisions = current.status.as_ref().and_then(|s| s.collision_count);
        if collisions != plan.status.collision_count {
            return Ok(Some(Duration::ZERO));
        }
        if current.status.as_ref() != Some(&plan.status) {
            let mut new = current;
            new.status = Some(plan.status);
            self.context.deployments.wrote(self.context.registry.update_status(&new).await?);
        }
        Ok(plan.look_again.map(until))
    }

    fn all(&self) -> Vec<ObjectKey> {
        self.context.deployments.all().iter().map(|d| key(&**d)).collect()
    }
}

fn selects(deployment: &Deployment, set: &ReplicaSet) -> bool {
    deployment
        .spec
        .as_ref()
        .is_some_and(|spec| objects::selects(&spec.selector, set.metadata.labels.as_ref()))
}

fn replicaset_size(set: &ReplicaSet) -> i32 {
    super::replicaset::plan::wanted(set)
}
