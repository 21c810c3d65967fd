use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;
use crate::snapshot::{Departure, DnsTarget, FrontendKind, Leaving, PathMatch, Protocol, WgKey};

fn object<T: DeserializeOwned>(value: Value) -> Arc<T> {
    Arc::new(serde_json::from_value(value).unwrap())
}

const KEY_A: &str = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
const KEY_B: &str = "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=";

fn node(name: &str, key: &str, created: &str, block: &str, address: &str) -> Arc<Node> {
    object(json!({
        "metadata": {"name": name, "creationTimestamp": created,
                     "annotations": {"mesh.dev/wireguard-public-key": key}},
        "spec": {"podCIDR": block, "podCIDRs": [block]},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]}
    }))
}

fn service(name: &str, spec: Value) -> Arc<Service> {
    object(json!({"metadata": {"namespace": "default", "name": name}, "spec": spec}))
}

fn slice(service: &str, suffix: &str, port: Value, endpoints: Value) -> Arc<EndpointSlice> {
    object(json!({
        "metadata": {"namespace": "default", "name": format!("{service}-{suffix}"),
                     "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "ports": [port], "endpoints": endpoints
    }))
}

fn web() -> Objects {
    Objects {
        services: vec![service(
            "web",
            json!({"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7", "fd10:96::7"],
                   "ports": [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080}]}),
        )],
        endpoint_slices: vec![slice(
            "web",
            "a",
            json!({"name": "http", "port": 8080, "protocol": "TCP"}),
            json!([{"addresses": ["10.244.1.5"], "nodeName": "n1", "conditions": {"ready": true}},
                   {"addresses": ["10.244.2.5"], "nodeName": "n2", "conditions": {"ready": true}},
                   {"addresses": ["10.244.2.6"], "nodeName": "n2",
                    "conditions": {"ready": false, "serving": true, "terminating": true}}]),
        )],
        nodes: vec![
            node("n1", KEY_A, "2026-01-01T00:00:00Z", "10.244.1.0/24", "192.0.2.1"),
            node("n2", KEY_B, "2026-01-02T00:00:00Z", "10.244.2.0/24", "192.0.2.2"),
        ],
        ..Objects::default()
    }
}

fn compiled(objects: &Objects) -> Snapshot {
    compile(objects, &"n1".parse().unwrap())
}

#[test]
fn peers_are_the_other_nodes() {
    let snapshot = compiled(&web());
    assert_eq!(snapshot.node.blocks, ["10.244.1.0/24".parse().unwrap()]);
    assert_eq!(snapshot.peers.len(), 1);
    assert_eq!(snapshot.peers[0].endpoints, ["192.0.2.2:51900".parse().unwrap()]);
}

#[test]
fn a_later_node_cannot_take_a_block_or_key_of_an_earlier_one() {
    let mut objects = web();
    objects.nodes.push(node("n0", KEY_B, "2026-02-01T00:00:00Z", "10.244.9.0/24", "192.0.2.9"));
    let third = "AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM=";
    objects.nodes.push(node("n00", third, "2026-02-01T00:00:00Z", "10.244.1.0/24", "192.0.2.8"));
    let names: Vec<String> = compiled(&objects).peers.iter().map(|p| p.node.to_string()).collect();
    assert_eq!(names, ["n2"]);
}

#[test]
fn a_later_node_cannot_take_a_part_of_a_block_nor_what_it_is_a_part_of() {
    let key = |n: u8| WgKey([n; 32]).to_string();
    let claims =
        ["10.244.2.128/25", "10.244.2.0/25", "10.244.1.7/32", "10.240.0.0/12", "0.0.0.0/0"];
    let mut objects = web();
    for (n, claim) in (10..).zip(claims) {
        let at = "2026-02-01T00:00:00Z";
        objects.nodes.push(node(&format!("n{n}"), &key(n), at, claim, "192.0.2.9"));
    }
    objects.nodes.push(node("n3", &key(3), "2026-02-02T00:00:00Z", "10.244.3.0/24", "192.0.2.3"));
    let blocks = |name: &str| {
        let peers = compile(&objects, &name.parse().unwrap()).peers;
        let mut all: Vec<String> =
            peers.iter().flat_map(|peer| &peer.allowed_ips).map(ToString::to_string).collect();
        all.sort();
        all
    };
    assert_eq!(blocks("n1"), ["10.244.2.0/24", "10.244.3.0/24"]);
    assert_eq!(blocks("n2"), ["10.244.1.0/24", "10.244.3.0/24"]);
    assert_eq!(blocks("n3"), ["10.244.1.0/24", "10.244.2.0/24"]);
}

