//! Golden packets: the TC programs' verdicts by packet and map content, without a network.

use mesh_abi::{Counter, Reason, programs as names};
use mesh_kernel::bpf::test_run::Input;
use mesh_kernel::pods::LinuxPodNetwork;
use mesh_kernel::pods::{PodNetwork, PodPort};
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::lab::{Lab, Net, privileged};
use crate::pod_network::port;

/// Verdicts of `linux/pkt_cls.h`.
const NEXT: u32 = u32::MAX;
const DROP: u32 = 2;
const REDIRECT: u32 = 7;

/// A pod's port and another pod on the same node, with the programs that know both.
struct Bench {
    programs: Arc<mesh_kernel::Programs>,
    node: Net,
    _lab: Lab,
    _pods: [Net; 2],
    port: PodPort,
    ifindex: u32,
    other: PodPort,
}

impl Bench {
    fn new() -> Self {
        let (lab, node) = (Lab::new(), Net::new());
        let pods = [Net::new(), Net::new()];
        let programs = Arc::new(lab.load());
        let network = LinuxPodNetwork::new(node.handle(), programs.clone());
        let [port, other] = [port(&pods[0], 5), port(&pods[1], 6)];
        let ifindex = network.attach(&port).unwrap().host_ifindex;
        network.attach(&other).unwrap();
        Self { programs, node, _lab: lab, _pods: pods, port, ifindex, other }
    }

    fn counters(&self) -> BTreeMap<Reason, Counter> {
        self.programs.counters().unwrap()
    }

    /// Runs the program once and checks the verdict and that exactly this reason was counted.
    fn expect(&self, program: &str, packet: &[u8], verdict: u32, reason: Reason) -> Vec<u8> {
        let before = self.counters();
        let input = Input { packet, ifindex: self.ifindex, repeat: 1 };
        let output = self.node.run(|| self.programs.test_run(program, &input)).unwrap();
        let after = self.counters();
        let counted: Vec<Reason> = Reason::ALL
            .into_iter()
            .filter(|r| after[r].packets != before[r].packets)
            // The pods' own stacks send neighbour discovery now and then.
            .filter(|r| *r == reason || ![Reason::Noise, Reason::PodToStack].contains(r))
            .collect();
        assert_eq!((output.verdict, counted), (verdict, vec![reason]));
        output.packet
    }

    fn pod_sends(&self, packet: &[u8], verdict: u32, reason: Reason) {
        self.expect(names::FROM_POD, packet, verdict, reason);
    }

    /// An Ethernet header from the pod.
    fn ethernet(&self, ethertype: u16) -> Vec<u8> {
        let mut packet = self.port.host_mac().0.to_vec();
        packet.extend(self.port.pod_mac().0);
        packet.extend(ethertype.to_be_bytes());
        packet
    }

    fn ipv4(&self, source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
        [self.ethernet(0x0800), ipv4(source, destination, 17, &udp(53))].concat()
    }

    fn ipv6(&self, source: &str, destination: &str, next: u8, payload: &[u8]) -> Vec<u8> {
        [self.ethernet(0x86dd), ipv6(source, destination, next, payload)].concat()
    }
}

