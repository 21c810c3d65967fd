//! The names of the cluster domain (Kubernetes DNS specification 1.1.0).

use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::Objects;
use super::directory::Directory;
use super::endpoints::{endpoint_port, is_ready, port_number};
use super::services::cluster_ips;
use crate::ObjectKey;
use crate::snapshot::{DnsEndpoint, DnsPort, DnsService, DnsTarget, DnsZone, Protocol};

/// From so many changed names on the zone is made anew.
const MANY: usize = 64;

/// The zone as it was made last.
#[derive(Default)]
pub(super) struct Memory(Arc<DnsZone>);

impl Memory {
    pub(super) fn zone(&self) -> &Arc<DnsZone> {
        &self.0
    }

    /// `anew` when something else than services has changed; `renamed` are those whose names mean something else.
    pub(super) fn follow(
        &mut self,
        objects: &Objects,
        directory: &Directory,
        anew: bool,
        renamed: &[ObjectKey],
    ) {
        if anew || renamed.len() > MANY {
            super::compiler::share(&mut self.0, zone(objects, directory));
            return;
        }
        for key in renamed {
            let now = directory.entry(key).and_then(|entry| entry.made.dns.clone());
            let services = &mut Arc::make_mut(&mut self.0).services;
            match (services.binary_search_by(|one| one.key.cmp(key)), now) {
                (Ok(place), Some(now)) => services[place] = now,
                (Err(place), Some(now)) => services.insert(place, now),
                (Ok(place), None) => drop(services.remove(place)),
                (Err(_), None) => {}
            }
        }
    }
}

fn zone(objects: &Objects, directory: &Directory) -> DnsZone {
    let mut namespaces: Vec<String> =
        objects.namespaces.iter().filter_map(|n| n.metadata.name.clone()).collect();
    namespaces.sort();
    DnsZone {
        domain: objects.cluster.domain.clone(),
        services: directory.all().filter_map(|(_, entry)| entry.made.dns.clone()).collect(),
        namespaces,
        pod_cidrs: objects.cluster.pod_cidrs.clone(),
    }
}

/// What the name of a Service means; nothing where it has none.
pub(super) fn service(
    key: &ObjectKey,
    service: &Service,
    slices: &[Arc<EndpointSlice>],
) -> Option<DnsService> {
    Some(DnsService { key: key.clone(), target: target(service, slices)? })
}

fn target(service: &Service, slices: &[Arc<EndpointSlice>]) -> Option<DnsTarget> {
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return spec.external_name.clone().map(DnsTarget::ExternalName);
    }
    if spec.cluster_ip.as_deref() == Some("None") {
        return Some(headless(slices));
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

fn headless(slices: &[Arc<EndpointSlice>]) -> DnsTarget {
    let mut all: Vec<DnsEndpoint> = Vec::new();
    for slice in slices {
        let ports: Vec<DnsPort> = slice
            .ports
            .iter()
            .flatten()
            .filter_map(endpoint_port)
            .map(|(name, protocol, port)| DnsPort { name: name.to_owned(), protocol, port })
            .collect();
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
    // Slices that are written by hand may list a host several times, each time with other ports.
    all.dedup_by(|again, first| {
        let same = (again.address, &again.hostname) == (first.address, &first.hostname);
        if same {
            first.ports.append(&mut again.ports);
        }
        same
    });
    for endpoint in &mut all {
        endpoint.ports.sort();
        endpoint.ports.dedup();
    }
    DnsTarget::Headless { endpoints: all }
}