#[test]
fn a_node_that_says_that_it_is_nowhere_harms_no_other() {
    let endpoints = |said: &str, address: &str| {
        let at = "2026-01-01T00:00:00Z";
        let mut other = Arc::unwrap_or_clone(node("n2", KEY_B, at, "10.244.2.0/24", address));
        let annotations = other.metadata.annotations.get_or_insert_default();
        annotations.insert(crate::wellknown::ANNOTATION_ENDPOINTS.to_owned(), said.to_owned());
        let objects = Objects { nodes: vec![Arc::new(other)], ..Objects::default() };
        let peers = compiled(&objects).peers;
        peers[0].endpoints.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let nowhere = "0.0.0.0:51900, [::]:51900,192.0.2.7:0,224.0.0.1:51900,[ff02::1]:51900,nonsense";
    assert_eq!(
        endpoints(&format!("{nowhere},[::ffff:192.0.2.7]:51900"), "192.0.2.2"),
        ["192.0.2.7:51900"]
    );
    assert_eq!(endpoints(nowhere, "192.0.2.2"), ["192.0.2.2:51900"], "where the node's address is");
    assert_eq!(endpoints(nowhere, "0.0.0.0"), [""; 0], "it has to call");
}

#[test]
fn a_node_keeps_its_name_while_its_keys_change_and_takes_nobody_elses() {
    let key = |n: u8| WgKey([n; 32]).to_string();
    let announcing = |node: Arc<Node>, keys: &str| {
        let mut node = Arc::unwrap_or_clone(node);
        let annotations = node.metadata.annotations.get_or_insert_default();
        annotations.insert(crate::wellknown::ANNOTATION_WIREGUARD_KEYS.to_owned(), keys.to_owned());
        Arc::new(node)
    };
    let at = "2026-01-01T00:00:00Z";
    let later = "2026-01-02T00:00:00Z";
    let own = node("n1", &key(1), later, "10.244.1.0/24", "192.0.2.1");
    let other = node("n2", &key(2), at, "10.244.2.0/24", "192.0.2.2");
    let third = node("n3", &key(3), later, "10.244.3.0/24", "192.0.2.3");
    let keys = |own_keys: &str, others: &str, thirds: &str| {
        let nodes = vec![
            announcing(own.clone(), own_keys),
            announcing(other.clone(), others),
            announcing(third.clone(), thirds),
        ];
        let objects = Objects { nodes, ..Objects::default() };
        let peers = compile(&objects, &"n1".parse().unwrap()).peers;
        let numbers = |peer: &crate::snapshot::Peer| {
            let keys: Vec<u8> = peer.keys.iter().map(|key| key.0[0]).collect();
            (peer.public_key.0[0], keys)
        };
        peers.iter().map(numbers).collect::<Vec<_>>()
    };
    let list = |keys: &[u8]| keys.iter().map(|n| key(*n)).collect::<Vec<_>>().join(",");
    let good = keys(&list(&[9]), &list(&[2, 22]), &list(&[33, 34]));
    assert_eq!(
        good,
        [(2, vec![2, 22]), (3, vec![33, 34])],
        "its name is no key of its own any more"
    );
    let stolen = keys(&list(&[9]), &list(&[9, 22]), &list(&[22, 1, 35]));
    assert_eq!(stolen, [(2, vec![22])], "the younger one is left without a key: {stolen:?}");
    let nonsense = keys("", "nonsense", &list(&[2, 33, 34, 35]));
    assert_eq!(nonsense, [(2, vec![]), (3, vec![33])]);
}

#[test]
fn frontends_carry_ready_backends_of_their_family() {
    let snapshot = compiled(&web());
    let kinds: Vec<_> = snapshot.frontends.iter().map(|f| (f.vip.to_string(), f.kind)).collect();
    assert_eq!(
        kinds,
        [
            // The port on the addresses of all nodes.
            ("0.0.0.0".to_owned(), FrontendKind::NodePort),
            ("10.96.0.7".to_owned(), FrontendKind::ClusterIp),
            ("192.0.2.1".to_owned(), FrontendKind::NodePort),
            ("::".to_owned(), FrontendKind::NodePort),
            ("fd10:96::7".to_owned(), FrontendKind::ClusterIp)
        ]
    );
    assert_eq!(snapshot.frontends[1].backends.len(), 2, "the terminating one gets nothing new");
    let left = [Leaving { address: "10.244.2.6:8080".parse().unwrap(), terminating: true }];
    assert_eq!(snapshot.frontends[1].leaving, left);
    assert_eq!(snapshot.frontends[1].backends[0].port, 8080);
    assert_eq!(snapshot.frontends[1].protocol, Protocol::Tcp);
    assert!(snapshot.frontends[4].backends.is_empty(), "no IPv6 endpoints");
    let nodes: Vec<String> = snapshot.node_addresses.iter().map(ToString::to_string).collect();
    assert_eq!(nodes, ["192.0.2.1", "192.0.2.2"]);
}

#[test]
fn local_policy_is_about_the_cluster_address_only() {
    let mut objects = web();
    let spec = json!({"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"], "internalTrafficPolicy": "Local",
        "externalTrafficPolicy": "Local",
        "ports": [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080}]});
    objects.services = vec![service("web", spec)];
    let snapshot = compiled(&objects);
    let count = |kind| {
        let of = snapshot.frontends.iter().filter(|f| f.kind == kind);
        of.map(|f| f.backends.len()).collect::<Vec<_>>()
    };
    assert_eq!(count(FrontendKind::ClusterIp), [1]);
    assert_eq!(count(FrontendKind::NodePort), [2, 2], "any node's and this node's, IPv4 only");
}

