//! Events of connections and drops, from real sockets and packets.
//!
//! ```text
//!   client (in the cgroup, namespace of its own) -> VIP --hook--> 127.0.0.1:x, server in or outside the cgroup
//!   node --veth-- pod
//! ```

use std::io::Read as _;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aya::maps::{Array, Map, MapData};
use mesh_kernel::flows::{Direction, End, Event, FlowReader, Kind, Reason, Settings};
use mesh_kernel::pods::{LinuxPodNetwork, PodNetwork, PodPort};
use mesh_kernel::services::ServiceReconciler;
use mesh_kernel::{NetNs, Programs};
use mesh_model::snapshot::{Frontend, Protocol};

use crate::client::Client;
use crate::lab::{Lab, Net, PATIENCE, privileged};
use crate::pod_network::port;
use crate::socket_hooks::frontend;

const TCP: u8 = 6;
const UDP: u8 = 17;
const VIP: &str = "10.96.0.1";

fn open(programs: &Programs, node: &NetNs) -> FlowReader {
    let reader = FlowReader::open(programs, node, Settings::default()).unwrap();
    assert_eq!(reader.lacking(), [] as [&str; 0]);
    reader
}

/// Events until one is as wanted; fails with all that came when none is.
#[track_caller]
fn expect(reader: &mut FlowReader, wanted: impl Fn(&Event) -> bool) -> Event {
    let (start, mut seen) = (Instant::now(), Vec::new());
    while start.elapsed() < PATIENCE {
        let Some(event) = reader.next_event() else {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        };
        if wanted(&event) {
            return event;
        }
        seen.push(event);
    }
    panic!("not among {seen:#?}");
}

/// All events up to one that is as wanted.
#[track_caller]
fn until(reader: &mut FlowReader, wanted: impl Fn(&Event) -> bool) -> Vec<Event> {
    let seen = std::cell::RefCell::default();
    expect(reader, |event| {
        let seen: &mut Vec<Event> = &mut seen.borrow_mut();
        seen.push(*event);
        wanted(event)
    });
    seen.into_inner()
}

/// What a server says, in bytes.
const SERVED: u64 = "served".len() as u64;

/// Reads all that a server says; returns the client's address.
fn speak(server: SocketAddr) -> SocketAddr {
    let mut stream = TcpStream::connect_timeout(&server, PATIENCE).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.read_to_end(&mut Vec::new()).unwrap();
    stream.local_addr().unwrap()
}

/// How many places of the table of connections are taken.
fn taken(lab: &Lab) -> usize {
    let path = lab.bpf_dir().join(format!("v{}/maps/FLOW_SLOTS", mesh_abi::VERSION));
    let map = MapData::from_pin(path).unwrap();
    let slots: Array<_, [u64; 2]> = Map::Array(map).try_into().unwrap();
    slots.iter().filter(|slot| slot.as_ref().unwrap()[0] != 0).count()
}

/// Waits until that is so: the last packets of a connection may be on their way.
#[track_caller]
fn until_taken(lab: &Lab, wanted: usize) {
    let start = Instant::now();
    while taken(lab) != wanted {
        assert!(start.elapsed() < PATIENCE, "{} places are taken, not {wanted}", taken(lab));
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_connection_through_a_service_is_told_from_opening_to_end() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let programs = lab.load();
    let mut reader = open(&programs, &net.handle());
    let mut server = Client::start(&lab.cgroup, &net);
    let backend: SocketAddr = server.ask("serve 127.0.0.1:0").parse().unwrap();
    let mut table = ServiceReconciler::new(programs.services());
    table.reconcile(&[frontend(VIP, Protocol::Tcp, &[backend])]).unwrap();
    let mut client = Client::start(&lab.cgroup, &net);
    assert_eq!(client.ask("tcp 10.96.0.1:80"), "served from 10.96.0.1:80");

    let vip = Some("10.96.0.1:80".parse().unwrap());
    let told = until(&mut reader, |e| e.kind == Kind::Closed);
    let [opened, closed] = told[..] else { panic!("the opener tells all: {told:#?}") };
    assert_eq!((opened.kind, opened.service), (Kind::Opened, vip));
    assert_eq!((opened.direction, opened.protocol), (Direction::Egress, TCP));
    assert_eq!(opened.destination, backend);
    assert_eq!(opened.netns, net.handle().cookie().unwrap());
    assert_eq!((closed.direction, closed.socket), (Direction::Egress, opened.socket));
    assert_eq!((closed.source, closed.destination), (opened.source, backend));
    assert_eq!((closed.service, closed.end), (vip, End::Finished));
    assert_eq!((closed.sent_bytes, closed.received_bytes), (0, SERVED));
    assert!(closed.duration > Duration::ZERO && closed.duration < PATIENCE, "{closed:?}");
    assert!(closed.rtt > Duration::ZERO, "{closed:?}");
    assert_eq!(reader.tally().unwrap().lost, 0);
    until_taken(&lab, 0);
}

#[test]
fn who_is_spoken_to_tells_what_its_opener_does_not() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let programs = lab.load();
    let mut reader = open(&programs, &net.handle());
    let mut server = Client::start(&lab.cgroup, &net);
    let address: SocketAddr = server.ask("serve 127.0.0.1:0").parse().unwrap();
    // The opener is none of this node's processes.
    let source = net.run(|| speak(address));
    let told = until(&mut reader, |e| e.kind == Kind::Closed);
    let [opened, closed] = told[..] else { panic!("{told:#?}") };
    assert_eq!((opened.kind, opened.direction), (Kind::Opened, Direction::Ingress));
    assert_eq!((opened.source, opened.destination), (source, address));
    assert_eq!((closed.source, closed.destination), (source, address));
    assert_eq!((closed.direction, closed.end), (Direction::Ingress, End::Finished));
    assert_eq!((closed.sent_bytes, closed.received_bytes), (SERVED, 0));
    assert!(closed.duration > Duration::ZERO && closed.duration < PATIENCE, "{closed:?}");
    until_taken(&lab, 0);
}

