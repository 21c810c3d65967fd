//! Clients outside and services inside, on two nodes.
//!
//! ```text
//!   client 192.0.2.2 -- up0 (TC) -- node 1 -- (TC) mesh-wg ==TUN, copied by this test== mesh-wg (TC) -- node 2
//!          2001:db8::2            192.0.2.1      10.244.1.1                        10.244.2.1
//!                                    |                                                |
//!                                pod 10.244.1.5                                   pod 10.244.2.5
//! ```

mod collision;
mod golden;
mod gone;
mod sctp;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use mesh_abi::{EdgeReason, Reason};
use mesh_kernel::edge::{Desired, Observed, Service, plan};
use mesh_kernel::node::{Desired as NodeDesired, LinuxNodeNetwork, NodeNetwork};
use mesh_kernel::pods::{LinuxPodNetwork, PodNetwork, PodPort};
use mesh_kernel::policy::{Place, PolicyReconciler, Tables};
use mesh_kernel::services::FrontendKey;
use mesh_kernel::{IfName, LinuxEdge, Programs};
use mesh_model::ObjectKey;
use mesh_model::policy::{FIRST_FREE, PodPolicy, PolicySet, Ports, Rule};
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
    /// Of the pod's host-side veth.
    ifindex: u32,
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
    fn new(number: u8, other: u8, capacities: &[(&'static str, u32)]) -> (Self, File) {
        let (lab, net, pod) = (Lab::new(), Net::new(), Net::new());
        let programs = Arc::new(lab.load_with(capacities));
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
            mac: None,
            ports: vec![],
            bandwidth: Default::default(),
        };
        let ifindex = pods.attach(&port).unwrap().host_ifindex;
        // Nothing here may depend on the stack: it must not forward.
        for name in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
            net.run(|| mesh_kernel::sysctl::write(name, "0")).unwrap();
        }
        let edge = LinuxEdge::new(net.handle(), programs.clone());
        (Self { number, edge, programs, pod, ifindex, net, _lab: lab }, device)
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

    /// Restricts the pod in both directions: it may receive from these, and send to nobody.
    fn restrict(&self, clients: &[&str]) {
        const INGRESS: u32 = FIRST_FREE;
        const EGRESS: u32 = FIRST_FREE + 1;
        const CLIENTS: u32 = FIRST_FREE + 2;
        let pod = ObjectKey::new("default", "pod");
        let own = PodPolicy { identity: FIRST_FREE + 3, ingress: INGRESS, egress: EGRESS };
        let ports = Ports::Everything;
        let set = PolicySet {
            active: true,
            pods: [(pod.clone(), own)].into(),
            blocks: clients
                .iter()
                .map(|ip| (ip.parse::<IpAddr>().unwrap().into(), CLIENTS))
                .collect(),
            rules: [Rule { policy: INGRESS, identity: CLIENTS, ports, number: 300 }].into(),
            ..PolicySet::default()
        };
        let addresses = vec![v4(self.number, 5), v6(self.number, 5)];
        let places = [(self.ifindex, Place { pod: Some(pod), addresses })].into();
        let mut table = PolicyReconciler::new(self.programs.policy());
        let outcome = table.reconcile(&Tables::wanted(&set, &places, &[])).unwrap();
        assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
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
    /// The other end of the second node's overlay device.
    second: File,
}

impl World {
    fn new() -> Self {
        Self::with(&[])
    }

    /// On maps of these capacities.
    fn with(capacities: &[(&'static str, u32)]) -> Self {
        let (one, first) = Node::new(1, 2, capacities);
        let (two, second) = Node::new(2, 1, capacities);
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
        copy(second.try_clone().unwrap(), first, largest.clone());
        let world = Self { nodes: [one, two], client, largest, second };
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

/// Sends a datagram that is longer than the link takes and may be cut on the way.
fn ask_in_pieces(world: &World, frontend: SocketAddr) -> (String, SocketAddr) {
    let socket = world.client.udp(any(frontend));
    // Without path MTU discovery the client cuts at its own link's 1500 bytes.
    let (level, option) = if frontend.is_ipv4() {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER)
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER)
    };
    let value: libc::c_int = libc::IP_PMTUDISC_WANT;
    // SAFETY: an integer of the size that is passed with it.
    let result = unsafe {
        use std::os::fd::AsRawFd as _;
        let size = size_of::<libc::c_int>() as libc::socklen_t;
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), size)
    };
    assert_eq!(result, 0);
    // The first ones may have to find out how much the way takes.
    socket.set_read_timeout(Some(std::time::Duration::from_millis(500))).unwrap();
    let mut buffer = [0; 65_536];
    for _ in 0..10 {
        if socket.send_to(&[b'?'; 4000], frontend).is_err() {
            continue;
        }
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            assert!(length >= 4000, "{length}");
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            return (text.split(' ').take(2).collect::<Vec<_>>().join(" "), from);
        }
    }
    panic!("{frontend}: no answer; {:?} {:?}", world.nodes[0].losses(), world.nodes[1].losses())
}

