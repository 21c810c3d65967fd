//! Our network next to another one in the same directory, and a second one of ours, as nerdctl configures networks.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::node::{Container, NETWORKS, Node, ask, until, until_left};
use super::runtime::{Attachment, Network};
use crate::machine;

const LEASES: &str = "/run/host-local/bridged";

fn write(file: &str, list: &Value) -> Network {
    let file = Path::new(NETWORKS).join(file);
    fs::write(&file, list.to_string()).unwrap();
    Network::read(&file).unwrap()
}

/// A network that is none of our business.
fn bridged() -> Network {
    write(
        "20-bridged.conflist",
        &json!({"cniVersion": "1.0.0", "name": "bridged", "plugins": [
            {"type": "bridge", "bridge": "cni-other", "isGateway": true,
             "ipam": {"type": "host-local", "dataDir": "/run/host-local", "ranges": [[{"subnet": "10.99.0.0/24"}]]}},
            {"type": "firewall", "backend": "iptables"},
        ]}),
    )
}

/// As nerdctl writes it: keys of its own in the list, our plugin under its own name, the stock ones behind it.
fn of_nerdctl() -> Network {
    write(
        "nerdctl-front.conflist",
        &json!({"cniVersion": "1.0.0", "name": "front",
        "nerdctlID": "17f29b073143d8cd97b5bbe492bdeffec1c5fee55cc1fe2112c8b9335f8b6121",
        "nerdctlLabels": {"com.example.team": "net"},
        "plugins": [
            {"type": "mesh", "capabilities": {"portMappings": true, "ips": true, "mac": true}},
            {"type": "firewall", "backend": "iptables"},
            {"type": "tuning"},
        ]}),
    )
}

fn addresses(result: &Value) -> Vec<String> {
    let all = result["ips"].as_array().unwrap().iter();
    let all = all.filter_map(|ip| ip["address"].as_str()?.split('/').next().map(str::to_owned));
    all.filter(|address| !address.contains(':')).collect()
}

#[test]
fn networks_do_not_disturb_each_other() {
    machine::run_empty("network::beside::networks_do_not_disturb_each_other", async |cgroup| {
        let node = Node::start(cgroup);
        let (ours, other) = (Node::network(), bridged());
        let (a, b) = (Container::new("a"), Container::new("b"));
        let second = Attachment::new("a", &a.path(), "eth1");
        let own = ours.add(&a.eth0()).unwrap();
        let wide = other.add(&second).unwrap();
        let single = other.add(&b.eth0()).unwrap();
        let (own_ip, b_ip) = (addresses(&own).remove(0), addresses(&single).remove(0));
        let _server = (a.serve(), b.serve());
        let both_work = || {
            until("ours answers", || ask(&format!("{own_ip}:8080")).is_ok_and(|said| said == "a"));
            until("the other answers", || ask(&format!("{b_ip}:8080")).is_ok());
            // A container in both reaches a container of the other network.
            a.run(&["busybox", "wget", "-qO-", &format!("http://{b_ip}:8080")]).unwrap();
        };
        both_work();
        let leases = || fs::read_dir(LEASES).unwrap().count();
        let held = leases();

        // Nothing of ours is in use, by this list: the other network, and a second one of ours, keep what they have.
        let front = of_nerdctl();
        let c = Container::new("c");
        let third = front.add(&c.eth0()).unwrap();
        assert_eq!(ours.clone().version("1.1.0").gc(&[]), Vec::<Value>::new());
        assert!(ask(&format!("{own_ip}:8080")).is_err(), "collected");
        until("the other answers", || ask(&format!("{b_ip}:8080")).is_ok());
        assert_eq!(leases(), held);
        front.check(&c.eth0(), &third).unwrap();

        let own = ours.add(&a.eth0()).unwrap();
        assert_ne!(addresses(&own)[0], own_ip, "an address rests after its pod");
        other.del(&second, &wide).unwrap();
        other.del(&b.eth0(), &single).unwrap();
        ours.clone().version("1.1.0").check(&a.eth0(), &own).unwrap();
        front.check(&c.eth0(), &third).unwrap();
        front.del(&c.eth0(), &third).unwrap();
        ours.del(&a.eth0(), &own).unwrap();
        drop(node);
    });
}

#[test]
fn a_network_as_nerdctl_configures_it() {
    machine::run_empty("network::beside::a_network_as_nerdctl_configures_it", async |cgroup| {
        let node = Node::start(cgroup);
        let before = Node::left();
        let network = of_nerdctl();
        let container = Container::new("nerdctl");
        let wanted = json!({
            "portMappings": [
                {"hostPort": 18081, "containerPort": 8080, "protocol": "tcp", "hostIP": "0.0.0.0"},
                {"hostPort": 18082, "containerPort": 8080, "protocol": "tcp", "hostIP": ""},
            ],
            "mac": "02:42:ac:11:00:07",
            "bandwidth": {"ingressRate": 1},
        });
        let id = "default-5b1c0d1d4cf4f4e0f0a4b1d7f36cb9fdac36c2a0d09a8ad4e0e4b2a5d0c1b2a3";
        let attachment = Attachment::new(id, &container.path(), "eth0")
            .args("IgnoreUnknown=1;NERDCTL_CNI_DHCP_HOSTNAME=web;IP=10.244.1.77")
            .capabilities(wanted);
        let result = network.add(&attachment).unwrap();
        assert_eq!(addresses(&result), ["10.244.1.77"]);
        let link = container.run(&["ip", "link", "show", "eth0"]).unwrap();
        assert!(link.contains("02:42:ac:11:00:07"), "{link}");
        let _server = container.serve();
        for port in [18081, 18082] {
            let address = format!("192.0.2.1:{port}");
            until("the node's port leads to it", || ask(&address).is_ok_and(|s| s == "nerdctl"));
        }
        let host = result["interfaces"][0]["name"].as_str().unwrap();
        let limits = super::node::ip(&format!("-d link show {host}"));
        assert!(
            !limits.contains("tbf"),
            "a capability that the list does not declare is not passed"
        );
        network.check(&attachment, &result).unwrap();
        network.del(&attachment, &result).unwrap();
        assert!(ask("192.0.2.1:18081").is_err());
        drop(container);
        until_left(&before);
        drop(node);
    });
}
