//! EndpointSlices, Ingresses, IngressClasses; Endpoints, Services and NetworkPolicies are in files of their own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::{Ingress, IngressBackend, IngressClass, IngressRule};

use super::rules::{forbidden, invalid, one_of, port, port_name, protocol, required};
use super::{Causes, Object, names};

mod endpoints;
mod policy;
mod service;

const PATH_TYPES: [&str; 3] = ["Exact", "ImplementationSpecific", "Prefix"];
/// As Kubernetes: keeps one object small.
const ENDPOINTS: usize = 1000;

impl Object for EndpointSlice {
    const GENERATION: bool = true;

    fn set_defaults(&mut self) {
        for port in self.ports.iter_mut().flatten() {
            port.name.get_or_insert_default();
            port.protocol.get_or_insert_with(|| "TCP".to_owned());
        }
    }

    fn spec_differs(&self, old: &Self) -> bool {
        (&self.endpoints, &self.ports) != (&old.endpoints, &old.ports)
    }

    fn validate(&self, causes: &mut Causes) {
        if self.address_type.is_empty() {
            required("addressType", causes);
        } else {
            one_of("addressType", Some(&self.address_type), &["FQDN", "IPv4", "IPv6"], causes);
        }
        let endpoints = self.endpoints.as_deref().unwrap_or_default();
        if endpoints.len() > ENDPOINTS {
            let text =
                format!("Too many: {}: must have at most {ENDPOINTS} items", endpoints.len());
            causes.add("endpoints", text);
        }
        for (i, endpoint) in endpoints.iter().enumerate() {
            if endpoint.addresses.is_empty() {
                required(format!("endpoints[{i}].addresses"), causes);
            }
            for (j, text) in endpoint.addresses.iter().enumerate() {
                let field = format!("endpoints[{i}].addresses[{j}]");
                endpoint_address(&field, &self.address_type, text, causes);
            }
            if let Some(host) = endpoint.hostname.as_deref() {
                names::label(&format!("endpoints[{i}].hostname"), host, causes);
            }
        }
        for (i, p) in self.ports.iter().flatten().enumerate() {
            if let Some(number) = p.port {
                port(&format!("ports[{i}].port"), number, causes);
            }
            protocol(&format!("ports[{i}].protocol"), p.protocol.as_deref(), causes);
            if let Some(name) = p.name.as_deref().filter(|n| !n.is_empty()) {
                names::label(&format!("ports[{i}].name"), name, causes);
            }
        }
    }

    fn validate_update(&self, old: &Self, causes: &mut Causes) {
        if self.address_type != old.address_type {
            invalid("addressType", &self.address_type, "field is immutable", causes);
        }
    }
}

fn endpoint_address(field: &str, type_: &str, text: &str, causes: &mut Causes) {
    let good = match type_ {
        "IPv4" => text.parse::<Ipv4Addr>().is_ok(),
        "IPv6" => text.parse::<Ipv6Addr>().is_ok(),
        _ => mesh_model::names::is_subdomain(text),
    };
    if !good {
        invalid(field, text, &format!("must be a valid {type_} address"), causes);
        return;
    }
    if let Ok(address) = text.parse() {
        reachable(field, address, causes);
    }
}

/// Refuses an address that means another machine to everybody who uses it, or none.
fn reachable(field: &str, address: IpAddr, causes: &mut Causes) {
    let special = match address.to_canonical() {
        IpAddr::V4(a) => {
            a.is_loopback() || a.is_link_local() || a.is_unspecified() || a.is_multicast()
        }
        IpAddr::V6(a) => {
            a.is_loopback() || a.is_unicast_link_local() || a.is_unspecified() || a.is_multicast()
        }
    };
    if special {
        let rule = "may not be unspecified, in the loopback, link-local or multicast range";
        invalid(field, address.to_string(), rule, causes);
    }
}

impl Object for Ingress {
    const GENERATION: bool = true;
    const STATUS_CARRIES_LABELS: bool = true;

    fn prepare_create(&mut self) {
        self.status = None;
    }

    fn copy_status(&mut self, from: &Self) {
        self.status.clone_from(&from.status);
    }

    fn spec_differs(&self, old: &Self) -> bool {
        self.spec != old.spec
    }