#[test]
fn external_addresses_are_served_where_the_cluster_allows_them() {
    let mut objects = web();
    let mut balanced = (*objects.services[0]).clone();
    balanced.spec.as_mut().unwrap().external_ips =
        Some(vec!["198.51.100.7".to_owned(), "203.0.113.7".to_owned()]);
    balanced.status =
        serde_json::from_value(json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.99"}, {"ip": "192.0.2.98", "ipMode": "Proxy"}]}}))
            .unwrap();
    objects.services = vec![Arc::new(balanced)];
    let external = |objects: &Objects| -> Vec<String> {
        let frontends = compiled(objects).frontends;
        let of = frontends.iter().filter(|f| f.kind == FrontendKind::External);
        of.map(|f| f.vip.to_string()).collect()
    };
    assert_eq!(external(&objects), ["192.0.2.99"]);
    objects.cluster.external_ip_cidrs = vec!["198.51.100.0/24".parse().unwrap()];
    assert_eq!(external(&objects), ["192.0.2.99", "198.51.100.7"]);
}

#[test]
fn aliases_headless_services_and_those_of_another_proxy_are_names_only() {
    let mut objects = web();
    objects.cluster.external_ip_cidrs = vec!["198.51.100.0/24".parse().unwrap()];
    let plain = || json!({"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"]});
    for (label, spec) in [
        ("a", json!({"type": "ExternalName", "externalName": "a.example"})),
        ("a", json!({"clusterIP": "None", "clusterIPs": ["None"]})),
        ("service.kubernetes.io/service-proxy-name", plain()),
        ("service.kubernetes.io/headless", plain()),
    ] {
        let mut service = json!({
            "metadata": {"namespace": "default", "name": "web", "labels": {label: ""}}, "spec": spec,
            "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.99"}]}}
        });
        service["spec"]["externalIPs"] = json!(["198.51.100.7"]);
        service["spec"]["ports"] = json!([{"name": "http", "port": 80}]);
        objects.services = vec![object(service)];
        let snapshot = compiled(&objects);
        let proxied = (snapshot.frontends.len(), snapshot.edge.services.len());
        assert_eq!(proxied, (0, 0), "{label} {spec}");
        assert_eq!(snapshot.dns.services.len(), 1);
    }
}

