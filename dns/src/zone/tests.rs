use mesh_model::ObjectKey;
use mesh_model::snapshot::{DnsService, Protocol};
use proptest::prelude::*;

use super::*;

fn port(name: &str, port: u16) -> DnsPort {
    DnsPort { name: name.to_owned(), protocol: Protocol::Tcp, port }
}

fn zone() -> Zone {
    let service = |name: &str, target| {
        std::sync::Arc::new(DnsService { key: ObjectKey::new("default", name), target })
    };
    Zone::new(&DnsZone {
        domain: "Cluster.Local".to_owned(),
        namespaces: vec!["default".to_owned(), "empty".to_owned()],
        pod_cidrs: vec!["10.244.0.0/16".parse().unwrap(), "fd10:244::/56".parse().unwrap()],
        services: vec![
            service(
                "web",
                DnsTarget::ClusterIp {
                    addresses: vec!["10.96.0.7".parse().unwrap(), "fd10:96::7".parse().unwrap()],
                    ports: vec![port("http", 80), port("", 81)],
                },
            ),
            service(
                "db",
                DnsTarget::Headless {
                    endpoints: vec![
                        DnsEndpoint {
                            address: "10.244.1.5".parse().unwrap(),
                            hostname: Some("db-0".to_owned()),
                            ports: vec![port("pg", 5432)],
                        },
                        DnsEndpoint {
                            address: "10.244.1.6".parse().unwrap(),
                            hostname: None,
                            ports: vec![port("pg", 5432)],
                        },
                    ],
                },
            ),
            service("gone", DnsTarget::ExternalName("example.org.".to_owned())),
        ],
    })
}

fn records(zone: &Zone, name: &str) -> Records {
    match zone.answer(name) {
        Answer::Found(records) => records.into_owned(),
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn a_service_has_its_addresses_and_ports() {
    let zone = zone();
    let web = records(&zone, "web.default.svc.cluster.local");
    assert_eq!(web.addresses.len(), 2);
    let target = "web.default.svc.cluster.local".to_owned();
    let http = records(&zone, "_http._tcp.web.default.svc.cluster.local");
    assert_eq!(http.srv, [Srv { port: 80, target: target.clone() }]);
    assert_eq!(zone.answer("7.0.96.10.in-addr.arpa"), Answer::Pointer(&[target]));
    assert_eq!(records(&zone, "dns-version.cluster.local").text, ["1.1.0"]);
}

#[test]
fn two_hosts_at_one_address_are_told_once() {
    let host = |name: &str| DnsEndpoint {
        address: "192.0.2.9".parse().unwrap(),
        hostname: Some(name.to_owned()),
        ports: vec![],
    };
    let target = DnsTarget::Headless { endpoints: vec![host("main"), host("replica")] };
    let key = ObjectKey::new("default", "db");
    let zone = Zone::new(&DnsZone {
        domain: "cluster.local".to_owned(),
        services: vec![std::sync::Arc::new(DnsService { key, target })],
        namespaces: vec!["default".to_owned()],
        pod_cidrs: vec![],
    });
    for name in ["db", "main.db", "replica.db"] {
        let records = records(&zone, &format!("{name}.default.svc.cluster.local"));
        assert_eq!(records.addresses.len(), 1, "{name}");
    }
}

#[test]
fn a_headless_service_has_its_endpoints_each_by_name() {
    let zone = zone();
    assert_eq!(records(&zone, "db.default.svc.cluster.local").addresses.len(), 2);
    let first = records(&zone, "db-0.db.default.svc.cluster.local");
    assert_eq!(first.addresses, ["10.244.1.5".parse::<IpAddr>().unwrap()]);
    assert_eq!(records(&zone, "10-244-1-6.db.default.svc.cluster.local").addresses.len(), 1);
    assert_eq!(records(&zone, "_pg._tcp.db.default.svc.cluster.local").srv.len(), 2);
    assert_eq!(
        zone.answer("5.1.244.10.in-addr.arpa"),
        Answer::Pointer(&["db-0.db.default.svc.cluster.local".to_owned()])
    );
    assert_eq!(zone.answer("6.1.244.10.in-addr.arpa"), Answer::NoName);
}

#[test]
fn an_external_name_is_an_alias() {
    let alias = records(&zone(), "gone.default.svc.cluster.local").alias;
    assert_eq!(alias.as_deref(), Some("example.org"));
}

#[test]
fn pods_are_named_by_address_inside_the_cluster_only() {
    let zone = zone();
    let v4 = records(&zone, "10-244-3-4.default.pod.cluster.local").addresses;
    assert_eq!(v4, ["10.244.3.4".parse::<IpAddr>().unwrap()]);
    let v6 = records(&zone, "fd10-244--7.default.pod.cluster.local").addresses;
    assert_eq!(v6, ["fd10:244::7".parse::<IpAddr>().unwrap()]);
    for absent in
        ["10-244-3-4.nowhere.pod", "192-0-2-1.default.pod", "x.default.pod", "1.default.pod"]
    {
        assert_eq!(zone.answer(&format!("{absent}.cluster.local")), Answer::NoName, "{absent}");
    }
}

#[test]
fn parents_exist_and_strangers_go_upstream() {
    let zone = zone();
    for parent in [
        "cluster.local",
        "svc.cluster.local",
        "empty.svc.cluster.local",
        "_tcp.web.default.svc.cluster.local",
    ] {
        assert_eq!(records(&zone, parent), Records::default(), "{parent}");
    }
    assert_eq!(zone.answer("nosuch.default.svc.cluster.local"), Answer::NoName);
    for other in ["example.org", "xcluster.local", "local", "", "1.2.0.192.in-addr.arpa"] {
        assert_eq!(zone.answer(other), Answer::Elsewhere, "{other}");
    }
    assert_eq!(Zone::default().answer("a.b"), Answer::Elsewhere);
}

proptest! {
    #[test]
    fn reverse_names_give_the_address_back(v4: u32, v6: u128) {
        let a = std::net::Ipv4Addr::from(v4);
        let [x, y, z, w] = a.octets();
        prop_assert_eq!(reverse_address(&format!("{w}.{z}.{y}.{x}.in-addr.arpa")), Some(a.into()));
        let nibbles: Vec<String> =
            (0..32).map(|i| format!("{:x}", v6 >> (4 * i) & 0xf)).collect();
        let name = format!("{}.ip6.arpa", nibbles.join("."));
        prop_assert_eq!(reverse_address(&name), Some(std::net::Ipv6Addr::from(v6).into()));
    }

    #[test]
    fn no_name_makes_it_panic(name in "[a-z0-9.-]{0,80}") {
        let zone = zone();
        let _ = zone.answer(&name);
        let _ = zone.answer(&format!("{name}.pod.cluster.local"));
        let _ = zone.answer(&format!("{name}.ip6.arpa"));
    }
}
