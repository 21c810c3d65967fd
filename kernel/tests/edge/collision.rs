//! One port of a client reaches one backend by two frontends at the same time.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};

use mesh_model::snapshot::Protocol;
use socket2::{Domain, Socket, Type};

use super::gone::echo;
use super::{Published, World, any, ask, at, frontends, udp_teller, unchanged, v4, v6};
use crate::lab::{PATIENCE, privileged};

/// Two frontends each for a backend here and one elsewhere; nobody listens on port 9.
const SERVICES: &[Published<'_>] = &[
    (Protocol::Tcp, 30_001, &[(1, 80)]),
    (Protocol::Tcp, 30_002, &[(1, 80)]),
    (Protocol::Tcp, 30_003, &[(2, 80)]),
    (Protocol::Tcp, 30_004, &[(2, 80)]),
    (Protocol::Udp, 30_001, &[(1, 53)]),
    (Protocol::Udp, 30_002, &[(1, 53)]),
    (Protocol::Udp, 30_003, &[(2, 53)]),
    (Protocol::Udp, 30_004, &[(2, 53)]),
    (Protocol::Udp, 30_005, &[(1, 9)]),
    (Protocol::Udp, 30_006, &[(1, 9)]),
    (Protocol::Udp, 30_007, &[(2, 9)]),
    (Protocol::Udp, 30_008, &[(2, 9)]),
];

fn world() -> World {
    let world = World::new();
    for (node, number) in world.nodes.iter().zip(1..) {
        echo(&node.pod, 80);
        for address in [v4(number, 5), v6(number, 5)] {
            udp_teller(&node.pod, at(address, 53), "pod");
        }
    }
    world.publish(SERVICES, unchanged);
    world
}

/// The two frontends of each pair, of one family and one backend.
fn pairs(ports: [(u16, u16); 2]) -> impl Iterator<Item = [SocketAddr; 2]> {
    ports.into_iter().flat_map(|(one, other)| {
        let both = frontends(one).into_iter().zip(frontends(other));
        both.map(|(one, other)| [one, other])
    })
}

/// Sockets of the client on one port, connected to each of these.
fn connected(world: &World, kind: Type, to: [SocketAddr; 2]) -> [Socket; 2] {
    let mut own: SocketAddr = any(to[0]).parse().unwrap();
    to.map(|to| {
        world.client.run(|| {
            let socket = Socket::new(Domain::for_address(to), kind, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.bind(&own.into()).unwrap();
            socket.connect_timeout(&to.into(), PATIENCE).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            own.set_port(socket.local_addr().unwrap().as_socket().unwrap().port());
            socket
        })
    })
}

#[test]
fn answers_come_from_the_frontend_that_was_asked() {
    if !privileged() {
        return;
    }
    let world = world();
    for pair in pairs([(30_001, 30_002), (30_003, 30_004)]) {
        let socket = world.client.udp(any(pair[0]));
        for to in pair.into_iter().cycle().take(6) {
            let (told, from) = ask(&socket, to, 1);
            assert!(told.starts_with("pod "), "{told}");
            assert_eq!(from, to, "asked {to}");
        }
        let mut streams = connected(&world, Type::STREAM, pair).map(TcpStream::from);
        for round in 0..6 {
            let stream = &mut streams[round % 2];
            let question = [b'a' + round as u8];
            stream.write_all(&question).unwrap();
            let mut answer = [0];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(answer, question);
        }
    }
}

#[test]
fn errors_reach_the_socket_that_they_are_about() {
    if !privileged() {
        return;
    }
    let world = world();
    for pair in pairs([(30_005, 30_006), (30_007, 30_008)]) {
        let sockets = connected(&world, Type::DGRAM, pair).map(UdpSocket::from);
        for socket in &sockets {
            socket.send(b"?").unwrap();
        }
        for socket in sockets {
            let error = socket.recv(&mut [0; 16]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{:?}", socket.peer_addr());
        }
    }
}
