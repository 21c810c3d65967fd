//! What a client hears of a backend that is gone: a refusal, not silence.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};

use mesh_kernel::pods::{LinuxPodNetwork, PodNetwork as _};
use mesh_model::snapshot::Protocol;

use super::{
    Node, Published, World, any, ask, at, frontends, pod_port, udp_teller, unchanged, v4, v6,
};
use crate::lab::{Net, PATIENCE, privileged};

/// A TCP server that echoes, for as long as its clients want.
pub(super) fn echo(net: &Net, port: u16) {
    let listener = net.run(|| TcpListener::bind(("::", port))).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut byte = [0];
                while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
            });
        }
    });
}

impl Node {
    /// Takes its pod away, as at the end of its life.
    pub(super) fn end_pod(&self) {
        let pods = LinuxPodNetwork::new(self.net.handle(), self.programs.clone());
        let port = pod_port(self.number, &self.pod);
        pods.detach(&port.host_interface, &port.addresses().collect::<Vec<_>>()).unwrap();
    }
}

fn connect(world: &World, port: u16) -> Vec<TcpStream> {
    let mut streams: Vec<TcpStream> = frontends(port)
        .into_iter()
        .map(|to| world.client.run(|| TcpStream::connect_timeout(&to, PATIENCE)).unwrap())
        .collect();
    for stream in &mut streams {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"?").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    }
    streams
}

/// What a client hears that goes on with an open connection.
fn goes_on(stream: &mut TcpStream) -> ErrorKind {
    stream.write_all(b"?").unwrap();
    stream.read_exact(&mut [0]).unwrap_err().kind()
}

const SERVICES: &[Published<'_>] = &[
    (Protocol::Tcp, 30_001, &[(1, 80)]),
    (Protocol::Tcp, 30_002, &[(2, 80)]),
    (Protocol::Udp, 30_001, &[(1, 53)]),
    (Protocol::Udp, 30_002, &[(2, 53)]),
];

#[test]
fn a_connection_to_a_pod_that_is_gone_is_reset() {
    if !privileged() {
        return;
    }
    let world = World::new();
    for (node, number) in world.nodes.iter().zip(1..) {
        echo(&node.pod, 80);
        for address in [v4(number, 5), v6(number, 5)] {
            udp_teller(&node.pod, at(address, 53), "pod");
        }
    }
    world.publish(SERVICES, unchanged);
    let streams = connect(&world, 30_001).into_iter().chain(connect(&world, 30_002));
    let streams: Vec<TcpStream> = streams.collect();
    let sockets: Vec<_> = [frontends(30_001), frontends(30_002)]
        .concat()
        .into_iter()
        .map(|to| {
            let socket = world.client.udp(any(to));
            assert!(ask(&socket, to, 1).0.starts_with("pod "));
            world.client.run(|| socket.connect(to)).unwrap();
            socket
        })
        .collect();
    // The list of backends follows later: that is how long clients would hear nothing.
    world.nodes.iter().for_each(Node::end_pod);
    for mut stream in streams {
        let to = stream.peer_addr().unwrap();
        let losses = || (world.nodes[0].losses(), world.nodes[1].losses());
        assert_eq!(goes_on(&mut stream), ErrorKind::ConnectionReset, "{to}: {:?}", losses());
        // A new one is refused in the same way.
        let new = world.client.run(|| TcpStream::connect_timeout(&to, PATIENCE)).map(drop);
        assert_eq!(new.unwrap_err().kind(), ErrorKind::ConnectionRefused, "{to}: {:?}", losses());
    }
    for socket in sockets {
        socket.send(b"?").unwrap();
        let error = socket.recv(&mut [0; 16]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{:?}", socket.peer_addr());
    }
}

#[test]
fn a_connection_to_a_node_that_is_no_more_is_reset() {
    if !privileged() {
        return;
    }
    let world = World::new();
    echo(&world.nodes[1].pod, 80);
    world.publish(SERVICES, unchanged);
    let streams = connect(&world, 30_002);
    let mut without = world.wanted(&[(Protocol::Tcp, 30_002, &[])], unchanged);
    without.nodes.clear();
    world.nodes[0].settle(&without);
    for mut stream in streams {
        assert_eq!(goes_on(&mut stream), ErrorKind::ConnectionReset);
    }
}
