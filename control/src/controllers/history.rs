//! ControllerRevisions: the templates that a DaemonSet or a StatefulSet has had, by which `kubectl rollout` shows and undoes them.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet, StatefulSet};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{
    DeleteOptions, LabelSelector, ObjectMeta, Preconditions,
};
use k8s_openapi::apimachinery::pkg::runtime::RawExtension;
use mesh_model::ObjectKey;
use serde_json::{Value, json};

use super::deployment::revision::template_hash;
use super::mirror::Mirror;
use super::ownership;
use super::queue::WorkQueue;
use super::runtime::Context;
use crate::error::ApiError;
use crate::objects;
use crate::registry::{Object, Part, WriteOptions};

/// Label of the pods of a set: of which revision they are.
pub(super) const POD_REVISION: &str = "controller-revision-hash";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Adopting, and creating or renumbering: more rounds mean that somebody else writes, too.
const ROUNDS: usize = 4;

/// A kind whose templates are kept as revisions.
pub(super) trait Revised: Object {
    /// Label of its revisions that tells their hash.
    const HASH: &'static str;

    /// The pods that it makes.
    fn template(&self) -> Option<&PodTemplateSpec>;
    /// The same with another template.
    fn with_template(&self, template: PodTemplateSpec) -> Self;
    /// What it selects.
    fn selector(&self) -> Option<&LabelSelector>;
    /// How often the name of a revision was taken.
    fn collisions(&self) -> Option<i32>;
    /// The same with another number of them.
    fn with_collisions(&self, collisions: i32) -> Self;
    /// How many revisions are kept that no pod has.
    fn kept(&self) -> Option<i32>;
}

macro_rules! revised {
    ($kind:ty, $hash:expr) => {
        impl Revised for $kind {
            const HASH: &'static str = $hash;

            fn template(&self) -> Option<&PodTemplateSpec> {
                self.spec.as_ref().map(|spec| &spec.template)
            }

            fn with_template(&self, template: PodTemplateSpec) -> Self {
                let mut set = self.clone();
                set.spec.get_or_insert_default().template = template;
                set
            }

            fn selector(&self) -> Option<&LabelSelector> {
                self.spec.as_ref().map(|spec| &spec.selector)
            }

            fn collisions(&self) -> Option<i32> {
                self.status.as_ref().and_then(|status| status.collision_count)
            }

            fn with_collisions(&self, collisions: i32) -> Self {
                let mut set = self.clone();
                set.status.get_or_insert_default().collision_count = Some(collisions);
                set
            }

            fn kept(&self) -> Option<i32> {
                self.spec.as_ref().and_then(|spec| spec.revision_history_limit)
            }
        }
    };
}

revised!(DaemonSet, POD_REVISION);
revised!(StatefulSet, "controller.kubernetes.io/hash");

/// One change of the revisions of a set.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Step {
    /// Become the controller of a revision that has none.
    Adopt(String),
    /// Create the revision of the present template.
    Create(Box<ControllerRevision>),
    /// Make an old revision the newest one: its template is the present one again.
    Renumber(String, i64),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Adopt(name) => write!(f, "adopt revision {name}"),
            Self::Create(made) => write!(f, "create revision {}", objects::name(&made.metadata)),
            Self::Renumber(name, number) => write!(f, "make revision {name} number {number}"),
        }
    }
}

/// The next steps until the newest revision is that of the present template. `all` may hold foreign revisions, in any order.
pub(super) fn plan<K: Revised>(set: &K, all: &[Arc<ControllerRevision>]) -> Vec<Step> {
    let selected = |meta: &ObjectMeta| {
        set.selector().is_some_and(|s| objects::selects(s, meta.labels.as_ref()))
    };
    let free = all.iter().map(|revision| &revision.metadata).filter(|meta| {
        objects::controller_of(meta).is_none() && selected(meta) && !objects::is_terminating(meta)
    });
    let adopt: Vec<Step> = free.map(|meta| Step::Adopt(objects::name(meta).to_owned())).collect();
    if !adopt.is_empty() {
        return adopt;
    }
    let own = of(set, all);
    let next = own.last().map_or(1, |newest| newest.revision.saturating_add(1));
    match own.iter().rposition(|revision| has_template(set, revision)) {
        Some(at) if at + 1 == own.len() => Vec::new(),
        Some(at) => vec![Step::Renumber(objects::name(&own[at].metadata).to_owned(), next)],
        None => {
            new_revision(set, next).map(|made| Step::Create(Box::new(made))).into_iter().collect()
        }
    }
}