    fn validate(&self, causes: &mut Causes) {
        let spec = self.spec.clone().unwrap_or_default();
        let rules = spec.rules.unwrap_or_default();
        if rules.is_empty() && spec.default_backend.is_none() {
            let text = "Invalid value: []: either `defaultBackend` or `rules` must be specified";
            causes.add("spec", text);
        }
        if let Some(found) = &spec.default_backend {
            backend("spec.defaultBackend", found, causes);
        }
        for (i, found) in rules.iter().enumerate() {
            rule(&format!("spec.rules[{i}]"), found, causes);
        }
        for (i, tls) in spec.tls.iter().flatten().enumerate() {
            for (j, name) in tls.hosts.iter().flatten().enumerate() {
                host(&format!("spec.tls[{i}].hosts[{j}]"), name, causes);
            }
            if let Some(secret) = tls.secret_name.as_deref().filter(|s| !s.is_empty()) {
                names::subdomain(&format!("spec.tls[{i}].secretName"), secret, causes);
            }
        }
        if let Some(class) = spec.ingress_class_name.as_deref() {
            names::subdomain("spec.ingressClassName", class, causes);
        }
    }
}

fn rule(field: &str, rule: &IngressRule, causes: &mut Causes) {
    if let Some(name) = rule.host.as_deref().filter(|h| !h.is_empty()) {
        host(&format!("{field}.host"), name, causes);
    }
    let Some(http) = &rule.http else { return };
    if http.paths.is_empty() {
        required(format!("{field}.http.paths"), causes);
    }
    for (i, path) in http.paths.iter().enumerate() {
        let at = |part: &str| format!("{field}.http.paths[{i}].{part}");
        if path.path_type.is_empty() {
            causes.add(at("pathType"), "Required value: pathType must be specified");
        } else {
            one_of(&at("pathType"), Some(&path.path_type), &PATH_TYPES, causes);
        }
        let text = path.path.as_deref().unwrap_or_default();
        if path.path_type != "ImplementationSpecific" || !text.is_empty() {
            path_text(&at("path"), text, causes);
        }
        backend(&at("backend"), &path.backend, causes);
    }
}

fn path_text(field: &str, path: &str, causes: &mut Causes) {
    if !path.starts_with('/') {
        invalid(field, path, "must be an absolute path", causes);
        return;
    }
    let parts = ["//", "/./", "/../", "%2f", "%2F"];
    if let Some(part) = parts.iter().find(|part| path.contains(**part)) {
        invalid(field, path, &format!("must not contain '{part}'"), causes);
    }
    if path.ends_with("/.") || path.ends_with("/..") {
        invalid(field, path, "must not end with '/.' or '/..'", causes);
    }
}

fn host(field: &str, name: &str, causes: &mut Causes) {
    if name.parse::<IpAddr>().is_ok() {
        invalid(field, name, "must be a DNS name, not an IP address", causes);
        return;
    }
    let (rest, wildcard) = match name.strip_prefix("*.") {
        Some(rest) => (rest, true),
        None => (name, false),
    };
    if name.contains('*') && !wildcard {
        let rule =
            "a wildcard DNS-1123 subdomain must start with '*.', followed by a valid DNS subdomain";
        invalid(field, name, rule, causes);
    } else {
        names::subdomain(field, rest, causes);
    }
}

fn backend(field: &str, backend: &IngressBackend, causes: &mut Causes) {
    let Some(service) = &backend.service else {
        match &backend.resource {
            Some(_) => forbidden(
                format!("{field}.resource"),
                "only backends of a service are served",
                causes,
            ),
            None => required(format!("{field}.service"), causes),
        }
        return;
    };
    if backend.resource.is_some() {
        causes.add(field, "Invalid value: \"\": cannot set both resource and service backends");
    }
    if service.name.is_empty() {
        required(format!("{field}.service.name"), causes);
    } else if !names::is_label_1035(&service.name) {
        invalid(format!("{field}.service.name"), &service.name, "must be a DNS-1035 label", causes);
    }
    let chosen = service.port.clone().unwrap_or_default();
    match (chosen.name.filter(|n| !n.is_empty()), chosen.number.filter(|n| *n != 0)) {
        (None, None) => {
            let text = "Required value: port name or number is required";
            causes.add(format!("{field}.service.port"), text);
        }
        (Some(_), Some(_)) => {
            let text = "Invalid value: \"\": cannot set both port name & port number";
            causes.add(format!("{field}.service.port"), text);
        }
        (Some(name), None) => port_name(&format!("{field}.service.port.name"), &name, causes),
        (None, Some(number)) => port(&format!("{field}.service.port.number"), number, causes),
    }
}

