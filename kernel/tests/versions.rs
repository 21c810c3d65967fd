//! Pods that were made under another ABI version, and the version that follows on it.
//!
//! ```text
//!   pod 10.244.1.5 -- mvA (TC) -- node -- (TC) mvB -- pod 10.244.1.6
//!                     another version's, with maps of its own; then this one's
//! ```

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mesh_abi::Reason;
use mesh_kernel::Programs;
use mesh_kernel::pods::{LinuxPodNetwork, MacAddress, PodNetwork, PodPort};
use mesh_kernel::policy::{Place, PolicyReconciler, Tables};
use mesh_model::ObjectKey;
use mesh_model::policy::{PodPolicy, PolicySet, Ports, Rule};

use crate::lab::{Net, PATIENCE, at, names, privileged};
use crate::pod_network::{Node, exchange, filter, port};

/// Identity of the client, and what both pods may receive.
const CLIENT: u32 = 105;
const SERVER: u32 = 106;
const TO_CLIENT: u32 = 205;
const TO_SERVER: u32 = 206;

/// A node with a client and a server that another version of the programs guards.
struct Upgrade {
    node: Node,
    client: (Net, PodPort),
    server: (Net, PodPort),
}

impl Upgrade {
    fn new() -> Self {
        let node = Node::new();
        // What a version knows no short way for goes through the stack.
        node.net.run(|| mesh_kernel::sysctl::write("net/ipv4/ip_forward", "1")).unwrap();
        let (client, server) = (node.pod(5), node.pod(6));
        Self { node, client, server }
    }

    fn sockets(&self) -> (UdpSocket, UdpSocket, SocketAddr) {
        let (client, server) = (self.client.0.udp("0.0.0.0:0"), self.server.0.udp("0.0.0.0:0"));
        let port = server.local_addr().unwrap().port();
        (client, server, at(self.server.1.v4.unwrap().into(), port))
    }

    /// What was loaded so far becomes that version's; then this one is loaded, with empty maps.
    fn change_version(&self, from: u32) -> Heir<'_> {
        self.node.lab.change_version(from);
        self.load()
    }

    fn load(&self) -> Heir<'_> {
        let programs = Arc::new(self.node.lab.load_on(&self.node.net));
        let network = LinuxPodNetwork::new(self.node.net.handle(), programs.clone());
        Heir { upgrade: self, programs, network }
    }

    /// Nobody may send to the client, and to the server only the client, if anybody.
    fn enforce(&self, programs: &Programs, client_may: bool) {
        let pod = |(_, port): &(Net, PodPort), identity, ingress| {
            let key = ObjectKey::new("default", port.host_interface.to_string());
            let mut all = self.node.network.list().unwrap().into_iter();
            let found = all.find(|seen| seen.host_interface == port.host_interface);
            let place = Place { pod: Some(key.clone()), addresses: port.addresses().collect() };
            let policy = PodPolicy { identity, ingress, egress: 0 };
            ((key, policy), (found.unwrap().ifindex, place))
        };
        let (client, server) =
            (pod(&self.client, CLIENT, TO_CLIENT), pod(&self.server, SERVER, TO_SERVER));
        let ports = Ports::Everything;
        let rule = Rule { policy: TO_SERVER, identity: CLIENT, ports, number: 300 };
        let set = PolicySet {
            active: true,
            pods: [client.0, server.0].into(),
            rules: client_may.then_some(rule).into_iter().collect::<Vec<_>>().into(),
            ..PolicySet::default()
        };
        let places: BTreeMap<u32, Place> = [client.1, server.1].into();
        let mut table = PolicyReconciler::new(programs.policy());
        let outcome = table.reconcile(&Tables::wanted(&set, &places, &[])).unwrap();
        assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    }
}

/// The version that follows.
struct Heir<'a> {
    upgrade: &'a Upgrade,
    programs: Arc<Programs>,
    network: LinuxPodNetwork,
}

impl Heir<'_> {
    fn enforce(&self, client_may: bool) {
        self.upgrade.enforce(&self.programs, client_may);
    }

    fn take_over_both(&self) {
        for (_, port) in [&self.upgrade.client, &self.upgrade.server] {
            assert!(self.network.take_over(port).unwrap());
            assert!(!self.network.take_over(port).unwrap(), "it is ours");
        }
    }

    fn retire(&self) {
        assert!(self.programs.retire_old_versions().unwrap());
        let own = format!("v{}", mesh_abi::VERSION);
        assert_eq!(names(&self.upgrade.node.lab.bpf_dir()), [own]);
    }

    /// Sends, and waits until these programs have dropped it.
    fn assert_denied(&self, from: &UdpSocket, server: &UdpSocket, address: SocketAddr) {
        let dropped = || self.programs.counters().unwrap()[&Reason::PolicyIngress].packets;
        let before = dropped();
        from.send_to(b"ping", address).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while dropped() == before {
            assert!(Instant::now() < deadline, "nothing was denied");
            std::thread::sleep(Duration::from_millis(1));
        }
        server.set_nonblocking(true).unwrap();
        assert_eq!(server.recv_from(&mut [0; 16]).unwrap_err().kind(), ErrorKind::WouldBlock);
        server.set_nonblocking(false).unwrap();
    }
}

#[test]
fn a_pod_of_another_version_gets_the_policies_of_this_one() {
    if !privileged() {
        return;
    }
    // From an older one, and back from a newer one.
    for other in [1, 999] {
        let upgrade = Upgrade::new();
        let (client, server, address) = upgrade.sockets();
        exchange(&client, &server, address);
        let heir = upgrade.change_version(other);
        heir.enforce(false);
        exchange(&client, &server, address);
        heir.take_over_both();
        heir.assert_denied(&client, &server, address);
        heir.retire();
        heir.assert_denied(&client, &server, address);
        heir.enforce(true);
        exchange(&client, &server, address);
        for (_, port) in [&upgrade.client, &upgrade.server] {
            assert_eq!(heir.network.check(port).unwrap(), []);
        }
        heir.enforce(false);
        heir.assert_denied(&client, &server, address);
    }
}