/// The revisions of a set, the newest last.
pub(super) fn of<K: Object>(
    set: &K,
    all: &[Arc<ControllerRevision>],
) -> Vec<Arc<ControllerRevision>> {
    let uid = objects::uid(set.metadata());
    let mut own = all.to_vec();
    own.retain(|revision| {
        objects::is_controlled_by(&revision.metadata, uid)
            && !objects::is_terminating(&revision.metadata)
    });
    own.sort_by_key(|revision| {
        let meta = &revision.metadata;
        (revision.revision, objects::created(meta), meta.name.clone())
    });
    own
}

/// The names of revisions, oldest first, that are more than the set keeps: of those that are not `used`.
pub(super) fn surplus<K: Revised>(
    set: &K,
    own: &[Arc<ControllerRevision>],
    used: &BTreeSet<&str>,
) -> Vec<String> {
    let old = &own[..own.len().saturating_sub(1)];
    let idle: Vec<&str> = old
        .iter()
        .map(|revision| objects::name(&revision.metadata))
        .filter(|name| !used.contains(name))
        .collect();
    let kept = usize::try_from(set.kept().unwrap_or(0)).unwrap_or(0);
    let gone = idle.len().saturating_sub(kept);
    idle[..gone].iter().map(|name| (*name).to_owned()).collect()
}

/// The hash of a revision of that kind.
pub(super) fn hash<K: Revised>(revision: &ControllerRevision) -> &str {
    let labels = revision.metadata.labels.as_ref();
    labels.and_then(|labels| labels.get(K::HASH)).map_or("", String::as_str)
}

/// The template that a revision keeps.
pub(super) fn template_of(revision: &ControllerRevision) -> Option<PodTemplateSpec> {
    let mut template = revision.data.as_ref()?.0.get("spec")?.get("template")?.clone();
    template.as_object_mut()?.remove("$patch");
    serde_json::from_value(template).ok()
}

/// Whether a revision keeps the set's present template.
fn has_template<K: Revised>(set: &K, revision: &ControllerRevision) -> bool {
    let (Some(kept), Some(present)) = (template_of(revision), set.template()) else {
        return false;
    };
    // It may have been kept by a version of this program that had other defaults.
    let defaulted = |template: PodTemplateSpec| {
        let mut set = set.with_template(template);
        set.set_defaults();
        set
    };
    kept == *present || defaulted(kept).template() == defaulted(present.clone()).template()
}

/// A revision of the set's present template.
fn new_revision<K: Revised>(set: &K, number: i64) -> Option<ControllerRevision> {
    let template = set.template()?;
    let hash = template_hash(template, set.collisions().unwrap_or(0));
    let mut data: Value = serde_json::to_value(template).ok()?;
    // A patch that makes the template this one, whatever it is.
    data.as_object_mut()?.insert("$patch".to_owned(), json!("replace"));
    let meta = set.metadata();
    let mut labels = template.metadata.as_ref().map(objects::labels).unwrap_or_default();
    labels.insert(K::HASH.to_owned(), hash.clone());
    let mut annotations = meta.annotations.clone().unwrap_or_default();
    annotations.remove(LAST_APPLIED);
    Some(ControllerRevision {
        metadata: ObjectMeta {
            name: Some(format!("{}-{hash}", objects::name(meta))),
            namespace: meta.namespace.clone(),
            labels: Some(labels),
            annotations: Some(annotations).filter(|annotations| !annotations.is_empty()),
            owner_references: Some(vec![ownership::reference(set)]),
            ..ObjectMeta::default()
        },
        data: Some(RawExtension(json!({"spec": {"template": data}}))),
        revision: number,
    })
}