impl Object for IngressClass {
    const GENERATION: bool = true;

    fn spec_differs(&self, old: &Self) -> bool {
        self.spec != old.spec
    }

    fn validate(&self, causes: &mut Causes) {
        let controller = self.spec.as_ref().and_then(|s| s.controller.as_deref());
        match controller {
            None | Some("") => required("spec.controller", causes),
            Some(name) if !names::is_qualified(name) || !name.contains('/') => {
                invalid("spec.controller", name, "must be a domain-prefixed path", causes);
            }
            Some(_) => {}
        }
    }

    fn validate_update(&self, old: &Self, causes: &mut Causes) {
        let controller = |class: &Self| class.spec.as_ref().and_then(|s| s.controller.clone());
        if controller(self) != controller(old) {
            invalid("spec.controller", controller(self), "field is immutable", causes);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn causes<K: Object>(object: Value) -> Vec<String> {
        let mut object: K = serde_json::from_value(object).unwrap();
        object.set_defaults();
        let mut causes = Causes::default();
        object.validate(&mut causes);
        causes.into_vec().into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect()
    }

    fn path(path: Value) -> Value {
        json!({"spec": {"rules": [{"http": {"paths": [path]}}]}})
    }

    #[test]
    fn ingresses() {
        let backend = json!({"service": {"name": "s", "port": {"number": 80}}});
        let good = json!({"path": "/", "pathType": "Prefix", "backend": backend});
        assert_eq!(causes::<Ingress>(path(good.clone())), Vec::<String>::new());
        for (change, cause) in [
            (json!({"pathType": null}), "spec.rules[0].http.paths[0].pathType: Required value"),
            (json!({"pathType": "X"}), "spec.rules[0].http.paths[0].pathType: Unsupported value"),
            (
                json!({"path": "x"}),
                "spec.rules[0].http.paths[0].path: Invalid value: \"x\": must be an",
            ),
            (json!({"path": "/a/../b"}), "spec.rules[0].http.paths[0].path: Invalid value"),
            (
                json!({"backend": {"service": {"port": null}}}),
                "spec.rules[0].http.paths[0].backend.service.port: Required value",
            ),
            (
                json!({"backend": {"service": {"port": {"number": 70000}}}}),
                "spec.rules[0].http.paths[0].backend.service.port.number: Invalid value: 70000",
            ),
        ] {
            let mut changed = good.clone();
            json_patch::merge(&mut changed, &change);
            let found = causes::<Ingress>(path(changed));
            assert!(found.iter().any(|f| f.starts_with(cause)), "{cause}\n{found:?}");
        }
        assert_eq!(causes::<Ingress>(json!({})).len(), 1);
        for bad in ["10.0.0.1", "*", "a.*.b", "UPPER", "*.*.a"] {
            assert_eq!(
                causes::<Ingress>(json!({"spec": {"rules": [{"host": bad}]}})).len(),
                1,
                "{bad}"
            );
        }
        for fine in ["a.example", "*.a.example"] {
            assert!(
                causes::<Ingress>(json!({"spec": {"rules": [{"host": fine}]}})).is_empty(),
                "{fine}"
            );
        }
    }

    #[test]
    fn endpoint_slices() {
        let slice = |addresses: Value| {
            causes::<EndpointSlice>(
                json!({"addressType": "IPv4", "endpoints": [{"addresses": addresses}]}),
            )
        };
        assert!(slice(json!(["10.0.0.1"])).is_empty());
        for bad in ["fd00::1", "127.0.0.1", "x", "0.0.0.0"] {
            assert_eq!(slice(json!([bad])).len(), 1, "{bad}");
        }
        assert_eq!(slice(json!([])), ["endpoints[0].addresses: Required value"]);
    }
}
