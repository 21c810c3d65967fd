//! Services as clients outside see them: node ports, load balancer addresses, external addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Service, ServicePort};
use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::choice::{Reach, choose};
use super::claims::{self, Claims};
use super::directory::Entry;
use super::endpoints::{Candidate, Family, candidates, port_number};
use super::services::{cluster_ips, load_balancer_ips};
use crate::snapshot::{
    Announced, Backend, Edge, EdgeService, FrontendKind, HealthCheck, LocalNode, Protocol,
};
use crate::{ClusterConfig, NodeName, ObjectKey, wellknown};

/// The nodes that may answer for an address; nothing means all.
type Nodes = Option<BTreeSet<NodeName>>;

/// What one Service is to clients outside.
#[derive(Default)]
pub(super) struct Part {
    /// By address, protocol and port.
    pub(super) services: Vec<Arc<EdgeService>>,
    announced: BTreeMap<IpAddr, Nodes>,
    health_check: Option<HealthCheck>,
}

impl Part {
    /// What is as in `entry.made` is shared with it.
    pub(super) fn of(
        key: &ObjectKey,
        entry: &Entry,
        service: &Service,
        cluster: &ClusterConfig,
        local: &LocalNode,
    ) -> Self {
        let Some(one) = Outside::new(key, service, cluster) else { return Self::default() };
        let mut part = Self::default();
        let mut services = Vec::new();
        for port in service.spec.iter().flat_map(|s| s.ports.iter().flatten()) {
            for (vip, number, kind) in one.addresses(port, local) {
                let candidates = candidates(&entry.slices, port, Family::of(&vip));
                // The same on every node, so that each would send a client to the same place.
                let anywhere = choose(&candidates, Reach::Anywhere, local).backends;
                if kind == FrontendKind::External && one.is_announced(vip) {
                    add(part.announced.entry(vip).or_default(), one.local, &anywhere);
                }
                let backends = one.backends(&candidates, anywhere, local);
                services.extend(one.service(port, (vip, number, kind), backends, local));
            }
        }
        part.health_check = one.health_check(&entry.slices, local);
        part.services = claims::of_service(services, &entry.made.edge.services);
        part
    }
}

/// With traffic that stays on a node, the nodes that have backends: of any of the ports.
fn add(nodes: &mut Nodes, local: bool, backends: &[Backend]) {
    if local {
        let with = backends.iter().filter_map(|backend| backend.node.clone());
        nodes.get_or_insert_default().extend(with);
    }
}

fn is_on(backend: &Backend, local: &LocalNode) -> bool {
    backend.node.as_ref() == Some(&local.name)
}

/// The edge as it was made last, and what of it is whose.
#[derive(Default)]
pub(super) struct Memory {
    services: Claims<EdgeService>,
    announced: BTreeMap<ObjectKey, BTreeMap<IpAddr, Nodes>>,
    health_checks: BTreeMap<ObjectKey, HealthCheck>,
    /// Whether one of these two has changed.
    stale: bool,
    edge: Arc<Edge>,
}

impl Memory {
    pub(super) fn edge(&self) -> &Arc<Edge> {
        &self.edge
    }

    /// Takes over what one Service announces and tells.
    pub(super) fn follow(&mut self, key: &ObjectKey, before: &Part, after: &Part) {
        if before.announced != after.announced {
            self.announced.insert(key.clone(), after.announced.clone());
            self.stale = true;
        }
        if before.health_check != after.health_check {
            match after.health_check.clone() {
                Some(check) => drop(self.health_checks.insert(key.clone(), check)),
                None => drop(self.health_checks.remove(key)),
            }
            self.stale = true;
        }
    }

    /// Takes over what services have and had.
    pub(super) fn change(&mut self, gone: &[Arc<EdgeService>], come: &[Arc<EdgeService>]) {
        self.services.change(gone, come);
    }