/// Has the owners of one kind looked at when somebody else changes or deletes a revision of theirs.
pub(super) fn follow<K: Object>(context: &Context, queue: &Arc<WorkQueue<ObjectKey>>) {
    let sink = queue.clone();
    context.revisions.listen(move |old, _| {
        let Some(meta) = old.map(|revision| &revision.metadata) else { return };
        if let Some(owner) = objects::controller_of(meta).filter(|owner| owner.kind == K::KIND) {
            sink.add(ObjectKey::new(objects::namespace(meta), &owner.name));
        }
    });
}

impl Context {
    /// Makes the newest revision of a set that of its present template. Returns all of them, the newest last; `None` when its name
    /// is taken, and the set has to be looked at again with another count of collisions.
    pub(super) async fn keep_history<K: Revised>(
        &self,
        set: &K,
    ) -> Result<Option<Vec<Arc<ControllerRevision>>>, ApiError> {
        let ns = objects::namespace(set.metadata());
        for _ in 0..ROUNDS {
            let all = self.revisions.in_namespace(ns);
            let steps = plan(set, &all);
            if steps.is_empty() {
                return Ok(Some(of(set, &all)));
            }
            for step in steps {
                tracing::debug!(namespace = ns, set = objects::name(set.metadata()), %step, "history");
                if !self.revise(set, step).await? {
                    return Ok(None);
                }
            }
        }
        let name = objects::name(set.metadata()).to_owned();
        let detail = "somebody else changes its revisions".to_owned();
        Err(ApiError::Conflict { kind: K::kind(), name, detail })
    }

    /// Stores a set that the name of its next revision was taken for: it gets another one then.
    pub(super) async fn note_collision<K: Revised>(
        &self,
        mirror: &Mirror<K>,
        set: &K,
    ) -> Result<Option<Duration>, ApiError> {
        let new = set.with_collisions(set.collisions().unwrap_or(0).saturating_add(1));
        mirror.wrote(self.registry.update_status(&new).await?);
        Ok(Some(Duration::ZERO))
    }

    /// Whether the step could be taken.
    async fn revise<K: Revised>(&self, set: &K, step: Step) -> Result<bool, ApiError> {
        let ns = set.metadata().namespace.as_deref();
        match step {
            Step::Adopt(name) => self.adopt(set, &self.revisions, &name).await?,
            Step::Renumber(name, number) => {
                let options = WriteOptions::default();
                let renumbered = |old: &ControllerRevision| {
                    Ok(ControllerRevision { revision: number, ..old.clone() })
                };
                let part = Part::Main;
                let written = self.registry.modify(ns, &name, part, &options, renumbered).await?;
                self.revisions.wrote(written);
            }
            Step::Create(made) => match self.registry.create(&*made).await {
                Ok(created) => self.revisions.wrote(created),
                Err(ApiError::AlreadyExists { .. }) => {
                    let name = objects::name(&made.metadata);
                    let present: ControllerRevision = self.registry.get(ns, name)?;
                    let uid = objects::uid(set.metadata());
                    if !objects::is_controlled_by(&present.metadata, uid)
                        || !has_template(set, &present)
                    {
                        return Ok(false);
                    }
                    self.revisions.wrote(present);
                }
                Err(error) => return Err(error),
            },
        }
        Ok(true)
    }

    /// Deletes revisions of a set, if they are still the same ones.
    pub(super) async fn forget_revisions<K: Object>(
        &self,
        set: &K,
        names: &[String],
    ) -> Result<(), ApiError> {
        let ns = objects::namespace(set.metadata());
        for name in names {
            let Some(revision) = self.revisions.get(ns, name) else { continue };
            let options = DeleteOptions {
                preconditions: Some(Preconditions {
                    uid: revision.metadata.uid.clone(),
                    // Not if it became the present one in the meantime.
                    resource_version: revision.metadata.resource_version.clone(),
                }),
                ..DeleteOptions::default()
            };
            match self.registry.delete::<ControllerRevision>(Some(ns), name, &options).await {
                Ok(deleted) => self.revisions.deleted(deleted),
                Err(ApiError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
