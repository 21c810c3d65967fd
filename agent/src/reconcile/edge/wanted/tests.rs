use std::collections::BTreeSet;

use mesh_model::{Objects, compile};
use serde_json::{Value, json};

use super::*;

fn object<T: serde::de::DeserializeOwned>(value: Value) -> Arc<T> {
    Arc::new(serde_json::from_value(value).unwrap())
}

/// Three nodes; a service with a load balancer's address, a pod on each of the first two, and on the third one a process in the
/// node's own network, and one that somebody says is there whose address is no node's.
fn snapshot(policy: &str) -> Snapshot {
    snapshot_of("n1", policy)
}

/// As that node sees them.
fn snapshot_of(node_name: &str, policy: &str) -> Snapshot {
    let node = |n: u8| {
        let key = mesh_model::snapshot::WgKey([n; 32]).to_string();
        let (v4, v6) = (format!("10.244.{n}.0/24"), format!("fd10:244:0:{n}::/64"));
        object(json!({
            "metadata": {"name": format!("n{n}"), "annotations": {"mesh.dev/wireguard-public-key": key}},
            "spec": {"podCIDRs": [v4, v6]},
            "status": {"addresses": [{"type": "InternalIP", "address": format!("192.0.2.{n}")}]}
        }))
    };
    let objects = Objects {
        nodes: vec![node(1), node(2), node(3)],
        services: vec![object(json!({
            "metadata": {"namespace": "default", "name": "web"},
            "spec": {"type": "LoadBalancer", "clusterIPs": ["10.96.0.7"], "externalTrafficPolicy": policy,
                     "loadBalancerSourceRanges": ["198.51.100.0/24"], "healthCheckNodePort": 30999,
                     "ports": [{"port": 80, "nodePort": 30080}]},
            "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.200"}]}}
        }))],
        endpoint_slices: vec![object(json!({
            "metadata": {"namespace": "default", "name": "web-a", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": [{"port": 8080}],
            "endpoints": [{"addresses": ["10.244.1.5"], "nodeName": "n1"},
                          {"addresses": ["10.244.2.5"], "nodeName": "n2"},
                          {"addresses": ["192.0.2.3"], "nodeName": "n3"},
                          {"addresses": ["198.51.100.9"], "nodeName": "n3"}]
        }))],
        ..Objects::default()
    };
    compile(&objects, &node_name.parse().unwrap())
}

fn away(nodes: &[&str]) -> Outlook {
    let away = nodes.iter().map(|name| name.parse().unwrap()).collect();
    Outlook { away, ..Outlook::default() }
}

fn backends(wanted: &Wanted, vip: &str) -> Vec<(String, Option<String>)> {
    let service = wanted.services.iter().find(|(key, _)| key.vip.to_string() == vip).unwrap().1;
    let text = |(backend, via): (&SocketAddr, &Option<IpAddr>)| {
        (backend.to_string(), via.map(|via| via.to_string()))
    };
    service.backends.iter().map(text).collect()
}

#[test]
fn backends_are_here_or_behind_their_node_and_so_are_processes_of_nodes() {
    let wanted = wanted(&snapshot("Cluster"), &Outlook::default(), 1420);
    let expected = vec![
        ("10.244.1.5:8080".to_owned(), None),
        ("10.244.2.5:8080".to_owned(), Some("10.244.2.1".to_owned())),
        ("192.0.2.3:8080".to_owned(), Some("10.244.3.1".to_owned())),
    ];
    assert_eq!(backends(&wanted, "192.0.2.1"), expected);
    assert_eq!(backends(&wanted, "192.0.2.200"), expected);
    assert_eq!(wanted.nodes.len(), 4);
    assert_eq!(wanted.own.len(), 2);
    assert_eq!(wanted.addresses, ["192.0.2.1".parse().unwrap()].into());
    let ports: BTreeSet<u16> = wanted.services.keys().map(|key| key.port).collect();
    assert_eq!(ports, [80, 30_080].into());
}

