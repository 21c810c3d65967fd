//! What one side hears of the other by ICMP.

use mesh_model::snapshot::Protocol;

use super::{NODE, NODE6, World, any, at, frontends, unchanged, v4, v6};
use crate::lab::privileged;

#[test]
fn errors_reach_the_client_as_from_the_service() {
    if !privileged() {
        return;
    }
    let world = World::new();
    // Nobody listens in the pods: they answer "port unreachable", which quotes their own address.
    world.publish(
        &[(Protocol::Udp, 30_001, &[(1, 9)]), (Protocol::Udp, 30_002, &[(2, 9)])],
        unchanged,
    );
    for port in [30_001, 30_002] {
        for frontend in frontends(port) {
            let socket = world.client.udp(any(frontend));
            world.client.run(|| socket.connect(frontend)).unwrap();
            socket.send(b"?").unwrap();
            let error = socket.recv(&mut [0; 16]).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{frontend}: {error}");
        }
    }
}

#[test]
fn errors_reach_the_backend_as_about_its_own_packets() {
    if !privileged() {
        return;
    }
    let world = World::new();
    for address in [v4(1, 5), v6(1, 5), v4(2, 5), v6(2, 5)] {
        let node = usize::from(world.nodes[1].pod.ip("addr").contains(&format!("{address}/")));
        let socket = world.nodes[node].pod.udp(&at(address, 53).to_string());
        let (vip, number) =
            if address.is_ipv4() { (NODE, node as u8 + 1) } else { (NODE6, node as u8 + 1) };
        world.publish(&[(Protocol::Udp, 30_001, &[(number, 53)])], unchanged);
        let frontend = at(vip.parse().unwrap(), 30_001);
        let client = world.client.udp(any(frontend));
        client.send_to(b"?", frontend).unwrap();
        let (_, from) = socket.recv_from(&mut [0; 16]).unwrap();
        world.nodes[node].pod.run(|| socket.connect(from)).unwrap();
        // The client is gone when the answer comes: its stack says so, about the frontend's packet. It may take its time.
        drop(client);
        socket.set_read_timeout(Some(std::time::Duration::from_secs(1))).unwrap();
        let mut told = (0..10).map(|_| {
            let sent = socket.send(b"!").map(|_| ());
            sent.and_then(|()| socket.recv(&mut [0; 16])).unwrap_err()
        });
        let error = told.find(|error| error.kind() != std::io::ErrorKind::WouldBlock).unwrap();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{address}: {error}");
    }
}
