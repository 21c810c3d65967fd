//! What the node's proxy serves: Ingress rules and their certificates (networking.k8s.io/v1).

use std::collections::BTreeMap;
use std::net::SocketAddr;

use k8s_openapi::api::core::v1::{Secret, Service, ServicePort};
use k8s_openapi::api::networking::v1::{HTTPIngressPath, Ingress, IngressBackend};

use super::Objects;
use super::choice::{Reach, choose};
use super::endpoints::{Endpoints, Family, port_number};
use super::services::key;
use crate::snapshot::{Certificate, HttpRoute, L7Config, LocalNode, PathMatch};
use crate::{ObjectKey, wellknown};

/// The annotation that named the class before `spec.ingressClassName` existed; charts still set it.
const CLASS_ANNOTATION: &str = "kubernetes.io/ingress.class";

pub(super) fn config(objects: &Objects, endpoints: &Endpoints<'_>, local: &LocalNode) -> L7Config {
    let services: BTreeMap<ObjectKey, &Service> =
        objects.services.iter().filter_map(|s| Some((key(s)?, s.as_ref()))).collect();
    let secrets: BTreeMap<ObjectKey, &Secret> =
        objects.secrets.iter().filter_map(|s| Some((secret_key(s)?, s.as_ref()))).collect();
    let mut ingresses: Vec<&Ingress> =
        objects.ingresses.iter().map(AsRef::as_ref).filter(|i| is_ours(i)).collect();
    // Of two equal rules the older Ingress wins, so that nobody takes a route over by adding one.
    ingresses.sort_by_key(|i| {
        let m = &i.metadata;
        (m.creation_timestamp.clone(), m.namespace.clone(), m.name.clone())
    });
    let mut config = L7Config::default();
    for ingress in ingresses {
        let resolver = Resolver { services: &services, endpoints, ingress, local };
        config.routes.extend(resolver.routes());
        config.certificates.extend(certificates(ingress, &secrets));
    }
    config
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
    services: &'a BTreeMap<ObjectKey, &'a Service>,
    endpoints: &'a Endpoints<'a>,
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
        let port = self.services.get(&service).and_then(|s| service_port(s, number, name));
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
            let (namespace, name) = (&service.namespace, &service.name);
            let candidates = self.endpoints.candidates(namespace, name, port, family);
            choose(&candidates, Reach::Cluster, self.local).backends
        };
        let v4 = of(Family::V4);
        let chosen = if v4.is_empty() { of(Family::V6) } else { v4 };
        chosen.into_iter().map(|b| SocketAddr::new(b.address, b.port)).collect()
    }
}

fn service_port<'a>(
    service: &'a Service,
    number: Option<u16>,
    name: Option<&str>,
) -> Option<&'a ServicePort> {
    service.spec.as_ref()?.ports.iter().flatten().find(|p| match (number, name) {
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