#[test]
fn answers_of_what_another_version_let_begin_pass() {
    if !privileged() {
        return;
    }
    let upgrade = Upgrade::new();
    upgrade.enforce(&upgrade.node.programs, true);
    let (client, server, address) = upgrade.sockets();
    client.send_to(b"ping", address).unwrap();
    let mut buffer = [0; 16];
    let (_, sender) = server.recv_from(&mut buffer).unwrap();
    // A port that clients are given: without memory nobody can tell who began.
    let listener = upgrade.server.0.run(|| TcpListener::bind("10.244.1.6:45000")).unwrap();
    let open = || TcpStream::connect_timeout(&listener.local_addr().unwrap(), PATIENCE);
    let mut near = upgrade.client.0.run(open).unwrap();
    let (mut far, _) = listener.accept().unwrap();
    near.set_read_timeout(Some(PATIENCE)).unwrap();

    let heir = upgrade.change_version(999);
    heir.enforce(true);
    heir.take_over_both();
    heir.retire();
    server.send_to(b"pong", sender).unwrap();
    assert_eq!(client.recv_from(&mut buffer).unwrap().1, address);
    far.write_all(b"pong").unwrap();
    near.read_exact(&mut buffer[..4]).unwrap();
    let stranger = upgrade.client.0.udp("0.0.0.0:0");
    let to = at(upgrade.client.1.v4.unwrap().into(), stranger.local_addr().unwrap().port());
    heir.assert_denied(&server, &stranger, to);
}

#[test]
fn what_another_version_allowed_is_asked_again() {
    if !privileged() {
        return;
    }
    let upgrade = Upgrade::new();
    upgrade.enforce(&upgrade.node.programs, true);
    let (client, server, address) = upgrade.sockets();
    exchange(&client, &server, address);
    let heir = upgrade.change_version(999);
    heir.enforce(false);
    heir.take_over_both();
    heir.assert_denied(&client, &server, address);
}

#[test]
fn a_change_of_versions_loses_no_packet() {
    if !privileged() {
        return;
    }
    let upgrade = Upgrade::new();
    upgrade.enforce(&upgrade.node.programs, true);
    let (client, server, address) = upgrade.sockets();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let changing = scope.spawn(|| {
            for other in [999, 1, 999, 1, 999] {
                let heir = upgrade.change_version(other);
                heir.enforce(true);
                heir.take_over_both();
                heir.retire();
            }
            done.store(true, Ordering::Release);
        });
        while !done.load(Ordering::Acquire) && !changing.is_finished() {
            exchange(&client, &server, address);
        }
        changing.join().unwrap();
    });
}

#[test]
fn an_interrupted_change_is_ended_by_the_next_load() {
    if !privileged() {
        return;
    }
    let upgrade = Upgrade::new();
    let (client, server, address) = upgrade.sockets();
    let killed = upgrade.change_version(999);
    killed.enforce(false);
    assert!(killed.network.take_over(&upgrade.client.1).unwrap());
    drop(killed);
    let filters = || {
        let filter = |pod: &(Net, PodPort)| filter(&upgrade.node.net, &pod.1);
        (filter(&upgrade.client), filter(&upgrade.server))
    };
    let before = filters();
    let heir = upgrade.load();
    let after = filters();
    assert_ne!(after.0, before.0, "what was taken over is switched by each load");
    assert_eq!(after.1, before.1, "the other version's is not");
    assert!(!heir.network.take_over(&upgrade.client.1).unwrap());
    assert!(heir.network.take_over(&upgrade.server.1).unwrap());
    heir.retire();
    heir.assert_denied(&client, &server, address);
    for (_, port) in [&upgrade.client, &upgrade.server] {
        assert_eq!(heir.network.check(port).unwrap(), []);
    }
}

#[test]
fn a_pod_that_has_gone_is_not_taken_over() {
    if !privileged() {
        return;
    }
    let upgrade = Upgrade::new();
    let heir = upgrade.change_version(999);
    upgrade.node.net.ip(&format!("link del {}", upgrade.client.1.host_interface));
    assert!(!heir.network.take_over(&upgrade.client.1).unwrap());
    assert!(heir.network.take_over(&upgrade.server.1).unwrap());
    let pressure = heir.programs.pressure().unwrap();
    assert_eq!((pressure["POD_PORTS"].0, pressure["LOCAL_PODS"].0), (1, 2));
}

/// What a journal that was lost does not know any more.
#[test]
fn a_pod_keeps_a_mac_address_of_its_own() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    let pod = Net::new();
    let known = port(&pod, 5);
    let wanted = PodPort { mac: Some(MacAddress([2, 0x42, 0xac, 0x11, 0, 7])), ..known.clone() };
    node.network.attach(&wanted).unwrap();
    let (other, other_port) = node.pod(6);
    node.lab.change_version(999);
    let programs = Arc::new(node.lab.load_on(&node.net));
    let network = LinuxPodNetwork::new(node.net.handle(), programs);
    assert!(network.take_over(&known).unwrap());
    assert!(network.take_over(&other_port).unwrap());
    assert_eq!(network.check(&wanted).unwrap(), []);
    let (client, server) = (pod.udp("0.0.0.0:0"), other.udp("0.0.0.0:0"));
    let at = at(other_port.v4.unwrap().into(), server.local_addr().unwrap().port());
    exchange(&client, &server, at);
}
