//! Services.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec, SessionAffinityConfig};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::super::rules::{
    duplicate, forbidden, invalid, one_of, port, port_or_name, protocol, required,
};
use super::super::{Causes, Object, names};

const AFFINITY_SECS: i32 = 10_800;
const LONGEST_AFFINITY_SECS: i32 = 86_400;
const TYPES: [&str; 4] = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];

impl Object for Service {
    const STATUS_CARRIES_LABELS: bool = true;

    fn prepare_create(&mut self) {
        self.status = None;
    }

    fn copy_status(&mut self, from: &Self) {
        self.status.clone_from(&from.status);
    }

    fn set_defaults(&mut self) {
        if let Some(spec) = &mut self.spec {
            defaults(spec);
        }
        // Clients expect the field.
        self.status.get_or_insert_default().load_balancer.get_or_insert_default();
    }

    fn drop_superfluous(&mut self, old: &Self) {
        if let (Some(spec), Some(old)) = (&mut self.spec, &old.spec) {
            drop_of_former_type(spec, old);
        }
    }

    fn validate(&self, causes: &mut Causes) {
        match &self.spec {
            Some(found) => spec(found, causes),
            None => causes.add("spec.ports", "Required value"),
        }
    }

    fn validate_update(&self, old: &Self, causes: &mut Causes) {
        let (Some(new), Some(old)) = (&self.spec, &old.spec) else { return };
        let (class, before) = (&new.load_balancer_class, &old.load_balancer_class);
        if type_of(new) == "LoadBalancer" && type_of(old) == "LoadBalancer" && class != before {
            let value = class.as_deref().unwrap_or_default();
            invalid("spec.loadBalancerClass", value, "may not change once set", causes);
        }
    }
}

/// A patch of the type, or of a traffic policy, brings along what the API had filled in for the one before. Whoever wrote another
/// value means it, and is told when it cannot be.
fn drop_of_former_type(spec: &mut ServiceSpec, old: &ServiceSpec) {
    if !is_for_clients_outside(spec) && spec.external_traffic_policy == old.external_traffic_policy
    {
        spec.external_traffic_policy = None;
    }
    let balancer = type_of(spec) == "LoadBalancer";
    let local = spec.external_traffic_policy.as_deref() == Some("Local");
    if !(balancer && local) && spec.health_check_node_port == old.health_check_node_port {
        spec.health_check_node_port = None;
    }
    if !balancer && spec.load_balancer_class == old.load_balancer_class {
        spec.load_balancer_class = None;
    }
    if type_of(spec) != "ExternalName" && spec.external_name == old.external_name {
        spec.external_name = None;
    }
}

/// Whether it has addresses that `externalTrafficPolicy` is about.
fn is_for_clients_outside(spec: &ServiceSpec) -> bool {
    matches!(type_of(spec), "NodePort" | "LoadBalancer")
        || spec.external_ips.as_ref().is_some_and(|ips| !ips.is_empty())
}

fn text(field: &mut Option<String>, value: &str) {
    if field.as_deref().unwrap_or_default().is_empty() {
        *field = Some(value.to_owned());
    }
}

fn type_of(spec: &ServiceSpec) -> &str {
    spec.type_.as_deref().unwrap_or("ClusterIP")
}

fn defaults(spec: &mut ServiceSpec) {
    text(&mut spec.type_, "ClusterIP");
    text(&mut spec.session_affinity, "None");
    if spec.session_affinity.as_deref() == Some("ClientIP") {
        let config =
            spec.session_affinity_config.get_or_insert_with(SessionAffinityConfig::default);
        config.client_ip.get_or_insert_default().timeout_seconds.get_or_insert(AFFINITY_SECS);
    } else {
        spec.session_affinity_config = None;
    }
    let type_ = type_of(spec).to_owned();
    // As with all of its fields that have no null: empty is not set. Charts write it for any type.
    spec.external_traffic_policy.take_if(|policy| policy.is_empty());
    if type_ != "ExternalName" {
        text(&mut spec.internal_traffic_policy, "Cluster");
    }
    if matches!(type_.as_str(), "NodePort" | "LoadBalancer") {
        text(&mut spec.external_traffic_policy, "Cluster");
    }
    if type_ == "LoadBalancer" {
        spec.allocate_load_balancer_node_ports.get_or_insert(true);
    } else {
        spec.allocate_load_balancer_node_ports = None;
    }
    for port in spec.ports.iter_mut().flatten() {
        text(&mut port.protocol, "TCP");
        let unset = match &port.target_port {
            None | Some(IntOrString::Int(0)) => true,
            Some(IntOrString::String(name)) => name.is_empty(),
            Some(IntOrString::Int(_)) => false,
        };
        if unset {
            port.target_port = Some(IntOrString::Int(port.port));
        }
    }
}

