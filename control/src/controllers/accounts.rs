//! What every namespace has: the account that pods run as by default, and the certificate by which they know the API.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use mesh_model::wellknown::{CA_CONFIG_MAP, CA_KEY, DEFAULT_ACCOUNT};
use tokio::task::JoinSet;

use super::queue::WorkQueue;
use super::runtime::{Context, Reconcile};
use crate::error::ApiError;
use crate::objects;
use crate::registry::{Event, Object, Registry};

pub(super) struct Controller {
    context: Arc<Context>,
}

impl Controller {
    pub(super) fn new(
        context: Arc<Context>,
        tasks: &mut JoinSet<()>,
    ) -> (Arc<Self>, Arc<WorkQueue<String>>) {
        let queue = WorkQueue::new();
        let sink = queue.clone();
        context.namespaces.listen(move |_, new| {
            if let Some(namespace) = new.filter(|n| !objects::is_terminating(&n.metadata)) {
                sink.add(objects::name(&namespace.metadata).to_owned());
            }
        });
        let registry = &context.registry;
        tasks.spawn(follow::<ServiceAccount>(registry.clone(), queue.clone(), DEFAULT_ACCOUNT));
        tasks.spawn(follow::<ConfigMap>(registry.clone(), queue.clone(), CA_CONFIG_MAP));
        (Arc::new(Self { context }), queue)
    }
}

/// Has the namespace looked at when its object of that name is changed or deleted.
async fn follow<K: Object>(registry: Registry, queue: Arc<WorkQueue<String>>, name: &'static str) {
    loop {
        let mut events = registry.watch::<K>(registry.revision());
        while let Some(event) = events.next().await {
            let object = match event {
                Event::Modified(object) | Event::Deleted(object) => object,
                Event::Added(_) => continue,
                // What was missed is found by the next resync.
                Event::Gone => break,
            };
            if objects::name(object.metadata()) == name {
                queue.add(objects::namespace(object.metadata()).to_owned());
            }
        }
    }
}

#[async_trait]
impl Reconcile for Controller {
    type Key = String;
    const NAME: &'static str = "accounts";

    async fn reconcile(&self, ns: &String) -> Result<Option<Duration>, ApiError> {
        let namespace = self.context.namespaces.get("", ns);
        if namespace.is_none_or(|n| objects::is_terminating(&n.metadata)) {
            return Ok(None);
        }
        let registry = &self.context.registry;
        let named = |name: &str| ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(ns.clone()),
            ..ObjectMeta::default()
        };
        let account = ServiceAccount { metadata: named(DEFAULT_ACCOUNT), ..Default::default() };
        if registry.record(ServiceAccount::kind(), Some(ns), DEFAULT_ACCOUNT).is_err() {
            registry.create(&account).await?;
        }
        let ca = self.context.options.ca_pem.to_string();
        let data = Some([(CA_KEY.to_owned(), ca)].into());
        match registry.get::<ConfigMap>(Some(ns), CA_CONFIG_MAP) {
            Ok(present) if present.data == data => {}
            Ok(present) => {
                registry.update(&ConfigMap { data, ..present }).await?;
            }
            Err(ApiError::NotFound { .. }) => {
                let metadata = named(CA_CONFIG_MAP);
                registry.create(&ConfigMap { metadata, data, ..Default::default() }).await?;
            }
            Err(error) => return Err(error),
        }
        Ok(None)
    }

    fn all(&self) -> Vec<String> {
        let namespaces = self.context.namespaces.all();
        namespaces.iter().map(|n| objects::name(&n.metadata).to_owned()).collect()
    }
}
