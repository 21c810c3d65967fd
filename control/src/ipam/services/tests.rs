use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn service(name: &str, spec: Value) -> Service {
    serde_json::from_value(json!({
        "metadata": {"namespace": "default", "name": name}, "spec": spec,
    }))
    .unwrap()
}

fn spec(service: &Service) -> &ServiceSpec {
    service.spec.as_ref().unwrap()
}

fn ips(service: &Service) -> Vec<String> {
    spec(service).cluster_ips.clone().unwrap_or_default()
}

fn node_ports(service: &Service) -> Vec<i32> {
    spec(service).ports.iter().flatten().map(|p| p.node_port.unwrap_or(0)).collect()
}

fn addresses() -> ServiceAddresses {
    ServiceAddresses::new(&ClusterConfig::default())
}

/// Assigns and commits.
fn stored(addresses: &ServiceAddresses, mut service: Service, old: Option<&Service>) -> Service {
    addresses.assign(&mut service, old).unwrap().commit();
    service
}

fn refused(addresses: &ServiceAddresses, name: &str, spec: Value, old: Option<&Service>) -> String {
    addresses.assign(&mut service(name, spec), old).unwrap_err().to_string()
}

#[test]
fn a_plain_service_gets_one_ipv4_address_outside_the_band_for_requests() {
    let a = stored(&addresses(), service("a", json!({"ports": [{"port": 80}]})), None);
    assert_eq!(ips(&a), ["10.96.1.0"]);
    assert_eq!(spec(&a).cluster_ip.as_deref(), Some("10.96.1.0"));
    assert_eq!(spec(&a).ip_families.as_deref(), Some(&["IPv4".to_owned()][..]));
    assert_eq!(spec(&a).ip_family_policy.as_deref(), Some("SingleStack"));
    assert_eq!(node_ports(&a), [0]);
}

#[test]
fn family_policies_choose_the_families() {
    let addresses = addresses();
    let families = |spec: Value| {
        let s = stored(&addresses, service("s", spec), None);
        (ips(&s).len(), s.spec.unwrap().ip_families.unwrap().join(","))
    };
    assert_eq!(families(json!({"ipFamilyPolicy": "PreferDualStack"})), (2, "IPv4,IPv6".into()));
    assert_eq!(
        families(json!({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6"]})),
        (2, "IPv6,IPv4".into())
    );
    assert_eq!(families(json!({"ipFamilies": ["IPv6"]})), (1, "IPv6".into()));
    assert_eq!(families(json!({"clusterIP": "fd10:96::77"})), (1, "IPv6".into()));
    assert_eq!(families(json!({"clusterIP": "None"})), (1, "IPv4,IPv6".into()));
    assert_eq!(families(json!({"clusterIP": "None", "selector": {"a": "b"}})), (1, "IPv4".into()));
}

#[test]
fn a_single_family_cluster_refuses_to_require_two() {
    let cluster = ClusterConfig {
        service_cidrs: vec!["10.96.0.0/16".parse().unwrap()],
        ..ClusterConfig::default()
    };
    let addresses = ServiceAddresses::new(&cluster);
    assert_eq!(
        refused(&addresses, "a", json!({"ipFamilyPolicy": "RequireDualStack"}), None),
        "spec.ipFamilyPolicy: Invalid value: \"RequireDualStack\": this cluster is not configured for dual-stack services"
    );
    let a = stored(&addresses, service("a", json!({"ipFamilyPolicy": "PreferDualStack"})), None);
    assert_eq!(ips(&a).len(), 1);
    assert!(
        refused(&addresses, "b", json!({"ipFamilies": ["IPv6"]}), None)
            .starts_with("spec.ipFamilies[0]: Invalid value: \"IPv6\": not configured")
    );
}

#[test]
fn bad_values_name_their_field() {
    let addresses = addresses();
    stored(&addresses, service("a", json!({"clusterIP": "10.96.0.7"})), None);
    for (spec, expected) in [
        (
            json!({"clusterIP": "10.96.0.7"}),
            "spec.clusterIPs[0]: Invalid value: \"10.96.0.7\": provided IP is already allocated",
        ),
        (
            json!({"clusterIP": "10.96.0.10"}),
            "spec.clusterIPs[0]: Invalid value: \"10.96.0.10\": provided IP is already allocated",
        ),
        (
            json!({"clusterIP": "1.2.3.4"}),
            "spec.clusterIPs[0]: Invalid value: \"1.2.3.4\": the provided IP is not in the valid range. The range of valid IPs is 10.96.0.0/16, fd10:96::/112",
        ),
        (
            json!({"clusterIP": "x"}),
            "spec.clusterIPs[0]: Invalid value: \"x\": must be a valid IP address",
        ),
        (json!({"clusterIPs": ["10.96.0.8", "x"]}), "spec.clusterIPs[1]: Invalid value"),
        (
            json!({"clusterIPs": ["10.96.0.8", "10.96.0.9"]}),
            "spec.clusterIPs[1]: Invalid value: \"10.96.0.9\": may specify at most one",
        ),
        (json!({"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.8"]}), "spec.clusterIPs[0]"),
        (json!({"clusterIPs": ["None", "10.96.0.8"]}), "spec.clusterIPs: Invalid value"),
        (
            json!({"clusterIP": "10.96.0.8", "ipFamilies": ["IPv6"]}),
            "spec.clusterIPs[0]: Invalid value: \"10.96.0.8\": expected an IPv6 value",
        ),
        (json!({"ipFamilies": ["IPv5"]}), "spec.ipFamilies[0]: Unsupported value: \"IPv5\""),
        (json!({"ipFamilies": ["IPv4", "IPv4"]}), "spec.ipFamilies[1]: Duplicate value"),
        (json!({"ipFamilies": ["IPv4", "IPv6"]}), "spec.ipFamilyPolicy: Invalid value"),
        (json!({"ipFamilyPolicy": "Both"}), "spec.ipFamilyPolicy: Unsupported value: \"Both\""),
        (
            json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 80}]}),
            "spec.ports[0].nodePort: Invalid value: 80: provided port is not in the valid range. The range of valid ports is 30000-32767",
        ),
        (
            json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080}, {"port": 81, "nodePort": 30080}]}),
            "spec.ports[1].nodePort: Duplicate value: 30080",
        ),
        (
            json!({"ports": [{"port": 80, "nodePort": 30080}]}),
            "spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'",
        ),
    ] {
        let message = refused(&addresses, "b", spec, None);
        assert!(message.starts_with(expected), "{message}");
    }
    // Nothing of the refused ones stayed taken.
    let wanted = json!({"type": "NodePort", "clusterIPs": ["10.96.0.8"], "ports": [{"port": 1, "nodePort": 30080}]});
    assert_eq!(ips(&stored(&addresses, service("c", wanted), None)), ["10.96.0.8"]);
}