#[test]
fn a_process_of_a_node_is_found_by_its_address_where_nobody_names_the_node() {
    let mut snapshot = snapshot("Cluster");
    let edge = Arc::make_mut(&mut snapshot.edge);
    for service in Arc::make_mut(&mut edge.services) {
        Arc::make_mut(service).backends.iter_mut().for_each(|backend| backend.node = None);
    }
    let wanted = wanted(&snapshot, &Outlook::default(), 1420);
    let there = ("192.0.2.3:8080".to_owned(), Some("10.244.3.1".to_owned()));
    assert_eq!(backends(&wanted, "192.0.2.200")[2], there);
}

#[test]
fn a_node_that_is_away_gets_nothing_and_a_narrow_way_is_respected() {
    let snapshot = snapshot("Cluster");
    let mut outlook = away(&["n2"]);
    outlook.mtus = [(snapshot.peers[0].public_key, 1300)].into();
    let wanted = wanted(&snapshot, &outlook, 1420);
    let there = Some("10.244.3.1".to_owned());
    assert_eq!(
        backends(&wanted, "192.0.2.1"),
        [("10.244.1.5:8080".to_owned(), None), ("192.0.2.3:8080".to_owned(), there)]
    );
    assert_eq!(wanted.nodes[&"10.244.2.1".parse::<IpAddr>().unwrap()], 1300);
    assert_eq!(wanted.nodes[&"10.244.3.1".parse::<IpAddr>().unwrap()], 1420);
}

#[test]
fn local_traffic_stays_and_only_the_load_balancers_address_is_restricted() {
    let snapshot = snapshot("Local");
    let wanted = wanted(&snapshot, &Outlook::default(), 1420);
    assert_eq!(backends(&wanted, "192.0.2.1"), [("10.244.1.5:8080".to_owned(), None)]);
    for (key, service) in &wanted.services {
        assert!(service.local_only);
        let outside = key.vip.to_string() == "192.0.2.200";
        assert_eq!(service.sources.is_some(), outside, "{key:?}");
    }
    let checks = &snapshot.edge.health_checks;
    assert_eq!((checks.len(), checks[0].port, checks[0].local_endpoints), (1, 30_999, 1));
}

#[test]
fn a_process_in_the_nodes_own_network_is_a_backend_here() {
    let there = Some("10.244.1.1".to_owned());
    let own = ("192.0.2.3:8080".to_owned(), None);
    let all = wanted(&snapshot_of("n3", "Cluster"), &Outlook::default(), 1420);
    let found = backends(&all, "192.0.2.3");
    assert_eq!((found.len(), &found[0]), (3, &("10.244.1.5:8080".to_owned(), there)));
    assert_eq!(found[2], own);
    let local = wanted(&snapshot_of("n3", "Local"), &Outlook::default(), 1420);
    assert_eq!(backends(&local, "192.0.2.3"), [own]);
}

#[test]
fn what_changed_is_described_anew_and_nothing_else_unless_backends_are_elsewhere() {
    let before = Arc::new(snapshot("Cluster"));
    let mut after = Snapshot::clone(&before);
    let services = Arc::make_mut(&mut Arc::make_mut(&mut after.edge).services);
    let gone = key(&services.remove(0));
    let lesser = Arc::make_mut(&mut services[0]);
    lesser.backends.pop();
    let lesser = key(lesser);
    let after = Arc::new(after);
    let outside = |snapshot: &Arc<Snapshot>, outlook| Outside(Arc::clone(snapshot), outlook);
    let done = || (outside(&before, Arc::default()), wanted(&before, &Outlook::default(), 1420));

    let slice = outside(&after, Arc::default());
    let (now, changed) = wanted_since(Some(done()), &slice, 1420);
    assert_eq!(now, wanted(&after, &Outlook::default(), 1420));
    assert_eq!(changed, Some(vec![gone, lesser]));

    let elsewhere = outside(&after, Arc::new(away(&["n2"])));
    let (now, changed) = wanted_since(Some(done()), &elsewhere, 1420);
    assert_eq!(now, wanted(&after, &away(&["n2"]), 1420));
    assert_eq!(changed, None, "backends of every service may be at that node");
}
