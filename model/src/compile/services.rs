//! Services as the socket hooks see them: frontends and backends.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Service, ServicePort};
use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::choice::{Choice, Reach, choose};
use super::directory::Entry;
use super::endpoints::{Family, candidates, port_number};
use super::{claims, dns, edge};
use crate::snapshot::{
    Backend, DnsService, FULL_WEIGHT, Frontend, FrontendKind, LocalNode, Protocol,
};
use crate::wellknown::{LABEL_HEADLESS, LABEL_SERVICE_PROXY};
use crate::{ClusterConfig, ObjectKey, wellknown};

/// Kubernetes' default for `sessionAffinityConfig.clientIP.timeoutSeconds`.
const DEFAULT_AFFINITY_SECS: u32 = 10_800;

/// What follows from one Service, its slices, the cluster's plan and the node, and from nothing else.
#[derive(Default)]
pub(super) struct Made {
    /// By address, protocol and port.
    pub(super) frontends: Vec<Arc<Frontend>>,
    pub(super) edge: edge::Part,
    pub(super) dns: Option<Arc<DnsService>>,
}

impl Made {
    /// What is as in `entry.made` is shared with it.
    pub(super) fn of(
        key: &ObjectKey,
        entry: &Entry,
        cluster: &ClusterConfig,
        local: &LocalNode,
    ) -> Self {
        let Some(service) = &entry.service else { return Self::default() };
        let before = &entry.made;
        let dns = dns::service(key, service, &entry.slices);
        let same = |fresh: &DnsService| before.dns.as_ref().filter(|old| ***old == *fresh).cloned();
        let dns = dns.map(|fresh| same(&fresh).unwrap_or_else(|| Arc::new(fresh)));
        if is_name_only(service) {
            return Self { dns, ..Self::default() };
        }
        let frontends = frontends(key, service, &entry.slices, cluster, local);
        Self {
            frontends: claims::of_service(frontends, &before.frontends),
            edge: edge::Part::of(key, entry, service, cluster, local),
            dns,
        }
    }
}

fn frontends(
    key: &ObjectKey,
    service: &Service,
    slices: &[Arc<EndpointSlice>],
    cluster: &ClusterConfig,
    local: &LocalNode,
) -> Vec<Frontend> {
    let mut all = Vec::new();
    let is_dns = *key == ObjectKey::new(wellknown::SYSTEM_NAMESPACE, wellknown::DNS_SERVICE);
    let external = external_ips(service, cluster);
    for port in service.spec.iter().flat_map(|s| s.ports.iter().flatten()) {
        let Some(one) = PortFrontends::new(key, service, port) else { continue };
        let mut choices = Choices { port: &one, slices, local, made: vec![] };
        for (vip, number, kind) in one.addresses(local, &external) {
            let choice = if is_dns { node_local_dns(vip, number) } else { choices.of(vip, kind) };
            all.push(one.frontend(vip, number, kind, choice));
        }
    }
    all
}

