//! Two nodes with a pod each, a client, and what serves and asks there.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use mesh_abi::EdgeReason;
use mesh_kernel::edge::{Desired, Service, plan};
use mesh_kernel::node::{Desired as NodeDesired, LinuxNodeNetwork, NodeNetwork};
use mesh_kernel::pods::{LinuxPodNetwork, PodNetwork, PodPort};
use mesh_kernel::policy::{Place, PolicyReconciler, Tables};
use mesh_kernel::services::FrontendKey;
use mesh_kernel::{IfName, LinuxEdge, Programs};
use mesh_model::ObjectKey;
use mesh_model::policy::{FIRST_FREE, OTHER_NODE, PodPolicy, PolicySet, Ports, Rule};
use mesh_model::snapshot::Protocol;

use crate::lab::{Lab, Net, PATIENCE, at};
use crate::node_network::{move_link, tun};
use crate::pod_network::port;

pub(super) const MTU: u32 = 1420;
pub(super) const CLIENT: &str = "192.0.2.2";
pub(super) const CLIENT6: &str = "2001:db8::2";
pub(super) const NODE: &str = "192.0.2.1";
pub(super) const NODE6: &str = "2001:db8::1";
/// Identity of clients by their ranges.
pub(super) const CLIENTS: u32 = FIRST_FREE + 2;

/// A node with one pod.
pub(super) struct Node {
    pub(super) number: u8,
    pub(super) edge: LinuxEdge,
    pub(super) programs: Arc<Programs>,
    pub(super) pod: Net,
    /// Of the pod's host-side veth.
    pub(super) ifindex: u32,
    pub(super) net: Net,
    lab: Lab,
}

pub(super) fn overlay() -> IfName {
    "mesh-wg".parse().unwrap()
}

pub(super) fn v4(node: u8, host: u8) -> IpAddr {
    IpAddr::from([10, 244, node, host])
}

pub(super) fn v6(node: u8, host: u8) -> IpAddr {
    IpAddr::from([0xfd10, 0x244, 0, u16::from(node), 0, 0, 0, u16::from(host)])
}

/// The interface of the pod of that node.
pub(super) fn pod_port(number: u8, pod: &Net) -> PodPort {
    let (IpAddr::V4(a4), IpAddr::V6(a6)) = (v4(number, 5), v6(number, 5)) else { panic!() };
    PodPort { v4: Some(a4), v6: Some(a6), mtu: MTU, ..port(pod, 5) }
}

/// Makes the network of a node that knows one other.
fn connect(number: u8, other: u8, net: &Net, programs: &Arc<Programs>) {
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
}

/// Nothing here may depend on the stack: it must not forward.
fn forbid_forwarding(net: &Net) {
    for name in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        net.run(|| mesh_kernel::sysctl::write(name, "0")).unwrap();
    }
}

impl Node {
    /// The node, and the other end of its overlay device.
    pub(super) fn new(number: u8, other: u8, capacities: &[(&'static str, u32)]) -> (Self, File) {
        let (lab, net, pod) = (Lab::new(), Net::new(), Net::new());
        let programs = Arc::new(lab.load_with(capacities));
        let device = tun(&net);
        connect(number, other, &net, &programs);
        let pods = LinuxPodNetwork::new(net.handle(), programs.clone());
        let ifindex = pods.attach(&pod_port(number, &pod)).unwrap().host_ifindex;
        forbid_forwarding(&net);
        let edge = LinuxEdge::new(net.handle(), programs.clone());
        (Self { number, edge, programs, pod, ifindex, net, lab }, device)
    }

    /// What was loaded becomes another version's; then this one is loaded, and knows nothing but the network.
    pub(super) fn change_version(&mut self, other: u8) {
        self.lab.change_version(999);
        self.programs = Arc::new(self.lab.load_on(&self.net));
        connect(self.number, other, &self.net, &self.programs);
        forbid_forwarding(&self.net);
        self.edge = LinuxEdge::new(self.net.handle(), self.programs.clone());
    }

    /// Takes the pod over from the other version.
    pub(super) fn take_over(&self) {
        let pods = LinuxPodNetwork::new(self.net.handle(), self.programs.clone());
        assert!(pods.take_over(&pod_port(self.number, &self.pod)).unwrap());
    }

    /// Makes the edge so, and checks that it is one round and that the kernel says the same.
    pub(super) fn settle(&self, desired: &Desired) {
        let mut observed = self.edge.observe(desired).unwrap();
        let applied = self.edge.apply(&plan(desired, &observed), &mut observed);
        assert!(applied.failed.is_empty(), "{:#?}", applied.failed);
        let again = self.edge.observe(desired).unwrap();
        assert_eq!(again, observed);
        assert_eq!(plan(desired, &again).steps, []);
    }

    pub(super) fn desired(&self, other: u8) -> Desired {
        Desired {
            nodes: [(v4(other, 1), MTU), (v6(other, 1), MTU)].into(),
            own: [v4(self.number, 1), v6(self.number, 1)].into(),
            ..Desired::default()
        }
    }

    /// Restricts the pod in both directions: it may receive from these, and send to nobody.
    pub(super) fn restrict(&self, clients: &[&str]) {
        self.enforce(clients, &[], CLIENTS);
    }

    /// The same, where some are other nodes: it may receive from `allowed`, which are these or [`CLIENTS`].
    pub(super) fn enforce(&self, clients: &[&str], nodes: &[&str], allowed: u32) {
        const INGRESS: u32 = FIRST_FREE;
        const EGRESS: u32 = FIRST_FREE + 1;
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
            identities: nodes
                .iter()
                .map(|ip| (ip.parse::<IpAddr>().unwrap(), OTHER_NODE))
                .collect(),
            rules: [Rule { policy: INGRESS, identity: allowed, ports, number: 300 }].into(),
            ..PolicySet::default()
        };
        let addresses = vec![v4(self.number, 5), v6(self.number, 5)];
        let places = [(self.ifindex, Place { pod: Some(pod), addresses })].into();
        let mut table = PolicyReconciler::new(self.programs.policy());
        let outcome = table.reconcile(&Tables::wanted(&set, &places, &[])).unwrap();
        assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    }

    pub(super) fn counted(&self, reason: EdgeReason) -> u64 {
        self.programs.edge_counters().unwrap()[&reason].packets
    }

    /// What was dropped or refused, for the text of a failure.
    pub(super) fn losses(&self) -> BTreeMap<&'static str, u64> {
        let all = self.programs.edge_counters().unwrap();
        all.iter().map(|(reason, counter)| (reason.name(), counter.packets)).collect()
    }
}

