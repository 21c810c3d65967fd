//! From the objects of the API to what one node has to do.
//!
//! Order of input never matters and equal objects give equal snapshots, so a reconciler may skip work by
//! comparing. An object that makes no sense is left out: validation is the API's job, survival is ours.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, Secret, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::{Ingress, NetworkPolicy};

use crate::snapshot::Snapshot;
use crate::{ClusterConfig, NodeName};

mod choice;
mod dns;
mod edge;
mod endpoints;
mod l7;
mod nodes;
mod pods;
mod policy;
mod services;
#[cfg(test)]
mod tests;

use endpoints::Endpoints;
pub use policy::is_restricted;

/// The objects that a node's state follows from, in any order.
#[derive(Debug, Clone, Default)]
pub struct Objects {
    /// The cluster's address plan.
    pub cluster: ClusterConfig,
    /// All nodes.
    pub nodes: Vec<Arc<Node>>,
    /// All namespaces.
    pub namespaces: Vec<Arc<Namespace>>,
    /// The pods bound to the node (others are ignored).
    pub pods: Vec<Arc<Pod>>,
    /// All services.
    pub services: Vec<Arc<Service>>,
    /// All endpoint slices.
    pub endpoint_slices: Vec<Arc<EndpointSlice>>,
    /// ConfigMaps that pods may refer to.
    pub config_maps: Vec<Arc<ConfigMap>>,
    /// Secrets that pods and ingresses may refer to.
    pub secrets: Vec<Arc<Secret>>,
    /// All ingresses.
    pub ingresses: Vec<Arc<Ingress>>,
    /// All network policies.
    pub network_policies: Vec<Arc<NetworkPolicy>>,
    /// The pods of the whole cluster, where anybody restricts anything ([`is_restricted`]); of them only what policies look
    /// at.
    pub cluster_pods: Vec<Arc<Pod>>,
}

/// The `resourceVersion` of a slice: they grow over all objects of a cluster, and are compared by number.
fn revision(slice: &EndpointSlice) -> Option<u64> {
    slice.metadata.resource_version.as_deref()?.parse().ok()
}

/// The desired state of `node`. Total: never panics, whatever the objects say.
pub fn compile(objects: &Objects, node: &NodeName) -> Snapshot {
    let local = nodes::local(objects, node);
    let endpoints = Endpoints::index(&objects.endpoint_slices);
    Snapshot {
        cluster: objects.cluster.clone(),
        peers: nodes::peers(objects, &local),
        frontends: services::frontends(objects, &endpoints, &local),
        edge: edge::edge(objects, &endpoints, &local),
        dns: dns::zone(objects, &endpoints),
        l7: l7::config(objects, &endpoints, &local),
        node_addresses: nodes::all_addresses(objects),
        pods: pods::work(objects, &endpoints, node),
        revision: objects
            .endpoint_slices
            .iter()
            .filter_map(|slice| revision(slice))
            .max()
            .unwrap_or(0),
        policy: policy::set(objects, &local),
        node: local,
    }
}