/// Every node answers names itself, so the DNS service has exactly one backend everywhere.
fn node_local_dns(vip: IpAddr, port: u16) -> Choice {
    let address = match vip {
        IpAddr::V4(_) => wellknown::NODE_LOCAL_ADDRESS.into(),
        IpAddr::V6(_) => wellknown::NODE_LOCAL_ADDRESS_V6.into(),
    };
    let backends = vec![Backend { address, port, node: None, weight: FULL_WEIGHT }];
    Choice { backends, leaving: vec![] }
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
    fn addresses(
        &self,
        local: &LocalNode,
        external: &[IpAddr],
    ) -> Vec<(IpAddr, u16, FrontendKind)> {
        let own = cluster_ips(self.service);
        let mut addresses: Vec<_> =
            own.iter().map(|vip| (*vip, self.number, FrontendKind::ClusterIp)).collect();
        if let Some(node_port) = self.port.node_port.and_then(port_number) {
            let any = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
            let served = |a: &&IpAddr| own.iter().any(|vip| vip.is_ipv4() == a.is_ipv4());
            let nodes = local.addresses.iter().chain(&any).filter(served);
            addresses.extend(nodes.map(|a| (*a, node_port, FrontendKind::NodePort)));
        }
        let external = load_balancer_ips(self.service).chain(external.iter().copied());
        addresses.extend(external.map(|vip| (vip, self.number, FrontendKind::External)));
        addresses
    }

    /// `internalTrafficPolicy` is about ClusterIPs. A client inside that uses an outside address is short-cut to the whole
    /// cluster, whatever `externalTrafficPolicy` says.
    fn reach(&self, kind: FrontendKind) -> Reach {
        let policy = self.service.spec.as_ref().and_then(|s| s.internal_traffic_policy.as_deref());
        match kind {
            FrontendKind::ClusterIp if policy == Some("Local") => Reach::Local,
            _ => Reach::Cluster,
        }
    }

    fn frontend(&self, vip: IpAddr, port: u16, kind: FrontendKind, choice: Choice) -> Frontend {
        Frontend {
            vip,
            protocol: self.protocol,
            port,
            kind,
            service: self.key.clone(),
            port_name: self.port.name.clone().unwrap_or_default(),
            affinity_secs: affinity_secs(self.service),
            backends: choice.backends,
            leaving: choice.leaving,
        }
    }
}

/// The endpoints of a port by family and reach, each looked up once: a port may have many addresses.
struct Choices<'a> {
    port: &'a PortFrontends<'a>,
    slices: &'a [Arc<EndpointSlice>],
    local: &'a LocalNode,
    made: Vec<((Family, Reach), Choice)>,
}

impl Choices<'_> {
    fn of(&mut self, vip: IpAddr, kind: FrontendKind) -> Choice {
        let key = (Family::of(&vip), self.port.reach(kind));
        if let Some((_, choice)) = self.made.iter().find(|(made, _)| *made == key) {
            return choice.clone();
        }
        let candidates = candidates(self.slices, self.port.port, key.0);
        let choice = choose(&candidates, key.1, self.local);
        self.made.push((key, choice.clone()));
        choice
    }
}

/// Namespace and name of a Service.
pub(super) fn key(service: &Service) -> Option<ObjectKey> {
    let metadata = &service.metadata;
    Some(ObjectKey::new(metadata.namespace.clone()?, metadata.name.clone()?))
}

/// Whether the Service is known by its name alone: headless ones and aliases are not proxied, whatever addresses they list or still
/// have from before, and some are for somebody else to proxy. By the same fields and labels as kube-proxy tells.
fn is_name_only(service: &Service) -> bool {
    let by_label = service.metadata.labels.as_ref().is_some_and(|labels| {
        [LABEL_SERVICE_PROXY, LABEL_HEADLESS].iter().any(|label| labels.contains_key(*label))
    });
    by_label
        || service.spec.as_ref().is_some_and(|spec| {
            spec.type_.as_deref() == Some("ExternalName")
                || spec.cluster_ip.as_deref() == Some("None")
        })
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

pub(super) fn load_balancer_ips(service: &Service) -> impl Iterator<Item = IpAddr> + '_ {
    let balancer = service.status.as_ref().and_then(|s| s.load_balancer.as_ref());
    let ingress = balancer.and_then(|b| b.ingress.as_ref()).into_iter().flatten();
    // With this mode the balancer wants to see the connections of clients inside, too.
    let ingress = ingress.filter(|i| i.ip_mode.as_deref() != Some("Proxy"));
    ingress.filter_map(|i| i.ip.as_deref()?.parse().ok())
}

/// The `externalIPs` that the cluster allows; they may not be anybody's else.
fn external_ips(service: &Service, cluster: &ClusterConfig) -> Vec<IpAddr> {
    let allowed = |ip: &IpAddr| cluster.external_ip_cidrs.iter().any(|range| range.contains(ip));
    let spec = service.spec.iter().flat_map(|s| s.external_ips.iter().flatten());
    spec.filter_map(|ip| ip.parse().ok()).filter(allowed).collect()
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