#[test]
fn the_dns_service_alone_gets_the_dns_addresses() {
    let mut dns = service(
        "kube-dns",
        json!({"ipFamilyPolicy": "PreferDualStack", "clusterIPs": ["10.96.0.10", "fd10:96::a"]}),
    );
    dns.metadata.namespace = Some("kube-system".to_owned());
    let addresses = addresses();
    let dns = stored(&addresses, dns, None);
    addresses.release(&dns);
    assert!(
        refused(&addresses, "a", json!({"clusterIP": "10.96.0.10"}), None)
            .contains("already allocated")
    );
}

#[test]
fn an_update_keeps_what_it_does_not_mention() {
    let addresses = addresses();
    let old = stored(
        &addresses,
        service(
            "a",
            json!({"type": "NodePort", "ipFamilyPolicy": "PreferDualStack", "ports": [
            {"name": "x", "port": 80}, {"name": "y", "port": 81, "protocol": "UDP"}]}),
        ),
        None,
    );
    let new = stored(
        &addresses,
        service(
            "a",
            json!({"type": "NodePort", "ports": [
            {"name": "y", "port": 81, "protocol": "UDP"}, {"name": "z", "port": 82}, {"name": "x", "port": 80}]}),
        ),
        Some(&old),
    );
    assert_eq!(ips(&new), ips(&old));
    let (before, after) = (node_ports(&old), node_ports(&new));
    assert_eq!((after[0], after[2]), (before[1], before[0]));
    assert!(!before.contains(&after[1]) || after[1] == before[1]);
    assert_eq!(
        refused(&addresses, "a", json!({"clusterIP": "10.96.0.99"}), Some(&old)),
        "spec.clusterIPs[0]: Invalid value: \"10.96.0.99\": may not change once set"
    );
}

