//! Clients outside and services inside, on two nodes.
//!
//! ```text
//!   client 192.0.2.2 -- up0 (TC) -- node 1 -- (TC) mesh-wg ==TUN, copied by this test== mesh-wg (TC) -- node 2
//!          2001:db8::2            192.0.2.1      10.244.1.1                        10.244.2.1
//!                                    |                                                |
//!                                pod 10.244.1.5                                   pod 10.244.2.5
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use mesh_abi::EdgeReason;
use mesh_kernel::edge::{Desired, Observed, Service, plan};
use mesh_kernel::node::{Desired as NodeDesired, LinuxNodeNetwork, NodeNetwork};
use mesh_kernel::pods::{LinuxPodNetwork, PodNetwork, PodPort};
use mesh_kernel::services::FrontendKey;
use mesh_kernel::{IfName, LinuxEdge, Programs};
use mesh_model::snapshot::Protocol;

use crate::lab::{Lab, Net, PATIENCE, at, privileged};
use crate::node_network::{move_link, tun};

const MTU: u32 = 1420;
const CLIENT: &str = "192.0.2.2";
const CLIENT6: &str = "2001:db8::2";
const NODE: &str = "192.0.2.1";
const NODE6: &str = "2001:db8::1";

/// A node with one pod.
struct Node {
    number: u8,
    edge: LinuxEdge,
    programs: Arc<Programs>,
    pod: Net,
    net: Net,
    _lab: Lab,
}

fn overlay() -> IfName {
    "mesh-wg".parse().unwrap()
}

fn v4(node: u8, host: u8) -> IpAddr {
    IpAddr::from([10, 244, node, host])
}

fn v6(node: u8, host: u8) -> IpAddr {
    IpAddr::from([0xfd10, 0x244, 0, u16::from(node), 0, 0, 0, u16::from(host)])
}

impl Node {
    /// The node, and the other end of its overlay device.
    fn new(number: u8, other: u8) -> (Self, File) {
        let (lab, net, pod) = (Lab::new(), Net::new(), Net::new());
        let programs = Arc::new(lab.load());
        let device = tun(&net);
        let network = LinuxNodeNetwork::new(net.handle(), programs.clone(), overlay());
        let block = |address: IpAddr| {
            ipnet::IpNet::new(address, if address.is_ipv4() { 24 } else { 64 }).unwrap().trunc()
        };
        let desired = NodeDesired {
            local_addresses: [].into(),
            overlay: overlay(),
            overlay_mtu: MTU,
            overlay_addresses: [v4(number, 1), v6(number, 1)].into(),
            remote_blocks: [block(v4(other, 1)), block(v6(other, 1))].into(),
            block_mtus: [].into(),
            refused: [].into(),
            masquerade: None,
        };
        let (_, applied) = network.reconcile(&desired).unwrap();
        assert!(applied.failed.is_empty(), "{:#?}", applied.failed);
        let pods = LinuxPodNetwork::new(net.handle(), programs.clone());
        let container = format!("pod-{number}");
        let (IpAddr::V4(a4), IpAddr::V6(a6)) = (v4(number, 5), v6(number, 5)) else { panic!() };
        let port = PodPort {
            netns: pod.path(),
            interface: "eth0".parse().unwrap(),
            host_interface: IfName::for_pod(&container, "eth0"),
            owner: format!("default/{container}"),
            v4: Some(a4),
            v6: Some(a6),
            mtu: MTU,
        };
        pods.attach(&port).unwrap();
        // Nothing here may depend on the stack: it must not forward.
        for name in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
            net.run(|| mesh_kernel::sysctl::write(name, "0")).unwrap();
        }
        let edge = LinuxEdge::new(net.handle(), programs.clone());
        (Self { number, edge, programs, pod, net, _lab: lab }, device)
    }

    /// Makes the edge so, and checks that it is one round and that the kernel says the same.
    fn settle(&self, desired: &Desired) {
        let mut observed = self.edge.observe(desired).unwrap();
        let applied = self.edge.apply(&plan(desired, &observed), &mut observed);
        assert!(applied.failed.is_empty(), "{:#?}", applied.failed);
        let again = self.edge.observe(desired).unwrap();
        assert_eq!(again, observed);
        assert_eq!(plan(desired, &again).steps, []);
    }

    fn desired(&self, other: u8) -> Desired {
        Desired {
            nodes: [(v4(other, 1), MTU), (v6(other, 1), MTU)].into(),
            own: [v4(self.number, 1), v6(self.number, 1)].into(),
            ..Desired::default()
        }
    }

    fn counted(&self, reason: EdgeReason) -> u64 {
        self.programs.edge_counters().unwrap()[&reason].packets
    }

    /// What was dropped or refused, for the text of a failure.
    fn losses(&self) -> BTreeMap<&'static str, u64> {
        let all = self.programs.edge_counters().unwrap();
        all.iter().map(|(reason, counter)| (reason.name(), counter.packets)).collect()
    }
}

