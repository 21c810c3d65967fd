//! Namespaces that are being deleted: everything in them goes, then they do.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use mesh_model::kinds::Kind;
use serde::Deserialize;

use super::kinds::{self, AnyKind, Target};
use super::queue::WorkQueue;
use super::runtime::{Context, Reconcile};
use crate::error::ApiError;
use crate::objects;
use crate::store::Range;

/// How long to wait for objects that take time to go.
const PAUSE: Duration = Duration::from_millis(500);

pub(super) struct Controller {
    context: Arc<Context>,
    kinds: Vec<Box<dyn AnyKind>>,
}

/// The part of a stored object that matters here.
#[derive(Deserialize)]
struct Bare {
    metadata: k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
}

impl Controller {
    pub(super) fn new(context: Arc<Context>) -> (Arc<Self>, Arc<WorkQueue<String>>) {
        let queue = WorkQueue::new();
        let sink = queue.clone();
        context.namespaces.listen(move |_, new| {
            if let Some(namespace) = new.filter(|n| objects::is_terminating(&n.metadata)) {
                sink.add(objects::name(&namespace.metadata).to_owned());
            }
        });
        let mut kinds = kinds::all();
        kinds.retain(|kind| kind.kind().namespaced);
        // What creates other objects goes first; events last, for they tell the story.
        kinds.sort_by_key(|kind| match kind.kind().kind {
            "CronJob" | "DaemonSet" | "Deployment" | "StatefulSet" => 0,
            "Job" | "ReplicaSet" => 1,
            "Event" => 9,
            _ => 5,
        });
        (Arc::new(Self { context, kinds }), queue)
    }

    fn content(&self, kind: &Kind, ns: &str) -> Result<Vec<Bare>, ApiError> {
        let page = self.context.registry.page(kind, Some(ns), Range::default())?;
        Ok(page.records.iter().filter_map(|r| serde_json::from_slice(&r.value).ok()).collect())
    }
}

#[async_trait]
impl Reconcile for Controller {
    type Key = String;
    const NAME: &'static str = "namespace";

    async fn reconcile(&self, ns: &String) -> Result<Option<Duration>, ApiError> {
        let namespace = self.context.namespaces.get("", ns);
        if !namespace.is_some_and(|n| objects::is_terminating(&n.metadata)) {
            return Ok(None);
        }
        for kind in &self.kinds {
            for object in self.content(kind.kind(), ns)? {
                if objects::is_terminating(&object.metadata) {
                    continue;
                }
                let target = Target {
                    namespace: ns.clone(),
                    name: objects::name(&object.metadata).to_owned(),
                    uid: objects::uid(&object.metadata).to_owned(),
                };
                kind.delete(&self.context.registry, &target, Some("Background")).await?;
            }
        }
        let mut left = 0;
        for kind in &self.kinds {
            left += self.content(kind.kind(), ns)?.len();
        }
        if left > 0 {
            tracing::debug!(namespace = ns, left, "namespace is not empty yet");
            return Ok(Some(PAUSE));
        }
        match self.context.registry.finalize_namespace(ns).await {
            Ok(()) | Err(ApiError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn all(&self) -> Vec<String> {
        let namespaces = self.context.namespaces.all();
        namespaces.iter().map(|n| objects::name(&n.metadata).to_owned()).collect()
    }
}
