//! Garbage: objects whose owners are gone, and owners that go after or without their dependents.
//!
//! Keeps only objects that own or are owned, and of them only the names: the content of Secrets never gets here.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use mesh_model::kinds::{KINDS, Kind};
use serde::Deserialize;
use tokio::task::JoinSet;

use self::graph::{Graph, Item, Owner, Step, kind_of};
use super::kinds::{self, AnyKind, Target};
use super::queue::WorkQueue;
use super::runtime::{Context, Reconcile};
use crate::error::ApiError;
use crate::objects;
use crate::registry::Registry;
use crate::store::{Range, Record};

mod graph;

/// The part of a stored object that matters here.
#[derive(Deserialize)]
struct Bare {
    metadata: ObjectMeta,
}

pub(super) struct Controller {
    registry: Registry,
    graph: Mutex<Graph>,
    kinds: Vec<Box<dyn AnyKind>>,
    queue: Arc<WorkQueue<String>>,
}

impl Controller {
    /// Reads all kinds, then follows them in `tasks`.
    pub(super) fn new(
        context: &Context,
        tasks: &mut JoinSet<()>,
    ) -> Result<(Arc<Self>, Arc<WorkQueue<String>>), ApiError> {
        let queue = WorkQueue::new();
        let controller = Arc::new(Self {
            registry: context.registry.clone(),
            graph: Mutex::default(),
            kinds: kinds::all(),
            queue: queue.clone(),
        });
        for kind in KINDS {
            let from = controller.load(kind)?;
            tasks.spawn(controller.clone().follow(kind, from));
        }
        Ok((controller, queue))
    }

    fn load(&self, kind: &'static Kind) -> Result<u64, ApiError> {
        let page = self.registry.page(kind, None, Range::default())?;
        let mut present = HashSet::new();
        for record in &page.records {
            if let Some(item) = item(kind, record) {
                present.insert(item.uid.clone());
                self.look_at(self.graph().set(item));
            }
        }
        let look = self.graph().retain(kind, &present);
        self.look_at(look);
        Ok(page.revision)
    }

    async fn follow(self: Arc<Self>, kind: &'static Kind, mut from: u64) {
        loop {
            let mut watch = self.registry.changes(kind, from);
            while let Ok(changes) = watch.changes().await {
                for change in changes {
                    let look = match (&change.record, &change.previous) {
                        (Some(record), _) => item(kind, record).map(|i| self.graph().set(i)),
                        (None, Some(previous)) => {
                            item(kind, previous).map(|i| self.graph().remove(&i.uid))
                        }
                        (None, None) => None,
                    };
                    self.look_at(look.unwrap_or_default());
                }
            }
            from = loop {
                match self.load(kind) {
                    Ok(revision) => break revision,
                    Err(error) => {
                        tracing::error!(kind = kind.kind, %error, "cannot list; will retry");
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                }
            };
        }
    }

    fn look_at(&self, uids: Vec<String>) {
        uids.into_iter().for_each(|uid| self.queue.add(uid));
    }

    fn graph(&self) -> MutexGuard<'_, Graph> {
        self.graph.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the registry itself: the watches of two kinds may be at different revisions.
    fn exists(&self, owner: &OwnerReference, ns: &str) -> Owner {
        let Some(kind) = kind_of(owner) else {
            return Owner::Unknown;
        };
        let ns = kind.namespaced.then_some(ns);
        if kind.namespaced && ns == Some("") {
            // A cluster-wide object cannot belong to one of a namespace: nobody can say which.
            return Owner::Unknown;
        }
        match self.registry.record(kind, ns, &owner.name) {
            Ok(record) => match item(kind, &record) {
                Some(item) if item.uid != owner.uid => Owner::Absent,
                _ => Owner::Present,
            },
            Err(ApiError::NotFound { .. }) => Owner::Absent,
            Err(_) => Owner::Unknown,
        }
    }

    async fn apply(&self, step: Step) -> Result<(), ApiError> {
        let (Step::Delete { uid, .. } | Step::Disown { uid, .. } | Step::Unhold { uid, .. }) =
            &step;
        let Some(item) = self.graph().item(uid).cloned() else {
            return Ok(());
        };
        let Some(kind) = self.kinds.iter().find(|k| k.kind() == item.kind) else {
            return Ok(());
        };
        tracing::debug!(kind = item.kind.kind, namespace = item.namespace, name = item.name, %step, "garbage");
        let target = Target { namespace: item.namespace, name: item.name, uid: item.uid };
        match &step {
            Step::Delete { foreground, .. } => {
                let policy = match (foreground, item.orphan, item.foreground) {
                    (_, true, _) => "Orphan",
                    (true, ..) | (_, _, true) => "Foreground",
                    _ => "Background",
                };
                kind.delete(&self.registry, &target, Some(policy)).await
            }
            Step::Disown { owners, .. } => kind.disown(&self.registry, &target, owners).await,
            Step::Unhold { finalizer, .. } => kind.unhold(&self.registry, &target, finalizer).await,
        }
    }
}

#[async_trait]
impl Reconcile for Controller {
    type Key = String;
    const NAME: &'static str = "garbage";
    const WORKERS: usize = 4;

    async fn reconcile(&self, uid: &String) -> Result<Option<Duration>, ApiError> {
        let steps = self.graph().plan(uid, |owner, ns| self.exists(owner, ns));
        for step in steps {
            self.apply(step).await?;
        }
        Ok(None)
    }

    fn all(&self) -> Vec<String> {
        self.graph().all()
    }
}

fn item(kind: &'static Kind, record: &Record) -> Option<Item> {
    match serde_json::from_slice::<Bare>(&record.value) {
        Ok(bare) if !objects::uid(&bare.metadata).is_empty() => {
            Some(Item::new(kind, &bare.metadata))
        }
        Ok(_) => None,
        Err(error) => {
            tracing::error!(key = %record.key, %error, "left out of garbage collection");
            None
        }
    }
}
