//! Network policy in the programs: golden packets on tables that a test fills.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_abi::{Reason, maps, programs as names};
use mesh_kernel::Programs;
use mesh_kernel::bpf::test_run::Input;
use mesh_kernel::pods::{HostPort, LinuxPodNetwork, PodNetwork, PodPort};
use mesh_kernel::policy::{BpfPolicyTable, Place, PolicyReconciler, Tables};
use mesh_model::ObjectKey;
use mesh_model::parts::Element as _;
use mesh_model::policy::{Flow, PodPolicy, PolicySet, Ports, Rule, Side, THIS_NODE};
use mesh_model::snapshot::Protocol;

use crate::lab::{Lab, Net, privileged};
use crate::packets::{self, ACK, FIN, RST, SYN, SYN_ACK, Segment};
use crate::pod_network::port;

mod direction;

const NEXT: u32 = u32::MAX;
const DROP: u32 = 2;
const REDIRECT: u32 = 7;

/// Identities and policies of the tests.
const ALICE: u32 = 100;
const BOB: u32 = 101;
const RANGE: u32 = 102;
const IN: u32 = 200;
const OUT: u32 = 201;

const POD: [u8; 4] = [10, 244, 1, 5];
const NEAR: [u8; 4] = [10, 244, 1, 6];
const FAR: [u8; 4] = [10, 244, 2, 7];
const NODE: [u8; 4] = [10, 244, 1, 1];
const WORLD: [u8; 4] = [192, 0, 2, 1];

/// A pod with policies and another one on the same node.
struct Bench {
    programs: Arc<Programs>,
    table: PolicyReconciler<BpfPolicyTable>,
    node: Net,
    lab: Lab,
    _pods: [Net; 2],
    port: PodPort,
    other: PodPort,
    ifindex: u32,
    other_ifindex: u32,
    set: PolicySet,
    places: BTreeMap<u32, Place>,
}

fn rule(policy: u32, identity: u32, ports: Ports) -> Rule {
    Rule { policy, identity, ports, number: 300 }
}

fn tcp(port: u16) -> Ports {
    Ports::Prefix { protocol: Protocol::Tcp, first: port, bits: 16 }
}

impl Bench {
    /// The pod `default/one` with these policies and rules. `default/two` has none, and is Bob.
    fn new(ingress: u32, egress: u32, rules: Vec<Rule>) -> Self {
        Self::with(&[], ingress, egress, rules)
    }

