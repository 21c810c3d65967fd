//! Our plugin and the stock ones (package containernetworking-plugins) in one list.

use mesh_tests::command::run;
use serde_json::{Value, json};

use super::node::{Container, Node, ask, until_left};
use super::runtime::{Attachment, Network};
use crate::machine;

fn stock(version: &str) -> Vec<Value> {
    let mut list = vec![
        Node::entry(),
        json!({"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}),
        json!({"type": "bandwidth", "capabilities": {"bandwidth": true}}),
        json!({"type": "tuning", "sysctl": {"net.ipv4.conf.eth0.arp_filter": "1"}, "mtu": 1300}),
    ];
    if version != "0.3.1" {
        // It speaks 0.4.0 and later.
        list.push(json!({"type": "firewall", "backend": "iptables"}));
    }
    list
}

fn with_everything(container: &Container) -> Attachment {
    container.eth0().capabilities(json!({
        "portMappings": [{"hostPort": 18080, "containerPort": 8080, "protocol": "tcp"}],
        "bandwidth": {"ingressRate": 800_000_000, "ingressBurst": 80_000_000},
    }))
}

/// Rules of iptables that name this.
fn rules(word: &str) -> usize {
    let of = |table| run("iptables", &["-w", "-t", table, "-S"]).unwrap_or_default();
    let all = [of("nat"), of("filter")].concat();
    all.lines().filter(|line| line.contains(word)).count()
}

#[test]
fn stock_plugins_work_behind_ours() {
    machine::run_empty("network::chains::stock_plugins_work_behind_ours", async |cgroup| {
        let node = Node::start(cgroup);
        let before = Node::left();
        for (n, version) in ["0.3.1", "0.4.0", "1.0.0"].into_iter().enumerate() {
            let network = Network::new(version, "chained", &stock(version));
            let container = Container::new(&format!("c{n}"));
            let attachment = with_everything(&container);
            let result = network.add(&attachment).unwrap();
            assert_eq!(result["cniVersion"], version);
            let address = result["ips"][0]["address"].as_str().unwrap().to_owned();
            let address = address.strip_suffix("/32").unwrap();
            assert!(rules(address) > 0, "portmap has a rule");
            let host = result["interfaces"][0]["name"].as_str().unwrap();
            let limits = run("tc", &["qdisc", "show", "dev", host]).unwrap();
            assert!(limits.contains("tbf"), "bandwidth has a limit: {limits}");
            let inside = container.run(&["ip", "link", "show", "eth0"]).unwrap();
            assert!(inside.contains("mtu 1300"), "tuning has tuned: {inside}");
            let _server = container.serve();
            super::node::until("it answers", || ask(&format!("{address}:8080")).is_ok());
            if version != "0.3.1" {
                let rest: Vec<Value> =
                    stock(version).into_iter().filter(|p| p["type"] != "portmap").collect();
                // portmap 1.1.1 looks for rules of the wrong family where there are two, and fails behind everybody.
                let network = Network::new(version, "chained", &rest);
                network.check(&attachment, &result).unwrap();
                container.run(&["ip", "route", "del", "default"]).unwrap();
                let error = network.check(&attachment, &result).unwrap_err();
                assert_eq!(error["code"], 102, "{error}");
                assert!(error["details"].as_str().unwrap().contains("default route"), "{error}");
            }
            network.del(&attachment, &result).unwrap();
            network.del(&attachment, &result).unwrap();
            assert_eq!(rules(address), 0);
        }
        until_left(&before);
        drop(node);
    });
}

/// The stock plugins of today do not speak 1.1.0: then the whole list fails, and ours goes by the garbage collection.
#[test]
fn a_list_that_another_plugin_refuses_leaves_nothing() {
    let name = "network::chains::a_list_that_another_plugin_refuses_leaves_nothing";
    machine::run_empty(name, async |cgroup| {
        let node = Node::start(cgroup);
        let before = Node::left();
        let container = Container::new("c");
        let list = [Node::entry(), json!({"type": "no-such-version"})];
        refuser();
        let network = Network::new("1.1.0", "refused", &list);
        let error = network.add(&container.eth0()).unwrap_err();
        assert_eq!(error["code"], 1, "{error}");
        let _ = network.del(&container.eth0(), &Value::Null);
        assert_ne!(Node::left().links, before.links, "its DEL stops at the plugin that refuses");
        assert_eq!(network.gc(&[]).len(), 1, "the other plugin refuses this, too");
        drop(container);
        until_left(&before);
        drop(node);
    });
}

/// A plugin that speaks nothing newer than 1.0.0.
fn refuser() {
    use std::os::unix::fs::PermissionsExt as _;
    let file = std::path::Path::new(super::node::PLUGINS).join("no-such-version");
    let script = "#!/bin/sh\necho '{\"cniVersion\":\"1.0.0\",\"code\":1,\"msg\":\"incompatible\"}'\nexit 1\n";
    std::fs::write(&file, script).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn ours_in_the_second_place() {
    machine::run_empty("network::chains::ours_in_the_second_place", async |cgroup| {
        let node = Node::start(cgroup);
        let before = Node::left();
        let loopback = json!({"type": "loopback"});
        for (n, version) in ["0.3.1", "0.4.0", "1.0.0"].into_iter().enumerate() {
            let network = Network::new(version, "second", &[loopback.clone(), Node::entry()]);
            let container = Container::new(&format!("c{n}"));
            let result = network.add(&container.eth0()).unwrap();
            let names: Vec<&Value> =
                result["interfaces"].as_array().unwrap().iter().map(|i| &i["name"]).collect();
            assert_eq!((names[0], names.last()), (&json!("lo"), Some(&&json!("eth0"))), "{result}");
            let ours = result["ips"].as_array().unwrap().iter().find(|ip| {
                ip["address"].as_str().is_some_and(|address| address.starts_with("10.244.1."))
            });
            let index = ours.unwrap()["interface"].as_u64().unwrap();
            assert_eq!(names[usize::try_from(index).unwrap()], "eth0", "{result}");
            if version != "0.3.1" {
                network.check(&container.eth0(), &result).unwrap();
            }
            network.del(&container.eth0(), &result).unwrap();
        }
        until_left(&before);

        // Somebody before us has made the interface: ours is refused, and takes no address.
        let bridge = json!({"type": "bridge", "bridge": "cni-other", "isGateway": true,
            "ipam": {"type": "host-local", "dataDir": "/run/host-local", "ranges": [[{"subnet": "10.99.0.0/24"}]]}});
        let network = Network::new("1.0.0", "taken", &[bridge, Node::entry()]);
        let container = Container::new("taken");
        let error = network.add(&container.eth0()).unwrap_err();
        assert_eq!(error["code"], 101, "{error}");
        assert!(error["msg"].as_str().unwrap().contains("eth0"), "{error}");
        let of_the_first: Value = json!({"cniVersion": "1.0.0"});
        network.del(&container.eth0(), &of_the_first).unwrap();
        assert!(Node::leased().is_empty(), "{:?}", Node::leased());
        run("ip", &["link", "del", "cni-other"]).unwrap();
        drop(container);
        until_left(&before);
        drop(node);
    });
}
