//! From the objects of the API to what one node has to do.
//!
//! Order of input never matters and equal objects give equal snapshots, so a reconciler may skip work by
//! comparing. An object that makes no sense is left out: validation is the API's job, survival is ours.
//!
//! [`compile`] starts from nothing. [`Compiler`] remembers what it made of which objects, and makes only what changed
//! again: the same snapshot, and what is the same in two of its snapshots lies at the same address.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, Secret, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::{Ingress, NetworkPolicy};

use crate::snapshot::Snapshot;
use crate::{ClusterConfig, NodeName};

mod changes;
mod choice;
mod claims;
mod compiler;
mod directory;
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

pub use compiler::Compiler;
pub use policy::is_restricted;

/// The objects that a node's state follows from, in any order, none of them twice.
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

/// The desired state of `node`. Total: never panics, whatever the objects say.
pub fn compile(objects: &Objects, node: &NodeName) -> Snapshot {
    Compiler::new(node.clone()).compile(objects)
}
