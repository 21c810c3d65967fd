//! What the node's proxy serves: Ingress rules and their certificates (networking.k8s.io/v1).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Secret, Service, ServicePort};
use k8s_openapi::api::networking::v1::{HTTPIngressPath, Ingress, IngressBackend};

use super::Objects;
use super::choice::{Reach, choose};
use super::directory::Directory;
use super::endpoints::{Family, candidates, port_number};
use crate::snapshot::{Certificate, HttpRoute, L7Config, LocalNode, PathMatch, Protocol};
use crate::{ObjectKey, wellknown};

/// The annotation that named the class before `spec.ingressClassName` existed; charts still set it.
const CLASS_ANNOTATION: &str = "kubernetes.io/ingress.class";

/// What follows from one Ingress.
struct Made {
    ingress: Arc<Ingress>,
    routes: Vec<HttpRoute>,
    certificates: Vec<Certificate>,
}

/// The configuration as it was made last, and of what.
#[derive(Default)]
pub(super) struct Memory {
    made: Vec<Made>,
    /// Services that routes lead to, whether they exist or not.
    meant: BTreeSet<ObjectKey>,
    config: Arc<L7Config>,
}

impl Memory {
    pub(super) fn config(&self) -> &Arc<L7Config> {
        &self.config
    }

    /// `routes` when ingresses or secrets have changed, `anew` when all routes may be others; `changed` are services.
    pub(super) fn follow(
        &mut self,
        objects: &Objects,
        directory: &Directory,
        (routes, anew): (bool, bool),
        local: &LocalNode,
        changed: &BTreeSet<ObjectKey>,
    ) {
        if !routes && !anew && changed.iter().all(|key| !self.meant.contains(key)) {
            return;
        }
        let secrets: BTreeMap<ObjectKey, &Secret> = match routes {
            true => objects.secrets.iter().filter_map(|s| Some((secret_key(s)?, &**s))).collect(),
            false => BTreeMap::new(),
        };
        let before = std::mem::take(&mut self.made).into_iter();
        let mut before: HashMap<*const Ingress, Made> =
            before.map(|made| (Arc::as_ptr(&made.ingress), made)).collect();
        for ingress in in_order(&objects.ingresses) {
            let old = before.remove(&Arc::as_ptr(ingress));
            let stale = |made: &Made| made.routes.iter().any(|r| changed.contains(&r.service));
            let (kept, certificates) = match old {
                Some(old) if anew || stale(&old) => (None, Some(old.certificates)),
                Some(old) => (Some(old.routes), Some(old.certificates)),
                None => (None, None),
            };
            let resolver = Resolver { directory, ingress, local };
            self.made.push(Made {
                routes: kept.unwrap_or_else(|| resolver.routes()),
                certificates: certificates
                    .filter(|_| !routes)
                    .unwrap_or_else(|| self::certificates(ingress, &secrets)),
                ingress: Arc::clone(ingress),
            });
        }
        let all = || self.made.iter().flat_map(|made| &made.routes);
        self.meant = all().map(|route| route.service.clone()).collect();
        let config = L7Config {
            routes: all().cloned().collect(),
            certificates: self.made.iter().flat_map(|made| &made.certificates).cloned().collect(),
        };
        super::compiler::share(&mut self.config, config);
    }
}

/// Of two equal rules the older Ingress wins, so that nobody takes a route over by adding one.
fn in_order(ingresses: &[Arc<Ingress>]) -> Vec<&Arc<Ingress>> {
    let mut ours: Vec<&Arc<Ingress>> = ingresses.iter().filter(|i| is_ours(i)).collect();
    let order = |i: &Ingress| {
        let m = &i.metadata;
        (m.creation_timestamp.clone(), m.namespace.clone(), m.name.clone())
    };
    ours.sort_by_cached_key(|ingress| order(ingress));
    ours
}

fn is_ours(ingress: &Ingress) -> bool {
    let by_field = ingress.spec.as_ref().and_then(|s| s.ingress_class_name.as_deref());
    let annotations = ingress.metadata.annotations.as_ref();
    let by_annotation = annotations.and_then(|a| a.get(CLASS_ANNOTATION)).map(String::as_str);
    by_field.or(by_annotation).is_none_or(|class| class == wellknown::INGRESS_CLASS)
}