    /// On maps of these capacities.
    fn with(
        capacities: &[(&'static str, u32)],
        ingress: u32,
        egress: u32,
        rules: Vec<Rule>,
    ) -> Self {
        let (lab, node) = (Lab::new(), Net::new());
        let pods = [Net::new(), Net::new()];
        let programs = Arc::new(lab.load_with(capacities));
        let network = LinuxPodNetwork::new(node.handle(), programs.clone());
        let [port, other] = [port(&pods[0], 5), port(&pods[1], 6)];
        let ifindex = network.attach(&port).unwrap().host_ifindex;
        let other_ifindex = network.attach(&other).unwrap().host_ifindex;
        let key = |name| ObjectKey::new("default", name);
        let own = PodPolicy { identity: ALICE, ingress, egress };
        let two = PodPolicy { identity: BOB, ..PodPolicy::default() };
        let set = PolicySet {
            active: true,
            pods: [(key("one"), own), (key("two"), two)].into(),
            identities: [(IpAddr::from(NODE), THIS_NODE), (IpAddr::from(FAR), BOB)].into(),
            rules: rules.into(),
            ..PolicySet::default()
        };
        let place = |name, port: &PodPort| Place {
            pod: Some(key(name)),
            addresses: port.addresses().collect(),
        };
        let places = [(ifindex, place("one", &port)), (other_ifindex, place("two", &other))].into();
        let table = PolicyReconciler::new(programs.policy());
        let _pods = pods;
        let mut bench = Self {
            programs,
            table,
            node,
            lab,
            _pods,
            port,
            other,
            ifindex,
            other_ifindex,
            set,
            places,
        };
        bench.publish();
        bench
    }

    fn publish(&mut self) {
        let wanted = Tables::wanted(&self.set, &self.places, &[(Protocol::Tcp, 10_250)]);
        let outcome = self.table.reconcile(&wanted).unwrap();
        assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    }

    /// Puts the pod `default/one` under these policies.
    fn restrict(&mut self, ingress: u32, egress: u32) {
        self.set.active = true;
        let own = PodPolicy { identity: ALICE, ingress, egress };
        self.set.pods.insert(ObjectKey::new("default", "one"), own);
        self.publish();
    }

    /// What answers "hello" in the first pod by a port of the node.
    fn publish_port(&self) -> SocketAddr {
        self.node.ip("addr add 10.244.1.1/32 dev lo");
        let forwarding = || mesh_kernel::sysctl::write("net/ipv4/ip_forward", "1");
        self.node.run(forwarding).unwrap();
        let port = HostPort { protocol: Protocol::Tcp, address: None, port: 8080, pod_port: 80 };
        let network = LinuxPodNetwork::new(self.node.handle(), self.programs.clone());
        network.publish(&[(vec![port], self.port.addresses().collect())]).unwrap();
        self._pods[0].greeter("10.244.1.5:80", "hello");
        SocketAddr::from((NODE, 8080))
    }

    fn dropped(&self, reason: Reason) -> u64 {
        self.programs.counters().unwrap()[&reason].packets
    }

    fn run(&self, program: &str, ifindex: u32, packet: &[u8]) -> u32 {
        let input = Input { packet, ifindex, repeat: 1 };
        self.node.run(|| self.programs.test_run(program, &input)).unwrap().verdict
    }

    /// The pod sends the IP packet; the verdict.
    fn sends(&self, packet: &[u8]) -> u32 {
        self.sent_by(&self.port, self.ifindex, packet)
    }

    fn sent_by(&self, port: &PodPort, ifindex: u32, packet: &[u8]) -> u32 {
        let ethertype: [u8; 2] = if packet[0] >> 4 == 4 { [8, 0] } else { [0x86, 0xdd] };
        let ethernet = [&port.host_mac().0[..], &port.pod_mac().0, &ethertype].concat();
        self.run(names::FROM_POD, ifindex, &[&ethernet, packet].concat())
    }

    /// The IP packet comes out of the overlay; the verdict.
    fn arrives(&self, packet: &[u8]) -> u32 {
        self.run(names::FROM_OVERLAY, self.ifindex, packet)
    }
}

fn segment(from: [u8; 4], from_port: u16, to: [u8; 4], to_port: u16, flags: u8) -> Vec<u8> {
    packets::tcp(&Segment { from, from_port, to, to_port, flags })
}

#[test]
fn ingress_is_by_identity_protocol_and_port_and_answers_pass() {
    if !privileged() {
        return;
    }
    let bench = Bench::new(IN, 0, vec![rule(IN, BOB, tcp(80))]);
    let syn = |to_port| bench.arrives(&segment(FAR, 40_000, POD, to_port, SYN));
    assert_eq!(syn(81), DROP);
    assert_eq!(bench.dropped(Reason::PolicyIngress), 1);
    assert_eq!(syn(80), REDIRECT);
    assert_eq!(bench.arrives(&segment([10, 244, 2, 8], 40_000, POD, 80, SYN)), DROP, "a stranger");
    assert_eq!(bench.arrives(&packets::udp(FAR, 40_000, POD, 80)), DROP, "another protocol");
    // The same from the pod beside it, which has no policy of its own.
    let near = |port| {
        let packet = segment(NEAR, 40_000, POD, port, SYN);
        bench.sent_by(&bench.other, bench.other_ifindex, &packet)
    };
    assert_eq!((near(80), near(81)), (REDIRECT, DROP));
    assert_eq!(bench.sends(&segment(POD, 80, NEAR, 40_000, SYN_ACK)), REDIRECT);
    // What the pod begins itself is answered.
    assert_eq!(bench.sends(&segment(POD, 50_000, WORLD, 443, SYN)), NEXT);
    assert_eq!(
        bench.run(
            names::TO_POD,
            bench.ifindex,
            &bench.framed(&segment(WORLD, 443, POD, 50_000, SYN_ACK))
        ),
        NEXT
    );
    assert_eq!(bench.sends(&packets::udp(POD, 5_353, FAR, 53)), NEXT);
    assert_eq!(bench.arrives(&packets::udp(FAR, 53, POD, 5_353)), REDIRECT);
    assert_eq!(bench.arrives(&packets::udp(FAR, 54, POD, 5_353)), DROP);
}

#[test]
fn egress_is_by_identity_range_and_port_and_the_own_node_is_always_allowed() {
    if !privileged() {
        return;
    }
    let mut bench = Bench::new(
        0,
        OUT,
        vec![rule(OUT, BOB, Ports::of(Protocol::Udp)), rule(OUT, RANGE, tcp(443))],
    );
    bench.set.blocks = [
        ("192.0.2.0/24".parse().unwrap(), RANGE),
        ("192.0.2.128/25".parse().unwrap(), 103),
        ("::/0".parse().unwrap(), RANGE),
    ]
    .into();
    bench.publish();
    let to = |to, port| bench.sends(&segment(POD, 50_000, to, port, SYN));
    assert_eq!(to(WORLD, 443), NEXT);
    assert_eq!(to(WORLD, 80), DROP);
    assert_eq!(to([192, 0, 2, 200], 443), DROP, "an exception in the range");
    assert_eq!(to([198, 51, 100, 1], 443), DROP, "a range for IPv6 is none for IPv4");
    assert_eq!(to(NODE, 22), NEXT);
    assert_eq!(bench.sends(&packets::udp(POD, 1_000, NEAR, 9)), REDIRECT);
    assert_eq!(to(NEAR, 443), DROP);
    assert_eq!(bench.dropped(Reason::PolicyEgress), 4);
    // Whoever speaks to the pod gets its answers.
    assert_eq!(bench.arrives(&segment(FAR, 40_000, POD, 8_080, SYN)), REDIRECT);
    assert_eq!(bench.sends(&segment(POD, 8_080, FAR, 40_000, SYN_ACK)), NEXT);
    assert_eq!(bench.sends(&segment(POD, 8_081, FAR, 40_000, SYN)), DROP);
}

#[test]
fn a_pod_without_an_entry_is_denied_and_without_enforcement_nothing_is() {
    if !privileged() {
        return;
    }
    let mut bench = Bench::new(IN, OUT, vec![]);
    bench.places.remove(&bench.ifindex);
    bench.publish();
    assert_eq!(bench.arrives(&segment(FAR, 40_000, POD, 80, SYN)), DROP);
    assert_eq!(bench.sends(&segment(POD, 50_000, FAR, 80, SYN)), DROP);
    bench.set.active = false;
    bench.publish();
    assert_eq!(bench.arrives(&segment(FAR, 40_000, POD, 80, SYN)), REDIRECT);
    assert_eq!(bench.sends(&segment(POD, 50_000, FAR, 80, SYN)), NEXT);
    // Of all tables only who the nodes are is left.
    let pressure = bench.programs.pressure().unwrap();
    let left = [maps::POD_POLICIES, maps::POLICY_RULES, maps::IDENTITIES].map(|m| pressure[m].0);
    assert_eq!(left, [0, 0, 2]);
}

#[test]
fn a_change_applies_to_connections_under_way() {
    if !privileged() {
        return;
    }
    let mut bench = Bench::new(IN, OUT, vec![rule(IN, BOB, tcp(80)), rule(OUT, BOB, tcp(443))]);
    let inbound = |flags| segment(FAR, 40_000, POD, 80, flags);
    let outbound = |flags| segment(POD, 50_000, FAR, 443, flags);
    let answer = segment(POD, 80, FAR, 40_000, ACK);
    let answered = segment(FAR, 443, POD, 50_000, ACK);
    assert_eq!((bench.arrives(&inbound(SYN)), bench.sends(&answer)), (REDIRECT, NEXT));
    assert_eq!((bench.sends(&outbound(SYN)), bench.arrives(&answered)), (NEXT, REDIRECT));
    // Unrelated rules come and go: they go on.
    bench.set.rules.insert(rule(IN, 104, tcp(99)));
    bench.publish();
    bench.set.rules.remove(&rule(IN, 104, tcp(99)).key());
    bench.publish();
    assert_eq!((bench.arrives(&inbound(ACK)), bench.sends(&answer)), (REDIRECT, NEXT));
    assert_eq!((bench.sends(&outbound(ACK)), bench.arrives(&answered)), (NEXT, REDIRECT));
    let rules = std::mem::take(&mut bench.set.rules);
    bench.publish();
    assert_eq!((bench.arrives(&inbound(ACK)), bench.sends(&answer)), (DROP, DROP));
    assert_eq!((bench.sends(&outbound(ACK)), bench.arrives(&answered)), (DROP, DROP));
    // Nor does a new one come through because one like it did.
    assert_eq!(bench.arrives(&segment(FAR, 40_001, POD, 80, SYN)), DROP);
    assert_eq!(bench.sends(&segment(POD, 50_001, FAR, 443, SYN)), DROP);
    // Allowed again, they continue.
    bench.set.rules = rules;
    bench.publish();
    assert_eq!((bench.sends(&answer), bench.arrives(&inbound(ACK))), (NEXT, REDIRECT));
    // Bob is somebody else now.
    bench.set.identities.insert((IpAddr::from(FAR), 105));
    bench.publish();
    assert_eq!((bench.arrives(&inbound(ACK)), bench.sends(&answer)), (DROP, DROP));
}

/// Connections from before the first policy: the port that a client is given tells who began.
#[test]
fn a_first_policy_applies_to_connections_that_nobody_watched() {
    if !privileged() {
        return;
    }
    let bench = Bench::new(IN, 0, vec![rule(IN, BOB, tcp(50_051))]);
    // A client of the pod, on a port that is not allowed; neither side's packets revive the connection.
    assert_eq!(bench.sends(&segment(POD, 80, FAR, 40_000, ACK)), DROP);
    assert_eq!(bench.arrives(&segment(FAR, 40_000, POD, 80, ACK)), DROP);
    // The pod as a client of somebody.
    assert_eq!(bench.arrives(&segment(FAR, 443, POD, 50_000, ACK)), REDIRECT);
    // Both ports are such that a client may have them: both ways have to be allowed.
    assert_eq!(bench.arrives(&segment(FAR, 40_000, POD, 50_051, ACK)), REDIRECT);
    assert_eq!(bench.sends(&segment(POD, 50_052, FAR, 40_000, ACK)), DROP);
}

#[test]
fn the_end_of_a_connection_is_not_the_beginning_of_another() {
    if !privileged() {
        return;
    }
    let bench = Bench::new(IN, OUT, vec![rule(IN, BOB, tcp(80))]);
    let there = |flags| bench.arrives(&segment(FAR, 40_000, POD, 80, flags));
    let back = |flags| bench.sends(&segment(POD, 80, FAR, 40_000, flags));
    assert_eq!((there(SYN), back(SYN_ACK), there(ACK)), (REDIRECT, NEXT, REDIRECT));
    assert_eq!(
        (back(FIN | ACK), there(ACK), there(FIN | ACK), back(ACK)),
        (NEXT, REDIRECT, REDIRECT, NEXT)
    );
    // The pod may not begin one, not even with the ports of an old one.
    assert_eq!(back(SYN), DROP);
    assert_eq!((there(SYN), back(RST)), (REDIRECT, NEXT));
}

/// More connections than the memory holds: each new one finds it full, and its answers pass all the same.
#[test]
fn a_full_memory_of_connections_denies_nothing_that_is_allowed() {
    if !privileged() {
        return;
    }
    const NEW: u16 = 2_000;
    let rules = vec![rule(IN, BOB, tcp(80)), rule(OUT, BOB, Ports::Everything)];
    let bench = Bench::with(&[(maps::CONNECTIONS, 64)], IN, OUT, rules);
    let mut denied = 0;
    for port in 40_000..40_000 + NEW {
        let served = [
            bench.arrives(&segment(FAR, port, POD, 80, SYN)) == REDIRECT,
            bench.sends(&segment(POD, 80, FAR, port, SYN_ACK)) == NEXT,
            bench.arrives(&segment(FAR, port, POD, 80, ACK)) == REDIRECT,
        ];
        // Only what is remembered lets the answer in: no rule does.
        let asked = [
            bench.sends(&packets::udp(POD, port, FAR, 53)) == NEXT,
            bench.arrives(&packets::udp(FAR, 53, POD, port)) == REDIRECT,
        ];
        denied += usize::from(served.contains(&false)) + usize::from(asked.contains(&false));
    }
    println!("{denied} of {} new connections were denied something", 2 * NEW);
    assert!(denied * 1000 <= 2 * usize::from(NEW), "{denied} of {}", 2 * NEW);
    // What was forgotten and began before is still judged right by its ports.
    assert_eq!(bench.arrives(&segment(FAR, 40_000, POD, 80, ACK)), REDIRECT);
    assert_eq!(bench.sends(&segment(POD, 80, FAR, 40_000, ACK)), NEXT);
    assert_eq!(bench.arrives(&packets::udp(FAR, 53, POD, 40_000)), DROP);
}

#[test]
fn icmp_errors_pass_when_they_are_about_a_connection() {
    if !privileged() {
        return;
    }
    let bench = Bench::new(IN, OUT, vec![rule(OUT, BOB, tcp(80))]);
    let sent = segment(POD, 50_000, FAR, 80, SYN);
    let router = [198, 51, 100, 9];
    let error = |about: &[u8]| bench.arrives(&packets::icmp_error(router, POD, &about[..28]));
    assert_eq!(error(&sent), DROP, "nothing was sent yet");
    assert_eq!(bench.sends(&sent), NEXT);
    assert_eq!(error(&sent), REDIRECT);
    assert_eq!(error(&segment(POD, 50_000, FAR, 81, SYN)), DROP);
    // Somebody else's packet is no reason to speak to this pod.
    assert_eq!(error(&segment(FAR, 80, POD, 50_000, ACK)), DROP);
    let echo = |reply, from, to| packets::echo(reply, from, to, 7);
    assert_eq!(bench.arrives(&echo(false, FAR, POD)), DROP);
    let open = Bench::new(IN, OUT, vec![rule(OUT, BOB, Ports::Everything)]);
    assert_eq!(open.arrives(&echo(true, FAR, POD)), DROP);
    assert_eq!(open.sends(&echo(false, POD, FAR)), NEXT);
    assert_eq!(open.arrives(&echo(true, FAR, POD)), REDIRECT);
    assert_eq!(open.arrives(&echo(false, FAR, POD)), DROP);
}

#[test]
fn fragments_follow_their_first_one() {
    if !privileged() {
        return;
    }
    let bench = Bench::new(IN, 0, vec![rule(IN, BOB, Ports::of(Protocol::Udp))]);
    let fragment = |from, id, first| {
        let mut packet = packets::udp(from, 4_000, POD, 9);
        packet[4..6].copy_from_slice(&[0, id]);
        packet[6..8].copy_from_slice(if first { &[0x20, 0] } else { &[0, 2] });
        packet
    };
    assert_eq!(bench.arrives(&fragment(FAR, 1, false)), DROP);
    assert_eq!(bench.dropped(Reason::PolicyFragment), 1);
    assert_eq!(bench.arrives(&fragment(FAR, 1, true)), REDIRECT);
    assert_eq!(bench.arrives(&fragment(FAR, 1, false)), REDIRECT);
    assert_eq!(bench.arrives(&fragment(FAR, 2, false)), DROP);
    assert_eq!(bench.arrives(&fragment(WORLD, 3, true)), DROP);
    assert_eq!(bench.arrives(&fragment(WORLD, 3, false)), DROP);
}

#[test]
fn ipv6_and_sctp_are_no_different() {
    if !privileged() {
        return;
    }
    let mut bench =
        Bench::new(IN, 0, vec![rule(IN, BOB, tcp(80)), rule(IN, BOB, Ports::of(Protocol::Sctp))]);
    bench.set.identities.insert(("fd10:244:0:2::7".parse().unwrap(), BOB));
    bench.publish();
    let six = |next, port: u16, fragment: Option<u16>| {
        packets::ipv6("fd10:244:0:2::7", "fd10:244:0:1::5", next, 40_000, port, fragment)
    };
    assert_eq!(bench.arrives(&six(6, 80, None)), REDIRECT);
    assert_eq!(bench.arrives(&six(6, 81, None)), DROP);
    assert_eq!(bench.arrives(&six(132, 81, None)), REDIRECT);
    assert_eq!(bench.arrives(&six(6, 80, Some(1))), REDIRECT, "the first fragment");
    assert_eq!(bench.arrives(&six(6, 80, Some(8))), REDIRECT, "the last one");
    assert_eq!(bench.arrives(&six(17, 80, Some(8))), DROP);
}

#[test]
fn pods_do_not_reach_the_nodes_own_ports() {
    if !privileged() {
        return;
    }
    let bench = Bench::new(0, 0, vec![]);
    bench.node.ip("addr add 198.51.100.77/32 dev lo");
    bench.node.ip(&format!("route add 192.0.2.0/24 dev {}", bench.other.host_interface));
    bench.node.run(|| mesh_kernel::sysctl::write("net/ipv4/ip_forward", "1")).unwrap();
    let to = |to, port| bench.sends(&segment(POD, 50_000, to, port, SYN));
    assert_eq!(to(NODE, 10_250), DROP);
    assert_eq!(to(NODE, 10_251), NEXT);
    assert_eq!(
        to([198, 51, 100, 77], 10_250),
        DROP,
        "an address of the node that only the kernel knows"
    );
    assert_eq!(to(WORLD, 10_250), NEXT, "somebody else's port");
    assert_eq!(to([127, 0, 0, 1], 80), DROP);
    assert_eq!(bench.dropped(Reason::HostProtected), 3);
    assert_eq!(
        bench.arrives(&segment(FAR, 50_000, NODE, 10_250, SYN)),
        DROP,
        "from another node's pod"
    );
    assert_eq!(bench.arrives(&segment(FAR, 50_000, NODE, 80, SYN)), NEXT);
}

impl Bench {
    /// With the Ethernet header of the node's side.
    fn framed(&self, packet: &[u8]) -> Vec<u8> {
        [&self.port.pod_mac().0[..], &self.port.host_mac().0, &[8, 0], packet].concat()
    }
}

/// Real packets: what a process of the node sends to its pods is allowed, and answered, whatever the policy.
#[test]
fn processes_of_the_node_reach_their_pods_and_other_pods_do_not() {
    if !privileged() {
        return;
    }
    let bench = Bench::new(IN, OUT, vec![]);
    // An address of the node that no table knows.
    bench.node.ip("addr add 198.51.100.77/32 dev lo");
    let pod = &bench._pods[0];
    let server = pod.greeter("10.244.1.5:80", "hello");
    assert_eq!(bench.node.tcp(server).unwrap(), "hello");
    let before = bench.dropped(Reason::PolicyIngress);
    let near = bench._pods[1].run(|| {
        std::net::TcpStream::connect_timeout(&server, std::time::Duration::from_millis(300))
    });
    assert!(near.is_err());
    assert!(bench.dropped(Reason::PolicyIngress) > before);
}

/// Real packets: by a port of the node a pod comes to another one with the node's address, which is always allowed where a process
/// of the node has it.
#[test]
fn a_pod_does_not_get_past_a_policy_by_a_port_of_its_node() {
    if !privileged() {
        return;
    }
    let mut bench = Bench::new(IN, 0, vec![]);
    let by_node = bench.publish_port();
    assert_eq!(bench.node.tcp(by_node).unwrap(), "hello", "a process of the node");
    let quick =
        || std::net::TcpStream::connect_timeout(&by_node, std::time::Duration::from_millis(300));
    let before = bench.dropped(Reason::PolicyIngress);
    assert!(bench._pods[1].run(quick).is_err());
    assert!(bench.dropped(Reason::PolicyIngress) > before);
    // Whom everybody may ask may be asked by everybody.
    bench.set.rules = vec![rule(IN, 0, tcp(80))].into();
    bench.publish();
    assert_eq!(bench._pods[1].tcp(by_node).unwrap(), "hello");
}

/// Real packets: a pod may always speak to its node, and by a port of the node only to pods to which it may speak.
#[test]
fn a_pod_does_not_get_past_its_own_policy_by_a_port_of_its_node() {
    if !privileged() {
        return;
    }
    let mut bench = Bench::new(0, 0, vec![]);
    let own = PodPolicy { identity: BOB, ingress: IN, egress: OUT };
    bench.set.pods.insert(ObjectKey::new("default", "two"), own);
    bench.publish();
    let by_node = bench.publish_port();
    let of_node = bench.node.greeter("10.244.1.1:9090", "node");
    assert_eq!(bench._pods[1].tcp(of_node).unwrap(), "node");
    let quick =
        || std::net::TcpStream::connect_timeout(&by_node, std::time::Duration::from_millis(300));
    let before = bench.dropped(Reason::PolicyEgress);
    assert!(bench._pods[1].run(quick).is_err());
    assert!(bench.dropped(Reason::PolicyEgress) > before);
    // That it may hear nobody says nothing about answers.
    bench.set.rules = vec![rule(OUT, ALICE, tcp(80))].into();
    bench.publish();
    assert_eq!(bench._pods[1].tcp(by_node).unwrap(), "hello");
    // Nor what the other one may hear, which has been asked.
    bench.set.rules = vec![rule(OUT, ALICE, tcp(80)), rule(IN, 0, tcp(80))].into();
    bench.restrict(IN, 0);
    assert_eq!(bench._pods[1].tcp(by_node).unwrap(), "hello");
}

/// Policies, pods and packets as a seed wants them; the same every time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        // Xorshift, 64 bits (Marsaglia).
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::try_from(self.roll(choices.len() as u64)).unwrap()]
    }
}