#[test]
fn sctp_is_served_outside() {
    let mut objects = web();
    let port = json!({"name": "signal", "port": 2905, "protocol": "SCTP", "nodePort": 30_905});
    let endpoints = json!([{"addresses": ["10.244.1.9"], "conditions": {"ready": true}}]);
    let spec = json!({"type": "NodePort", "clusterIPs": ["10.96.0.7"], "ports": [port]});
    objects.services = vec![service("web", spec)];
    let port = json!({"name": "signal", "port": 2905, "protocol": "SCTP"});
    objects.endpoint_slices = vec![slice("web", "sctp", port, endpoints)];
    let snapshot = compiled(&objects);
    let found = snapshot
        .edge
        .services
        .iter()
        .find(|s| s.protocol == Protocol::Sctp && s.port == 30_905)
        .unwrap();
    assert_eq!(found.backends.len(), 1);
}

#[test]
fn weights_and_zones_come_from_where_they_are_written() {
    let mut objects = web();
    let weights = r#"{"10.244.1.5":20,"10.244.2.5":0,"10.244.9.9":7}"#;
    let slice = Arc::make_mut(&mut objects.endpoint_slices[0]);
    slice.metadata.annotations = Some([("mesh.dev/weights".to_owned(), weights.to_owned())].into());
    let node = Arc::make_mut(&mut objects.nodes[0]);
    node.metadata.labels =
        Some([("topology.kubernetes.io/zone".to_owned(), "a".to_owned())].into());
    let snapshot = compiled(&objects);
    assert_eq!(snapshot.node.zone.as_deref(), Some("a"));
    let weights: Vec<u16> = snapshot.frontends[1].backends.iter().map(|b| b.weight).collect();
    assert_eq!(weights, [20], "the one of weight 0 gets nothing");
}

#[test]
fn terminating_backends_serve_when_nothing_else_does() {
    let mut objects = web();
    let mut only = (*objects.endpoint_slices[0]).clone();
    only.endpoints.as_mut().unwrap().drain(..2);
    objects.endpoint_slices = vec![Arc::new(only)];
    assert_eq!(compiled(&objects).frontends[0].backends[0].address.to_string(), "10.244.2.6");
}

#[test]
fn a_node_with_nothing_but_what_terminates_serves_clients_outside_and_asks_for_none() {
    let mut objects = web();
    objects.services = vec![object(json!({
        "metadata": {"namespace": "default", "name": "web"},
        "spec": {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 30999,
                 "clusterIPs": ["10.96.0.7"], "ports": [{"name": "http", "port": 80}]},
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.200"}]}}
    }))];
    let seen = |objects: &Objects, node: &str| {
        let edge = compile(objects, &node.parse().unwrap()).edge;
        let announcing: Vec<String> =
            edge.announced[0].nodes.iter().flatten().map(ToString::to_string).collect();
        (edge.services[0].backends.len(), edge.health_checks[0].local_endpoints, announcing)
    };
    let all = || vec!["n1".to_owned(), "n2".to_owned()];
    assert_eq!(seen(&objects, "n1"), (1, 1, all()));
    assert_eq!(seen(&objects, "n2"), (1, 1, all()));
    let slice = Arc::make_mut(&mut objects.endpoint_slices[0]);
    slice.endpoints.as_mut().unwrap().remove(1);
    // All nodes agree on who may answer for the address.
    assert_eq!(seen(&objects, "n1"), (1, 1, vec!["n1".to_owned()]));
    assert_eq!(seen(&objects, "n2"), (1, 0, vec!["n1".to_owned()]));
    // A load balancer outside that has no address yet asks, too.
    Arc::make_mut(&mut objects.services[0]).status = None;
    let local = |node: &str| {
        compile(&objects, &node.parse().unwrap()).edge.health_checks[0].local_endpoints
    };
    assert_eq!((local("n1"), local("n2")), (1, 0));
}

#[test]
fn a_node_port_of_one_family_leaves_the_other_to_the_node() {
    let mut objects = web();
    let six = json!({"type": "InternalIP", "address": "2001:db8::1"});
    let status = Arc::make_mut(&mut objects.nodes[0]).status.as_mut().unwrap();
    status.addresses.as_mut().unwrap().push(serde_json::from_value(six).unwrap());
    let vips = |objects: &Objects| -> Vec<String> {
        compiled(objects).edge.services.iter().map(|one| one.vip.to_string()).collect()
    };
    assert_eq!(vips(&objects), ["192.0.2.1", "2001:db8::1"]);
    let spec = Arc::make_mut(&mut objects.services[0]).spec.as_mut().unwrap();
    spec.cluster_ips = Some(vec!["10.96.0.7".to_owned()]);
    assert_eq!(vips(&objects), ["192.0.2.1"]);
}

