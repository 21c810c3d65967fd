//! EndpointSlices: which pods a Service means, for those who send traffic to it.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::DeleteOptions;
use mesh_model::ObjectKey;
use mesh_model::wellknown::{LABEL_MANAGED_BY, LABEL_SERVICE_NAME, LABEL_ZONE};

use self::plan::{MANAGER, Step, Surroundings, plan};
use super::mirror::Mirror;
use super::queue::WorkQueue;
use super::runtime::{Context, Reconcile, key, queue_of};
use crate::error::ApiError;
use crate::objects;

pub(super) mod handwritten;
pub(super) mod plan;

pub(super) struct Controller {
    context: Arc<Context>,
}

impl Controller {
    pub(super) fn new(context: Arc<Context>) -> (Arc<Self>, Arc<WorkQueue<ObjectKey>>) {
        let queue = queue_of(&context.services);
        let (sink, services) = (queue.clone(), context.services.clone());
        context.pods.listen(move |old, new| {
            if let (Some(old), Some(new)) = (old, new)
                && !matters(old, new)
            {
                return;
            }
            for pod in old.into_iter().chain(new) {
                selecting(&services, pod).for_each(|service| sink.add(service));
            }
        });
        follow_slices(&context, &queue, MANAGER);
        let (sink, services, pods) =
            (queue.clone(), context.services.clone(), context.pods.clone());
        context.nodes.listen(move |old, new| {
            let facts = |node: Option<&Arc<Node>>| {
                node.map(|node| (objects::is_node_lost(node), zone(node)))
            };
            let Some(node) = new.or(old).filter(|_| facts(old) != facts(new)) else {
                return;
            };
            let name = objects::name(&node.metadata);
            for pod in pods.all().iter().filter(|pod| objects::node_of(pod) == Some(name)) {
                selecting(&services, pod).for_each(|service| sink.add(service));
            }
        });
        (Arc::new(Self { context }), queue)
    }

    fn surroundings(&self) -> Surroundings {
        let nodes = self.context.nodes.all();
        let zones = nodes
            .iter()
            .filter_map(|node| Some((objects::name(&node.metadata).to_owned(), zone(node)?)));
        Surroundings { lost: self.context.lost_nodes(), zones: zones.collect() }
    }
}

#[async_trait]
impl Reconcile for Controller {
    type Key = ObjectKey;
    const NAME: &'static str = "endpointslice";

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, ApiError> {
        let Some(service) = self.context.services.get(&key.namespace, &key.name) else {
            return Ok(None);
        };
        if !objects::selects_pods(&service) {
            return Ok(None);
        }
        let pods = self.context.pods.in_namespace(&key.namespace);
        let slices = slices_of(&self.context, key, MANAGER);
        for step in plan(&service, &pods, &self.surroundings(), &slices) {
            tracing::debug!(service = %key, %step, "endpoints");
            apply(&self.context, &key.namespace, step).await?;
        }
        Ok(None)
    }

    fn all(&self) -> Vec<ObjectKey> {
        self.context.services.all().iter().map(|s| key(&**s)).collect()
    }
}

fn zone(node: &Node) -> Option<String> {
    node.metadata.labels.as_ref()?.get(LABEL_ZONE).cloned()
}

/// The Service of a slice that `manager` maintains.
fn service_of<'a>(slice: &'a EndpointSlice, manager: &str) -> Option<&'a str> {
    let labels = slice.metadata.labels.as_ref()?;
    let is_theirs = labels.get(LABEL_MANAGED_BY).is_some_and(|name| name == manager);
    labels.get(LABEL_SERVICE_NAME).filter(|_| is_theirs).map(String::as_str)
}

/// The slices of a Service that `manager` maintains.
fn slices_of(context: &Context, service: &ObjectKey, manager: &str) -> Vec<Arc<EndpointSlice>> {
    let mut slices = context.slices.in_namespace(&service.namespace);
    slices.retain(|slice| service_of(slice, manager) == Some(service.name.as_str()));
    slices
}

/// Has the Services looked at whose slices of `manager` change.
fn follow_slices(context: &Context, queue: &Arc<WorkQueue<ObjectKey>>, manager: &'static str) {
    let sink = queue.clone();
    context.slices.listen(move |old, new| {
        for slice in old.into_iter().chain(new) {
            if let Some(service) = service_of(slice, manager) {
                sink.add(ObjectKey::new(objects::namespace(&slice.metadata), service));
            }
        }
    });
}

async fn apply(context: &Context, ns: &str, step: Step) -> Result<(), ApiError> {
    let (registry, slices) = (&context.registry, &context.slices);
    match step {
        Step::Create(slice) => slices.wrote(registry.create(&*slice).await?),
        Step::Update(slice) => slices.wrote(registry.update(&*slice).await?),
        Step::Delete(name) => {
            let options = DeleteOptions::default();
            match registry.delete::<EndpointSlice>(Some(ns), &name, &options).await {
                Ok(deleted) => slices.deleted(deleted),
                Err(ApiError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

fn selecting(services: &Mirror<Service>, pod: &Pod) -> impl Iterator<Item = ObjectKey> {
    let labels = pod.metadata.labels.clone();
    let services = services.in_namespace(objects::namespace(&pod.metadata));
    services.into_iter().filter_map(move |service| {
        let selector = service.spec.as_ref()?.selector.as_ref()?;
        objects::selects_all(selector, labels.as_ref()).then(|| key(&*service))
    })
}

/// Whether a change of the pod can change an endpoint.
fn matters(old: &Pod, new: &Pod) -> bool {
    let facts = |pod: &Pod| {
        let status = pod.status.as_ref();
        (
            pod.metadata.labels.clone(),
            pod.metadata.deletion_timestamp.is_some(),
            pod.metadata.uid.clone(),
            objects::node_of(pod).map(str::to_owned),
            objects::have_ended(pod),
            objects::ready_since(pod).is_some(),
            plan::weight(pod),
            status.and_then(|s| s.pod_ips.clone()),
            status.and_then(|s| s.pod_ip.clone()),
        )
    };
    facts(old) != facts(new)
}
