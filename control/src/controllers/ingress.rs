//! The addresses in the status of Ingresses: those of the nodes whose proxies answer.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::networking::v1::{
    Ingress, IngressLoadBalancerIngress, IngressLoadBalancerStatus, IngressStatus,
};
use mesh_model::ObjectKey;
use mesh_model::wellknown::INGRESS_CLASS;

use super::queue::WorkQueue;
use super::runtime::{Context, Reconcile, key, queue_of};
use crate::error::ApiError;
use crate::objects;

const LEGACY_CLASS: &str = "kubernetes.io/ingress.class";

pub(super) struct Controller {
    context: Arc<Context>,
}

impl Controller {
    pub(super) fn new(context: Arc<Context>) -> (Arc<Self>, Arc<WorkQueue<ObjectKey>>) {
        let queue = queue_of(&context.ingresses);
        let (sink, ingresses) = (queue.clone(), context.ingresses.clone());
        context.nodes.listen(move |old, new| {
            let facts = |node: Option<&Arc<Node>>| node.map(|node| public_addresses([&**node]));
            if facts(old) != facts(new) {
                ingresses.all().iter().for_each(|ingress| sink.add(key(&**ingress)));
            }
        });
        (Arc::new(Self { context }), queue)
    }
}

#[async_trait]
impl Reconcile for Controller {
    type Key = ObjectKey;
    const NAME: &'static str = "ingress-status";
    const WORKERS: usize = 1;

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, ApiError> {
        let Some(ingress) = self.context.ingresses.get(&key.namespace, &key.name) else {
            return Ok(None);
        };
        if objects::is_terminating(&ingress.metadata) || !is_ours(&ingress) {
            return Ok(None);
        }
        let nodes = self.context.nodes.all();
        let wanted = status(public_addresses(nodes.iter().map(AsRef::as_ref)));
        let present = ingress.status.as_ref().and_then(|s| s.load_balancer.as_ref());
        let addresses = |status: Option<&IngressLoadBalancerStatus>| {
            status.and_then(|s| s.ingress.clone()).unwrap_or_default()
        };
        if addresses(present) != addresses(wanted.load_balancer.as_ref()) {
            let mut new = (*ingress).clone();
            new.status = Some(wanted);
            self.context.ingresses.wrote(self.context.registry.update_status(&new).await?);
        }
        Ok(None)
    }

    fn all(&self) -> Vec<ObjectKey> {
        self.context.ingresses.all().iter().map(|i| key(&**i)).collect()
    }
}

/// Whether the nodes' proxies serve the Ingress: its class is ours, or it names none.
fn is_ours(ingress: &Ingress) -> bool {
    let named = ingress.spec.as_ref().and_then(|s| s.ingress_class_name.as_deref());
    let annotations = ingress.metadata.annotations.as_ref();
    let legacy = annotations.and_then(|a| a.get(LEGACY_CLASS)).map(String::as_str);
    named.or(legacy).is_none_or(|class| class == INGRESS_CLASS)
}

/// Addresses of the Ready nodes: external ones where any node has one, else internal ones.
fn public_addresses<'a>(nodes: impl IntoIterator<Item = &'a Node>) -> BTreeSet<IpAddr> {
    let (mut external, mut internal) = (BTreeSet::new(), BTreeSet::new());
    for node in nodes.into_iter().filter(|node| objects::is_node_ready(node)) {
        let addresses = node.status.iter().flat_map(|s| s.addresses.iter().flatten());
        for address in addresses {
            let Ok(ip) = address.address.parse() else {
                continue;
            };
            match address.type_.as_str() {
                "ExternalIP" => external.insert(ip),
                "InternalIP" => internal.insert(ip),
                _ => false,
            };
        }
    }
    if external.is_empty() { internal } else { external }
}

fn status(addresses: BTreeSet<IpAddr>) -> IngressStatus {
    let point = |ip: IpAddr| IngressLoadBalancerIngress {
        ip: Some(ip.to_string()),
        ..IngressLoadBalancerIngress::default()
    };
    let points: Vec<_> = addresses.into_iter().map(point).collect();
    IngressStatus {
        load_balancer: Some(IngressLoadBalancerStatus {
            ingress: Some(points).filter(|points| !points.is_empty()),
        }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn node(ready: &str, addresses: Value) -> Node {
        serde_json::from_value(json!({"status": {"addresses": addresses,
            "conditions": [{"type": "Ready", "status": ready}]}}))
        .unwrap()
    }

    #[test]
    fn ready_nodes_answer_and_external_addresses_win() {
        let internal = |ip: &str| json!([{"type": "InternalIP", "address": ip}, {"type": "Hostname", "address": "n"}]);
        let a = node("True", internal("10.0.0.2"));
        let b = node("True", internal("10.0.0.1"));
        let lost = node("Unknown", internal("10.0.0.3"));
        let texts = |nodes: &[&Node]| {
            let set = public_addresses(nodes.iter().copied());
            set.into_iter().map(|ip| ip.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(texts(&[&a, &b, &lost]), ["10.0.0.1", "10.0.0.2"]);
        let c = node("True", json!([{"type": "ExternalIP", "address": "192.0.2.1"}]));
        assert_eq!(texts(&[&a, &c]), ["192.0.2.1"]);
        assert_eq!(status(BTreeSet::new()).load_balancer.unwrap().ingress, None);
    }

    #[test]
    fn other_classes_are_left_alone() {
        let ingress = |spec: Value| {
            serde_json::from_value::<Ingress>(json!({"metadata": {}, "spec": spec})).unwrap()
        };
        assert!(is_ours(&ingress(json!({}))));
        assert!(is_ours(&ingress(json!({"ingressClassName": "mesh"}))));
        assert!(!is_ours(&ingress(json!({"ingressClassName": "nginx"}))));
    }
}