/// Once ranges are given, a family without any is refused (Service v1, `loadBalancerSourceRanges`, as kube-proxy does).
#[test]
fn ranges_of_clients_are_those_of_the_address_family() {
    let sources = |ranges: Value| {
        let mut objects = web();
        objects.services = vec![object(json!({
            "metadata": {"namespace": "default", "name": "web"},
            "spec": {"type": "LoadBalancer", "clusterIPs": ["10.96.0.7", "fd10:96::7"],
                     "loadBalancerSourceRanges": ranges, "ports": [{"name": "http", "port": 80}]},
            "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.200"}, {"ip": "2001:db8::200"}]}}
        }))];
        let services = compiled(&objects).edge.services.clone();
        services.iter().map(|one| serde_json::to_value(&one.sources).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(sources(json!([])), [json!(null), json!(null)]);
    assert_eq!(sources(json!(["::/0"])), [json!([]), json!(["::/0"])]);
    let of_both = ["10.1.2.3/8", "10.0.0.0/8", " 2001:db8::/32 "];
    assert_eq!(sources(json!(of_both)), [json!(["10.0.0.0/8"]), json!(["2001:db8::/32"])]);
}

#[test]
fn every_node_is_its_own_dns_server() {
    let mut objects = web();
    objects.services.push(object(json!({
        "metadata": {"namespace": "kube-system", "name": "kube-dns"},
        "spec": {"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10", "fd10:96::a"],
                 "ports": [{"name": "dns", "port": 53, "protocol": "UDP"}]}
    })));
    let snapshot = compiled(&objects);
    let dns: Vec<_> = snapshot.frontends.iter().filter(|f| f.port == 53).collect();
    assert_eq!(
        dns[0].backends[0].address,
        std::net::IpAddr::from(crate::wellknown::NODE_LOCAL_ADDRESS)
    );
    assert_eq!(
        dns[1].backends[0].address,
        std::net::IpAddr::from(crate::wellknown::NODE_LOCAL_ADDRESS_V6)
    );
}

#[test]
fn names_of_headless_services_are_their_ready_endpoints() {
    let mut objects = web();
    objects.services.push(service("db", json!({"clusterIP": "None", "ports": [{"port": 5432}]})));
    objects.endpoint_slices.push(slice(
        "db",
        "a",
        json!({"port": 5432}),
        json!([{"addresses": ["10.244.2.9"], "hostname": "db-0"},
               {"addresses": ["10.244.2.10"], "conditions": {"ready": false}}]),
    ));
    let zone = compiled(&objects).dns;
    let DnsTarget::Headless { endpoints } = &zone.services[0].target else { panic!("{zone:?}") };
    assert_eq!(endpoints.len(), 1);
    assert_eq!(endpoints[0].hostname.as_deref(), Some("db-0"));
}

#[test]
fn a_host_of_a_headless_service_has_the_ports_of_all_its_slices() {
    let mut objects = web();
    objects.services = vec![service("db", json!({"clusterIP": "None"}))];
    let host = |name: &str| json!([{"addresses": ["192.0.2.9"], "hostname": name}]);
    objects.endpoint_slices = vec![
        slice("db", "a", json!({"name": "sql", "port": 5432}), host("main")),
        slice("db", "b", json!({"name": "metrics", "port": 9187}), host("main")),
        slice("db", "c", json!({"name": "sql", "port": 5433}), host("replica")),
    ];
    let zone = compiled(&objects).dns;
    let DnsTarget::Headless { endpoints } = &zone.services[0].target else { panic!("{zone:?}") };
    let told: Vec<(&str, Vec<u16>)> = endpoints
        .iter()
        .map(|e| (e.hostname.as_deref().unwrap(), e.ports.iter().map(|p| p.port).collect()))
        .collect();
    assert_eq!(told, [("main", vec![9187, 5432]), ("replica", vec![5433])]);
}

