//! From the objects of the API to what one node has to do.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, Secret, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::Ingress;

use crate::snapshot::{DnsZone, L7Config, LocalNode, Snapshot};
use crate::{ClusterConfig, NodeName};

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
}

/// The desired state of `node`. Total: an object that makes no sense is left out, never a panic.
pub fn compile(objects: &Objects, node: &NodeName) -> Snapshot {
    let _ = objects;
    Snapshot {
        cluster: objects.cluster.clone(),
        node: LocalNode { name: node.clone(), blocks: vec![], addresses: vec![] },
        peers: vec![],
        frontends: vec![],
        dns: DnsZone::default(),
        l7: L7Config::default(),
        pods: vec![],
    }
}
