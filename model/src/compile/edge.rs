//! Services as clients outside see them: node ports, load balancer addresses, external addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Service, ServicePort};

use super::Objects;
use super::choice::{Reach, choose};
use super::endpoints::{Endpoints, Family, port_number};
use super::services::{key, load_balancer_ips};
use crate::snapshot::{
    Announced, Backend, Edge, EdgeService, FrontendKind, HealthCheck, LocalNode, Protocol,
};
use crate::{NodeName, ObjectKey, wellknown};

pub(super) fn edge(objects: &Objects, endpoints: &Endpoints<'_>, local: &LocalNode) -> Edge {
    let mut edge = Edge::default();
    let mut announced: BTreeMap<IpAddr, Candidates> = BTreeMap::new();
    for service in &objects.services {
        let Some(one) = Outside::new(objects, service) else { continue };
        let (mut here, mut here6) = (BTreeSet::new(), BTreeSet::new());
        for port in service.spec.iter().flat_map(|s| s.ports.iter().flatten()) {
            for (vip, number, kind) in one.addresses(port, local) {
                let found = one.backends(endpoints, port, Family::of(&vip), local);
                if kind == FrontendKind::External && one.is_announced(vip) {
                    announced.entry(vip).or_default().add(one.local, &found);
                }
                let family = if vip.is_ipv4() { &mut here } else { &mut here6 };
                family.extend(found.iter().filter(|b| is_on(b, local)).map(|b| b.address));
                edge.services.extend(one.service(port, (vip, number, kind), found, local));
            }
        }
        // A pod with an address of each family counts once.
        edge.health_checks.extend(one.health_check(here.len().max(here6.len())));
    }
    edge.services.sort_by_key(|s| (s.vip, s.protocol, s.port, s.kind, s.service.clone()));
    edge.services.dedup_by(|b, a| (a.vip, a.protocol, a.port) == (b.vip, b.protocol, b.port));
    edge.health_checks.sort();
    edge.health_checks.dedup_by_key(|check| check.port);
    edge.announced = announced
        .into_iter()
        .map(|(address, Candidates(nodes))| Announced { address, nodes })
        .collect();
    edge
}

fn is_on(backend: &Backend, local: &LocalNode) -> bool {
    backend.node.as_ref() == Some(&local.name)
}

/// The nodes that may answer for an address; nothing means all.
#[derive(Default)]
struct Candidates(Option<BTreeSet<NodeName>>);

impl Candidates {
    /// With traffic that stays on a node, the nodes that have backends: of any of the ports.
    fn add(&mut self, local: bool, backends: &[Backend]) {
        if local {
            let nodes = backends.iter().filter_map(|backend| backend.node.clone());
            self.0.get_or_insert_default().extend(nodes);
        }
    }
}

/// A Service that clients outside may use.
struct Outside<'a> {
    key: ObjectKey,
    service: &'a Service,
    /// `externalTrafficPolicy: Local`
    local: bool,
    /// External addresses that somebody with a say over the cluster has allowed.
    external: Vec<IpAddr>,
}

impl<'a> Outside<'a> {
    fn new(objects: &Objects, service: &'a Service) -> Option<Self> {
        let (key, spec) = (key(service)?, service.spec.as_ref()?);
        // Every node answers names itself.
        if key == ObjectKey::new(wellknown::SYSTEM_NAMESPACE, wellknown::DNS_SERVICE) {
            return None;
        }
        let allowed = &objects.cluster.external_ip_cidrs;
        let external = spec.external_ips.iter().flatten().filter_map(|text| text.parse().ok());
        let external = external.filter(|ip| allowed.iter().any(|net| net.contains(ip))).collect();
        let local = spec.external_traffic_policy.as_deref() == Some("Local");
        Some(Self { key, service, local, external })
    }

    fn is_load_balancer(&self) -> bool {
        let spec = self.service.spec.as_ref();
        spec.and_then(|spec| spec.type_.as_deref()) == Some("LoadBalancer")
    }

    /// Only addresses that this cluster has given: those of another class are somebody else's to announce.
    fn is_announced(&self, vip: IpAddr) -> bool {
        let class = self.service.spec.as_ref().and_then(|s| s.load_balancer_class.as_deref());
        self.is_load_balancer()
            && class.is_none_or(|class| class == wellknown::LOAD_BALANCER_CLASS)
            && load_balancer_ips(self.service).any(|ip| ip == vip)
    }

    fn addresses(&self, port: &ServicePort, local: &LocalNode) -> Vec<(IpAddr, u16, FrontendKind)> {
        let mut all = Vec::new();
        if let Some(node_port) = port.node_port.and_then(port_number) {
            all.extend(local.addresses.iter().map(|a| (*a, node_port, FrontendKind::NodePort)));
        }
        if let Some(number) = port_number(port.port) {
            let given = load_balancer_ips(self.service).filter(|_| self.is_load_balancer());
            let vips: BTreeSet<IpAddr> = given.chain(self.external.iter().copied()).collect();
            all.extend(vips.into_iter().map(|vip| (vip, number, FrontendKind::External)));
        }
        all
    }

    /// The same on every node, so that each would send a client to the same place; but where traffic stays on a node
    /// that has nothing ready, what still serves there while it terminates is better than nothing.
    fn backends(
        &self,
        endpoints: &Endpoints<'_>,
        port: &ServicePort,
        family: Family,
        local: &LocalNode,
    ) -> Vec<Backend> {
        let ObjectKey { namespace, name } = &self.key;
        let candidates = endpoints.candidates(namespace, name, port, family);
        let mut backends = choose(&candidates, Reach::Anywhere, local).backends;
        if self.local && !backends.iter().any(|backend| is_on(backend, local)) {
            backends.extend(choose(&candidates, Reach::Local, local).backends);
        }
        backends
    }

    fn service(
        &self,
        port: &ServicePort,
        (vip, number, kind): (IpAddr, u16, FrontendKind),
        mut backends: Vec<Backend>,
        local: &LocalNode,
    ) -> Option<EdgeService> {
        let protocol = Protocol::parse(port.protocol.as_deref())?;
        let elsewhere = self.local && !backends.is_empty();
        if self.local {
            backends.retain(|backend| is_on(backend, local));
        }
        let spec = self.service.spec.as_ref()?;
        let sources = spec.load_balancer_source_ranges.iter().flatten();
        let sources: BTreeSet<IpNet> = sources.filter_map(|s| s.trim().parse().ok()).collect();
        let restricted = kind == FrontendKind::External
            && self.is_load_balancer()
            && spec.load_balancer_source_ranges.iter().flatten().next().is_some();
        Some(EdgeService {
            vip,
            protocol,
            port: number,
            kind,
            service: self.key.clone(),
            affinity: spec.session_affinity.as_deref() == Some("ClientIP"),
            local_only: elsewhere,
            sources: restricted.then_some(sources),
            backends,
        })
    }

    fn health_check(&self, local_endpoints: usize) -> Option<HealthCheck> {
        let port = self.service.spec.as_ref()?.health_check_node_port.and_then(port_number)?;
        let wanted = self.is_load_balancer() && self.local;
        wanted.then(|| HealthCheck { port, service: self.key.clone(), local_endpoints })
    }
}
