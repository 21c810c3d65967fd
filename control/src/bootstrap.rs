//! The objects that every cluster has, made when they are missing.
//!
//! Runs at each start, and changes nothing that is there, except the endpoints of the API itself, which follow the
//! addresses that it was started with.

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{ConfigMap, Endpoints, Namespace, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::IngressClass;
use mesh_model::cluster::node_overlay_address;
use mesh_model::{ClusterConfig, wellknown};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::registry::{Object, Registry};

const NAMESPACES: [&str; 4] =
    ["default", wellknown::SYSTEM_NAMESPACE, "kube-public", wellknown::LEASE_NAMESPACE];

/// Makes what is missing. `advertise` are the addresses at which nodes and pods reach the API on `port`.
pub async fn run(registry: &Registry, advertise: &[IpAddr], port: u16) -> Result<(), ApiError> {
    for name in NAMESPACES {
        ensure::<Namespace>(registry, json!({"metadata": {"name": name}})).await?;
    }
    let cluster = registry.cluster().clone();
    ensure::<ConfigMap>(registry, config_map(&cluster)).await?;
    ensure::<Service>(registry, dns_service(&cluster)).await?;
    ensure::<IngressClass>(registry, ingress_class()).await?;
    // From another machine, or from a pod, a loopback address means something else.
    let reachable: Vec<IpAddr> = advertise.iter().copied().filter(|a| !a.is_loopback()).collect();
    let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = reachable.iter().copied().partition(IpAddr::is_ipv4);
    ensure::<Service>(registry, api_service(&cluster, !v4.is_empty(), !v6.is_empty())).await?;
    for (family, addresses) in [("IPv4", v4), ("IPv6", v6)] {
        if !addresses.is_empty() {
            let same = |a: &EndpointSlice, b: &EndpointSlice| {
                (&a.endpoints, &a.ports) == (&b.endpoints, &b.ports)
            };
            follow(registry, api_slice(family, &addresses, port), same).await?;
        }
    }
    if !reachable.is_empty() {
        let same = |a: &Endpoints, b: &Endpoints| a.subsets == b.subsets;
        follow(registry, api_endpoints(&reachable, port), same).await?;
    }
    Ok(())
}

fn object<K: DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).expect("a constant object of a served kind")
}