fn spec(spec: &ServiceSpec, causes: &mut Causes) {
    let type_ = type_of(spec);
    one_of("spec.type", spec.type_.as_deref(), &TYPES, causes);
    let affinity = spec.session_affinity.as_deref();
    one_of("spec.sessionAffinity", affinity, &["ClientIP", "None"], causes);
    let secs =
        spec.session_affinity_config.as_ref().and_then(|c| c.client_ip.as_ref()?.timeout_seconds);
    if let Some(secs) = secs.filter(|s| !(1..=LONGEST_AFFINITY_SECS).contains(s)) {
        let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
        invalid(field, secs, "must be greater than 0 and less than 86400", causes);
    }
    let policies = ["Cluster", "Local"];
    let (internal, external) = (&spec.internal_traffic_policy, &spec.external_traffic_policy);
    one_of("spec.internalTrafficPolicy", internal.as_deref(), &policies, causes);
    one_of("spec.externalTrafficPolicy", external.as_deref(), &policies, causes);
    let near = ["PreferClose", "PreferSameNode", "PreferSameZone"];
    one_of("spec.trafficDistribution", spec.traffic_distribution.as_deref(), &near, causes);
    names::labels("spec.selector", spec.selector.as_ref(), causes);
    let headless = spec.cluster_ip.as_deref() == Some("None");
    match type_ {
        "ExternalName" => external_name(spec, headless, causes),
        "NodePort" | "LoadBalancer" if headless => {
            let rule = format!("may not be set to 'None' for {type_} services");
            invalid("spec.clusterIPs[0]", "None", &rule, causes);
        }
        _ => {}
    }
    let found = spec.ports.as_deref().unwrap_or_default();
    if found.is_empty() && !headless && type_ != "ExternalName" {
        required("spec.ports", causes);
    }
    ports(found, causes);
    addresses(spec, causes);
}

fn external_name(spec: &ServiceSpec, headless: bool, causes: &mut Causes) {
    let name = spec.external_name.as_deref().unwrap_or_default();
    let name = name.strip_suffix('.').unwrap_or(name);
    if name.is_empty() {
        required("spec.externalName", causes);
    } else {
        names::subdomain("spec.externalName", name, causes);
    }
    let chosen = spec.cluster_ip.as_deref().is_some_and(|ip| !ip.is_empty());
    if chosen && !headless {
        forbidden("spec.clusterIPs[0]", "may not be set for ExternalName services", causes);
    }
}

fn ports(ports: &[ServicePort], causes: &mut Causes) {
    let (mut seen_names, mut seen_ports) = (BTreeSet::new(), BTreeSet::new());
    for (i, p) in ports.iter().enumerate() {
        let at = |part: &str| format!("spec.ports[{i}].{part}");
        match p.name.as_deref().filter(|n| !n.is_empty()) {
            None if ports.len() > 1 => required(at("name"), causes),
            None => {}
            Some(name) => {
                names::label(&at("name"), name, causes);
                if !seen_names.insert(name) {
                    duplicate(at("name"), name, causes);
                }
            }
        }
        port(&at("port"), p.port, causes);
        protocol(&at("protocol"), p.protocol.as_deref(), causes);
        if let Some(target) = &p.target_port {
            port_or_name(&at("targetPort"), target, causes);
        }
        if !seen_ports.insert((p.port, p.protocol.as_deref().unwrap_or("TCP"))) {
            duplicate(at("port"), p.port, causes);
        }
    }
}