#[test]
fn packets_in_pieces_arrive_and_what_is_too_long_is_told() {
    if !privileged() {
        return;
    }
    let world = World::new();
    for (node, name) in [(0, "one"), (1, "two")] {
        for address in [v4(node as u8 + 1, 5), v6(node as u8 + 1, 5)] {
            udp_teller(&world.nodes[node].pod, at(address, 53), name);
        }
    }
    world.publish(
        &[(Protocol::Udp, 30_001, &[(1, 53)]), (Protocol::Udp, 30_002, &[(2, 53)])],
        unchanged,
    );
    for (port, name) in [(30_001, "one"), (30_002, "two")] {
        for frontend in frontends(port) {
            let (told, from) = ask_in_pieces(&world, frontend);
            assert!(told.starts_with(name), "{told}");
            assert_eq!(from, frontend);
        }
    }
    // The way to the other node takes less than the client's link: somebody had to say so, once for each family.
    assert!(world.nodes[0].counted(EdgeReason::TooBig) >= 2);
    assert!(world.largest.load(Ordering::Relaxed) <= MTU as usize);
}

#[test]
fn errors_reach_the_client_as_from_the_service() {
    if !privileged() {
        return;
    }
    let world = World::new();
    // Nobody listens in the pods: they answer "port unreachable", which quotes their own address.
    world.publish(
        &[(Protocol::Udp, 30_001, &[(1, 9)]), (Protocol::Udp, 30_002, &[(2, 9)])],
        unchanged,
    );
    for port in [30_001, 30_002] {
        for frontend in frontends(port) {
            let socket = world.client.udp(any(frontend));
            world.client.run(|| socket.connect(frontend)).unwrap();
            socket.send(b"?").unwrap();
            let error = socket.recv(&mut [0; 16]).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{frontend}: {error}");
        }
    }
}

