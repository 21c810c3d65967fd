//! Packets that are none of ours, and senders that are none of us.

use std::io::Write as _;
use std::net::TcpStream;

use mesh_abi::EdgeReason;
use mesh_model::snapshot::Protocol;

use super::{NODE, NODE6, World, frontends, teller, unchanged};
use crate::lab::privileged;

#[test]
fn nobody_but_a_node_can_send_for_a_client() {
    if !privileged() {
        return;
    }
    let world = World::new();
    let two = &world.nodes[1];
    let wrapped = |outer: [u8; 4], inner: [u8; 4]| {
        let header = |source: [u8; 4], destination: [u8; 4], protocol: u8, length: u16| {
            let mut bytes = vec![0x45, 0];
            bytes.extend(length.to_be_bytes());
            bytes.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
            bytes.extend(source);
            bytes.extend(destination);
            bytes
        };
        let mut packet = header(outer, [10, 244, 2, 1], 4, 52);
        packet.extend(header(inner, [10, 244, 2, 5], 17, 32));
        packet.extend([0, 9, 0, 53, 0, 12, 0, 0, 1, 2, 3, 4]);
        packet
    };
    let send = |packet: &[u8]| (&world.second).write_all(packet).unwrap();
    // The device has taken the packet through the program when writing returns.
    send(&wrapped([10, 244, 1, 1], [192, 0, 2, 2]));
    assert_eq!(two.counted(EdgeReason::NodeToPod), 1);
    // A pod of the other node, which is not the node.
    send(&wrapped([10, 244, 1, 5], [192, 0, 2, 2]));
    assert_eq!((two.counted(EdgeReason::NodeToPod), two.counted(EdgeReason::Forged)), (1, 0));
    // A node that lends the address of a pod, here or elsewhere.
    for pod in [[10, 244, 1, 5], [10, 244, 2, 5]] {
        send(&wrapped([10, 244, 1, 1], pod));
    }
    assert_eq!(two.counted(EdgeReason::NodeToPod), 1);
    assert_eq!(two.counted(EdgeReason::Forged), 2);
}

#[test]
fn a_packet_for_another_machine_is_left_alone() {
    if !privileged() {
        return;
    }
    let world = World::new();
    teller(&world.nodes[0].pod, 80, "one");
    world.publish(&[(Protocol::Tcp, 30_001, &[(1, 80)])], unchanged);
    for address in [NODE, NODE6] {
        let wrong = "lladdr 02:00:00:00:00:99 dev down0 nud permanent";
        world.client.ip(&format!("neigh replace {address} {wrong}"));
    }
    for frontend in frontends(30_001) {
        let patience = std::time::Duration::from_millis(300);
        let tried = world.client.run(|| TcpStream::connect_timeout(&frontend, patience));
        assert_eq!(tried.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    }
    assert_eq!(world.nodes[0].counted(EdgeReason::Chosen), 0);
}