#[test]
fn a_connection_without_a_place_in_the_table_is_told_by_both_ends() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let programs = lab.load_with(&[("FLOW_SLOTS", 1)]);
    let mut reader = open(&programs, &net.handle());
    let mut server = Client::start(&lab.cgroup, &net);
    let address: SocketAddr = server.ask("serve 127.0.0.1:0").parse().unwrap();
    let mut client = Client::start(&lab.cgroup, &net);
    client.ask(&format!("tcp {address}"));
    let mut ends = [(); 2].map(|()| expect(&mut reader, |e| e.kind == Kind::Closed));
    ends.sort_by_key(|event| event.direction);
    let [opener, other] = ends;
    assert_eq!((opener.direction, other.direction), (Direction::Egress, Direction::Ingress));
    assert_eq!((opener.received_bytes, other.sent_bytes), (SERVED, SERVED));
    assert_eq!((opener.end, other.end), (End::Finished, End::Finished));
    for end in ends {
        assert!(end.duration > Duration::ZERO && end.duration < PATIENCE, "{end:?}");
    }
}

#[test]
fn who_begins_to_read_in_between_is_told_what_began_while_somebody_did() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let programs = lab.load();
    let server = net.greeter("127.0.0.1:0", "hello");
    let [mut early, mut known, mut unheard] = [(); 3].map(|()| Client::start(&lab.cgroup, &net));
    early.ask(&format!("tcp-hold {server}"));
    let mut reader = open(&programs, &net.handle());
    for client in [&mut known, &mut unheard] {
        client.ask(&format!("tcp-hold {server}"));
    }
    let opened = [(); 2].map(|()| expect(&mut reader, |e| e.kind == Kind::Opened));
    until_taken(&lab, 2);
    // One ends while nobody reads.
    drop(reader);
    drop(unheard);
    until_taken(&lab, 1);
    let mut reader = open(&programs, &net.handle());
    drop(early);
    drop(known);
    let told = until(&mut reader, |e| e.kind == Kind::Closed);
    let [closed] = told[..] else { panic!("{told:#?}") };
    assert_eq!((closed.source, closed.socket), (opened[0].source, opened[0].socket));
    assert!(closed.duration > Duration::ZERO && closed.duration < PATIENCE, "{closed:?}");
    until_taken(&lab, 0);
}

#[test]
fn a_reader_is_woken_when_the_ring_fills_and_not_before() {
    if !privileged() {
        return;
    }
    let lab = Node::new();
    let settings = Settings { connections: false, rate_per_sec: u32::MAX, ..Settings::default() };
    let mut reader = FlowReader::open(&lab.programs, &lab.node.handle(), settings).unwrap();
    assert!(!reader.wait(Duration::ZERO).unwrap());
    lab.spoof(500);
    assert!(!reader.wait(Duration::ZERO).unwrap());
    lab.spoof(2_000);
    assert!(reader.wait(PATIENCE).unwrap());
    assert_eq!(std::iter::from_fn(|| reader.next_event()).count(), 2_500);
    reader.bell().ring();
    assert!(reader.wait(PATIENCE).unwrap());
    assert_eq!(reader.tally().unwrap().lost, 0);
}

