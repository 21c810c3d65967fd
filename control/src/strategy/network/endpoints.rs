//! Endpoints: the addresses that people write by hand for a Service without a selector.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{EndpointAddress, EndpointPort, EndpointSubset, Endpoints};

use super::reachable;
use crate::strategy::rules::{invalid, port, protocol, required};
use crate::strategy::{Causes, Object, names};

impl Object for Endpoints {
    fn set_defaults(&mut self) {
        let ports = self.subsets.iter_mut().flatten().flat_map(|subset| subset.ports.iter_mut());
        for port in ports.flatten() {
            port.protocol = port.protocol.take().filter(|protocol| !protocol.is_empty());
            port.protocol.get_or_insert_with(|| "TCP".to_owned());
        }
    }

    fn validate(&self, causes: &mut Causes) {
        for (i, subset) in self.subsets.iter().flatten().enumerate() {
            validate_subset(&format!("subsets[{i}]"), subset, causes);
        }
    }
}

fn validate_subset(field: &str, subset: &EndpointSubset, causes: &mut Causes) {
    let lists =
        [("addresses", &subset.addresses), ("notReadyAddresses", &subset.not_ready_addresses)];
    if lists.iter().all(|(_, list)| list.iter().flatten().next().is_none()) {
        let text = "Required value: must specify `addresses` or `notReadyAddresses`";
        causes.add(field, text);
    }
    for (name, list) in lists {
        for (i, address) in list.iter().flatten().enumerate() {
            validate_address(&format!("{field}.{name}[{i}]"), address, causes);
        }
    }
    let ports = subset.ports.as_deref().unwrap_or_default();
    for (i, port) in ports.iter().enumerate() {
        validate_port(&format!("{field}.ports[{i}]"), port, ports.len() > 1, causes);
    }
}

fn validate_address(field: &str, address: &EndpointAddress, causes: &mut Causes) {
    let ip = format!("{field}.ip");
    match address.ip.parse::<IpAddr>() {
        Ok(parsed) => reachable(&ip, parsed, causes),
        Err(_) => {
            let rule = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
            invalid(ip, &address.ip, rule, causes);
        }
    }
    if let Some(host) = address.hostname.as_deref().filter(|host| !host.is_empty()) {
        names::label(&format!("{field}.hostname"), host, causes);
    }
    if let Some(node) = address.node_name.as_deref() {
        names::subdomain(&format!("{field}.nodeName"), node, causes);
    }
}

fn validate_port(field: &str, found: &EndpointPort, named: bool, causes: &mut Causes) {
    match found.name.as_deref().filter(|name| !name.is_empty()) {
        Some(name) => names::label(&format!("{field}.name"), name, causes),
        None if named => required(format!("{field}.name"), causes),
        None => {}
    }
    port(&format!("{field}.port"), found.port, causes);
    protocol(&format!("{field}.protocol"), found.protocol.as_deref(), causes);
    if let Some(app) = found.app_protocol.as_deref().filter(|app| !names::is_qualified(app)) {
        invalid(format!("{field}.appProtocol"), app, "must be a qualified name", causes);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn causes(subset: Value) -> Vec<String> {
        let mut object: Endpoints = serde_json::from_value(json!({"subsets": [subset]})).unwrap();
        object.set_defaults();
        let mut causes = Causes::default();
        object.validate(&mut causes);
        causes.into_vec().into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect()
    }

    fn at(ip: &str) -> Value {
        json!({"addresses": [{"ip": ip}], "ports": [{"port": 5432}]})
    }

    #[test]
    fn addresses_are_those_of_somebody() {
        for good in ["192.0.2.7", "2001:db8::7"] {
            assert_eq!(causes(at(good)), Vec::<String>::new(), "{good}");
        }
        for bad in [
            "",
            "db.example",
            "127.0.0.1",
            "::1",
            "169.254.169.254",
            "fe80::1",
            "224.0.0.1",
            "ff02::1",
            "0.0.0.0",
            "::",
            "::ffff:127.0.0.1",
        ] {
            let found = causes(at(bad));
            assert_eq!(found.len(), 1, "{bad}: {found:?}");
            assert!(found[0].starts_with("subsets[0].addresses[0].ip: Invalid value"), "{found:?}");
        }
        let waiting =
            json!({"notReadyAddresses": [{"ip": "::1", "hostname": "A", "nodeName": ""}]});
        let fields: Vec<_> =
            causes(waiting).iter().map(|c| c.split(": ").next().unwrap().to_owned()).collect();
        let of = |name: &str| format!("subsets[0].notReadyAddresses[0].{name}");
        assert_eq!(fields, [of("ip"), of("hostname"), of("nodeName")]);
        let nobody = causes(json!({"ports": [{"port": 1}]}));
        let text = "subsets[0]: Required value: must specify `addresses` or `notReadyAddresses`";
        assert_eq!(nobody, [text]);
    }

    #[test]
    fn ports_have_names_where_there_are_several() {
        let with = |ports: Value| {
            let mut subset = at("192.0.2.7");
            subset["ports"] = ports;
            causes(subset)
        };
        assert!(with(json!(null)).is_empty(), "of a headless Service");
        assert!(with(json!([{"port": 80, "name": "a"}, {"port": 81, "name": "b"}])).is_empty());
        let found = with(json!([{"port": 80, "name": "a"}, {"port": 81}]));
        assert_eq!(found, ["subsets[0].ports[1].name: Required value"]);
        for (port, field) in [
            (json!({"port": 0}), "port"),
            (json!({"port": 65536}), "port"),
            (json!({"port": 80, "protocol": "tcp"}), "protocol"),
            (json!({"port": 80, "name": "A"}), "name"),
            (json!({"port": 80, "appProtocol": "a b"}), "appProtocol"),
        ] {
            let found = with(json!([port]));
            assert_eq!(found.len(), 1, "{port}: {found:?}");
            assert!(found[0].starts_with(&format!("subsets[0].ports[0].{field}: ")), "{found:?}");
        }
    }

    #[test]
    fn a_protocol_is_tcp_unless_it_is_said() {
        for said in [json!(null), json!("")] {
            let subset = json!({"ports": [{"port": 1, "protocol": said}]});
            let mut object: Endpoints =
                serde_json::from_value(json!({"subsets": [subset]})).unwrap();
            object.set_defaults();
            let ports = object.subsets.unwrap().remove(0).ports.unwrap();
            assert_eq!(ports[0].protocol.as_deref(), Some("TCP"));
        }
    }
}
