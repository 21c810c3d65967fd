//! Loopback addresses stay a node's own, even where somebody has turned on `route_localnet`: then the stack would take what comes
//! for them from outside.

use std::net::{SocketAddr, UdpSocket};

use mesh_abi::{EdgeReason, Reason};
use mesh_kernel::policy::{PolicyReconciler, Tables};
use mesh_kernel::sysctl;
use mesh_model::policy::{OTHER_NODE, PolicySet};

use super::{NODE, Node, World, at, unchanged, v4};
use crate::lab::{Net, privileged};

const PORT: u16 = 9;

fn hidden() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 9], PORT))
}

fn open(net: &Net) {
    net.run(|| sysctl::write("net/ipv4/conf/all/route_localnet", "1")).unwrap();
}

/// Makes packets to the hidden address leave the namespace, where it is the namespace's own otherwise.
fn aim(net: &Net, route: &str) {
    net.ip("addr del 127.0.0.1/8 dev lo");
    net.ip(&format!("route add {} {route}", hidden().ip()));
}

/// A server by any address of the node's.
fn server(node: &Node) -> UdpSocket {
    open(&node.net);
    node.net.udp(&format!("0.0.0.0:{PORT}"))
}

fn heard(server: &UdpSocket) -> String {
    let mut buffer = [0; 16];
    let (length, _) = server.recv_from(&mut buffer).unwrap();
    String::from_utf8_lossy(&buffer[..length]).into_owned()
}

/// Sends to the hidden address, and then to another one of the same server: only that arrives.
fn only_the_open_one_arrives(from: &UdpSocket, other: SocketAddr, server: &UdpSocket) {
    from.send_to(b"hidden", hidden()).unwrap();
    from.send_to(b"open", other).unwrap();
    assert_eq!(heard(server), "open");
}

fn protected(node: &Node) -> u64 {
    node.programs.counters().unwrap()[&Reason::HostProtected].packets
}

#[test]
fn a_client_outside_does_not_reach_loopback_addresses() {
    if !privileged() {
        return;
    }
    let world = World::new();
    let node = &world.nodes[0];
    let server = server(node);
    aim(&world.client, &format!("via {NODE}"));
    let client = world.client.udp("0.0.0.0:0");
    client.send_to(b"before", hidden()).unwrap();
    assert_eq!(heard(&server), "before", "without a program on the uplink it is let in");
    node.settle(&world.wanted(&[], unchanged));
    only_the_open_one_arrives(&client, at(NODE.parse().unwrap(), PORT), &server);
    assert_eq!(node.counted(EdgeReason::Loopback), 1);
}

#[test]
fn a_pod_does_not_reach_loopback_addresses() {
    if !privileged() {
        return;
    }
    let world = World::new();
    let node = &world.nodes[0];
    let server = server(node);
    let default = node.pod.ip("route show default");
    let gateway = default.split(' ').nth(2).unwrap();
    aim(&node.pod, &format!("via {gateway} dev eth0 onlink"));
    let pod = node.pod.udp(&at(v4(1, 5), 0).to_string());
    only_the_open_one_arrives(&pod, at(v4(1, 1), PORT), &server);
    assert_eq!(protected(node), 1);
}

/// Also not when it speaks as itself, which lets it reach everything else.
#[test]
fn another_node_does_not_reach_loopback_addresses() {
    if !privileged() {
        return;
    }
    let world = World::new();
    let [one, two] = &world.nodes;
    let set = PolicySet { identities: [(v4(1, 1), OTHER_NODE)].into(), ..PolicySet::default() };
    let mut table = PolicyReconciler::new(two.programs.policy());
    let outcome = table.reconcile(&Tables::wanted(&set, &[].into(), &[])).unwrap();
    assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    let server = server(two);
    aim(&one.net, &format!("dev mesh-wg src {}", v4(1, 1)));
    let other = one.net.udp(&at(v4(1, 1), 0).to_string());
    only_the_open_one_arrives(&other, at(v4(2, 1), PORT), &server);
    assert_eq!(protected(two), 1);
}