#[test]
fn what_was_never_established_says_why() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let programs = lab.load();
    let mut reader = open(&programs, &net.handle());
    let mut table = ServiceReconciler::new(programs.services());
    table.reconcile(&[Frontend { port: 81, ..frontend(VIP, Protocol::Tcp, &[]) }]).unwrap();
    let mut client = Client::start(&lab.cgroup, &net);
    // Nobody listens there.
    assert_eq!(client.ask("tcp [::1]:1"), "error ECONNREFUSED");
    let failed = expect(&mut reader, |e| e.kind == Kind::Failed);
    assert_eq!((failed.end, failed.destination), (End::Refused, "[::1]:1".parse().unwrap()));
    // A service without a backend.
    assert_eq!(client.ask("tcp 10.96.0.1:81"), "error ECONNREFUSED");
    let refused = expect(&mut reader, |e| e.kind == Kind::Refused);
    assert_eq!(refused.service, Some("10.96.0.1:81".parse().unwrap()));
    assert_eq!((refused.protocol, refused.netns), (TCP, net.handle().cookie().unwrap()));
}

#[test]
fn datagrams_are_told_once_for_each_destination() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let programs = lab.load();
    let mut reader = open(&programs, &net.handle());
    let (one, other) = (net.answerer("127.0.0.1:0", "one"), net.answerer("127.0.0.1:0", "other"));
    let mut table = ServiceReconciler::new(programs.services());
    table.reconcile(&[Frontend { port: 53, ..frontend(VIP, Protocol::Udp, &[one]) }]).unwrap();
    let mut client = Client::start(&lab.cgroup, &net);
    for _ in 0..3 {
        client.ask("udp 10.96.0.1:53");
        client.ask(&format!("udp {other}"));
    }
    client.ask(&format!("udp-connected {other}"));
    let mut told = Vec::new();
    while let Some(event) = reader.next_event() {
        assert_eq!((event.kind, event.protocol), (Kind::Datagram, UDP));
        told.push((event.destination, event.service));
    }
    let vip = Some("10.96.0.1:53".parse().unwrap());
    assert_eq!(told, [(one, vip), (other, None), (other, None)], "the last one is another socket");
}

#[test]
fn nothing_is_told_to_nobody() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let programs = lab.load();
    drop(open(&programs, &net.handle()));
    let server = net.greeter("127.0.0.1:0", "hello");
    let mut client = Client::start(&lab.cgroup, &net);
    client.ask(&format!("tcp {server}"));
    let mut reader = open(&programs, &net.handle());
    assert_eq!(reader.next_event(), None);
    assert_eq!(reader.tally().unwrap().told, 0);
}

#[test]
fn a_full_ring_costs_events_that_are_counted_and_nothing_else() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let mut options = lab.options();
    options.capacities.insert("FLOWS", 4096);
    let programs = Programs::open_or_load(&options).unwrap();
    let mut reader = open(&programs, &net.handle());
    let server = net.greeter("127.0.0.1:0", "hello");
    let mut client = Client::start(&lab.cgroup, &net);
    for _ in 0..40 {
        assert_eq!(client.ask(&format!("tcp {server}")), format!("hello from {server}"));
    }
    let mut read = 0;
    while reader.next_event().is_some() {
        read += 1;
    }
    let tally = reader.tally().unwrap();
    assert_eq!(tally.told, read);
    assert!(tally.lost > 0 && tally.told + tally.lost >= 79, "{tally:?}");
}

/// A node with one pod.
struct Node {
    programs: Arc<Programs>,
    node: Net,
    pod: Net,
    port: PodPort,
    ifindex: u32,
    _lab: Lab,
}

impl Node {
    fn new() -> Self {
        let (lab, node, pod) = (Lab::new(), Net::new(), Net::new());
        let programs = Arc::new(lab.load());
        let port = port(&pod, 5);
        let network = LinuxPodNetwork::new(node.handle(), programs.clone());
        let ifindex = network.attach(&port).unwrap().host_ifindex;
        Self { programs, node, pod, port, ifindex, _lab: lab }
    }