    /// Puts all together.
    pub(super) fn settle(&mut self) {
        if !Arc::ptr_eq(&self.edge.services, self.services.winners()) {
            Arc::make_mut(&mut self.edge).services = Arc::clone(self.services.winners());
        }
        if !std::mem::take(&mut self.stale) {
            return;
        }
        self.announced.retain(|_, addresses| !addresses.is_empty());
        let mut announced: BTreeMap<IpAddr, Nodes> = BTreeMap::new();
        for (address, nodes) in self.announced.values().flatten() {
            let all = announced.entry(*address).or_default();
            if let Some(nodes) = nodes {
                all.get_or_insert_default().extend(nodes.iter().cloned());
            }
        }
        let mut health_checks: Vec<HealthCheck> = self.health_checks.values().cloned().collect();
        health_checks.sort();
        health_checks.dedup_by_key(|check| check.port);
        let edge = Arc::make_mut(&mut self.edge);
        edge.health_checks = health_checks;
        edge.announced =
            announced.into_iter().map(|(address, nodes)| Announced { address, nodes }).collect();
    }
}

/// A Service that clients outside may use.
struct Outside<'a> {
    key: &'a ObjectKey,
    service: &'a Service,
    /// `externalTrafficPolicy: Local`
    local: bool,
    /// External addresses that somebody with a say over the cluster has allowed.
    external: Vec<IpAddr>,
}

impl<'a> Outside<'a> {
    fn new(key: &'a ObjectKey, service: &'a Service, cluster: &ClusterConfig) -> Option<Self> {
        let spec = service.spec.as_ref()?;
        // Every node answers names itself.
        if *key == ObjectKey::new(wellknown::SYSTEM_NAMESPACE, wellknown::DNS_SERVICE) {
            return None;
        }
        let allowed = &cluster.external_ip_cidrs;
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
            // What is none of its families is left to processes of the node.
            let vips = cluster_ips(self.service);
            let served = |a: &&IpAddr| vips.iter().any(|vip| vip.is_ipv4() == a.is_ipv4());
            let own = local.addresses.iter().filter(served);
            all.extend(own.map(|a| (*a, node_port, FrontendKind::NodePort)));
        }
        if let Some(number) = port_number(port.port) {
            let given = load_balancer_ips(self.service).filter(|_| self.is_load_balancer());
            let vips: BTreeSet<IpAddr> = given.chain(self.external.iter().copied()).collect();
            all.extend(vips.into_iter().map(|vip| (vip, number, FrontendKind::External)));
        }
        all
    }

    /// Those that are anywhere; but where traffic stays on a node that has nothing ready, what still serves there while it
    /// terminates is better than nothing. It is for who comes all the same: the node neither announces nor praises itself for it.
    fn backends(
        &self,
        candidates: &[Candidate<'_>],
        anywhere: Vec<Backend>,
        local: &LocalNode,
    ) -> Vec<Backend> {
        let mut backends = anywhere;
        if self.local && !backends.iter().any(|backend| is_on(backend, local)) {
            backends.extend(choose(candidates, Reach::Local, local).backends);
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
        let sources = sources.filter_map(|text| text.trim().parse::<IpNet>().ok());
        // The tables hold IPv4 inside of IPv6, and an address has clients of its own family only.
        let sources = sources.filter(|net| net.addr().is_ipv4() == vip.is_ipv4());
        let sources: BTreeSet<IpNet> = sources.map(|net| net.trunc()).collect();
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

    fn health_check(
        &self,
        slices: &[Arc<EndpointSlice>],
        local: &LocalNode,
    ) -> Option<HealthCheck> {
        let port = self.service.spec.as_ref()?.health_check_node_port.and_then(port_number)?;
        let wanted = self.is_load_balancer() && self.local;
        wanted.then(|| HealthCheck {
            port,
            service: self.key.clone(),
            local_endpoints: self.ready_here(slices, local),
        })
    }

    /// How many endpoints of this node new clients are for, by whatever address they come.
    fn ready_here(&self, slices: &[Arc<EndpointSlice>], local: &LocalNode) -> usize {
        let ports = self.service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
        let of_family = |family| {
            let all = ports.clone().flat_map(|port| candidates(slices, port, family));
            let here = all.filter(|c| c.is_open() && c.is_on(&local.name));
            here.map(|c| c.address).collect::<BTreeSet<_>>().len()
        };
        // A pod with an address of each family counts once.
        of_family(Family::V4).max(of_family(Family::V6))
    }
}
