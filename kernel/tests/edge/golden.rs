//! Golden packets: what the program on the uplink makes of a packet, byte by byte.

use std::net::Ipv4Addr;

use mesh_abi::programs as names;
use mesh_kernel::bpf::test_run::Input;
use mesh_model::snapshot::Protocol;

use super::sctp::crc;
use super::{CLIENT, NODE, Published, World, unchanged};
use crate::lab::privileged;
use crate::packets::{ACK, RST, SYN, ipv4};

const DROP: u32 = 2;
const REDIRECT: u32 = 7;
const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;
const POD: [u8; 4] = [10, 244, 1, 5];

/// Two frontends of one pod that is there, and one of a pod that is not.
const SERVICES: &[Published<'_>] = &[
    (Protocol::Udp, 30_001, &[(1, 53)]),
    (Protocol::Udp, 30_002, &[(1, 53)]),
    (Protocol::Sctp, 30_001, &[(1, 9899)]),
    (Protocol::Sctp, 30_002, &[(1, 9899)]),
    (Protocol::Tcp, 30_001, &[(1, 80)]),
];

fn address(text: &str) -> [u8; 4] {
    text.parse::<Ipv4Addr>().unwrap().octets()
}

/// The sum of 16 bit words, with the carries added; all ones when a checksum in it is right.
fn sum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// What the transport checksum covers besides the transport's own bytes.
fn pseudo(packet: &[u8]) -> Vec<u8> {
    let length = (packet.len() - 20) as u16;
    [&packet[12..20], &[0, packet[9]], &length.to_be_bytes()].concat()
}

/// A packet from the client with right checksums.
fn from_client(protocol: u8, mut payload: Vec<u8>) -> Vec<u8> {
    let place = if protocol == TCP { 16 } else { 6 };
    if protocol == SCTP {
        payload[8..12].fill(0);
        let sum = crc(&payload).to_le_bytes();
        payload[8..12].copy_from_slice(&sum);
    }
    let mut packet = ipv4(address(CLIENT), address(NODE), protocol, &payload);
    let header = !sum(&packet[..20]);
    packet[10..12].copy_from_slice(&header.to_be_bytes());
    if protocol != SCTP {
        let checksum = !sum(&[pseudo(&packet), packet[20..].to_vec()].concat());
        packet[20 + place..22 + place].copy_from_slice(&checksum.to_be_bytes());
    }
    packet
}

fn ports(source: u16, destination: u16) -> Vec<u8> {
    [source.to_be_bytes(), destination.to_be_bytes()].concat()
}

fn datagram(port: u16) -> Vec<u8> {
    from_client(UDP, [ports(4001, port), vec![0, 12, 0, 0, 1, 2, 3, 4]].concat())
}

fn segment(flags: u8) -> Vec<u8> {
    let numbers = [7_u32.to_be_bytes(), 9_u32.to_be_bytes()].concat();
    let rest = vec![0x50, flags, 1, 0, 0, 0, 0, 0];
    from_client(TCP, [ports(4001, 30_001), numbers, rest].concat())
}

impl World {
    /// Runs the program once; the verdict, and the IP packet that is left, with its checksums checked.
    fn comes_in(&self, packet: &[u8]) -> (u32, Vec<u8>) {
        let node = &self.nodes[0];
        let link = node.net.ip("-o link show up0");
        let ifindex = link.split(':').next().unwrap().parse().unwrap();
        let mac = link.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
        let mac = mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap());
        let framed = [mac.collect(), vec![2, 0, 0, 0, 0, 9, 8, 0], packet.to_vec()].concat();
        let input = Input { packet: &framed, ifindex, repeat: 1 };
        let output = node.net.run(|| node.programs.test_run(names::FROM_UPLINK, &input)).unwrap();
        let left = output.packet[14..].to_vec();
        assert_eq!(sum(&left[..20]), 0xffff, "the sum of the header");
        if left[9] == SCTP {
            let mut without = left[20..].to_vec();
            without[8..12].fill(0);
            assert_eq!(left[28..32], crc(&without).to_le_bytes());
        } else {
            assert_eq!(sum(&[pseudo(&left), left[20..].to_vec()].concat()), 0xffff);
        }
        (output.verdict, left)
    }
}

#[test]
fn a_segment_for_a_pod_that_is_gone_becomes_a_reset() {
    if !privileged() {
        return;
    }
    let world = World::new();
    world.publish(SERVICES, unchanged);
    world.nodes[0].end_pod();
    // In the middle of a connection: what the client expects next. At its start: what it has begun with.
    for (flags, sequence, acknowledged, answer) in
        [(ACK, 9_u32, 0_u32, RST), (SYN, 0, 8, RST | ACK)]
    {
        let (verdict, reset) = world.comes_in(&segment(flags));
        assert_eq!(verdict, REDIRECT);
        assert_eq!((&reset[12..16], &reset[16..20]), (&address(NODE)[..], &address(CLIENT)[..]));
        assert_eq!(reset[20..24], ports(30_001, 4001));
        let numbers = [sequence.to_be_bytes(), acknowledged.to_be_bytes()].concat();
        assert_eq!((&reset[24..32], reset[33]), (&numbers[..], answer));
    }
    assert_eq!(world.comes_in(&segment(RST)).0, DROP, "a reset is not answered");
}

#[test]
fn the_second_of_two_connections_from_one_port_to_one_pod_gets_another_port() {
    if !privileged() {
        return;
    }
    let world = World::new();
    world.publish(SERVICES, unchanged);
    let association = |port| from_client(SCTP, [ports(4001, port), vec![5; 1021]].concat());
    let kinds: [(Vec<u8>, Vec<u8>, u16); 2] = [
        (datagram(30_001), datagram(30_002), 53),
        (association(30_001), association(30_002), 9899),
    ];
    for (first, second, port) in kinds {
        let seen = |packet: &[u8]| {
            let (verdict, packet) = world.comes_in(packet);
            assert_eq!((verdict, &packet[16..20]), (REDIRECT, &POD[..]));
            assert_eq!(packet[22..24], port.to_be_bytes());
            u16::from_be_bytes([packet[20], packet[21]])
        };
        assert_eq!(seen(&first), 4001);
        let other = seen(&second);
        assert!(other >= 0xf000, "{other}");
        // Both keep what they have.
        assert_eq!((seen(&first), seen(&second)), (4001, other));
    }
}