/// A port, and its backends as node and port.
type Published<'a> = (Protocol, u16, &'a [(u8, u16)]);

struct World {
    nodes: [Node; 2],
    client: Net,
    /// Largest packet that crossed the overlay.
    largest: Arc<AtomicUsize>,
}

impl World {
    fn new() -> Self {
        let (one, first) = Node::new(1, 2);
        let (two, second) = Node::new(2, 1);
        let client = Net::new();
        one.net.ip("link add up0 type veth peer name down0");
        one.net.run(|| move_link("down0", &client));
        for (net, device, addresses) in
            [(&one.net, "up0", [NODE, NODE6]), (&client, "down0", [CLIENT, CLIENT6])]
        {
            net.ip(&format!("addr add {}/24 dev {device}", addresses[0]));
            net.ip(&format!("link set {device} up"));
            net.ip(&format!("addr add {}/64 dev {device} nodad", addresses[1]));
            net.ip(&format!("link show {device}"));
        }
        let largest = Arc::new(AtomicUsize::new(0));
        copy(first.try_clone().unwrap(), second.try_clone().unwrap(), largest.clone());
        copy(second, first, largest.clone());
        let world = Self { nodes: [one, two], client, largest };
        world.nodes[1].settle(&world.nodes[1].desired(1));
        world
    }

    /// Publishes services on the first node: port -> backends as (node, port).
    fn publish(&self, services: &[Published<'_>], change: impl Fn(&mut Service)) {
        self.nodes[0].settle(&self.wanted(services, change));
    }

    fn wanted(&self, services: &[Published<'_>], change: impl Fn(&mut Service)) -> Desired {
        let mut desired = self.nodes[0].desired(2);
        desired.addresses = [NODE.parse().unwrap(), NODE6.parse().unwrap()].into();
        for &(protocol, port, backends) in services {
            for vip in [NODE, NODE6] {
                let vip: IpAddr = vip.parse().unwrap();
                let address =
                    |node, host| if vip.is_ipv4() { v4(node, host) } else { v6(node, host) };
                let backends = backends.iter().map(|&(node, port)| {
                    (at(address(node, 5), port), (node != 1).then(|| address(node, 1)))
                });
                let mut service = Service { backends: backends.collect(), ..Service::default() };
                change(&mut service);
                desired.services.insert(FrontendKey { vip, protocol, port }, service);
            }
        }
        desired
    }

    fn tcp(&self, address: SocketAddr) -> std::io::Result<String> {
        self.client.tcp(address)
    }
}

fn unchanged(_: &mut Service) {}

/// Copies packets from one overlay device to the other, for as long as both exist.
fn copy(mut from: File, mut to: File, largest: Arc<AtomicUsize>) {
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok(length) = from.read(&mut buffer) {
            largest.fetch_max(length, Ordering::Relaxed);
            if to.write_all(&buffer[..length]).is_err() {
                return;
            }
        }
    });
}

/// A TCP server that tells each client its name and the client's address.
fn teller(net: &Net, port: u16, name: &'static str) {
    let listener = net.run(|| TcpListener::bind(("::", port))).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let peer = stream.peer_addr().unwrap();
            let _ = write!(stream, "{name} {}", at(peer.ip().to_canonical(), peer.port()));
        }
    });
}

/// A UDP server that does the same, and sends back as much as it got.
fn udp_teller(net: &Net, address: SocketAddr, name: &'static str) {
    let socket = net.run(|| UdpSocket::bind(address)).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 65_536];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let mut answer = format!("{name} {from} ").into_bytes();
            answer.resize(answer.len().max(length), b'.');
            let _ = socket.send_to(&answer, from);
        }
    });
}