    /// Lets the pod send that many datagrams from an address that is not its own.
    fn spoof(&self, repeat: u32) {
        let mut packet = self.port.host_mac().0.to_vec();
        packet.extend(self.port.pod_mac().0);
        packet.extend([8, 0]);
        packet.extend(crate::packets::udp([10, 244, 1, 99], 4096, [10, 244, 2, 7], 53));
        let ifindex = self.ifindex;
        let input = mesh_kernel::bpf::test_run::Input { packet: &packet, ifindex, repeat };
        self.node.run(|| self.programs.test_run("from_pod", &input)).unwrap();
    }
}

#[test]
fn what_the_kernel_drops_in_a_pod_is_told_with_its_reason() {
    if !privileged() {
        return;
    }
    let lab = Node::new();
    let mut reader = open(&lab.programs, &lab.node.handle());
    lab.node.ip("addr add 10.244.1.1/32 dev lo");
    // The same in a namespace that is not of this node: nobody's business.
    let stranger = Net::new();
    let to = |net: &Net, address: &str| net.udp("0.0.0.0:0").send_to(b"?", address).unwrap();
    to(&stranger, "127.0.0.1:9");
    to(&lab.node, "10.244.1.5:9");
    let event = expect(&mut reader, |e| e.kind == Kind::KernelDropped);
    assert_eq!(reader.kernel_reason(event.reason), Some("no_socket"));
    assert_eq!(event.destination, "10.244.1.5:9".parse().unwrap());
    assert_eq!((event.source.ip(), event.protocol), ("10.244.1.1".parse().unwrap(), UDP));
    assert_eq!(event.netns, lab.pod.handle().cookie().unwrap());
}

#[test]
fn what_the_guard_drops_is_told_at_a_limited_rate() {
    if !privileged() {
        return;
    }
    let lab = Node::new();
    let settings = Settings { rate_per_sec: 5, ..Settings::default() };
    let mut reader = FlowReader::open(&lab.programs, &lab.node.handle(), settings).unwrap();
    let mut packet = lab.port.host_mac().0.to_vec();
    packet.extend(lab.port.pod_mac().0);
    packet.extend([8, 0, 0x45, 0, 0, 32, 0, 0, 0, 0, 64, UDP, 0, 0]);
    packet.extend([10, 244, 1, 99, 10, 244, 2, 7]);
    packet.extend([0x10, 0, 0, 53, 0, 12, 0, 0, 1, 2, 3, 4]);
    let input =
        mesh_kernel::bpf::test_run::Input { packet: &packet, ifindex: lab.ifindex, repeat: 100 };
    lab.node.run(|| lab.programs.test_run("from_pod", &input)).unwrap();
    let mut events = Vec::new();
    while let Some(event) = reader.next_event() {
        events.extend((event.reason == Reason::SpoofedAddress as u32).then_some(event));
    }
    // More than five when a second ends in between.
    assert!((5..=10).contains(&events.len()), "{events:#?}");
    let first = events[0];
    assert_eq!((first.kind, first.ifindex), (Kind::Dropped, lab.ifindex));
    assert_eq!(first.source, "10.244.1.99:4096".parse().unwrap());
    assert_eq!(first.destination, "10.244.2.7:53".parse().unwrap());
    let counted = lab.programs.counters().unwrap()[&Reason::SpoofedAddress].packets;
    assert_eq!(counted, 100, "counters are exact");
    assert!(reader.tally().unwrap().limited >= 90);
}

#[test]
fn told_and_held_back_are_all_that_was_dropped_on_however_many_cpus() {
    const THREADS: u64 = 4;
    const EACH: u32 = 5_000;
    if !privileged() {
        return;
    }
    let lab = Node::new();
    let settings = Settings { connections: false, rate_per_sec: 5, ..Settings::default() };
    let mut reader = FlowReader::open(&lab.programs, &lab.node.handle(), settings).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| lab.spoof(EACH));
        }
    });
    // The next second tells what was held back in this one.
    std::thread::sleep(Duration::from_millis(1100));
    lab.spoof(1);
    let spoofed = Reason::SpoofedAddress as u32;
    let events = std::iter::from_fn(|| reader.next_event());
    let told: Vec<Event> = events.filter(|event| event.reason == spoofed).collect();
    let held_back: u64 = told.iter().map(|event| u64::from(event.unreported)).sum();
    let tally = reader.tally().unwrap();
    let all = THREADS * u64::from(EACH) + 1;
    assert_eq!((told.len() as u64 + held_back, tally.lost), (all, 0), "{tally:?}");
    assert_eq!(tally.limited, held_back);
    assert_eq!(lab.programs.counters().unwrap()[&Reason::SpoofedAddress].packets, all);
}
