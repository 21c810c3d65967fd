//! Another life of the machine: what was reserved in the one before is free.

use std::fs;

use mesh_tests::command::run;

use super::node::{Container, Node, ip};
use crate::machine;

/// What tells one life from another.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

#[test]
fn reservations_of_an_earlier_boot_are_gone_when_the_network_works() {
    let name = "network::reboot::reservations_of_an_earlier_boot_are_gone_when_the_network_works";
    machine::run_empty(name, async |cgroup| {
        // Five addresses. One stays free, so that the network works whether the others are free or not.
        let mut node = Node::with_blocks(cgroup, ["10.244.1.0/29", "fd10:244:0:1::/64"]);
        let network = Node::network();
        let add = |container: &Container| network.add(&container.eth0());
        let old: Vec<Container> = (0..4).map(|n| Container::new(&format!("c{n}"))).collect();
        old.iter().for_each(|container| drop(add(container).unwrap()));

        node.kill_agent();
        drop(old);
        let links = ip("-o link");
        for link in links.lines().filter_map(|line| line.split(": ").nth(1)) {
            let name = link.split('@').next().unwrap();
            if name.starts_with("mv") || name.starts_with("mx") {
                // Its namespace may have taken it along.
                let _ = run("ip", &["link", "del", name]);
            }
        }
        fs::write("/run/boot_id", "00000000-0000-4000-8000-000000000001\n").unwrap();
        run("mount", &["--bind", "/run/boot_id", BOOT_ID]).unwrap();
        assert_eq!(Node::leased().len(), 4);

        let took = node.start_agent();
        println!("the network works {took:.1?} after the agent's start");
        assert!(Node::leased().is_empty(), "{:?}", Node::leased());
        let new: Vec<Container> = (0..5).map(|n| Container::new(&format!("n{n}"))).collect();
        new.iter().for_each(|container| drop(add(container).unwrap()));
    });
}