#[test]
fn errors_reach_the_backend_as_about_its_own_packets() {
    if !privileged() {
        return;
    }
    let world = World::new();
    for address in [v4(1, 5), v6(1, 5), v4(2, 5), v6(2, 5)] {
        let node = usize::from(world.nodes[1].pod.ip("addr").contains(&format!("{address}/")));
        let socket = world.nodes[node].pod.udp(&at(address, 53).to_string());
        let (vip, number) =
            if address.is_ipv4() { (NODE, node as u8 + 1) } else { (NODE6, node as u8 + 1) };
        world.publish(&[(Protocol::Udp, 30_001, &[(number, 53)])], unchanged);
        let frontend = at(vip.parse().unwrap(), 30_001);
        let client = world.client.udp(any(frontend));
        client.send_to(b"?", frontend).unwrap();
        let (_, from) = socket.recv_from(&mut [0; 16]).unwrap();
        world.nodes[node].pod.run(|| socket.connect(from)).unwrap();
        // The client is gone when the answer comes: its stack says so, about the frontend's packet. It may take its time.
        drop(client);
        socket.set_read_timeout(Some(std::time::Duration::from_secs(1))).unwrap();
        let mut told = (0..10).map(|_| {
            let sent = socket.send(b"!").map(|_| ());
            sent.and_then(|()| socket.recv(&mut [0; 16])).unwrap_err()
        });
        let error = told.find(|error| error.kind() != std::io::ErrorKind::WouldBlock).unwrap();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{address}: {error}");
    }
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

#[test]
fn a_connection_stays_where_it_is_while_backends_come_and_go() {
    if !privileged() {
        return;
    }
    let world = World::new();
    for (node, name) in [(0, "one"), (1, "two")] {
        let address = v4(node as u8 + 1, 5);
        udp_teller(&world.nodes[node].pod, at(address, 53), name);
        echo(&world.nodes[node].pod, name);
    }
    let both: &[Published<'_>] = &[
        (Protocol::Tcp, 30_001, &[(1, 80), (2, 80)]),
        (Protocol::Udp, 30_001, &[(1, 53), (2, 53)]),
    ];
    world.publish(both, unchanged);
    let frontend = frontends(30_001)[0];
    let mut streams: Vec<TcpStream> = (0..40)
        .map(|_| world.client.run(|| TcpStream::connect_timeout(&frontend, PATIENCE)).unwrap())
        .collect();
    let say = |stream: &mut TcpStream| say(stream).unwrap();
    let before: Vec<String> = streams.iter_mut().map(say).collect();
    for name in ["one", "two"] {
        let share = before.iter().filter(|n| *n == name).count();
        assert!((8..=32).contains(&share), "{share} of 40 went to {name}");
    }
    let socket = world.client.udp("0.0.0.0:0");
    let first = ask(&socket, frontend, 1).0;
    // The second node's pods are taken away: open connections go on, new ones and datagrams go to the first.
    world.publish(
        &[(Protocol::Tcp, 30_001, &[(1, 80)]), (Protocol::Udp, 30_001, &[(1, 53)])],
        unchanged,
    );
    let after: Vec<String> = streams.iter_mut().map(say).collect();
    assert_eq!(after, before);
    assert!(ask(&socket, frontend, 1).0.starts_with("one"), "it was {first}");
    for _ in 0..10 {
        let mut new = world.client.run(|| TcpStream::connect_timeout(&frontend, PATIENCE)).unwrap();
        assert_eq!(say(&mut new), "one");
    }
}

#[test]
fn every_node_chooses_the_same_and_a_full_memory_drops_nothing() {
    if !privileged() {
        return;
    }
    let world = World::new();
    for (node, name) in [(0, "one"), (1, "two")] {
        echo(&world.nodes[node].pod, name);
    }
    world.publish(&[(Protocol::Tcp, 30_001, &[(1, 80), (2, 80)])], unchanged);
    let mut streams: Vec<TcpStream> = frontends(30_001)
        .into_iter()
        .cycle()
        .take(20)
        .map(|to| world.client.run(|| TcpStream::connect_timeout(&to, PATIENCE)).unwrap())
        .collect();
    let say = |stream: &mut TcpStream| say(stream).unwrap();
    let before: Vec<String> = streams.iter_mut().map(say).collect();
    for _ in 0..3 {
        // As after eviction, or on another node that takes over the address: nobody remembers anything.
        for node in &world.nodes {
            assert!(node.programs.forget_flows().unwrap() > 0);
        }
        let after: Vec<String> = streams.iter_mut().map(say).collect();
        assert_eq!(after, before);
    }
}

/// Segments that the client has sent again: what was lost shows there, even if it got through in the end.
fn retransmitted(client: &Net) -> u64 {
    let text = client.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp")).unwrap();
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.split(' ').position(|name| name == "RetransSegs").unwrap();
    values.split(' ').nth(at).unwrap().parse().unwrap()
}

/// Many more connections are open than the memories of both nodes hold, at the edge and of policies: every new one finds them full.
#[test]
fn new_connections_do_not_fail_when_the_memory_of_connections_is_full() {
    if !privileged() {
        return;
    }
    const ENTRIES: u32 = 128;
    const OPEN: usize = 400;
    const NEW: usize = 2_000;
    let world = World::with(&[("EDGE_FLOWS", ENTRIES), ("CONNECTIONS", ENTRIES)]);
    for (node, name) in [(0, "one"), (1, "two")] {
        world.nodes[node].restrict(&[CLIENT, CLIENT6]);
        echo(&world.nodes[node].pod, name);
    }
    world.publish(&[(Protocol::Tcp, 30_001, &[(1, 80), (2, 80)])], unchanged);
    let connect = |to: &SocketAddr| {
        let mut stream = world.client.run(|| TcpStream::connect_timeout(to, PATIENCE))?;
        say(&mut stream).map(|name| (stream, name))
    };
    let some = |count: usize| frontends(30_001).into_iter().cycle().take(count);
    let mut open: Vec<(TcpStream, String)> = some(OPEN).map(|to| connect(&to).unwrap()).collect();
    // Each needs two entries. Of a full table a part is free, which the kernel keeps in hand for each CPU.
    let (entries, capacity) = world.nodes[0].programs.pressure().unwrap()["EDGE_FLOWS"];
    assert!(capacity == ENTRIES && entries < OPEN, "{entries} entries for {OPEN} connections");
    let before = retransmitted(&world.client);
    let failed = some(NEW).filter(|to| connect(to).is_err()).count();
    let lost = usize::try_from(retransmitted(&world.client) - before).unwrap();
    println!("{NEW} new connections: {failed} failed, {lost} segments sent again");
    assert!((failed + lost) * 1000 <= NEW, "{failed} failed, {lost} segments were lost");
    // Those that are forgotten go on where they were: the choice is the same without a memory.
    for (stream, name) in &mut open {
        assert_eq!(say(stream).unwrap(), *name);
    }
}

/// A TCP server that answers each byte with its name.
fn echo(pod: &Net, name: &'static str) {
    let listener = pod.run(|| TcpListener::bind("[::]:80")).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut byte = [0];
                while stream.read_exact(&mut byte).is_ok()
                    && stream.write_all(name.as_bytes()).is_ok()
                {}
            });
        }
    });
}

