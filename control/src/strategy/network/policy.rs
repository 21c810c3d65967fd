//! NetworkPolicies.

use ipnet::IpNet;
use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::super::rules::{
    forbidden, invalid, one_of, port, port_name, protocol, required, selector,
};
use super::super::{Causes, Object};

const TYPES: [&str; 2] = ["Egress", "Ingress"];
const CIDR: &str = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";

impl Object for NetworkPolicy {
    const GENERATION: bool = true;

    fn set_defaults(&mut self) {
        let Some(spec) = &mut self.spec else { return };
        for port in ports_mut(spec) {
            port.protocol.get_or_insert_with(|| "TCP".to_owned());
        }
        if spec.policy_types.as_ref().is_none_or(Vec::is_empty) {
            let egress = spec.egress.as_ref().is_some_and(|rules| !rules.is_empty());
            let types = [Some("Ingress"), egress.then_some("Egress")].into_iter().flatten();
            spec.policy_types = Some(types.map(str::to_owned).collect());
        }
    }

    fn spec_differs(&self, old: &Self) -> bool {
        self.spec != old.spec
    }

    fn validate(&self, causes: &mut Causes) {
        let Some(spec) = &self.spec else { return };
        if let Some(pods) = &spec.pod_selector {
            selector("spec.podSelector", pods, causes);
        }
        for (i, rule) in spec.ingress.iter().flatten().enumerate() {
            let field = format!("spec.ingress[{i}]");
            ports(&field, rule.ports.as_deref(), causes);
            peers(&format!("{field}.from"), rule.from.as_deref(), causes);
        }
        for (i, rule) in spec.egress.iter().flatten().enumerate() {
            let field = format!("spec.egress[{i}]");
            ports(&field, rule.ports.as_deref(), causes);
            peers(&format!("{field}.to"), rule.to.as_deref(), causes);
        }
        let types = spec.policy_types.as_deref().unwrap_or_default();
        if types.len() > TYPES.len() {
            let rule = "may not specify more than two policyTypes";
            invalid("spec.policyTypes", types, rule, causes);
            return;
        }
        for (i, found) in types.iter().enumerate() {
            one_of(&format!("spec.policyTypes[{i}]"), Some(found), &TYPES, causes);
        }
    }
}

fn ports_mut(spec: &mut NetworkPolicySpec) -> impl Iterator<Item = &mut NetworkPolicyPort> {
    let ingress = spec.ingress.iter_mut().flatten().filter_map(|rule| rule.ports.as_mut());
    let egress = spec.egress.iter_mut().flatten().filter_map(|rule| rule.ports.as_mut());
    ingress.chain(egress).flatten()
}

fn ports(rule: &str, list: Option<&[NetworkPolicyPort]>, causes: &mut Causes) {
    for (i, found) in list.unwrap_or_default().iter().enumerate() {
        let field = format!("{rule}.ports[{i}]");
        protocol(&format!("{field}.protocol"), found.protocol.as_deref(), causes);
        let end = format!("{field}.endPort");
        match (&found.port, found.end_port) {
            (Some(IntOrString::Int(first)), last) => {
                port(&format!("{field}.port"), *first, causes);
                let Some(last) = last else { continue };
                if last < *first {
                    invalid(&end, last, "must be greater than or equal to `port`", causes);
                }
                port(&end, last, causes);
            }
            (Some(IntOrString::String(name)), last) => {
                port_name(&format!("{field}.port"), name, causes);
                if let Some(last) = last {
                    invalid(end, last, "may not be specified when `port` is non-numeric", causes);
                }
            }
            (None, Some(last)) => {
                invalid(end, last, "may not be specified when `port` is not specified", causes);
            }
            (None, None) => {}
        }
    }
}

fn peers(field: &str, list: Option<&[NetworkPolicyPeer]>, causes: &mut Causes) {
    for (i, peer) in list.unwrap_or_default().iter().enumerate() {
        let field = format!("{field}[{i}]");
        let selectors = [
            ("podSelector", peer.pod_selector.as_ref()),
            ("namespaceSelector", peer.namespace_selector.as_ref()),
        ];
        let selectors: Vec<_> =
            selectors.into_iter().filter_map(|(name, s)| Some((name, s?))).collect();
        for (name, found) in &selectors {
            selector(&format!("{field}.{name}"), found, causes);
        }
        match &peer.ip_block {
            Some(_) if !selectors.is_empty() => {
                forbidden(field, "may not specify both ipBlock and another peer", causes);
            }
            Some(found) => block(&format!("{field}.ipBlock"), found, causes),
            None if selectors.is_empty() => {
                causes.add(field, "Required value: must specify a peer");
            }
            None => {}
        }
    }
}