#[test]
fn changing_the_type_frees_on_commit_only() {
    let addresses = addresses();
    let spec = json!({"type": "NodePort", "clusterIP": "10.96.0.7", "ports": [{"port": 80, "nodePort": 30080}]});
    let old = stored(&addresses, service("a", spec.clone()), None);
    let external = json!({"type": "ExternalName", "externalName": "x.org"});
    drop(addresses.assign(&mut service("a", external.clone()), Some(&old)).unwrap());
    assert!(refused(&addresses, "b", spec.clone(), None).contains("already allocated"));
    let new = stored(&addresses, service("a", external), Some(&old));
    assert!(ips(&new).is_empty());
    stored(&addresses, service("b", spec), None);

    // NodePort to ClusterIP: the manifest still carries the port that was assigned.
    let old = stored(
        &addresses,
        service("c", json!({"type": "NodePort", "ports": [{"port": 80}]})),
        None,
    );
    let mut new = old.clone();
    new.spec.as_mut().unwrap().type_ = Some("ClusterIP".to_owned());
    let new = stored(&addresses, new, Some(&old));
    assert_eq!(node_ports(&new), [0]);
    let again =
        json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": node_ports(&old)[0]}]});
    stored(&addresses, service("d", again), None);
}

#[test]
fn a_second_family_comes_and_goes_with_the_policy() {
    let addresses = addresses();
    let single = stored(&addresses, service("a", json!({})), None);
    let mut dual = single.clone();
    dual.spec.as_mut().unwrap().ip_family_policy = Some("PreferDualStack".to_owned());
    let dual = stored(&addresses, dual, Some(&single));
    assert_eq!(ips(&dual)[0], ips(&single)[0]);
    assert_eq!(ips(&dual).len(), 2);
    let mut back = dual.clone();
    back.spec.as_mut().unwrap().ip_family_policy = Some("SingleStack".to_owned());
    let back = stored(&addresses, back, Some(&dual));
    assert_eq!(ips(&back), ips(&single));
    stored(&addresses, service("b", json!({"clusterIP": ips(&dual)[1]})), None);
}

#[test]
fn tcp_and_udp_of_one_port_share_a_node_port() {
    let ports = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "ports": [
        {"name": "t", "port": 53}, {"name": "u", "port": 53, "protocol": "UDP"}]});
    let s = stored(&addresses(), service("a", ports), None);
    assert_eq!(node_ports(&s)[0], node_ports(&s)[1]);
    let health = spec(&s).health_check_node_port.unwrap();
    assert!(health >= 30_000 && health != node_ports(&s)[0]);
    let none = json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": [{"port": 53}]});
    assert_eq!(node_ports(&stored(&addresses(), service("a", none), None)), [0]);
}

#[test]
fn a_port_keeps_its_node_port_when_its_number_changes() {
    let addresses = addresses();
    let of = |ports: Value| service("a", json!({"type": "NodePort", "ports": ports}));
    let one = stored(&addresses, of(json!([{"port": 80}])), None);
    let other = stored(&addresses, of(json!([{"port": 8080}])), Some(&one));
    assert_eq!(node_ports(&other), node_ports(&one), "of a port without a name, too");
    let two = json!([{"name": "http", "port": 8080}, {"name": "admin", "port": 9000}]);
    let two = stored(&addresses, of(two), Some(&other));
    assert_eq!(node_ports(&two)[0], node_ports(&one)[0], "the number is the same, if not the name");
    let swapped = json!([{"name": "admin", "port": 8080}, {"name": "http", "port": 9001}]);
    let swapped = stored(&addresses, of(swapped), Some(&two));
    assert_eq!(node_ports(&swapped), [node_ports(&two)[1], node_ports(&two)[0]]);
    // A number that the update gives to somebody else is not taken over.
    let first = node_ports(&swapped)[0];
    let taken =
        json!([{"name": "admin", "port": 8080}, {"name": "http", "port": 9001, "nodePort": first}]);
    let taken = stored(&addresses, of(taken), Some(&swapped));
    assert_eq!(node_ports(&taken)[1], first);
    assert!(![0, first].contains(&node_ports(&taken)[0]));
}