fn ipv4(source: [u8; 4], destination: [u8; 4], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap();
    let mut packet = vec![0x45, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
    packet.extend(source);
    packet.extend(destination);
    packet.extend(payload);
    packet
}

fn ipv6(source: &str, destination: &str, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
    packet.extend([next, 255]);
    for address in [source, destination] {
        packet.extend(address.parse::<std::net::Ipv6Addr>().unwrap().octets());
    }
    packet.extend(payload);
    packet
}

fn udp(destination: u16) -> Vec<u8> {
    let mut packet = 4000_u16.to_be_bytes().to_vec();
    packet.extend(destination.to_be_bytes());
    packet.extend([0, 12, 0, 0, 1, 2, 3, 4]);
    packet
}

fn icmpv6(kind: u8, target: &str) -> Vec<u8> {
    let mut packet = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    packet.extend(target.parse::<std::net::Ipv6Addr>().unwrap().octets());
    packet
}

const OWN: [u8; 4] = [10, 244, 1, 5];
const OWN6: &str = "fd10:244:0:1::5";

#[test]
fn ipv4_from_a_pod() {
    if !privileged() {
        return;
    }
    let bench = Bench::new();
    let outside = [192, 0, 2, 1];
    bench.pod_sends(&bench.ipv4(OWN, outside), NEXT, Reason::PodToStack);
    bench.pod_sends(&bench.ipv4(OWN, [10, 244, 1, 6]), REDIRECT, Reason::PodToPod);
    bench.pod_sends(&bench.ipv4([10, 244, 1, 6], outside), DROP, Reason::SpoofedAddress);
    bench.pod_sends(&bench.ipv4([0; 4], [255; 4]), DROP, Reason::SpoofedAddress);
    let mut mac = bench.ipv4(OWN, outside);
    mac[11] ^= 1;
    bench.pod_sends(&mac, DROP, Reason::SpoofedMac);
    let dhcp = [bench.ethernet(0x0800), ipv4(OWN, outside, 17, &udp(67))].concat();
    bench.pod_sends(&dhcp, DROP, Reason::Forbidden);
    let mut version = bench.ipv4(OWN, outside);
    version[14] = 0x44;
    bench.pod_sends(&version, DROP, Reason::Malformed);
    // An IPv4 header that promises UDP, and nothing behind it. (The kernel takes no shorter one for a test run.)
    bench.pod_sends(&bench.ipv4(OWN, outside)[..34], DROP, Reason::Malformed);
    bench.pod_sends(&bench.ethernet(0x0806), DROP, Reason::Malformed);
    bench.pod_sends(&[bench.ethernet(0x8847), vec![0; 40]].concat(), DROP, Reason::UnknownProtocol);
}

#[test]
fn delivery_to_a_pod_rewrites_the_ethernet_header() {
    if !privileged() {
        return;
    }
    let bench = Bench::new();
    let packet = bench.ipv4(OWN, [10, 244, 1, 6]);
    let out = bench.expect(names::FROM_POD, &packet, REDIRECT, Reason::PodToPod);
    assert_eq!(out[..6], bench.other.pod_mac().0);
    assert_eq!(out[6..12], bench.other.host_mac().0);
    assert_eq!(out[12..], packet[12..]);
    let bare = ipv4([10, 244, 2, 9], OWN, 17, &udp(53));
    let out = bench.expect(names::FROM_OVERLAY, &bare, REDIRECT, Reason::OverlayToPod);
    assert_eq!(out[..6], bench.port.pod_mac().0);
    assert_eq!(out[6..12], bench.port.host_mac().0);
    assert_eq!(out[12..14], [0x08, 0x00]);
    assert_eq!(out[14..], bare[..]);
}

#[test]
fn ipv6_from_a_pod() {
    if !privileged() {
        return;
    }
    let bench = Bench::new();
    let outside = "2001:db8::1";
    let plain = |source, to| bench.ipv6(source, to, 17, &udp(53));
    bench.pod_sends(&plain(OWN6, outside), NEXT, Reason::PodToStack);
    bench.pod_sends(&plain(OWN6, "fd10:244:0:1::6"), REDIRECT, Reason::PodToPod);
    bench.pod_sends(&plain("fd10:244:0:1::6", outside), DROP, Reason::SpoofedAddress);
    bench.pod_sends(&plain("fe80::5", outside), DROP, Reason::SpoofedAddress);
    bench.pod_sends(&plain("::ffff:10.244.1.5", outside), DROP, Reason::SpoofedAddress);
    let dhcp = bench.ipv6(OWN6, "ff02::1:2", 17, &udp(547));
    bench.pod_sends(&dhcp, DROP, Reason::Forbidden);
    let report = bench.ipv6("::", "ff02::16", 0, &[58, 0, 5, 2, 0, 0, 1, 0]);
    bench.pod_sends(&report, DROP, Reason::Noise);
}

#[test]
fn neighbour_and_router_discovery_from_a_pod() {
    if !privileged() {
        return;
    }
    let bench = Bench::new();
    let icmp = |source, kind, target| bench.ipv6(source, "ff02::1", 58, &icmpv6(kind, target));
    bench.pod_sends(&icmp(OWN6, 135, "fe80::1"), NEXT, Reason::PodToStack);
    bench.pod_sends(&icmp("::", 135, "fe80::5"), NEXT, Reason::PodToStack);
    bench.pod_sends(&icmp(OWN6, 136, OWN6), NEXT, Reason::PodToStack);
    bench.pod_sends(&icmp(OWN6, 136, "fd10:244:0:1::6"), DROP, Reason::SpoofedAddress);
    bench.pod_sends(&icmp("fe80::5", 136, "fe80::6"), DROP, Reason::SpoofedAddress);
    bench.pod_sends(&icmp("fd10:244:0:1::6", 135, OWN6), DROP, Reason::SpoofedAddress);
    bench.pod_sends(&icmp("fe80::5", 134, "::"), DROP, Reason::Forbidden);
    bench.pod_sends(&icmp(OWN6, 134, "::"), DROP, Reason::Forbidden);
    bench.pod_sends(&icmp(OWN6, 137, "::"), DROP, Reason::Forbidden);
    bench.pod_sends(&icmp("fe80::5", 133, "::"), DROP, Reason::Noise);
    bench.pod_sends(&icmp(OWN6, 128, "::"), NEXT, Reason::PodToStack);
    bench.pod_sends(&icmp("fe80::5", 128, "::"), DROP, Reason::SpoofedAddress);
}

#[test]
fn arp_from_a_pod() {
    if !privileged() {
        return;
    }
    let bench = Bench::new();
    let arp = |sender: [u8; 4], mac: [u8; 6]| {
        let mut packet = bench.ethernet(0x0806);
        packet.extend([0, 1, 8, 0, 6, 4, 0, 1]);
        packet.extend(mac);
        packet.extend(sender);
        packet.extend([0, 0, 0, 0, 0, 0, 169, 254, 1, 1]);
        packet
    };
    let own = bench.port.pod_mac().0;
    bench.pod_sends(&arp(OWN, own), NEXT, Reason::PodToStack);
    bench.pod_sends(&arp([0; 4], own), NEXT, Reason::PodToStack);
    bench.pod_sends(&arp([10, 244, 1, 6], own), DROP, Reason::SpoofedAddress);
    bench.pod_sends(&arp([169, 254, 1, 1], own), DROP, Reason::SpoofedAddress);
    bench.pod_sends(&arp(OWN, [2; 6]), DROP, Reason::SpoofedMac);
}

#[test]
fn what_the_maps_do_not_know_goes_to_the_stack_but_is_never_trusted() {
    if !privileged() {
        return;
    }
    let bench = Bench::new();
    let packet = bench.ipv4(OWN, [192, 0, 2, 1]);
    // The loopback device has no entry.
    let input = Input { packet: &packet, ifindex: 1, repeat: 1 };
    let output = bench.node.run(|| bench.programs.test_run(names::FROM_POD, &input)).unwrap();
    assert_eq!(output.verdict, DROP);
    assert_eq!(bench.counters()[&Reason::UnknownPort].packets, 1);
    let to_node = ipv4([10, 244, 2, 9], [10, 244, 1, 1], 6, &[0; 20]);
    bench.expect(names::FROM_OVERLAY, &to_node, NEXT, Reason::OverlayToStack);
    let to_node6 = ipv6("fd10:244:0:2::9", "fd10:244:0:1::1", 6, &[0; 20]);
    bench.expect(names::FROM_OVERLAY, &to_node6, NEXT, Reason::OverlayToStack);
    bench.expect(names::FROM_OVERLAY, &[0xff; 60], NEXT, Reason::OverlayToStack);
}

#[test]
fn the_verifier_has_little_to_do() {
    if !privileged() {
        return;
    }
    let lab = Lab::new();
    let programs = lab.load();
    for (name, count) in programs.verified_instructions() {
        println!("{name}: {count} instructions verified");
        // The kernel stops at a million. Where the edge, the policies and what traces them meet is most to follow, most
        // of all on older kernels (105,638 on Linux 6.1).
        assert!(*count < 200_000, "{name} costs the verifier {count} instructions");
    }
}
