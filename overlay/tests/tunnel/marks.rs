//! Marks of congestion on real packets: the sender's stand on the datagrams, and those of a router get to the receiver.

use std::io::IoSliceMut;
use std::net::{SocketAddr, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use quinn_udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState};

use crate::traffic::LIMIT;
use crate::world::{Side, World, privileged};

/// A congested router: it marks, of what may be marked, one kind only, so that it has to have seen which kind it is.
const ROUTER: &str = "table inet congestion { chain in { type filter hook prerouting priority -450; \
    iifname ul0 ip protocol udp ip ecn ect0 ip ecn set ce; \
    iifname ul0 ip6 nexthdr udp ip6 ecn ect0 ip6 ecn set ce; }; }";

const AGAIN: Duration = Duration::from_millis(200);

#[test]
fn a_congested_router_of_the_underlay_is_heard_of_in_the_pods() {
    if !privileged() {
        return;
    }
    for underlay_v6 in [false, true] {
        let mut world = World::new();
        world.connect(underlay_v6);
        let node = world.name("node", Side::B);
        let marks = Command::new("ip").args(["netns", "exec", &node, "nft", ROUTER]).status();
        assert!(marks.unwrap().success());
        for pod_v6 in [false, true] {
            check(&world, pod_v6);
        }
        assert_eq!(world.status(Side::B).drops.get(&mesh_overlay::DropReason::Congested), None);
    }
}

fn check(world: &World, v6: bool) {
    use EcnCodepoint::{Ce, Ect0, Ect1};
    let to = SocketAddr::new(Side::B.pod(v6), 7300);
    let [sender, receiver] = [(Side::A, 0), (Side::B, to.port())].map(|(side, port)| {
        let address = SocketAddr::new(side.pod(v6), port);
        let socket = world.inside("pod", side, || UdpSocket::bind(address)).unwrap();
        let state = UdpSocketState::new((&socket).into()).unwrap();
        (socket, state)
    });
    let cases =
        [(None, None), (Some(Ect1), Some(Ect1)), (Some(Ect0), Some(Ce)), (Some(Ce), Some(Ce))];
    for (number, (ecn, expected)) in cases.into_iter().enumerate() {
        let contents = [number as u8];
        let transmit = Transmit {
            destination: to,
            ecn,
            contents: &contents,
            segment_size: None,
            src_ip: None,
        };
        let begun = Instant::now();
        let seen = loop {
            assert!(begun.elapsed() < LIMIT, "{ecn:?} did not arrive");
            sender.1.try_send((&sender.0).into(), &transmit).unwrap();
            if let Some(seen) = receive(&receiver, contents) {
                break seen;
            }
        };
        assert_eq!(seen, expected, "{ecn:?} to {to}");
    }
}

/// The marks of a datagram with this content, if it comes soon.
fn receive(from: &(UdpSocket, UdpSocketState), content: [u8; 1]) -> Option<Option<EcnCodepoint>> {
    let begun = Instant::now();
    while begun.elapsed() < AGAIN {
        let (mut buffer, mut meta) = ([0; 2000], [RecvMeta::default()]);
        match from.1.recv((&from.0).into(), &mut [IoSliceMut::new(&mut buffer)], &mut meta) {
            Ok(_) if buffer.first_chunk() == Some(&content) => return Some(meta[0].ecn),
            Ok(_) => {}
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
    None
}