#[test]
fn who_wants_no_node_ports_gives_them_back_by_leaving_them_out() {
    let addresses = addresses();
    let balancer = |wanted: bool, ports: Value| {
        let spec = json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": wanted, "ports": ports});
        service("a", spec)
    };
    let plain = || json!([{"name": "a", "port": 80}, {"name": "b", "port": 81}]);
    let old = stored(&addresses, balancer(true, plain()), None);
    let held = node_ports(&old);
    let mut same = old.clone();
    same.spec.as_mut().unwrap().allocate_load_balancer_node_ports = Some(false);
    let same = stored(&addresses, same, Some(&old));
    assert_eq!(node_ports(&same), held, "what is still written stays");
    let one = json!([{"name": "a", "port": 80, "nodePort": 0}, {"name": "b", "port": 81, "nodePort": held[1]}]);
    let one = stored(&addresses, balancer(false, one), Some(&same));
    assert_eq!(spec(&one).ports.as_ref().unwrap()[0].node_port, None);
    assert_eq!(node_ports(&one), [0, held[1]]);
    let other = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": held[0]}]});
    stored(&addresses, service("b", other), None);
    assert_eq!(node_ports(&stored(&addresses, balancer(false, plain()), Some(&one))), [0, 0]);
}

#[test]
fn restart_finds_everything_taken_again() {
    let first = addresses();
    let a =
        stored(&first, service("a", json!({"type": "NodePort", "ports": [{"port": 80}]})), None);
    let again = addresses();
    again.load(std::slice::from_ref(&a));
    assert!(refused(&again, "b", json!({"clusterIP": ips(&a)[0]}), None).contains("allocated"));
    let b =
        stored(&again, service("b", json!({"type": "NodePort", "ports": [{"port": 80}]})), None);
    assert_ne!(ips(&a), ips(&b));
    assert_ne!(node_ports(&a), node_ports(&b));
    again.release(&a);
    stored(&again, service("c", json!({"clusterIP": ips(&a)[0]})), None);
}

#[test]
fn a_lost_race_for_a_name_frees_only_its_own() {
    let addresses = addresses();
    let stored = stored(&addresses, service("a", json!({"clusterIP": "10.96.0.7"})), None);
    // The store will answer "already exists": its reservation is dropped.
    drop(addresses.assign(&mut service("a", json!({"clusterIP": "10.96.0.7"})), None));
    assert!(
        refused(&addresses, "b", json!({"clusterIP": ips(&stored)[0]}), None).contains("allocated")
    );
}

fn any_spec() -> impl Strategy<Value = Value> {
    let type_ = prop::sample::select(vec!["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]);
    let policy = prop::option::of(prop::sample::select(vec!["SingleStack", "PreferDualStack"]));
    let ip = prop::sample::select(vec![
        None,
        Some("None"),
        Some("10.96.0.1"),
        Some("10.96.0.2"),
        Some("fd10:96::5"),
    ]);
    let port = (
        1i32..4,
        prop::sample::select(vec![None, Some(30000), Some(30001), Some(1)]),
        any::<bool>(),
    );
    (type_, policy, ip, prop::collection::vec(port, 0..3)).prop_map(|(type_, policy, ip, ports)| {
        let ports: Vec<Value> = ports
            .iter()
            .map(|(port, node, udp)| {
                json!({
            "port": port, "nodePort": node, "protocol": if *udp { "UDP" } else { "TCP" } })
            })
            .collect();
        json!({"type": type_, "ipFamilyPolicy": policy, "clusterIP": ip, "ports": ports})
    })
}

proptest! {
    #[test]
    fn nothing_is_ever_held_twice_or_leaked(
        ops in prop::collection::vec((0u8..5, any_spec(), any::<bool>(), any::<bool>()), 0..60),
    ) {
        let addresses = addresses();
        let mut stored: BTreeMap<String, Service> = BTreeMap::new();
        for (name, spec, commit, delete) in ops {
            let name = name.to_string();
            if delete {
                if let Some(old) = stored.remove(&name) {
                    addresses.release(&old);
                }
                continue;
            }
            let mut new = service(&name, spec);
            if let Ok(reservation) = addresses.assign(&mut new, stored.get(&name)) && commit {
                reservation.commit();
                stored.insert(name, new);
            }
        }
        let mut held: Vec<Item> = stored.values().flat_map(|s| items(s.spec.as_ref())).collect();
        held.sort();
        let count = held.len();
        held.dedup();
        prop_assert_eq!(held.len(), count);
        for s in stored.values() {
            addresses.release(s);
        }
        // Whatever was ever taken is free again.
        for ip in ["10.96.0.1", "10.96.0.2", "fd10:96::5"] {
            let free = addresses.assign(&mut service("z", json!({"clusterIP": ip})), None).is_ok();
            prop_assert!(free, "{} leaked", ip);
        }
    }
}
