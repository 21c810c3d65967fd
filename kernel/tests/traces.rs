//! Marked probes: what the programs tell about golden packets and real sockets, and that they tell nothing about others.

use std::net::SocketAddr;
use std::sync::Arc;

use mesh_abi::{Reason, programs as names};
use mesh_kernel::Programs;
use mesh_kernel::bpf::test_run::Input;
use mesh_kernel::flows::{FlowReader, Settings};
use mesh_kernel::pods::{LinuxPodNetwork, PodNetwork, PodPort};
use mesh_kernel::policy::{PolicyReconciler, Tables};
use mesh_kernel::services::ServiceReconciler;
use mesh_kernel::traces::{Event, Hook, Kind, Mark, Traces, identity};
use mesh_model::ObjectKey;
use mesh_model::policy::{PodPolicy, PolicySet, Ports, Rule};
use mesh_model::snapshot::{Frontend, Protocol};

use crate::client::Client;
use crate::lab::{Lab, Net, privileged};
use crate::packets::{self, ACK, SYN, SYN_ACK, Segment};
use crate::pod_network::port;
use crate::socket_hooks::frontend;

const POD: [u8; 4] = [10, 244, 1, 5];
const FAR: [u8; 4] = [10, 244, 2, 7];
const TCP: u8 = 6;
/// Numbers of a policy, an identity and a rule.
const IN: u32 = 200;
const BOB: u32 = 101;
const RULE: u32 = 300;

/// A pod that lets Bob in at port 80.
struct Bench {
    programs: Arc<Programs>,
    node: Net,
    port: PodPort,
    ifindex: u32,
    _lab: Lab,
    _pod: Net,
}

impl Bench {
    fn new() -> Self {
        let (lab, node, pod) = (Lab::new(), Net::new(), Net::new());
        let programs = Arc::new(lab.load());
        let port = PodPort { v6: None, ..port(&pod, 5) };
        let network = LinuxPodNetwork::new(node.handle(), programs.clone());
        let ifindex = network.attach(&port).unwrap().host_ifindex;
        let key = ObjectKey::new("default", "one");
        let ports = Ports::Prefix { protocol: Protocol::Tcp, first: 80, bits: 16 };
        let set = PolicySet {
            active: true,
            pods: [(key.clone(), PodPolicy { identity: 100, ingress: IN, egress: 0 })].into(),
            identities: [(FAR.into(), BOB)].into(),
            rules: [Rule { policy: IN, identity: BOB, ports, number: RULE }].into(),
            ..PolicySet::default()
        };
        let place =
            mesh_kernel::policy::Place { pod: Some(key), addresses: port.addresses().collect() };
        let wanted = Tables::wanted(&set, &[(ifindex, place)].into(), &[]);
        let outcome = PolicyReconciler::new(programs.policy()).reconcile(&wanted).unwrap();
        assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
        Self { programs, node, port, ifindex, _lab: lab, _pod: pod }
    }

    fn run(&self, program: &str, packet: &[u8]) {
        let input = Input { packet, ifindex: self.ifindex, repeat: 1 };
        self.node.run(|| self.programs.test_run(program, &input)).unwrap();
    }

    /// From Bob, out of the overlay.
    fn arrives(&self, from_port: u16, to_port: u16, flags: u8) {
        let segment = Segment { from: FAR, from_port, to: POD, to_port, flags };
        self.run(names::FROM_OVERLAY, &packets::tcp(&segment));
    }

    fn answers(&self, from_port: u16, to_port: u16, flags: u8) {
        let segment = Segment { from: POD, from_port, to: FAR, to_port, flags };
        let ethernet = [&self.port.host_mac().0[..], &self.port.pod_mac().0, &[8, 0]].concat();
        self.run(names::FROM_POD, &[ethernet, packets::tcp(&segment)].concat());
    }
}

fn all(traces: &mut Traces) -> Vec<Event> {
    std::iter::from_fn(|| traces.next_event()).collect()
}

fn kinds(events: &[Event]) -> Vec<(Hook, Kind, u32)> {
    events.iter().map(|event| (event.hook, event.kind, event.decision)).collect()
}

fn bob(port: u16) -> SocketAddr {
    SocketAddr::new(FAR.into(), port)
}