async fn ensure<K: Object>(registry: &Registry, value: Value) -> Result<(), ApiError> {
    match registry.create(&object::<K>(value)).await {
        Ok(_) | Err(ApiError::AlreadyExists { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Makes the object, or changes it to what it should be.
async fn follow<K: Object>(
    registry: &Registry,
    value: Value,
    same: impl Fn(&K, &K) -> bool,
) -> Result<(), ApiError> {
    let mut wanted: K = object(value);
    let name = wanted.metadata().name.clone().unwrap_or_default();
    let present: K = match registry.get(Some("default"), &name) {
        Ok(present) => present,
        Err(ApiError::NotFound { .. }) => return registry.create(&wanted).await.map(drop),
        Err(error) => return Err(error),
    };
    if same(&present, &wanted) {
        return Ok(());
    }
    *wanted.metadata_mut() = present.metadata().clone();
    registry.update(&wanted).await.map(drop)
}

fn config_map(cluster: &ClusterConfig) -> Value {
    let text = serde_json::to_string(cluster).expect("plain data becomes JSON");
    json!({
        "metadata": {"name": wellknown::CLUSTER_CONFIG_MAP, "namespace": wellknown::SYSTEM_NAMESPACE},
        "data": {wellknown::CLUSTER_CONFIG_KEY: text},
    })
}

fn families(addresses: &[IpAddr]) -> Vec<&'static str> {
    addresses.iter().map(|a| if a.is_ipv4() { "IPv4" } else { "IPv6" }).collect()
}

fn policy(addresses: &[IpAddr]) -> &'static str {
    if addresses.len() > 1 { "RequireDualStack" } else { "SingleStack" }
}

/// Without a selector: every node answers the DNS address itself.
fn dns_service(cluster: &ClusterConfig) -> Value {
    let vips = &cluster.dns_vips;
    json!({
        "metadata": {
            "name": wellknown::DNS_SERVICE,
            "namespace": wellknown::SYSTEM_NAMESPACE,
            "labels": {"k8s-app": "kube-dns", "kubernetes.io/cluster-service": "true", "kubernetes.io/name": "MeshDNS"},
        },
        "spec": {
            "clusterIP": vips.first(),
            "clusterIPs": vips,
            "ipFamilies": families(vips),
            "ipFamilyPolicy": policy(vips),
            "ports": [
                {"name": "dns", "port": 53, "protocol": "UDP"},
                {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
            ],
        },
    })
}

fn ingress_class() -> Value {
    json!({
        "metadata": {
            "name": wellknown::INGRESS_CLASS,
            "annotations": {"ingressclass.kubernetes.io/is-default-class": "true"},
        },
        "spec": {"controller": "mesh.dev/ingress"},
    })
}

/// The first address of the service range, as everywhere; of those families in which the API can be reached.
fn api_service(cluster: &ClusterConfig, v4: bool, v6: bool) -> Value {
    let first = |range: &IpNet| node_overlay_address(range);
    let mut vips: Vec<IpAddr> = cluster.service_cidrs.iter().map(first).collect();
    let served = |vip: &IpAddr| if vip.is_ipv4() { v4 } else { v6 };
    if vips.iter().any(served) {
        vips.retain(served);
    }
    json!({
        "metadata": {
            "name": "kubernetes",
            "namespace": "default",
            "labels": {"component": "apiserver", "provider": "kubernetes"},
        },
        "spec": {
            "clusterIP": vips.first(),
            "clusterIPs": vips,
            "ipFamilies": families(&vips),
            "ipFamilyPolicy": policy(&vips),
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": wellknown::API_PORT}],
        },
    })
}

fn api_slice(family: &str, addresses: &[IpAddr], port: u16) -> Value {
    json!({
        "metadata": {
            "name": format!("kubernetes-{}", family.to_lowercase()),
            "namespace": "default",
            "labels": {wellknown::LABEL_SERVICE_NAME: "kubernetes"},
        },
        "addressType": family,
        "endpoints": [{"addresses": addresses, "conditions": {"ready": true}}],
        "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
    })
}

/// The same for those who do not know slices. They are not mirrored, because the slices are there.
fn api_endpoints(addresses: &[IpAddr], port: u16) -> Value {
    let addresses: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
    json!({
        "metadata": {
            "name": "kubernetes",
            "namespace": "default",
            "labels": {wellknown::LABEL_SKIP_MIRROR: "true"},
        },
        "subsets": [{
            "addresses": addresses,
            "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
        }],
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn a_second_start_changes_nothing_but_the_address_of_the_api() {
        let dir = tempfile::tempdir().unwrap();
        let store = crate::store::RedbStore::open(&dir.path().join("store.redb")).unwrap();
        let registry = Registry::new(Arc::new(store), ClusterConfig::default()).unwrap();
        let at = |address: &str| [address.parse::<IpAddr>().unwrap()];
        run(&registry, &at("192.0.2.1"), 6443).await.unwrap();
        let before = registry.revision();
        run(&registry, &at("192.0.2.1"), 6443).await.unwrap();
        assert_eq!(registry.revision(), before);
        run(&registry, &at("192.0.2.2"), 6443).await.unwrap();
        assert_eq!(registry.revision(), before + 2);
        let endpoints: Endpoints = registry.get(Some("default"), "kubernetes").unwrap();
        let subsets = endpoints.subsets.unwrap();
        assert_eq!(subsets[0].addresses.as_ref().unwrap()[0].ip, "192.0.2.2");
        let dns: Service = registry.get(Some("kube-system"), "kube-dns").unwrap();
        assert_eq!(dns.spec.unwrap().cluster_ip.as_deref(), Some("10.96.0.10"));
        let api: Service = registry.get(Some("default"), "kubernetes").unwrap();
        // Nobody is sent to an address behind which there is nothing.
        assert_eq!(api.spec.unwrap().cluster_ips, Some(vec!["10.96.0.1".to_owned()]));
    }
}
