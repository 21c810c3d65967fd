//! Marks of congestion: what senders say is seen on the way, and what routers say is seen by receivers.

use mesh_overlay::DropReason;
use mesh_overlay::protocol::ecn::Ecn;

use crate::MILLIS;
use crate::net::{Datagram, Net};

const ALL: [Ecn; 4] = [Ecn::NotCapable, Ecn::Capable0, Ecn::Capable1, Ecn::Congested];

/// Sends a packet with each mark from node 0 to node 1; what arrived.
fn pass(net: &mut Net) -> Vec<Ecn> {
    for ecn in ALL {
        net.send_marked(0, 1, ecn);
        net.run(MILLIS(50));
    }
    let packets = std::mem::take(&mut net.nodes[1].received.packets);
    packets.iter().map(|packet| Ecn::of(packet)).collect()
}

#[test]
fn what_a_sender_says_stands_outside_and_what_a_router_says_gets_inside() {
    let mut net = Net::mesh(2);
    net.run(MILLIS(100));
    assert!(net.tapped.drain(..).all(|d| d.ecn == Ecn::NotCapable), "handshakes are not marked");
    assert_eq!(pass(&mut net), ALL);
    assert_eq!(net.tapped.iter().map(|d| d.ecn).collect::<Vec<_>>(), ALL);
    net.congested = true;
    let marked = [Ecn::NotCapable, Ecn::Congested, Ecn::Congested, Ecn::Congested];
    assert_eq!(pass(&mut net), marked);
}

#[test]
fn a_mark_that_its_sender_would_not_hear_of_is_a_loss() {
    let mut net = Net::mesh(2);
    net.run(MILLIS(100));
    net.blocked = vec![(net.nodes[0].address, net.nodes[1].address)];
    net.tapped.clear();
    net.send_marked(0, 1, Ecn::NotCapable);
    let held = net.tapped.pop().unwrap();
    net.inject(&Datagram { ecn: Ecn::Congested, ..held });
    assert!(net.nodes[1].received.packets.is_empty());
    assert_eq!(net.drops(1, DropReason::Congested), 1);
}