fn block(field: &str, block: &IPBlock, causes: &mut Causes) {
    let at = format!("{field}.cidr");
    if block.cidr.is_empty() {
        return required(at, causes);
    }
    let Ok(range) = block.cidr.parse::<IpNet>() else {
        return invalid(at, &block.cidr, CIDR, causes);
    };
    for (i, text) in block.except.iter().flatten().enumerate() {
        let at = format!("{field}.except[{i}]");
        match text.parse::<IpNet>() {
            Err(_) => invalid(at, text, CIDR, causes),
            Ok(hole) if !range.contains(&hole) || hole.prefix_len() <= range.prefix_len() => {
                invalid(at, text, "must be a strict subset of `cidr`", causes);
            }
            Ok(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn defaulted(spec: Value) -> NetworkPolicy {
        let mut policy: NetworkPolicy = serde_json::from_value(json!({"spec": spec})).unwrap();
        policy.set_defaults();
        policy
    }

    fn causes(spec: Value) -> Vec<String> {
        let mut causes = Causes::default();
        defaulted(spec).validate(&mut causes);
        causes.into_vec().into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect()
    }

    #[test]
    fn types_follow_from_rules_and_ports_are_tcp() {
        let types = |spec| defaulted(spec).spec.unwrap().policy_types.unwrap();
        assert_eq!(types(json!({})), ["Ingress"]);
        assert_eq!(types(json!({"egress": []})), ["Ingress"]);
        assert_eq!(types(json!({"egress": [{}]})), ["Ingress", "Egress"]);
        assert_eq!(types(json!({"policyTypes": ["Egress"]})), ["Egress"]);
        let policy = defaulted(json!({"ingress": [{"ports": [{"port": 80}]}]}));
        let ports = policy.spec.unwrap().ingress.unwrap().remove(0).ports.unwrap();
        assert_eq!(ports[0].protocol.as_deref(), Some("TCP"));
    }

    #[test]
    fn rules_are_those_of_kubernetes() {
        let from = |peer: Value| json!({"ingress": [{"from": [peer]}]});
        let to_port = |port: Value| json!({"egress": [{"ports": [port]}]});
        let block =
            |cidr: &str, except: Value| from(json!({"ipBlock": {"cidr": cidr, "except": except}}));
        for good in [
            json!({"podSelector": {"matchLabels": {"a": "b"}}, "policyTypes": ["Ingress", "Egress"]}),
            from(json!({"podSelector": {}, "namespaceSelector": {}})),
            block("10.0.0.0/8", json!(["10.1.0.0/16"])),
            block("2001:db8::/32", json!([])),
            to_port(json!({"port": 80, "endPort": 90, "protocol": "SCTP"})),
            to_port(json!({"port": "http"})),
        ] {
            assert_eq!(causes(good.clone()), Vec::<String>::new(), "{good}");
        }
        let peer = "spec.ingress[0].from[0]";
        let port = "spec.egress[0].ports[0]";
        for (bad, cause) in [
            (from(json!({})), format!("{peer}: Required value: must specify a peer")),
            (
                from(json!({"podSelector": {}, "ipBlock": {"cidr": "10.0.0.0/8"}})),
                format!("{peer}: Forbidden: may not specify both ipBlock and another peer"),
            ),
            (block("", json!([])), format!("{peer}.ipBlock.cidr: Required value")),
            (block("10.0.0.1", json!([])), format!("{peer}.ipBlock.cidr: Invalid value")),
            (
                block("10.0.0.0/8", json!(["10.0.0.0/8"])),
                format!(
                    "{peer}.ipBlock.except[0]: Invalid value: \"10.0.0.0/8\": must be a strict"
                ),
            ),
            (
                from(
                    json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}),
                ),
                format!("{peer}.podSelector.matchExpressions[0].values: Required value"),
            ),
            (to_port(json!({"port": 0})), format!("{port}.port: Invalid value: 0")),
            (
                to_port(json!({"port": 80, "protocol": "ICMP"})),
                format!("{port}.protocol: Unsupported value"),
            ),
            (
                to_port(json!({"port": 80, "endPort": 79})),
                format!(
                    "{port}.endPort: Invalid value: 79: must be greater than or equal to `port`"
                ),
            ),
            (
                to_port(json!({"port": "http", "endPort": 79})),
                format!(
                    "{port}.endPort: Invalid value: 79: may not be specified when `port` is non-numeric"
                ),
            ),
            (
                to_port(json!({"endPort": 79})),
                format!(
                    "{port}.endPort: Invalid value: 79: may not be specified when `port` is not"
                ),
            ),
            (json!({"policyTypes": ["Both"]}), "spec.policyTypes[0]: Unsupported value".to_owned()),
        ] {
            let found = causes(bad);
            assert!(found.iter().any(|f| f.starts_with(&cause)), "{cause}\n{found:?}");
        }
    }
}