fn ingress(class: Option<&str>) -> Arc<Ingress> {
    object(json!({
        "metadata": {"namespace": "default", "name": "web"},
        "spec": {"ingressClassName": class,
                 "tls": [{"hosts": ["a.test"], "secretName": "cert"}],
                 "rules": [{"host": "a.test", "http": {"paths": [
                    {"path": "/x", "pathType": "Exact",
                     "backend": {"service": {"name": "web", "port": {"name": "http"}}}},
                    {"path": "/", "pathType": "Prefix",
                     "backend": {"service": {"name": "gone", "port": {"number": 81}}}}]}}]}
    }))
}

#[test]
fn ingress_rules_become_routes_to_endpoints() {
    let mut objects = web();
    objects.ingresses = vec![ingress(Some("mesh"))];
    objects.secrets = vec![object(json!({
        "metadata": {"namespace": "default", "name": "cert"}, "type": "kubernetes.io/tls",
        "data": {"tls.crt": "Y2VydA==", "tls.key": "a2V5"}}))];
    let l7 = compiled(&objects).l7;
    assert_eq!(l7.routes[0].path, PathMatch::Exact("/x".to_owned()));
    assert_eq!(l7.routes[0].port, 80);
    assert_eq!(l7.routes[0].backends.len(), 2);
    assert_eq!(l7.routes[1].backends, [], "an absent service is a 503, not a missing route");
    assert_eq!(l7.certificates[0].chain_pem, "cert");
    assert!(!format!("{:?}", l7.certificates).contains("key_pem: \"key\""));

    objects.ingresses = vec![ingress(Some("nginx"))];
    assert_eq!(compiled(&objects).l7.routes, [], "another controller's class");
}

#[test]
fn a_route_leads_to_the_tcp_port_of_a_number_that_udp_has_too() {
    let mut objects = web();
    objects.services = vec![service(
        "web",
        json!({"clusterIP": "10.96.0.7", "ports": [{"name": "quic", "port": 443, "protocol": "UDP"},
            {"name": "https", "port": 443, "protocol": "TCP"}]}),
    )];
    let mut both = (*slice("web", "a", json!({}), json!([{"addresses": ["10.244.1.5"]}]))).clone();
    both.ports = serde_json::from_value(json!([{"name": "quic", "port": 8443, "protocol": "UDP"},
        {"name": "https", "port": 8080, "protocol": "TCP"}]))
    .unwrap();
    objects.endpoint_slices = vec![Arc::new(both)];
    objects.ingresses = vec![object(json!({
        "metadata": {"namespace": "default", "name": "web"},
        "spec": {"defaultBackend": {"service": {"name": "web", "port": {"number": 443}}}}}))];
    let routes = &compiled(&objects).l7.routes;
    assert_eq!(routes[0].backends, ["10.244.1.5:8080".parse().unwrap()]);
}

#[test]
fn pods_carry_what_they_refer_to_and_nothing_else() {
    let mut objects = web();
    let pod = |name: &str, node: &str| -> Arc<Pod> {
        object(json!({
            "metadata": {"namespace": "default", "name": name, "uid": name},
            "spec": {"nodeName": node, "containers": [{"name": "c", "env": [
                {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "a"}}}]}],
                "volumes": [{"name": "v", "secret": {"secretName": "token"}}]}
        }))
    };
    objects.pods = vec![pod("mine", "n1"), pod("other", "n2")];
    for (namespace, name) in [("default", "settings"), ("default", "unused"), ("other", "settings")]
    {
        objects.config_maps.push(object(json!({
            "metadata": {"namespace": namespace, "name": name}, "data": {"a": namespace},
            "binaryData": {"b": "eA=="}})));
        objects.secrets.push(object(json!({
            "metadata": {"namespace": namespace, "name": "token"}, "data": {"t": "eA=="}})));
    }
    let snapshot = compiled(&objects);
    assert_eq!(snapshot.pods.len(), 1);
    let work = &snapshot.pods[0];
    assert_eq!(work.config_maps.keys().collect::<Vec<_>>(), ["settings"]);
    assert_eq!(work.config_maps["settings"]["a"], b"default");
    assert_eq!(work.config_maps["settings"]["b"], b"x", "files may have both");
    assert_eq!(work.binary_keys["settings"].iter().collect::<Vec<_>>(), ["b"]);
    assert_eq!(work.secrets["token"]["t"], b"x");
    assert_eq!(work.service_env["WEB_SERVICE_HOST"], "10.96.0.7");
    assert_eq!(work.service_env["WEB_PORT_80_TCP"], "tcp://10.96.0.7:80");
}