/// Sends a byte and returns the name that comes back.
fn say(stream: &mut TcpStream) -> std::io::Result<String> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"?")?;
    let mut name = [0; 3];
    stream.read_exact(&mut name)?;
    Ok(String::from_utf8_lossy(&name).into_owned())
}

#[test]
fn questions_for_a_services_address_are_answered_while_it_is_ours() {
    if !privileged() {
        return;
    }
    let world = World::new();
    teller(&world.nodes[0].pod, 80, "one");
    teller(&world.nodes[1].pod, 80, "two");
    let vips: [IpAddr; 2] = ["192.0.2.77".parse().unwrap(), "2001:db8::77".parse().unwrap()];
    let mut desired = world.wanted(&[], unchanged);
    for vip in vips {
        let address = |node, host| if vip.is_ipv4() { v4(node, host) } else { v6(node, host) };
        for (port, backend) in [
            (80, (at(address(1, 5), 80), None)),
            (81, (at(address(2, 5), 80), Some(address(2, 1)))),
        ] {
            let service = Service { backends: [backend].into(), ..Service::default() };
            let key = FrontendKey { vip, protocol: Protocol::Tcp, port };
            desired.services.insert(key, service);
        }
    }
    world.nodes[0].settle(&desired);
    let quick = |vip: IpAddr| {
        let patience = std::time::Duration::from_millis(400);
        world.client.run(|| TcpStream::connect_timeout(&at(vip, 80), patience)).map(drop)
    };
    for vip in vips {
        assert!(quick(vip).is_err(), "nobody is to answer for {vip} yet");
    }
    desired.owned = vips.into();
    world.nodes[0].settle(&desired);
    world.client.ip("neigh flush dev down0");
    for vip in vips {
        assert!(world.tcp(at(vip, 80)).unwrap().starts_with("one "), "{vip}");
        assert!(world.tcp(at(vip, 81)).unwrap().starts_with("two "), "{vip}");
    }
    assert!(world.nodes[0].counted(EdgeReason::Answered) >= 2);
    let devices = |name: &str| world.nodes[0].net.ip(&format!("-br link show {name}"));
    let mac = devices("up0").split_whitespace().nth(2).unwrap().to_owned();
    for family in ["-4", "-6"] {
        let neighbours = world.client.ip(&format!("{family} neigh show dev down0"));
        let line = neighbours.lines().find(|line| line.contains("77 ")).unwrap().to_owned();
        assert!(line.contains(&mac), "{line}");
    }
}

