//! What policies allow, read from the text of their specification and from nothing else.
//!
//! A pod without a policy for a direction is free in it; with one it may do what some rule of some such policy grants, and nothing
//! else. A connection needs both: the client's egress and the server's ingress. Nobody is kept from himself. (Kubernetes,
//! "Network Policies", sections on isolation; the API reference of NetworkPolicySpec.)

use std::net::IpAddr;

use serde_json::Value;

use super::{Member, Protocol, namespace_labels};

/// A connection of one pod to another.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// Who opens it.
    pub from: &'a Member,
    /// To whom.
    pub to: &'a Member,
    /// By IPv4, not IPv6.
    pub v4: bool,
    /// The protocol.
    pub protocol: Protocol,
    /// The port.
    pub port: u16,
}

/// Whether the policies (manifests) allow it.
pub fn allows(policies: &[Value], ask: &Question<'_>) -> bool {
    ask.from == ask.to || (side(policies, ask, "Egress") && side(policies, ask, "Ingress"))
}

fn side(policies: &[Value], ask: &Question<'_>, direction: &str) -> bool {
    let (subject, other, rules, peers) = match direction {
        "Egress" => (ask.from, ask.to, "egress", "to"),
        _ => (ask.to, ask.from, "ingress", "from"),
    };
    let mut isolated = false;
    for policy in policies {
        let spec = &policy["spec"];
        let applies = policy["metadata"]["namespace"] == subject.namespace
            && selects(&spec["podSelector"], &subject.labels())
            && types(spec).contains(&direction);
        if !applies {
            continue;
        }
        isolated = true;
        let allowed = each(&spec[rules]).any(|rule| {
            // A list that is empty or missing restricts nothing.
            let peer = is_empty(&rule[peers])
                || each(&rule[peers]).any(|peer| is_peer(peer, subject.namespace, other, ask.v4));
            let port = is_empty(&rule["ports"]) || each(&rule["ports"]).any(|p| is_port(p, ask));
            peer && port
        });
        if allowed {
            return true;
        }
    }
    !isolated
}

