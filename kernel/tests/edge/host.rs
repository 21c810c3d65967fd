//! Backends that are processes in a node's own network (`hostNetwork`): their address is the node's.
//!
//! ```text
//!   client 192.0.2.2 ---- up0 192.0.2.1 ---- node 1 ==overlay== node 2 ---- 198.51.100.1 up0 ---- 198.51.100.2 client
//!                                          process                process
//! ```
//!
//! Each node has a way to the client of its own: an answer that is not taken back to the node that the client used reaches it all the
//! same, with the wrong address.

use std::io::{ErrorKind, Read as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::Ordering;
use std::time::Duration;

use mesh_abi::EdgeReason;
use mesh_kernel::edge::{Desired, Service};
use mesh_kernel::services::FrontendKey;
use mesh_model::snapshot::Protocol;

use super::{
    MTU, NODE, NODE6, World, any, ask, ask_in_pieces, at, returner, teller, udp_teller, v4, v6,
};
use crate::lab::{PATIENCE, privileged};
use crate::node_network::move_link;

/// Of the nodes, and of the client towards them.
pub(super) const NODES: [[&str; 2]; 2] = [[NODE, NODE6], ["198.51.100.1", "2001:db8:2::1"]];
const CLIENTS: [[&str; 2]; 2] = [["192.0.2.2", "2001:db8::2"], ["198.51.100.2", "2001:db8:2::2"]];
/// Of a load balancer, at the first node.
const OUTSIDE: [&str; 2] = ["203.0.113.7", "2001:db8:7::7"];
/// Node port of the process on the first node; that of the second follows.
pub(super) const PORT: u16 = 30_001;
/// Where the processes listen.
pub(super) const TCP: u16 = 8080;
pub(super) const UDP: u16 = 8053;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Joins the client and the second node, too, and tells each node a way to the client's other address.
pub(super) fn world() -> World {
    let world = World::new();
    let two = &world.nodes[1].net;
    two.ip("link add up0 type veth peer name down1");
    two.run(|| move_link("down1", &world.client));
    let ends = [(two, "up0", NODES[1]), (&world.client, "down1", CLIENTS[1])];
    for (net, device, [address4, address6]) in ends {
        net.ip(&format!("addr add {address4}/24 dev {device}"));
        net.ip(&format!("link set {device} up"));
        net.ip(&format!("addr add {address6}/64 dev {device} nodad"));
    }
    for (node, nets) in
        [(0, ["198.51.100.0/24", "2001:db8:2::/64"]), (1, ["192.0.2.0/24", "2001:db8::/64"])]
    {
        for (net, via) in nets.into_iter().zip(CLIENTS[node]) {
            world.nodes[node].net.ip(&format!("route add {net} via {via}"));
        }
    }
    for (outside, via) in OUTSIDE.into_iter().zip(NODES[0]) {
        world.client.ip(&format!("route add {outside} via {via}"));
    }
    world
}

/// What a node is to be: both processes as backends, by the addresses that clients use there.
pub(super) fn desired(world: &World, node: usize, local: bool) -> Desired {
    let mut desired = world.nodes[node].desired(2 - node as u8);
    desired.addresses = NODES[node].map(ip).into();
    let mut vips: Vec<IpAddr> = NODES[node].map(ip).into();
    if node == 0 {
        vips.extend(OUTSIDE.map(ip));
    }
    for vip in vips {
        for (place, addresses) in NODES.iter().enumerate() {
            let family = usize::from(vip.is_ipv6());
            let overlay = if vip.is_ipv4() { v4 } else { v6 };
            let via = (place != node).then(|| overlay(place as u8 + 1, 1));
            for (protocol, port) in [(Protocol::Tcp, TCP), (Protocol::Udp, UDP)] {
                let backend = at(ip(addresses[family]), port);
                let service = Service {
                    local_only: local,
                    backends: (!local || place == node)
                        .then_some((backend, via))
                        .into_iter()
                        .collect(),
                    ..Service::default()
                };
                let key = FrontendKey { vip, protocol, port: PORT + place as u16 };
                desired.services.insert(key, service);
            }
        }
    }
    desired
}

fn publish(world: &World, local: bool) {
    for node in 0..2 {
        world.nodes[node].settle(&desired(world, node, local));
    }
}

/// Every way to a process: by which node's address, to which node's process, over IPv4 or IPv6.
fn ways() -> impl Iterator<Item = (usize, usize, usize, SocketAddr)> {
    let all = (0..8).map(|n| (n & 1, n >> 1 & 1, n >> 2));
    all.map(|(entry, place, family)| {
        (entry, place, family, at(ip(NODES[entry][family]), PORT + place as u16))
    })
}

const NAMES: [&str; 2] = ["one", "two"];

pub(super) fn serve(world: &World) {
    for node in 0..2 {
        teller(&world.nodes[node].net, TCP, NAMES[node]);
        for address in NODES[node] {
            udp_teller(&world.nodes[node].net, at(ip(address), UDP), NAMES[node]);
        }
    }
}

impl World {
    fn all_losses(&self) -> String {
        format!("{:?} {:?}", self.nodes[0].losses(), self.nodes[1].losses())
    }
}

#[test]
fn a_client_reaches_processes_of_nodes_by_every_node_with_its_own_address() {
    if !privileged() {
        return;
    }
    let world = world();
    serve(&world);
    publish(&world, false);
    let outside = OUTSIDE.into_iter().enumerate().flat_map(|(family, vip)| {
        (0..2).map(move |place| (0, place, family, at(ip(vip), PORT + place as u16)))
    });
    for (entry, place, family, frontend) in ways().chain(outside) {
        let told = world.tcp(frontend);
        let told = told.unwrap_or_else(|e| panic!("{frontend}: {e} {}", world.all_losses()));
        let (who, peer) = told.split_once(' ').unwrap();
        let peer: SocketAddr = peer.parse().unwrap();
        assert_eq!((who, peer.ip()), (NAMES[place], ip(CLIENTS[entry][family])), "{frontend}");
        let (told, from) = ask(&world.client.udp(any(frontend)), frontend, 10);
        let client = CLIENTS[entry][family];
        assert!(told.starts_with(NAMES[place]) && told.contains(client), "{frontend}: {told}");
        assert_eq!(from, frontend);
    }
    for node in &world.nodes {
        for reason in [
            EdgeReason::ClientToHost,
            EdgeReason::ClientToNode,
            EdgeReason::NodeToHost,
            EdgeReason::HostToClient,
            EdgeReason::HostToNode,
            EdgeReason::NodeToClient,
        ] {
            assert!(node.counted(reason) > 0, "{reason:?} on node {}", node.number);
        }
        node.settle(&Desired::default());
    }
}

#[test]
fn traffic_that_stays_on_a_node_reaches_its_own_process_only() {
    if !privileged() {
        return;
    }
    let world = world();
    serve(&world);
    publish(&world, true);
    for (entry, place, _, frontend) in ways() {
        let quick = Duration::from_millis(300);
        let connect = || TcpStream::connect_timeout(&frontend, quick).map(drop);
        if entry == place {
            assert!(world.tcp(frontend).unwrap().starts_with(NAMES[place]), "{frontend}");
        } else {
            let error = world.client.run(connect).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::TimedOut, "{frontend}");
        }
    }
}

