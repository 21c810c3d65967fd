//! The names of the cluster domain (Kubernetes DNS specification 1.1.0).

use k8s_openapi::api::core::v1::Service;

use super::Objects;
use super::endpoints::{Endpoints, endpoint_port, is_ready, port_number};
use super::services::{cluster_ips, key};
use crate::snapshot::{DnsEndpoint, DnsPort, DnsService, DnsTarget, DnsZone, Protocol};

pub(super) fn zone(objects: &Objects, endpoints: &Endpoints<'_>) -> DnsZone {
    let mut services: Vec<DnsService> = objects
        .services
        .iter()
        .filter_map(|service| {
            let key = key(service)?;
            let target = target(service, endpoints, &key.namespace, &key.name)?;
            Some(DnsService { key, target })
        })
        .collect();
    services.sort_by(|a, b| a.key.cmp(&b.key));
    let mut namespaces: Vec<String> =
        objects.namespaces.iter().filter_map(|n| n.metadata.name.clone()).collect();
    namespaces.sort();
    DnsZone {
        domain: objects.cluster.domain.clone(),
        services,
        namespaces,
        pod_cidrs: objects.cluster.pod_cidrs.clone(),
    }
}

fn target(
    service: &Service,
    endpoints: &Endpoints<'_>,
    namespace: &str,
    name: &str,
) -> Option<DnsTarget> {
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return spec.external_name.clone().map(DnsTarget::ExternalName);
    }
    if spec.cluster_ip.as_deref() == Some("None") {
        return Some(headless(endpoints, namespace, name));
    }
    let addresses = cluster_ips(service);
    let ports = spec.ports.iter().flatten().filter_map(|port| {
        Some(DnsPort {
            name: port.name.clone().unwrap_or_default(),
            protocol: Protocol::parse(port.protocol.as_deref())?,
            port: port_number(port.port)?,
        })
    });
    (!addresses.is_empty()).then(|| DnsTarget::ClusterIp { addresses, ports: ports.collect() })
}

fn headless(endpoints: &Endpoints<'_>, namespace: &str, name: &str) -> DnsTarget {
    let mut all = Vec::new();
    for slice in endpoints.of(namespace, name) {
        let mut ports: Vec<DnsPort> = slice
            .ports
            .iter()
            .flatten()
            .filter_map(endpoint_port)
            .map(|(name, protocol, port)| DnsPort { name: name.to_owned(), protocol, port })
            .collect();
        ports.sort();
        for endpoint in slice.endpoints.iter().flatten().filter(|e| is_ready(e)) {
            let addresses = endpoint.addresses.iter().filter_map(|a| a.parse().ok());
            all.extend(addresses.map(|address| DnsEndpoint {
                address,
                hostname: endpoint.hostname.clone(),
                ports: ports.clone(),
            }));
        }
    }
    all.sort_by(|a, b| (a.address, &a.hostname).cmp(&(b.address, &b.hostname)));
    all.dedup_by(|a, b| a.address == b.address);
    DnsTarget::Headless { endpoints: all }
}