fn secret_key(secret: &Secret) -> Option<ObjectKey> {
    Some(ObjectKey::new(secret.metadata.namespace.clone()?, secret.metadata.name.clone()?))
}

struct Resolver<'a> {
    directory: &'a Directory,
    ingress: &'a Ingress,
    local: &'a LocalNode,
}

impl Resolver<'_> {
    fn routes(&self) -> Vec<HttpRoute> {
        let Some(spec) = &self.ingress.spec else { return vec![] };
        let mut routes = Vec::new();
        for rule in spec.rules.iter().flatten() {
            let host = rule.host.clone().filter(|h| !h.is_empty());
            for path in rule.http.iter().flat_map(|http| &http.paths) {
                routes.extend(self.route(host.clone(), path_match(path), &path.backend));
            }
        }
        if let Some(backend) = &spec.default_backend {
            routes.extend(self.route(None, PathMatch::Prefix("/".to_owned()), backend));
        }
        routes
    }

    fn route(
        &self,
        host: Option<String>,
        path: PathMatch,
        backend: &IngressBackend,
    ) -> Option<HttpRoute> {
        let metadata = &self.ingress.metadata;
        let namespace = metadata.namespace.as_deref()?;
        let target = backend.service.as_ref()?;
        let service = ObjectKey::new(namespace, target.name.clone());
        let wanted = target.port.as_ref();
        let number = wanted.and_then(|p| p.number).and_then(port_number);
        let name = wanted.and_then(|p| p.name.as_deref());
        let port = self.directory.service(&service).and_then(|s| service_port(s, number, name));
        let backends = port.map(|p| self.backends(&service, p)).unwrap_or_default();
        Some(HttpRoute {
            ingress: ObjectKey::new(namespace, metadata.name.clone()?),
            host,
            path,
            port: port.and_then(|p| port_number(p.port)).or(number).unwrap_or(0),
            service,
            backends,
        })
    }

    /// The endpoints of one family: a pod of a dual-stack service must not count twice.
    fn backends(&self, service: &ObjectKey, port: &ServicePort) -> Vec<SocketAddr> {
        let of = |family| {
            let candidates = candidates(self.directory.slices(service), port, family);
            choose(&candidates, Reach::Cluster, self.local).backends
        };
        let v4 = of(Family::V4);
        let chosen = if v4.is_empty() { of(Family::V6) } else { v4 };
        chosen.into_iter().map(|b| SocketAddr::new(b.address, b.port)).collect()
    }
}

/// The port that is meant. One number may stand for two of them, such as 443 of TCP and of UDP: routes lead to TCP.
fn service_port<'a>(
    service: &'a Service,
    number: Option<u16>,
    name: Option<&str>,
) -> Option<&'a ServicePort> {
    let ports = service.spec.as_ref()?.ports.iter().flatten();
    let mut streams =
        ports.filter(|p| Protocol::parse(p.protocol.as_deref()) == Some(Protocol::Tcp));
    streams.find(|p| match (number, name) {
        (Some(number), _) => port_number(p.port) == Some(number),
        (None, Some(name)) => p.name.as_deref() == Some(name),
        (None, None) => false,
    })
}

fn path_match(path: &HTTPIngressPath) -> PathMatch {
    let text = path.path.clone().filter(|p| !p.is_empty()).unwrap_or_else(|| "/".to_owned());
    match path.path_type.as_str() {
        "Exact" => PathMatch::Exact(text),
        _ => PathMatch::Prefix(text),
    }
}

fn certificates(ingress: &Ingress, secrets: &BTreeMap<ObjectKey, &Secret>) -> Vec<Certificate> {
    let namespace = ingress.metadata.namespace.as_deref().unwrap_or_default();
    let tls = ingress.spec.iter().flat_map(|s| s.tls.iter().flatten());
    tls.filter_map(|entry| {
        let key = ObjectKey::new(namespace, entry.secret_name.clone()?);
        let data = secrets.get(&key)?.data.as_ref()?;
        let pem = |name| String::from_utf8(data.get(name)?.0.clone()).ok();
        Some(Certificate {
            hosts: entry.hosts.clone().unwrap_or_default(),
            chain_pem: pem("tls.crt")?,
            key_pem: pem("tls.key")?,
            secret: key,
        })
    })
    .collect()
}