fn addresses(spec: &ServiceSpec, causes: &mut Causes) {
    for (i, text) in spec.external_ips.iter().flatten().enumerate() {
        let field = format!("spec.externalIPs[{i}]");
        match text.parse::<IpAddr>() {
            Err(_) => invalid(
                field,
                text,
                "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
                causes,
            ),
            Ok(ip) if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() => {
                invalid(
                    field,
                    text,
                    "may not be unspecified, in the loopback or multicast range",
                    causes,
                );
            }
            Ok(_) => {}
        }
    }
    for (i, text) in spec.load_balancer_source_ranges.iter().flatten().enumerate() {
        if text.trim().parse::<IpNet>().is_err() {
            let rule = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
            invalid(format!("spec.loadBalancerSourceRanges[{i}]"), text, rule, causes);
        }
    }
    if spec.external_traffic_policy.is_some() && !is_for_clients_outside(spec) {
        let rule = "may only be set for externally-accessible services";
        let value = spec.external_traffic_policy.as_deref().unwrap_or_default();
        invalid("spec.externalTrafficPolicy", value, rule, causes);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn service(spec: Value) -> Service {
        let value = json!({"metadata": {"name": "s"}, "spec": spec});
        let mut service: Service = serde_json::from_value(value).unwrap();
        service.set_defaults();
        service
    }

    #[test]
    fn defaults() {
        let spec =
            service(json!({"ports": [{"port": 80}], "sessionAffinity": "ClientIP"})).spec.unwrap();
        assert_eq!(spec.type_.as_deref(), Some("ClusterIP"));
        assert_eq!(spec.ports.unwrap()[0].target_port, Some(IntOrString::Int(80)));
        let affinity = spec.session_affinity_config.unwrap().client_ip.unwrap();
        assert_eq!(affinity.timeout_seconds, Some(10_800));
    }

    #[test]
    fn an_empty_text_is_not_set() {
        let spec = json!({"type": "", "clusterIP": "", "sessionAffinity": "", "externalName": "", "loadBalancerIP": "",
            "externalTrafficPolicy": "", "ports": [{"name": "", "port": 80, "protocol": "", "targetPort": ""}]});
        let mut causes = Causes::default();
        let service = service(spec);
        service.validate(&mut causes);
        let texts: Vec<String> = causes.into_vec().into_iter().map(|c| c.message).collect();
        assert_eq!(texts, Vec::<String>::new());
        assert_eq!(service.spec.unwrap().external_traffic_policy, None);
    }

    #[test]
    fn an_update_to_another_type_drops_what_the_former_one_had() {
        let balancer = || {
            service(
                json!({"type": "LoadBalancer", "ports": [{"port": 80}], "externalTrafficPolicy": "Local",
                "healthCheckNodePort": 30999, "loadBalancerClass": "a.example/b"}),
            )
        };
        let changed = |change: Value| {
            let mut spec = serde_json::to_value(balancer().spec.unwrap()).unwrap();
            json_patch::merge(&mut spec, &change);
            let mut new = service(Value::Null);
            new.spec = serde_json::from_value(spec).unwrap();
            new.drop_superfluous(&balancer());
            new.set_defaults();
            let mut causes = Causes::default();
            new.validate(&mut causes);
            new.validate_update(&balancer(), &mut causes);
            let spec = new.spec.unwrap();
            let left = (spec.external_traffic_policy, spec.health_check_node_port);
            (left, spec.load_balancer_class.is_some(), causes.into_vec().len())
        };
        for plain in [
            json!({"type": "ClusterIP"}),
            json!({"type": "ExternalName", "externalName": "a.example"}),
        ] {
            assert_eq!(changed(plain), ((None, None), false, 0));
        }
        let cluster = || Some("Cluster".to_owned());
        assert_eq!(
            changed(json!({"externalTrafficPolicy": "Cluster"})),
            ((cluster(), None), true, 0)
        );
        let kept = ((Some("Local".to_owned()), Some(30_999)), true, 0);
        assert_eq!(changed(json!({"sessionAffinity": "ClientIP"})), kept);
        let alias = service(json!({"type": "ExternalName", "externalName": "a.example"}));
        let mut plain = alias.clone();
        let spec = plain.spec.as_mut().unwrap();
        spec.type_ = Some("ClusterIP".to_owned());
        plain.drop_superfluous(&alias);
        assert_eq!(plain.spec.unwrap().external_name, None);
        // What somebody writes is judged, not dropped.
        let written = json!({"type": "ClusterIP", "externalTrafficPolicy": "Cluster"});
        assert_eq!(changed(written).2, 1);
        assert_eq!(changed(json!({"loadBalancerClass": "a.example/c"})).2, 1);
    }

    #[test]
    fn each_wrong_field_is_named() {
        for (spec, cause) in [
            (json!({}), "spec.ports: Required value"),
            (json!({"ports": [{"port": 0}]}), "spec.ports[0].port: Invalid value: 0"),
            (json!({"ports": [{"port": 80}, {"port": 81}]}), "spec.ports[0].name: Required value"),
            (
                json!({"ports": [{"name": "a", "port": 80}, {"name": "a", "port": 81}]}),
                "spec.ports[1].name: Duplicate value: \"a\"",
            ),
            (
                json!({"ports": [{"port": 1, "protocol": "X"}]}),
                "spec.ports[0].protocol: Unsupported value",
            ),
            (
                json!({"ports": [{"port": 1, "targetPort": "A_"}]}),
                "spec.ports[0].targetPort: Invalid value",
            ),
            (json!({"type": "X", "ports": [{"port": 1}]}), "spec.type: Unsupported value: \"X\""),
            (json!({"type": "ExternalName"}), "spec.externalName: Required value"),
            (
                json!({"type": "NodePort", "clusterIP": "None", "ports": [{"port": 1}]}),
                "spec.clusterIPs[0]: Invalid value: \"None\": may not be set to 'None' for NodePort services",
            ),
            (
                json!({"ports": [{"port": 1}], "externalIPs": ["127.0.0.1"]}),
                "spec.externalIPs[0]: Invalid value",
            ),
            (
                json!({"ports": [{"port": 1}], "loadBalancerSourceRanges": ["x/8"]}),
                "spec.loadBalancerSourceRanges[0]: Invalid value: \"x/8\"",
            ),
        ] {
            let mut causes = Causes::default();
            service(spec).validate(&mut causes);
            let found: Vec<_> =
                causes.into_vec().iter().map(|c| format!("{}: {}", c.field, c.message)).collect();
            assert!(found.iter().any(|f| f.starts_with(cause)), "{cause}\n{found:?}");
        }
    }
}