/// A port, and its backends as node and port.
pub(super) type Published<'a> = (Protocol, u16, &'a [(u8, u16)]);

pub(super) struct World {
    pub(super) nodes: [Node; 2],
    pub(super) client: Net,
    /// Largest packet that crossed the overlay.
    pub(super) largest: Arc<AtomicUsize>,
    /// The other end of the second node's overlay device.
    pub(super) second: File,
}

impl World {
    pub(super) fn new() -> Self {
        Self::with(&[])
    }

    /// On maps of these capacities.
    pub(super) fn with(capacities: &[(&'static str, u32)]) -> Self {
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
    pub(super) fn publish(&self, services: &[Published<'_>], change: impl Fn(&mut Service)) {
        self.nodes[0].settle(&self.wanted(services, change));
    }

    pub(super) fn wanted(
        &self,
        services: &[Published<'_>],
        change: impl Fn(&mut Service),
    ) -> Desired {
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

    pub(super) fn tcp(&self, address: SocketAddr) -> std::io::Result<String> {
        self.client.tcp(address)
    }

    /// The client sends that many bytes to each [`returner`] behind the frontends, and gets the same back.
    pub(super) fn assert_returned(
        &self,
        frontends: impl Iterator<Item = SocketAddr>,
        bytes: usize,
    ) {
        let sent: Vec<u8> = (0..bytes).map(|i| (i * 7 % 251) as u8).collect();
        for frontend in frontends {
            let got = self.client.run(|| {
                let mut stream = TcpStream::connect_timeout(&frontend, PATIENCE).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                stream.write_all(&sent).unwrap();
                let mut got = vec![0; bytes];
                stream.read_exact(&mut got).unwrap();
                got
            });
            assert!(got == sent, "{frontend}: bytes changed on the way");
        }
    }
}

pub(super) fn unchanged(_: &mut Service) {}

/// Copies packets from one overlay device to the other, for as long as both exist.
pub(super) fn copy(mut from: File, mut to: File, largest: Arc<AtomicUsize>) {
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
pub(super) fn teller(net: &Net, port: u16, name: &'static str) {
    let listener = net.run(|| TcpListener::bind(("::", port))).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let peer = stream.peer_addr().unwrap();
            let _ = write!(stream, "{name} {}", at(peer.ip().to_canonical(), peer.port()));
        }
    });
}

/// A TCP server that reads that many bytes, and sends them back.
pub(super) fn returner(net: &Net, port: u16, bytes: usize) {
    let listener = net.run(|| TcpListener::bind(("::", port))).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut all = vec![0; bytes];
            if stream.read_exact(&mut all).is_ok() {
                let _ = stream.write_all(&all);
            }
        }
    });
}

/// A UDP server that does the same as [`teller`], and sends back as much as it got.
pub(super) fn udp_teller(net: &Net, address: SocketAddr, name: &'static str) {
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

pub(super) fn frontends(port: u16) -> [SocketAddr; 2] {
    [NODE, NODE6].map(|address| at(address.parse().unwrap(), port))
}

/// Asks over UDP and returns the words of the answer, and who gave it.
pub(super) fn ask(client: &UdpSocket, frontend: SocketAddr, bytes: usize) -> (String, SocketAddr) {
    client.send_to(&vec![b'?'; bytes], frontend).unwrap();
    let mut buffer = [0; 65_536];
    let (length, from) = client.recv_from(&mut buffer).unwrap();
    let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
    (text.split(' ').take(2).collect::<Vec<_>>().join(" "), from)
}

pub(super) fn any(frontend: SocketAddr) -> &'static str {
    if frontend.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }
}

/// Sends a datagram that is longer than the link takes and may be cut on the way.
pub(super) fn ask_in_pieces(world: &World, frontend: SocketAddr) -> (String, SocketAddr) {
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

/// A TCP server in a pod that answers each byte with its name.
pub(super) fn echo(pod: &Net, name: &'static str) {
    echo_from(pod.run(|| TcpListener::bind("[::]:80")).unwrap(), name);
}

/// As [`echo`], wherever it listens.
pub(super) fn echo_from(listener: TcpListener, name: &'static str) {
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
pub(super) fn say(stream: &mut TcpStream) -> std::io::Result<String> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"?")?;
    let mut name = [0; 3];
    stream.read_exact(&mut name)?;
    Ok(String::from_utf8_lossy(&name).into_owned())
}