#[test]
fn the_order_of_objects_does_not_matter_and_a_snapshot_survives_the_disk() {
    let mut objects = web();
    objects.services.push(service("db", json!({"clusterIP": "10.96.0.9", "ports": [{"port": 1}]})));
    let before = compiled(&objects);
    objects.services.reverse();
    objects.nodes.reverse();
    assert_eq!(compiled(&objects), before);
    let saved = serde_json::to_vec(&before).unwrap();
    assert_eq!(serde_json::from_slice::<Snapshot>(&saved).unwrap(), before);
}

#[test]
fn nonsense_is_left_out() {
    let mut objects = web();
    objects.nodes.push(object(json!({"metadata": {"name": "Bad Name"}, "spec": {"podCIDR": "x"}})));
    objects
        .services
        .push(service("bad", json!({"clusterIP": "x", "ports": [{"port": 70000}, {"port": -1}]})));
    objects.services.push(object(json!({"metadata": {}})));
    objects.ingresses.push(object(json!({"metadata": {"name": "x"}, "spec": {"rules": [{}]}})));
    objects.pods.push(object(json!({"metadata": {}})));
    let snapshot = compiled(&objects);
    assert_eq!(snapshot.peers.len(), 1);
    assert_eq!(snapshot.frontends.len(), 5);
}

#[test]
fn a_pod_that_is_deleted_knows_what_others_are_told() {
    let pod = |labels: Value, ip: Value, deleted: Value| {
        object::<Pod>(json!({
            "metadata": {"namespace": "default", "name": "web-1", "uid": "u1", "labels": labels,
                         "deletionTimestamp": deleted},
            "spec": {"nodeName": "n1", "containers": []},
            "status": {"podIP": ip, "podIPs": [{"ip": "10.244.1.5"}]}
        }))
    };
    let gone = json!("2026-01-01T00:00:00Z");
    let web = || pod(json!({"app": "web"}), json!("10.244.1.5"), gone.clone());
    let revised = |revision: &str, suffix: &str, conditions: Value| {
        let endpoint = json!([{"addresses": ["10.244.1.5"], "conditions": conditions,
                               "targetRef": {"kind": "Pod", "uid": "u1"}}]);
        let mut slice = slice("web", suffix, json!({"name": "", "port": 80}), endpoint);
        Arc::make_mut(&mut slice).metadata.resource_version = Some(revision.to_owned());
        slice
    };
    let leaves = || json!({"ready": false, "serving": true, "terminating": true});
    let selecting = service("web", json!({"selector": {"app": "web"}}));
    let departure = |pods: Vec<Arc<Pod>>, endpoint_slices: Vec<Arc<EndpointSlice>>| {
        let services = vec![selecting.clone()];
        let snapshot = compiled(&Objects { pods, services, endpoint_slices, ..Objects::default() });
        (snapshot.pods[0].departure, snapshot.revision)
    };
    let alive = pod(json!({"app": "web"}), json!("10.244.1.5"), Value::Null);
    assert_eq!(departure(vec![alive], vec![revised("7", "a", leaves())]), (None, 7));
    let both = vec![revised("7", "a", leaves()), revised("12", "b", leaves())];
    assert_eq!(departure(vec![web()], both), (Some(Departure::Told(12)), 12));
    let not_yet = vec![revised("7", "a", leaves()), revised("5", "b", json!({"ready": true}))];
    assert_eq!(departure(vec![web()], not_yet), (Some(Departure::Listed), 7));
    let unready = vec![revised("5", "a", json!({"ready": false, "terminating": false}))];
    let why = "it may have become ready since";
    assert_eq!(departure(vec![web()], unready).0, Some(Departure::Listed), "{why}");
    assert_eq!(departure(vec![web()], vec![]).0, Some(Departure::Listed), "it will be listed");
    let other = pod(json!({"app": "job"}), json!("10.244.1.5"), gone.clone());
    assert_eq!(departure(vec![other], vec![]).0, Some(Departure::Unlisted));
    let without_address = pod(json!({"app": "web"}), Value::Null, gone.clone());
    assert_eq!(departure(vec![without_address], vec![]).0, Some(Departure::Unlisted));
}
