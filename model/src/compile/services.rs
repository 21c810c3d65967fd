//! Services as the socket hooks see them: frontends and backends.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Service, ServicePort};

use super::Objects;
use super::endpoints::{Endpoints, Family, port_number};
use crate::snapshot::{Backend, FULL_WEIGHT, Frontend, FrontendKind, LocalNode, Protocol};
use crate::{ObjectKey, wellknown};

/// Kubernetes' default for `sessionAffinityConfig.clientIP.timeoutSeconds`.
const DEFAULT_AFFINITY_SECS: u32 = 10_800;

pub(super) fn frontends(
    objects: &Objects,
    endpoints: &Endpoints<'_>,
    local: &LocalNode,
) -> Vec<Frontend> {
    let mut all = Vec::new();
    for service in &objects.services {
        let Some(key) = key(service) else { continue };
        let is_dns = key == ObjectKey::new(wellknown::SYSTEM_NAMESPACE, wellknown::DNS_SERVICE);
        for port in service.spec.iter().flat_map(|s| s.ports.iter().flatten()) {
            let Some(one) = PortFrontends::new(&key, service, port) else { continue };
            for (vip, number, kind) in one.addresses(local) {
                let backends = if is_dns {
                    vec![node_local_dns(vip, number)]
                } else {
                    one.backends(endpoints, Family::of(&vip), local)
                };
                all.push(one.frontend(vip, number, kind, backends));
            }
        }
    }
    all.sort_by_key(|f| (f.vip, f.protocol, f.port, f.kind, f.service.clone()));
    // Two services that claim one address: the API refuses it, and here the first by name keeps it.
    all.dedup_by(|b, a| (a.vip, a.protocol, a.port) == (b.vip, b.protocol, b.port));
    all
}

/// Every node answers names itself, so the DNS service has exactly one backend everywhere.
fn node_local_dns(vip: IpAddr, port: u16) -> Backend {
    let address = match vip {
        IpAddr::V4(_) => wellknown::NODE_LOCAL_ADDRESS.into(),
        IpAddr::V6(_) => wellknown::NODE_LOCAL_ADDRESS_V6.into(),
    };
    Backend { address, port, node: None, weight: FULL_WEIGHT }
}

/// What one service port turns into.
struct PortFrontends<'a> {
    key: &'a ObjectKey,
    service: &'a Service,
    port: &'a ServicePort,
    protocol: Protocol,
    number: u16,
}

impl<'a> PortFrontends<'a> {
    fn new(key: &'a ObjectKey, service: &'a Service, port: &'a ServicePort) -> Option<Self> {
        let protocol = Protocol::parse(port.protocol.as_deref())?;
        Some(Self { key, service, port, protocol, number: port_number(port.port)? })
    }

    /// The addresses and ports that stand for it on this node.
    fn addresses(&self, local: &LocalNode) -> Vec<(IpAddr, u16, FrontendKind)> {
        let mut addresses: Vec<_> = cluster_ips(self.service)
            .into_iter()
            .map(|vip| (vip, self.number, FrontendKind::ClusterIp))
            .collect();
        if let Some(node_port) = self.port.node_port.and_then(port_number) {
            let own = local.addresses.iter().map(|a| (*a, node_port, FrontendKind::NodePort));
            addresses.extend(own);
        }
        let external = load_balancer_ips(self.service);
        addresses.extend(external.map(|vip| (vip, self.number, FrontendKind::External)));
        addresses
    }

    fn backends(
        &self,
        endpoints: &Endpoints<'_>,
        family: Family,
        local: &LocalNode,
    ) -> Vec<Backend> {
        let mut backends =
            endpoints.backends(&self.key.namespace, &self.key.name, self.port, family);
        let policy = self.service.spec.as_ref().and_then(|s| s.internal_traffic_policy.as_deref());
        if policy == Some("Local") {
            backends.retain(|b| b.node.as_ref() == Some(&local.name));
        }
        backends
    }

    fn frontend(
        &self,
        vip: IpAddr,
        port: u16,
        kind: FrontendKind,
        backends: Vec<Backend>,
    ) -> Frontend {
        Frontend {
            vip,
            protocol: self.protocol,
            port,
            kind,
            service: self.key.clone(),
            port_name: self.port.name.clone().unwrap_or_default(),
            affinity_secs: affinity_secs(self.service),
            backends,
            leaving: vec![],
        }
    }
}

/// Namespace and name of a Service.
pub(super) fn key(service: &Service) -> Option<ObjectKey> {
    let metadata = &service.metadata;
    Some(ObjectKey::new(metadata.namespace.clone()?, metadata.name.clone()?))
}

/// The ClusterIPs of a Service; none for headless and external ones.
pub(super) fn cluster_ips(service: &Service) -> Vec<IpAddr> {
    let Some(spec) = &service.spec else { return vec![] };
    let mut addresses: Vec<IpAddr> =
        spec.cluster_ips.iter().flatten().filter_map(|a| a.parse().ok()).collect();
    if addresses.is_empty() {
        addresses.extend(spec.cluster_ip.as_deref().and_then(|a| a.parse::<IpAddr>().ok()));
    }
    addresses
}

fn load_balancer_ips(service: &Service) -> impl Iterator<Item = IpAddr> + '_ {
    let balancer = service.status.as_ref().and_then(|s| s.load_balancer.as_ref());
    let ingress = balancer.and_then(|b| b.ingress.as_ref()).into_iter().flatten();
    ingress.filter_map(|i| i.ip.as_deref()?.parse().ok())
}

fn affinity_secs(service: &Service) -> Option<u32> {
    let spec = service.spec.as_ref()?;
    if spec.session_affinity.as_deref() != Some("ClientIP") {
        return None;
    }
    let config = spec.session_affinity_config.as_ref().and_then(|c| c.client_ip.as_ref());
    let seconds = config.and_then(|c| c.timeout_seconds).and_then(|s| u32::try_from(s).ok());
    Some(seconds.unwrap_or(DEFAULT_AFFINITY_SECS))
}