#[test]
fn each_decision_about_a_marked_packet_is_told_both_ways() {
    if !privileged() {
        return;
    }
    let bench = Bench::new();
    let mut traces = Traces::open(&bench.programs).unwrap();
    bench.arrives(40_000, 80, SYN);
    assert_eq!(all(&mut traces), [], "nobody has marked it");
    traces.mark(Mark::End(bob(40_001), TCP)).unwrap();
    bench.arrives(40_000, 80, SYN);
    assert_eq!(all(&mut traces), [], "another one is marked");

    bench.arrives(40_001, 80, SYN);
    let told = all(&mut traces);
    assert_eq!(
        kinds(&told),
        [
            (Hook::FromOverlay, Kind::Seen, 0),
            (Hook::FromOverlay, Kind::Policy, Kind::ALLOWED),
            (Hook::FromOverlay, Kind::Verdict, Reason::OverlayToPod as u32),
        ]
    );
    let asked = told[1];
    assert_eq!((asked.egress, asked.ingress, asked.ingress_rule), (0, IN, RULE));
    assert_eq!((asked.sender, asked.receiver), (BOB, 100));
    assert_eq!((asked.source, asked.destination), (bob(40_001), SocketAddr::new(POD.into(), 80)));
    assert_eq!(asked.bytes, 40);

    bench.answers(80, 40_001, SYN_ACK);
    let back = all(&mut traces);
    assert_eq!(back[0].hook, Hook::FromPod);
    assert_eq!(back[0].destination, bob(40_001), "known by its other end");
    // The second packet is not asked again, and says so.
    bench.arrives(40_001, 80, ACK);
    let again = all(&mut traces);
    assert_eq!((again[1].ingress, again[1].ingress_rule), (IN, 0));

    traces.unmark(Mark::End(bob(40_001), TCP)).unwrap();
    bench.arrives(40_001, 80, ACK);
    assert_eq!(all(&mut traces), []);
}

#[test]
fn a_denied_packet_names_its_policy() {
    if !privileged() {
        return;
    }
    let bench = Bench::new();
    let mut traces = Traces::open(&bench.programs).unwrap();
    traces.mark(Mark::End(bob(40_001), TCP)).unwrap();
    bench.arrives(40_001, 81, SYN);
    let told = all(&mut traces);
    let denied = Reason::PolicyIngress as u32;
    assert_eq!(
        kinds(&told),
        [
            (Hook::FromOverlay, Kind::Seen, 0),
            (Hook::FromOverlay, Kind::Policy, denied),
            (Hook::FromOverlay, Kind::Verdict, denied),
        ]
    );
    assert_eq!((told[1].ingress, told[1].ingress_rule), (IN, 0));
}

#[test]
fn what_an_earlier_reader_has_left_is_gone() {
    if !privileged() {
        return;
    }
    let bench = Bench::new();
    let traces = Traces::open(&bench.programs).unwrap();
    traces.mark(Mark::End(bob(40_001), TCP)).unwrap();
    drop(traces);
    let mut next = Traces::open(&bench.programs).unwrap();
    next.mark(Mark::End(bob(40_002), TCP)).unwrap();
    bench.arrives(40_001, 80, SYN);
    assert_eq!(all(&mut next), []);
}

#[test]
fn a_marked_socket_tells_which_backend_it_was_given() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let programs = lab.load();
    let backend = net.answerer("127.0.0.1:0", "one");
    let straight = net.answerer("127.0.0.1:0", "other");
    let mut table = ServiceReconciler::new(programs.services());
    let served = frontend("10.96.0.1", Protocol::Udp, &[backend]);
    let empty = frontend("10.96.0.1", Protocol::Udp, &[]);
    table.reconcile(&[Frontend { port: 53, ..served }, Frontend { port: 54, ..empty }]).unwrap();
    let mut traces = Traces::open(&programs).unwrap();
    let vip = |port: u16| SocketAddr::new("10.96.0.1".parse().unwrap(), port);
    let mut client = Client::start(&lab.cgroup, &net);
    assert_eq!(client.ask("udp-connected 10.96.0.1:53"), "one from 10.96.0.1:53 peer 10.96.0.1:53");
    assert_eq!(all(&mut traces), [], "nobody has marked it");
    let cookie = client.ask("bind 0.0.0.0:0").parse().unwrap();
    traces.mark(Mark::Socket(cookie)).unwrap();
    client.ask("again 10.96.0.1:53");
    client.ask(&format!("again {straight}"));
    assert_eq!(client.ask("again 10.96.0.1:54"), "error ECONNREFUSED");
    let told = all(&mut traces);
    let expected = [Kind::Chosen, Kind::Straight, Kind::Refused];
    assert_eq!(told.iter().map(|event| event.kind).collect::<Vec<_>>(), expected);
    assert_eq!((told[0].destination, told[0].chosen), (vip(53), Some(backend)));
    assert_eq!((told[0].egress, told[0].ingress), (1, 0), "the only one, not kept");
    assert_eq!(told[2].destination, vip(54));
}

#[test]
fn what_a_policy_denies_out_of_the_overlay_is_told_with_its_ends() {
    if !privileged() {
        return;
    }
    let bench = Bench::new();
    let settings = Settings::default();
    let mut flows = FlowReader::open(&bench.programs, &bench.node.handle(), settings).unwrap();
    bench.arrives(40_001, 81, SYN);
    let denied = std::iter::from_fn(|| flows.next_event())
        .find(|event| event.reason == Reason::PolicyIngress as u32);
    let denied = denied.unwrap();
    assert_eq!((denied.source, denied.destination), (bob(40_001), SocketAddr::new(POD.into(), 81)));
    assert_eq!(identity(&bench.programs, FAR.into()).unwrap(), Some(BOB));
}