fn each(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

fn is_empty(list: &Value) -> bool {
    each(list).next().is_none()
}

/// Without the field: ingress always, egress where there are rules for it.
fn types(spec: &Value) -> Vec<&str> {
    let named: Vec<&str> = each(&spec["policyTypes"]).filter_map(Value::as_str).collect();
    match (named.is_empty(), is_empty(&spec["egress"])) {
        (false, _) => named,
        (true, true) => vec!["Ingress"],
        (true, false) => vec!["Ingress", "Egress"],
    }
}

/// A label selector: all its requirements hold. An empty one selects everything.
fn selects(selector: &Value, labels: &[(&str, &str)]) -> bool {
    let value = |key: &str| labels.iter().find(|(k, _)| *k == key).map(|(_, value)| *value);
    let equal = selector["matchLabels"].as_object().into_iter().flatten();
    let mut equal = equal.map(|(key, wanted)| value(key) == wanted.as_str());
    let mut expressions = each(&selector["matchExpressions"]).map(|one| {
        let found = value(one["key"].as_str().unwrap_or_default());
        let listed = || each(&one["values"]).any(|wanted| wanted.as_str() == found);
        match one["operator"].as_str() {
            Some("In") => found.is_some() && listed(),
            // "NotIn" also holds for what lacks the key.
            Some("NotIn") => found.is_none() || !listed(),
            Some("Exists") => found.is_some(),
            _ => found.is_none(),
        }
    });
    equal.all(|holds| holds) && expressions.all(|holds| holds)
}

fn is_peer(peer: &Value, namespace: &str, other: &Member, v4: bool) -> bool {
    if let Some(block) = peer.get("ipBlock") {
        let address = other.addresses[usize::from(!v4)];
        let inside = |text: &Value| text.as_str().is_some_and(|text| contains(text, address));
        return inside(&block["cidr"]) && !each(&block["except"]).any(inside);
    }
    let in_namespace = match peer.get("namespaceSelector") {
        Some(selector) => selects(selector, &namespace_labels(other.namespace)),
        None => other.namespace == namespace,
    };
    in_namespace && peer.get("podSelector").is_none_or(|s| selects(s, &other.labels()))
}

fn contains(cidr: &str, address: IpAddr) -> bool {
    let Some((base, bits)) = cidr.split_once('/') else { return false };
    let (Ok(base), Ok(bits)) = (base.parse::<IpAddr>(), bits.parse::<u32>()) else { return false };
    let number = |address: IpAddr| match address {
        IpAddr::V4(a) => u128::from(u32::from(a)) << 96,
        IpAddr::V6(a) => u128::from(a),
    };
    let differ = number(base) ^ number(address);
    base.is_ipv4() == address.is_ipv4() && (bits == 0 || differ >> (128 - bits) == 0)
}

fn is_port(wanted: &Value, ask: &Question<'_>) -> bool {
    if wanted["protocol"].as_str().unwrap_or("TCP") != ask.protocol.name() {
        return false;
    }
    match &wanted["port"] {
        Value::Null => true,
        Value::String(name) => {
            // The containers declare this name, for TCP.
            name == "serve" && ask.protocol == Protocol::Tcp && ask.port == ask.to.named_port()
        }
        first => {
            let first = first.as_u64().unwrap_or(0);
            (first..=wanted["endPort"].as_u64().unwrap_or(first)).contains(&ask.port.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy_table::policies::sample_members;
    use serde_json::json;

    fn ask(policies: &[Value], from: usize, to: usize, protocol: Protocol, port: u16) -> bool {
        let members = sample_members();
        let (from, to) = (&members[from], &members[to]);
        allows(policies, &Question { from, to, v4: true, protocol, port })
    }

    #[test]
    fn nothing_is_isolated_that_nothing_selects_and_nobody_from_itself() {
        let closed = json!({"metadata": {"namespace": "y"}, "spec": {
            "podSelector": {"matchLabels": {"pod": "b"}}, "policyTypes": ["Ingress", "Egress"]}});
        let closed = [closed];
        assert!(ask(&[], 0, 4, Protocol::Tcp, 80) && ask(&closed, 0, 3, Protocol::Tcp, 80));
        assert!(!ask(&closed, 0, 4, Protocol::Tcp, 80) && !ask(&closed, 4, 0, Protocol::Udp, 80));
        assert!(ask(&closed, 4, 4, Protocol::Tcp, 80));
    }

    #[test]
    fn peers_ports_and_blocks() {
        let policies = [json!({"metadata": {"namespace": "x"}, "spec": {
        "podSelector": {"matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["t1"]}]},
        "ingress": [
            {"from": [{"namespaceSelector": {"matchLabels": {"ns": "y"}}, "podSelector": {"matchLabels": {"pod": "a"}}}],
             "ports": [{"port": "serve"}, {"port": 70, "endPort": 80, "protocol": "UDP"}]},
            {"from": [{"ipBlock": {"cidr": "10.244.2.0/24", "except": ["10.244.2.12/32"]}}]},
        ]}})];
        // x/a is 0, x/c is 2; y/a is 3; z/b is 7 at 10.244.2.11, z/c is 8 at 10.244.2.12.
        assert!(
            ask(&policies, 3, 0, Protocol::Tcp, 80) && !ask(&policies, 3, 0, Protocol::Tcp, 81)
        );
        assert!(
            ask(&policies, 3, 2, Protocol::Tcp, 81) && !ask(&policies, 3, 2, Protocol::Tcp, 80)
        );
        assert!(
            ask(&policies, 3, 0, Protocol::Udp, 80) && !ask(&policies, 3, 0, Protocol::Sctp, 80)
        );
        assert!(
            !ask(&policies, 4, 0, Protocol::Tcp, 80) && ask(&policies, 4, 1, Protocol::Tcp, 80)
        );
        assert!(
            ask(&policies, 7, 0, Protocol::Sctp, 81) && !ask(&policies, 8, 0, Protocol::Sctp, 81)
        );
    }
}
