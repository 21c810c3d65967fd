//! Names, ports and addresses that the programs agree on.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Node annotation: the WireGuard public key that the node had first, base64. It names the node on the overlay for good.
pub const ANNOTATION_WIREGUARD_KEY: &str = "mesh.dev/wireguard-public-key";
/// Node annotation: the WireGuard public keys in use, where they are others: joined by a comma, the present one and the one
/// that takes over once all peers know it. The one to call the node by is the last.
pub const ANNOTATION_WIREGUARD_KEYS: &str = "mesh.dev/wireguard-public-keys";
/// Node annotation: candidate overlay endpoints, `address:port` joined by commas, the preferred one first.
pub const ANNOTATION_ENDPOINTS: &str = "mesh.dev/wireguard-endpoints";
/// Node annotation: which overlay engine runs there, `kernel` or `user`.
pub const ANNOTATION_OVERLAY: &str = "mesh.dev/overlay";
/// Pod annotation: its share of a Service's new connections in percent of what a pod without it gets, 0 to 1000.
pub const ANNOTATION_WEIGHT: &str = "mesh.dev/weight";
/// EndpointSlice annotation: the weights of its endpoints that have one, JSON of an object from address to number.
pub const ANNOTATION_WEIGHTS: &str = "mesh.dev/weights";
/// Label on Nodes with their zone.
pub const LABEL_ZONE: &str = "topology.kubernetes.io/zone";
/// How many pod blocks of each family a node asks for; absent means one.
pub const ANNOTATION_BLOCKS_WANTED: &str = "mesh.dev/pod-blocks-wanted";
/// Node annotation: the maps that are full there, and what they have no room for; JSON of [`Shortages`](crate::shortage::Shortages).
pub const ANNOTATION_MAPS_FULL: &str = "mesh.dev/maps-full";
/// Condition of a Node: a map of its programs is full.
pub const CONDITION_MAPS_FULL: &str = "MeshMapsFull";
/// Condition of a Service: some node has no room for all of it.
pub const CONDITION_MAP_FULL: &str = "mesh.dev/MapFull";
/// Namespace of cluster-internal objects.
pub const SYSTEM_NAMESPACE: &str = "kube-system";
/// ConfigMap in [`SYSTEM_NAMESPACE`] that carries the cluster configuration.
pub const CLUSTER_CONFIG_MAP: &str = "mesh-cluster";
/// Key in [`CLUSTER_CONFIG_MAP`] whose value is the JSON of `ClusterConfig`.
pub const CLUSTER_CONFIG_KEY: &str = "cluster.json";
/// Namespace of the node leases.
pub const LEASE_NAMESPACE: &str = "kube-node-lease";
/// ServiceAccount annotation: what the account may do in the API: `view`, `edit`, `cluster-view` or `cluster-admin`.
pub const ANNOTATION_ROLE: &str = "mesh.dev/role";
/// The account that pods run as when they name none.
pub const DEFAULT_ACCOUNT: &str = "default";
/// ConfigMap in every namespace with the certificate by which pods know the API.
pub const CA_CONFIG_MAP: &str = "kube-root-ca.crt";
/// Its key.
pub const CA_KEY: &str = "ca.crt";
/// Name of the DNS service in [`SYSTEM_NAMESPACE`], as people expect to find it.
pub const DNS_SERVICE: &str = "kube-dns";
/// Label on EndpointSlices that names their Service.
pub const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Label on Services and EndpointSlices without an address to proxy.
pub const LABEL_HEADLESS: &str = "service.kubernetes.io/headless";
/// Label on Services that another proxy than the cluster's own serves; its value names that proxy.
pub const LABEL_SERVICE_PROXY: &str = "service.kubernetes.io/service-proxy-name";
/// Label on Nodes with the host name.
pub const LABEL_HOSTNAME: &str = "kubernetes.io/hostname";
/// Label that every Namespace has: its name.
pub const LABEL_NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";
/// Label on Namespaces that says how far their pods are open by default.
pub const LABEL_ISOLATION: &str = "mesh.dev/isolation";
/// Value of [`LABEL_ISOLATION`]: pods receive from their own namespace and from nodes, unless a policy allows more.
pub const ISOLATION_NAMESPACE: &str = "namespace";
/// Label on objects that says who maintains them.
pub const LABEL_MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// Label on Endpoints, `true` where no EndpointSlices are to say the same.
pub const LABEL_SKIP_MIRROR: &str = "endpointslice.kubernetes.io/skip-mirror";
/// The ingress class that the nodes' proxies serve.
pub const INGRESS_CLASS: &str = "mesh";
/// The load balancer class that this cluster serves; so it does services without a class.
pub const LOAD_BALANCER_CLASS: &str = "mesh.dev/load-balancer";
/// Organisation in client certificates of cluster administrators.
pub const GROUP_ADMINS: &str = "system:masters";
/// Organisation in client certificates of nodes.
pub const GROUP_NODES: &str = "system:nodes";
/// Prefix of the common name in client certificates of nodes.
pub const NODE_USER_PREFIX: &str = "system:node:";
/// Common name of the control service's own client certificate towards agents.
pub const CONTROL_USER: &str = "mesh-control";
/// Port of the Kubernetes API.
pub const API_PORT: u16 = 6443;
/// Port of the agent's HTTPS server (logs, admin), as the kubelet's.
pub const AGENT_PORT: u16 = 10250;
/// UDP port on a node's own overlay address where agents speak about paths. Below 1024, so that no ordinary process of
/// a node can pass for its agent.
pub const PATHS_PORT: u16 = 951;
/// UDP port on a node's own overlay address where agents ask each other what they have programmed. Below 1024 as well.
pub const DRAIN_PORT: u16 = 952;
/// Link-local address on every node where its own DNS and L7 proxy answer.
pub const NODE_LOCAL_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 20, 10);
/// The same for IPv6: a unique local address that exists on every node's loopback device only.
pub const NODE_LOCAL_ADDRESS_V6: Ipv6Addr = Ipv6Addr::new(0xfd7a, 0x6d65, 0x7368, 0, 0, 0, 0, 0x10);
/// Gateway that pods see; it exists only as a permanent neighbour entry.
pub const POD_GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// Overlay device on every node.
pub const OVERLAY_DEVICE: &str = "mesh-wg";