fn frontends(port: u16) -> [SocketAddr; 2] {
    [NODE, NODE6].map(|address| at(address.parse().unwrap(), port))
}

/// Asks over UDP and returns the words of the answer, and who gave it.
fn ask(client: &UdpSocket, frontend: SocketAddr, bytes: usize) -> (String, SocketAddr) {
    client.send_to(&vec![b'?'; bytes], frontend).unwrap();
    let mut buffer = [0; 65_536];
    let (length, from) = client.recv_from(&mut buffer).unwrap();
    let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
    (text.split(' ').take(2).collect::<Vec<_>>().join(" "), from)
}

fn any(frontend: SocketAddr) -> &'static str {
    if frontend.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }
}

#[test]
fn a_client_reaches_pods_here_and_elsewhere_with_its_own_address() {
    if !privileged() {
        return;
    }
    let world = World::new();
    for (node, name) in [(0, "one"), (1, "two")] {
        teller(&world.nodes[node].pod, 80, name);
        for address in [v4(node as u8 + 1, 5), v6(node as u8 + 1, 5)] {
            udp_teller(&world.nodes[node].pod, at(address, 53), name);
        }
    }
    world.publish(
        &[
            (Protocol::Tcp, 30_001, &[(1, 80)]),
            (Protocol::Tcp, 30_002, &[(2, 80)]),
            (Protocol::Udp, 30_001, &[(1, 53)]),
            (Protocol::Udp, 30_002, &[(2, 53)]),
        ],
        unchanged,
    );
    for (port, name) in [(30_001, "one"), (30_002, "two")] {
        for frontend in frontends(port) {
            let client = if frontend.is_ipv4() { CLIENT } else { CLIENT6 };
            let told = world.tcp(frontend).unwrap_or_else(|error| {
                panic!(
                    "{frontend}: {error} {:?} {:?}",
                    world.nodes[0].losses(),
                    world.nodes[1].losses()
                )
            });
            let (who, peer) = told.split_once(' ').unwrap();
            let peer: SocketAddr = peer.parse().unwrap();
            assert_eq!((who, peer.ip().to_string().as_str()), (name, client));
            let socket = world.client.udp(any(frontend));
            let (told, from) = ask(&socket, frontend, 10);
            assert!(told.starts_with(&format!("{name} ")) && told.contains(client), "{told}");
            assert_eq!(from, frontend);
        }
    }
    // Nobody has a service on this port: as without us.
    let refused = world.tcp(at(NODE.parse().unwrap(), 30_003)).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    assert!(world.nodes[0].counted(EdgeReason::ClientToPod) > 0);
    assert!(world.nodes[0].counted(EdgeReason::ClientToNode) > 0);
    assert!(world.nodes[1].counted(EdgeReason::PodToNode) > 0);
}

#[test]
fn much_goes_both_ways_and_nothing_is_too_large_for_the_overlay() {
    if !privileged() {
        return;
    }
    let world = World::new();
    const BYTES: usize = 3_000_000;
    for node in &world.nodes {
        let listener = node.pod.run(|| TcpListener::bind("[::]:80")).unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut all = vec![0; BYTES];
                if stream.read_exact(&mut all).is_ok() {
                    let _ = stream.write_all(&all);
                }
            }
        });
    }
    world.publish(
        &[(Protocol::Tcp, 30_001, &[(1, 80)]), (Protocol::Tcp, 30_002, &[(2, 80)])],
        unchanged,
    );
    let sent: Vec<u8> = (0..BYTES).map(|i| (i * 7 % 251) as u8).collect();
    for port in [30_001, 30_002] {
        for frontend in frontends(port) {
            let got = world.client.run(|| {
                let mut stream = TcpStream::connect_timeout(&frontend, PATIENCE).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                stream.write_all(&sent).unwrap();
                let mut got = vec![0; BYTES];
                stream.read_exact(&mut got).unwrap();
                got
            });
            assert!(got == sent, "{frontend}: bytes changed on the way");
        }
    }
    assert!(world.largest.load(Ordering::Relaxed) <= MTU as usize);
    assert_eq!(world.nodes[0].counted(EdgeReason::TooBig), 0, "no segment had to be refused");
}

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