#[test]
fn much_goes_both_ways_and_pieces_arrive() {
    if !privileged() {
        return;
    }
    let world = world();
    const BYTES: usize = 1_000_000;
    for node in 0..2 {
        for address in NODES[node] {
            udp_teller(&world.nodes[node].net, at(ip(address), UDP), NAMES[node]);
        }
        returner(&world.nodes[node].net, TCP, BYTES);
    }
    publish(&world, false);
    world.assert_returned(ways().map(|(_, _, _, frontend)| frontend), BYTES);
    assert!(world.nodes.iter().all(|node| node.counted(EdgeReason::TooBig) == 0));
    for (_, place, _, frontend) in ways() {
        let (told, from) = ask_in_pieces(&world, frontend);
        assert!(told.starts_with(NAMES[place]), "{told}");
        assert_eq!(from, frontend);
    }
    assert!(world.largest.load(Ordering::Relaxed) <= MTU as usize);
}

#[test]
fn a_process_that_is_gone_refuses_as_the_service() {
    if !privileged() {
        return;
    }
    let world = world();
    publish(&world, false);
    for (_, _, _, frontend) in ways() {
        let refused = world.tcp(frontend).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{frontend}: {refused}");
        let socket = world.client.udp(any(frontend));
        world.client.run(|| socket.connect(frontend)).unwrap();
        socket.send(b"?").unwrap();
        let error = socket.recv(&mut [0; 16]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{frontend}: {error}");
    }
}

/// One connection from this port of the client's; what it is told.
fn from_port(world: &World, port: u16, to: SocketAddr) -> std::io::Result<String> {
    use socket2::{Domain, Socket, Type};
    world.client.run(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        let own: SocketAddr = any(to).parse().unwrap();
        socket.bind(&at(own.ip(), port).into())?;
        socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
        let mut stream = TcpStream::from(socket);
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })
}

#[test]
fn a_client_may_go_on_to_the_process_itself_from_the_same_port() {
    if !privileged() {
        return;
    }
    let world = world();
    serve(&world);
    publish(&world, false);
    for (family, address) in NODES[0].into_iter().enumerate() {
        let port = 45_000 + family as u16;
        for to in [at(ip(address), PORT), at(ip(address), TCP), at(ip(address), PORT)] {
            let told = from_port(&world, port, to);
            let told = told.unwrap_or_else(|e| panic!("{to}: {e} {}", world.all_losses()));
            assert!(told.starts_with("one "), "{to}: {told}");
        }
    }
}

/// Some connections last longer than their backend's place in the table, as while it ends.
#[test]
fn connections_go_on_when_the_backend_takes_no_new_ones() {
    if !privileged() {
        return;
    }
    let world = world();
    for (node, name) in [(0, "one"), (1, "two")] {
        let listener = world.nodes[node].net.run(|| TcpListener::bind(("::", TCP))).unwrap();
        super::echo_from(listener, name);
    }
    publish(&world, false);
    let mut streams: Vec<(usize, TcpStream)> = ways()
        .map(|(_, place, _, to)| {
            let connect = || TcpStream::connect_timeout(&to, PATIENCE).unwrap();
            (place, world.client.run(connect))
        })
        .collect();
    let mut all_answer = || {
        for (place, stream) in &mut streams {
            assert_eq!(super::say(stream).unwrap(), NAMES[*place], "{:?}", stream.peer_addr());
        }
    };
    all_answer();
    for node in 0..2 {
        let mut without = desired(&world, node, false);
        without.services.values_mut().for_each(|service| service.backends.clear());
        world.nodes[node].settle(&without);
    }
    all_answer();
}
