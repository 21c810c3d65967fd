//! Who gets in: services without backends, source ranges, policies of pods, and removal.

use std::net::{SocketAddr, TcpStream, UdpSocket};

use mesh_abi::{EdgeReason, Reason};
use mesh_kernel::edge::{Desired, Observed};
use mesh_model::policy::OTHER_NODE;
use mesh_model::snapshot::Protocol;

use super::{CLIENT, CLIENT6, CLIENTS, Published, World, any, frontends, teller, unchanged};
use crate::lab::privileged;

#[test]
fn every_removal_is_complete() {
    if !privileged() {
        return;
    }
    let world = World::new();
    teller(&world.nodes[0].pod, 80, "one");
    let services: &[Published<'_>] = &[(Protocol::Tcp, 30_001, &[(1, 80)])];
    world.publish(services, unchanged);
    let frontend = frontends(30_001)[0];
    assert!(world.tcp(frontend).unwrap().starts_with("one "));
    let node = &world.nodes[0];
    node.settle(&Desired::default());
    assert_eq!(node.edge.observe(&Desired::default()).unwrap(), Observed::default());
    assert_eq!(world.tcp(frontend).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
    world.publish(services, unchanged);
    assert!(world.tcp(frontend).unwrap().starts_with("one "));
}

#[test]
fn a_service_without_backends_refuses_and_a_restricted_one_is_silent() {
    if !privileged() {
        return;
    }
    let world = World::new();
    teller(&world.nodes[0].pod, 80, "one");
    let services: &[Published<'_>] = &[(Protocol::Tcp, 30_001, &[]), (Protocol::Udp, 30_001, &[])];
    world.publish(services, unchanged);
    for frontend in frontends(30_001) {
        let error = world.tcp(frontend).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{frontend}: {error}");
        let socket = world.client.udp(any(frontend));
        world.client.run(|| socket.connect(frontend)).unwrap();
        socket.send(b"?").unwrap();
        let error = socket.recv(&mut [0; 16]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{frontend}: {error}");
    }
    assert_eq!(world.nodes[0].counted(EdgeReason::NoBackend), 4, "the stack was not asked");
    let quick = |frontend| {
        let patience = std::time::Duration::from_millis(300);
        world.client.run(|| TcpStream::connect_timeout(&frontend, patience)).map(drop)
    };
    world.publish(services, |service| service.local_only = true);
    for frontend in frontends(30_001) {
        assert_eq!(quick(frontend).unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    }
    let open: &[Published<'_>] = &[(Protocol::Tcp, 30_001, &[(1, 80)])];
    let ranges = |texts: &[&str]| Some(texts.iter().map(|text| text.parse().unwrap()).collect());
    world.publish(open, |s| s.sources = ranges(&["198.51.100.0/24", "2001:db8:1::/48"]));
    for frontend in frontends(30_001) {
        assert_eq!(quick(frontend).unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    }
    assert!(world.nodes[0].counted(EdgeReason::NotAllowed) >= 2);
    world.publish(open, |s| s.sources = ranges(&["192.0.2.2/32", "2001:db8::/64"]));
    for frontend in frontends(30_001) {
        assert!(world.tcp(frontend).unwrap().starts_with("one "));
    }
}

/// Whether a datagram from the client arrives in the pod. Nobody answers: an answer would be asked about, too.
fn arrives(world: &World, frontend: SocketAddr, pod: &UdpSocket) -> bool {
    world.client.udp(any(frontend)).send_to(b"?", frontend).unwrap();
    match pod.recv(&mut [0; 16]) {
        Ok(_) => true,
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => false,
        Err(error) => panic!("{frontend}: {error}"),
    }
}

#[test]
fn the_policies_of_pods_hold_for_clients_outside() {
    if !privileged() {
        return;
    }
    let world = World::new();
    let mut pods = Vec::new();
    for (node, name) in [(0, "one"), (1, "two")] {
        teller(&world.nodes[node].pod, 80, name);
        let socket = world.nodes[node].pod.udp("[::]:53");
        socket.set_read_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
        pods.push(socket);
    }
    let services = [
        (Protocol::Tcp, 30_001, &[(1, 80)][..]),
        (Protocol::Tcp, 30_002, &[(2, 80)]),
        (Protocol::Udp, 30_001, &[(1, 53)]),
        (Protocol::Udp, 30_002, &[(2, 53)]),
    ];
    world.publish(&services, unchanged);
    let denied = |index: usize| {
        world.nodes[index].programs.counters().unwrap()[&Reason::PolicyIngress].packets
    };
    for node in &world.nodes {
        node.restrict(&["192.0.2.99", "2001:db8::99"]);
    }
    for (index, port) in [30_001, 30_002].into_iter().enumerate() {
        for frontend in frontends(port) {
            let before = denied(index);
            assert!(!arrives(&world, frontend, &pods[index]), "{frontend}");
            assert!(denied(index) > before, "{frontend}: by the pod's own node");
        }
    }
    for node in &world.nodes {
        node.restrict(&[CLIENT, CLIENT6]);
    }
    for (index, (port, name)) in [(30_001, "one"), (30_002, "two")].into_iter().enumerate() {
        for frontend in frontends(port) {
            assert!(arrives(&world, frontend, &pods[index]), "{frontend}");
            // The pods may send to nobody, but answers are no sending.
            let told = world.tcp(frontend).unwrap();
            assert!(told.starts_with(name), "{told}");
        }
    }
}

/// What a node sends through the overlay is its own. What comes with its outside address may be a pod's there, behind it.
#[test]
fn the_outside_address_of_another_node_is_an_address() {
    if !privileged() {
        return;
    }
    let world = World::new();
    teller(&world.nodes[0].pod, 80, "one");
    world.publish(&[(Protocol::Tcp, 30_001, &[(1, 80)])], unchanged);
    let (node, from) = (&world.nodes[0], [CLIENT, CLIENT6]);
    let patience = std::time::Duration::from_millis(300);
    node.enforce(&[], &from, OTHER_NODE);
    for frontend in frontends(30_001) {
        let before = node.programs.counters().unwrap()[&Reason::PolicyIngress].packets;
        let tried = world.client.run(|| TcpStream::connect_timeout(&frontend, patience));
        assert!(tried.is_err(), "{frontend}");
        let after = node.programs.counters().unwrap()[&Reason::PolicyIngress].packets;
        assert!(after > before, "{frontend}");
    }
    node.enforce(&from, &from, CLIENTS);
    for frontend in frontends(30_001) {
        assert!(world.tcp(frontend).unwrap().starts_with("one "));
    }
}