#[test]
fn an_announcement_moves_an_address_to_another_machine() {
    if !privileged() {
        return;
    }
    let world = World::new();
    let vips = ["192.0.2.77", "2001:db8::77"];
    for vip in vips {
        world.client.ip(&format!("neigh add {vip} lladdr 02:00:00:00:00:09 dev down0 nud stale"));
    }
    let node = &world.nodes[0].net;
    let text = node.ip("-o link show up0");
    let ifindex: u32 = text.split(':').next().unwrap().parse().unwrap();
    let mac = node.ip("-br link show up0").split_whitespace().nth(2).unwrap().to_owned();
    let bytes: Vec<u8> = mac.split(':').map(|b| u8::from_str_radix(b, 16).unwrap()).collect();
    let devices = [(ifindex, <[u8; 6]>::try_from(bytes).unwrap())].into();
    let owned = vips.iter().map(|vip| vip.parse().unwrap()).collect();
    let announcement = node.run(|| mesh_kernel::edge::Announcement::new(owned, &devices)).unwrap();
    // The group of the IPv6 address, for as long as it is ours.
    assert!(node.ip("maddr show dev up0").contains("33:33:ff:00:00:77"));
    node.run(|| announcement.tell()).unwrap();
    let start = std::time::Instant::now();
    for vip in vips {
        while !world.client.ip(&format!("neigh show {vip} dev down0")).contains(&mac) {
            assert!(start.elapsed() < PATIENCE, "{vip} has not moved");
            std::thread::yield_now();
        }
    }
    drop(announcement);
    assert!(!node.ip("maddr show dev up0").contains("33:33:ff:00:00:77"));
}

#[test]
fn nobody_but_a_node_can_send_for_a_client() {
    if !privileged() {
        return;
    }
    let world = World::new();
    let two = &world.nodes[1];
    let wrapped = |outer: [u8; 4], inner: [u8; 4]| {
        let header = |source: [u8; 4], destination: [u8; 4], protocol: u8, length: u16| {
            let mut bytes = vec![0x45, 0];
            bytes.extend(length.to_be_bytes());
            bytes.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
            bytes.extend(source);
            bytes.extend(destination);
            bytes
        };
        let mut packet = header(outer, [10, 244, 2, 1], 4, 52);
        packet.extend(header(inner, [10, 244, 2, 5], 17, 32));
        packet.extend([0, 9, 0, 53, 0, 12, 0, 0, 1, 2, 3, 4]);
        packet
    };
    let send = |packet: &[u8]| (&world.second).write_all(packet).unwrap();
    // The device has taken the packet through the program when writing returns.
    send(&wrapped([10, 244, 1, 1], [192, 0, 2, 2]));
    assert_eq!(two.counted(EdgeReason::NodeToPod), 1);
    // A pod of the other node, which is not the node.
    send(&wrapped([10, 244, 1, 5], [192, 0, 2, 2]));
    assert_eq!((two.counted(EdgeReason::NodeToPod), two.counted(EdgeReason::Forged)), (1, 0));
    // A node that lends the address of a pod, here or elsewhere.
    for pod in [[10, 244, 1, 5], [10, 244, 2, 5]] {
        send(&wrapped([10, 244, 1, 1], pod));
    }
    assert_eq!(two.counted(EdgeReason::NodeToPod), 1);
    assert_eq!(two.counted(EdgeReason::Forged), 2);
}

#[test]
fn a_packet_for_another_machine_is_left_alone() {
    if !privileged() {
        return;
    }
    let world = World::new();
    teller(&world.nodes[0].pod, 80, "one");
    world.publish(&[(Protocol::Tcp, 30_001, &[(1, 80)])], unchanged);
    for address in [NODE, NODE6] {
        let wrong = "lladdr 02:00:00:00:00:99 dev down0 nud permanent";
        world.client.ip(&format!("neigh replace {address} {wrong}"));
    }
    for frontend in frontends(30_001) {
        let patience = std::time::Duration::from_millis(300);
        let tried = world.client.run(|| TcpStream::connect_timeout(&frontend, patience));
        assert_eq!(tried.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    }
    assert_eq!(world.nodes[0].counted(EdgeReason::Chosen), 0);
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