const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
const OTHERS: [[u8; 4]; 6] = [NEAR, FAR, [10, 244, 2, 8], NODE, [192, 0, 2, 1], [192, 0, 2, 200]];

fn random_rules(dice: &mut Dice) -> Vec<Rule> {
    let count = dice.roll(12);
    let ports = |dice: &mut Dice| {
        let protocol = dice.of(&PROTOCOLS);
        let first = 75 + u16::try_from(dice.roll(10)).unwrap();
        match dice.roll(4) {
            0 => vec![Ports::Everything],
            1 => vec![Ports::of(protocol)],
            2 => Ports::range(protocol, first, first),
            _ => Ports::range(protocol, first, first + u16::try_from(dice.roll(20)).unwrap()),
        }
    };
    let mut rules = BTreeMap::new();
    for _ in 0..count {
        let policy = dice.of(&[IN, OUT]);
        let identity = dice.of(&[0, ALICE, BOB, RANGE, 103, 104]);
        for ports in ports(dice) {
            rules.insert((policy, identity, ports), rule(policy, identity, ports));
        }
    }
    rules.into_values().collect()
}

/// The programs and [`PolicySet::decide`] say the same, on tables that nobody chose.
#[test]
fn the_programs_agree_with_the_model() {
    if !privileged() {
        return;
    }
    let mut dice = Dice(0x6d65_7368);
    let mut bench = Bench::new(IN, OUT, vec![]);
    let (mut passed, mut denied) = (0, 0);
    for round in 0..60 {
        let pod = PodPolicy {
            identity: ALICE,
            ingress: dice.of(&[0, IN, IN]),
            egress: dice.of(&[0, OUT, OUT]),
        };
        bench.set.pods.insert(ObjectKey::new("default", "one"), pod);
        bench.set.rules = random_rules(&mut dice).into();
        bench.set.identities = [(IpAddr::from(NODE), THIS_NODE), (IpAddr::from(FAR), BOB)].into();
        bench.set.identities.insert((IpAddr::from([10, 244, 2, 8]), dice.of(&[104, ALICE])));
        let ranges = ["192.0.2.0/24", "192.0.2.128/25", "10.244.0.0/16", "0.0.0.0/0", "::/0"];
        bench.set.blocks = BTreeMap::new();
        for range in ranges {
            if dice.roll(2) == 0 {
                bench.set.blocks.insert(range.parse().unwrap(), dice.of(&[RANGE, 103]));
            }
        }
        bench.publish();
        let mut known = bench.set.clone();
        known.identities.insert((IpAddr::from(NEAR), BOB));
        for trial in 0..60_u16 {
            // Ports of clients that no earlier packet had: nothing is remembered.
            let client = 10_000 + round * 100 + trial;
            let (protocol, port) =
                (dice.of(&PROTOCOLS), 75 + u16::try_from(dice.roll(30)).unwrap());
            let (other, sends) = (dice.of(&OTHERS), dice.roll(2) == 0);
            let ends = if sends { (POD, other) } else { (other, POD) };
            let packet = packets::with_ports(protocol.number(), (ends.0, client), (ends.1, port));
            let flow = Flow {
                source: ends.0.into(),
                destination: ends.1.into(),
                protocol: Some(protocol),
                port,
            };
            let (side, verdict) = match (sends, other == NEAR) {
                (true, _) => (Side::Sender, bench.sends(&packet)),
                (false, true) => {
                    (Side::Receiver, bench.sent_by(&bench.other, bench.other_ifindex, &packet))
                }
                (false, false) => (Side::Receiver, bench.arrives(&packet)),
            };
            let expected = known.decide(&pod, side, &flow);
            assert_eq!(
                verdict != DROP,
                expected.passes(),
                "{flow:?} {side:?} {expected:?} {known:#?}"
            );
            *if verdict == DROP { &mut denied } else { &mut passed } += 1;
        }
    }
    println!("{passed} passed, {denied} denied");
    assert!(passed > 500 && denied > 500, "the tables are too plain to tell");
}
