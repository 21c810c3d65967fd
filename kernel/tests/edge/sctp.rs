//! SCTP from outside. Packets are made by hand: the kernel carries them whether or not it has SCTP itself.

use std::io::Read as _;
use std::net::{IpAddr, SocketAddr};

use mesh_model::snapshot::Protocol;
use socket2::{Domain, Protocol as Number, SockAddr, Socket, Type};

use super::{CLIENT, CLIENT6, Published, World, at, frontends, unchanged};
use crate::lab::{Net, PATIENCE, privileged};

const SCTP: i32 = 132;

/// Services with another port than their backends', here and elsewhere; one with the same port; one without backends.
const SERVICES: &[Published<'_>] = &[
    (Protocol::Sctp, 30_001, &[(1, 9899)]),
    (Protocol::Sctp, 30_002, &[(2, 9899)]),
    (Protocol::Sctp, 9899, &[(1, 9899)]),
    (Protocol::Sctp, 30_003, &[]),
];

/// CRC32c, bit by bit.
pub(super) fn crc(bytes: &[u8]) -> u32 {
    let step = |register: u32| register >> 1 ^ (0x82f6_3b78 & (register & 1).wrapping_neg());
    let all = bytes.iter().fold(u32::MAX, |register, byte| {
        (0..8).fold(register ^ u32::from(*byte), |register, _| step(register))
    });
    !all
}

/// A packet with this text in the place of its chunks.
fn packet(source: u16, destination: u16, text: &[u8]) -> Vec<u8> {
    let ports = [source.to_be_bytes(), destination.to_be_bytes()].concat();
    let mut packet = [&ports[..], &[1, 2, 3, 4], &[0; 4], text].concat();
    let sum = crc(&packet);
    packet[8..12].copy_from_slice(&sum.to_le_bytes());
    packet
}

fn raw(net: &Net, v4: bool) -> Socket {
    let domain = if v4 { Domain::IPV4 } else { Domain::IPV6 };
    let open = || Socket::new(domain, Type::RAW, Some(Number::from(SCTP))).unwrap();
    let socket = net.run(open);
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn send(socket: &Socket, to: IpAddr, packet: &[u8]) {
    socket.send_to(packet, &SockAddr::from(at(to, 0))).unwrap();
}

/// Who sent the next packet, and that packet. Its sum has to be right.
fn receive(socket: &Socket) -> (IpAddr, Vec<u8>) {
    let (_, from) = socket.peek_from(&mut []).unwrap();
    let from: SocketAddr = from.as_socket().unwrap();
    let mut bytes = vec![0; 4096];
    let mut reader = socket;
    let length = reader.read(&mut bytes).unwrap();
    // Raw IPv4 sockets are given the IP header as well.
    let packet = bytes[if from.is_ipv4() { 20 } else { 0 }..length].to_vec();
    let mut without = packet.clone();
    without[8..12].fill(0);
    assert_eq!(packet[8..12], crc(&without).to_le_bytes(), "the sum of {packet:?}");
    (from.ip(), packet)
}

fn ports(packet: &[u8]) -> [u16; 2] {
    [0, 2].map(|at| u16::from_be_bytes([packet[at], packet[at + 1]]))
}

#[test]
fn packets_go_both_ways_with_right_sums() {
    if !privileged() {
        return;
    }
    let world = World::new();
    world.publish(SERVICES, unchanged);
    for (port, node) in [(30_001, 0), (30_002, 1), (9899, 0)] {
        for frontend in frontends(port) {
            let client = raw(&world.client, frontend.is_ipv4());
            let pod = raw(&world.nodes[node].pod, frontend.is_ipv4());
            // Lengths with many bits, and odd ones.
            for length in [1, 4, 119, 1000, 1255] {
                let text: Vec<u8> = (0..length).map(|i| (i * 7 % 251) as u8).collect();
                send(&client, frontend.ip(), &packet(4001, port, &text));
                let (from, question) = receive(&pod);
                // The last service has the backend of the first: there the client's port is another one.
                let [seen, asked] = ports(&question);
                assert_eq!((seen == 4001, asked), (port != 9899, 9899));
                assert_eq!(&question[12..], &text[..]);
                assert!([CLIENT, CLIENT6].contains(&from.to_string().as_str()), "{from}");
                send(&pod, from, &packet(9899, seen, &text));
                let (from, answer) = receive(&client);
                assert_eq!((from, ports(&answer)), (frontend.ip(), [port, 4001]));
                assert_eq!(&answer[12..], &text[..]);
            }
        }
    }
}

#[test]
fn a_service_without_backends_is_refused() {
    if !privileged() {
        return;
    }
    let world = World::new();
    world.publish(SERVICES, unchanged);
    for frontend in frontends(30_003) {
        let client = raw(&world.client, frontend.is_ipv4());
        client.connect(&SockAddr::from(at(frontend.ip(), 0))).unwrap();
        client.send(&packet(4001, 30_003, b"?")).unwrap();
        let mut reader = &client;
        let error = reader.read(&mut [0; 64]).unwrap_err();
        // Raw sockets tell "port unreachable" so, when they are connected.
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{frontend}: {error}");
    }
}
