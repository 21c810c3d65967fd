//! The protocol core with a clock and a wire of the test's own: what takes minutes in life takes milliseconds here.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod handover;
mod hostile;
mod marks;
mod net;
mod relay;
mod rotation;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_model::snapshot::WgKey;
use mesh_overlay::{DropReason, PresharedKey};
use net::{Datagram, Mishaps, Net, initiations};

const MILLIS: fn(u64) -> Duration = Duration::from_millis;
const SECS: fn(u64) -> Duration = Duration::from_secs;

#[test]
fn peers_agree_at_once_and_packets_pass_both_ways() {
    let mut net = Net::mesh(2);
    net.send(0, 1, b"early, waits for the handshake");
    net.run(MILLIS(100));
    net.send(0, 1, b"to one");
    net.send(1, 0, b"to zero");
    net.run(MILLIS(50));
    assert_eq!(net.payloads(1), [&b"early, waits for the handshake"[..], b"to one"]);
    assert_eq!(net.payloads(0), [b"to zero"]);
    let peer = net.peer(0, 1);
    assert_eq!((peer.unanswered, peer.endpoint), (0, Some(net.nodes[1].address)));
    assert!(peer.handshake_age_ms.is_some() && peer.sent_bytes > 0 && peer.received_bytes > 0);
}

#[test]
fn a_bad_wire_costs_packets_but_neither_order_of_sessions_nor_truth() {
    let mut net = Net::mesh(2);
    net.mishaps = Mishaps { lost: 30, repeated: 20, late: 20 };
    let mut sent = HashSet::new();
    for n in 0u32..2000 {
        let payload = n.to_be_bytes().to_vec();
        net.send(0, 1, &payload);
        sent.insert(payload);
        net.run(MILLIS(10));
    }
    net.run(MILLIS(200));
    let received = net.payloads(1);
    let unique: HashSet<_> = received.iter().cloned().collect();
    assert_eq!(unique.len(), received.len(), "nothing arrives twice");
    assert!(unique.is_subset(&sent));
    assert!(received.len() > 1200, "only {} of 2000 arrived at 30 % loss", received.len());
    assert!(net.drops(1, DropReason::Replayed) > 100);
}

#[test]
fn sessions_are_renewed_under_traffic_without_loss() {
    let mut net = Net::mesh(2);
    net.run(MILLIS(100));
    net.tapped.clear();
    let mut oldest = 0;
    for n in 0u32..800 {
        net.send(0, 1, &n.to_be_bytes());
        net.send(1, 0, &n.to_be_bytes());
        net.run(MILLIS(500));
        oldest = oldest.max(net.peer(0, 1).handshake_age_ms.unwrap());
    }
    assert_eq!((net.payloads(0).len(), net.payloads(1).len()), (800, 800));
    // 400 s at one renewal every 120 s (WG section 6.2), of both sides when both had called first.
    let calls = initiations(&net.tapped);
    assert!((3..=8).contains(&calls), "{calls} initiations in 400 s");
    assert!((119_000..126_000).contains(&oldest), "a session was used for {oldest} ms");
}

#[test]
fn idle_peers_say_nothing_and_are_there_at_the_first_word() {
    let mut net = Net::mesh(3);
    net.run(SECS(1));
    net.tapped.clear();
    net.run(SECS(900));
    assert_eq!(net.tapped.len(), 0, "datagrams in 15 idle minutes");
    assert_eq!(net.peer(0, 1).handshake_age_ms, None, "the session has ended");
    net.send(0, 1, b"hello after a while");
    net.run(MILLIS(100));
    assert_eq!(net.payloads(1), [b"hello after a while"]);
    let strangers = net.tapped.iter().filter(|d| d.to == net.nodes[2].address).count();
    assert_eq!(strangers, 0, "who has nothing to do with it hears nothing");
}

#[test]
fn only_who_keeps_alive_speaks_when_idle_and_its_session_never_ends() {
    let mut net = Net::new(3);
    let mut config = net.config(0);
    config.peers[0].persistent_keepalive_secs = Some(25);
    net.configure(0, &config);
    for node in [1, 2] {
        let config = net.config(node);
        net.configure(node, &config);
    }
    net.run(SECS(1));
    net.tapped.clear();
    for _ in 0..900 {
        net.run(SECS(1));
        assert!(net.peer(1, 0).handshake_age_ms.is_some(), "the peer can always be called");
    }
    let [first, second, third] = [0, 1, 2].map(|node: usize| net.nodes[node].address);
    let sent = |from, to| net.tapped.iter().filter(|d| d.from == from && d.to == to).count();
    // 36 keepalives, and a handshake every two to three minutes.
    assert!((33..=55).contains(&sent(first, second)), "{} datagrams", sent(first, second));
    assert!(sent(second, first) <= 10, "{} answers", sent(second, first));
    let others = [(first, third), (third, first), (second, third), (third, second)];
    assert_eq!(others.map(|(from, to)| sent(from, to)), [0; 4], "nobody else");
}

#[test]
fn a_peer_that_moves_is_followed_and_configuration_does_not_undo_it() {
    let mut net = Net::mesh(2);
    net.run(MILLIS(100));
    let config = net.config(0);
    let moved: SocketAddr = "198.51.100.9:4000".parse().unwrap();
    net.nodes[1].address = moved;
    net.send(1, 0, b"from elsewhere");
    net.run(MILLIS(50));
    net.send(0, 1, b"follows");
    net.run(MILLIS(50));
    assert_eq!(net.payloads(1), [b"follows"]);
    assert_eq!(net.peer(0, 1).endpoint, Some(moved));

    let mut again = config.clone();
    again.peers[0].endpoints.push("203.0.113.1:51900".parse().unwrap());
    net.configure(0, &again);
    assert_eq!(net.peer(0, 1).endpoint, Some(moved), "younger than what the configuration knows");
    net.send(0, 1, b"still there");
    net.run(MILLIS(50));
    assert_eq!(net.payloads(1), [b"still there"]);
}

#[test]
fn a_dead_first_endpoint_costs_less_than_a_second() {
    let mut net = Net::new(2);
    let mut config = net.config(0);
    config.peers[0].endpoints.insert(0, "203.0.113.66:51900".parse().unwrap());
    net.configure(0, &config);
    let mut knows = net.config(1);
    knows.peers[0].endpoints.clear(); // this side cannot call, as from outside a NAT
    net.configure(1, &knows);
    net.send(0, 1, b"patience");
    net.run(SECS(1));
    assert_eq!(net.payloads(1), [b"patience"]);
    assert_eq!(net.peer(0, 1).endpoint, Some(net.nodes[1].address));
}

#[test]
fn an_endpoint_that_dies_during_a_session_is_left() {
    let mut net = Net::mesh(2);
    net.run(MILLIS(100));
    let mut config = net.config(0);
    let other: SocketAddr = "198.51.100.2:51900".parse().unwrap();
    config.peers[0].endpoints.push(other);
    net.configure(0, &config);
    // The peer is reachable at its other address only, and does not know that it has to say so.
    net.nodes[1].address = other;
    let mut lost = 0u32;
    for n in 0..120u32 {
        net.send(0, 1, &n.to_be_bytes());
        net.run(MILLIS(250));
        if net.payloads(1).is_empty() {
            lost += 1;
        }
    }
    assert_eq!(net.peer(0, 1).endpoint, Some(other));
    assert!(lost < 110, "never found in 30 s");
}

#[test]
fn addresses_of_others_are_refused_and_counted() {
    let mut net = Net::mesh(3);
    net.run(MILLIS(100));
    let to = "10.244.0.7".parse().unwrap();
    net.send_as(1, "10.244.2.7".parse().unwrap(), to, b"in the name of node 2");
    net.send_as(1, "192.168.1.1".parse().unwrap(), to, b"from nowhere");
    net.send_as(1, "10.244.1.7".parse().unwrap(), to, b"honest");
    net.run(MILLIS(50));
    assert_eq!(net.payloads(0), [b"honest"]);
    assert_eq!(net.drops(0, DropReason::ForbiddenSource), 2);
    net.send_as(0, "10.244.0.7".parse().unwrap(), "172.16.0.1".parse().unwrap(), b"to nobody");
    assert_eq!(net.drops(0, DropReason::NoPeer), 1);
}

#[test]
fn an_eavesdropper_sees_no_payload_and_no_length_but_a_padded_one() {
    const CANARY: &[u8] = b"MESH-CANARY-7c1f";
    let mut net = Net::new(2);
    let config = net.config(0);
    net.configure(0, &config);
    // Before the other side exists, while it joins, and after.
    for _ in 0..20 {
        net.send(0, 1, CANARY);
        net.run(MILLIS(50));
    }
    let other = net.config(1);
    net.configure(1, &other);
    for _ in 0..20 {
        net.send(0, 1, CANARY);
        net.send(1, 0, CANARY);
        net.run(MILLIS(50));
    }
    net.restart(1, &other);
    net.send(0, 1, CANARY);
    net.send(1, 0, CANARY);
    net.run(SECS(1));
    assert!(net.payloads(1).iter().filter(|payload| *payload == CANARY).count() >= 40);
    for datagram in &net.tapped {
        assert!(!datagram.bytes.windows(CANARY.len()).any(|window| window == CANARY));
        if datagram.bytes[0] == 4 {
            // A probe of the way is as long as the largest packet, whatever is sent.
            let len = datagram.bytes.len();
            assert!(len % 16 == 0 || len == 1420 + 32, "{len} bytes are not padded");
        }
    }
}

#[test]
fn a_killed_engine_is_back_within_a_second() {
    let mut net = Net::mesh(3);
    net.run(SECS(30));
    let config = net.config(1);
    net.restart(1, &config);
    net.run(MILLIS(100));
    for other in [0, 2] {
        net.send(other, 1, b"hello again");
        net.send(1, other, b"hello again");
    }
    net.run(MILLIS(100));
    assert_eq!(net.payloads(1).len(), 2);
    assert_eq!((net.payloads(0).len(), net.payloads(2).len()), (1, 1));
}

#[test]
fn a_peer_that_was_away_for_long_is_found_again() {
    let mut net = Net::mesh(2);
    net.run(MILLIS(100));
    net.mishaps.lost = 100;
    net.tapped.clear();
    for _ in 0..900 {
        net.send(0, 1, b"anybody there?");
        net.send(1, 0, b"anybody there?");
        net.run(SECS(1));
    }
    assert_eq!(net.peer(0, 1).handshake_age_ms, None);
    assert!(net.peer(0, 1).unanswered > 2, "seen as unreachable");
    let calls = initiations(&net.tapped);
    assert!(
        (100..=360).contains(&calls),
        "{calls} calls of both sides into the void in 15 minutes"
    );
    net.mishaps.lost = 0;
    net.run(SECS(7));
    net.send(0, 1, b"back");
    net.run(MILLIS(50));
    assert_eq!(net.payloads(1).last().unwrap(), b"back");
}

#[test]
fn replayed_datagrams_change_nothing() {
    let mut net = Net::mesh(2);
    net.run(MILLIS(100));
    for n in 0u32..50 {
        net.send(0, 1, &n.to_be_bytes());
        net.run(MILLIS(10));
    }
    net.run(MILLIS(50));
    assert_eq!(net.payloads(1).len(), 50);
    let recorded: Vec<Datagram> = net.tapped.clone();
    let thief: SocketAddr = "203.0.113.99:1".parse().unwrap();
    for datagram in recorded {
        net.inject(&Datagram { from: thief, ..datagram });
    }
    net.run(MILLIS(100));
    assert!(net.payloads(1).is_empty());
    assert_eq!(net.peer(1, 0).endpoint, Some(net.nodes[0].address), "nobody is followed by replay");
    assert!(net.drops(1, DropReason::Replayed) >= 50);
    net.send(0, 1, b"unharmed");
    net.run(MILLIS(50));
    assert_eq!(net.payloads(1), [b"unharmed"]);
}

#[test]
fn the_preshared_key_rotates_without_loss() {
    let mut net = Net::mesh(2);
    net.run(MILLIS(100));
    let mut sent = 0;
    for round in 1u8..5 {
        for node in [0, 1] {
            let mut config = net.config(node);
            config.peers[0].preshared_key = Some(PresharedKey(WgKey([round; 32])));
            net.configure(node, &config);
            // The other side learns of it two seconds later.
            for _ in 0..40 {
                net.send(0, 1, b"to one");
                net.send(1, 0, b"to zero");
                sent += 1;
                net.run(MILLIS(50));
            }
        }
        net.run(SECS(4));
    }
    assert_eq!((net.payloads(0).len(), net.payloads(1).len()), (sent, sent));
    let age = net.peer(0, 1).handshake_age_ms.unwrap();
    assert!(age < 8_000, "the session in use is of the last round, not {age} ms old");
    assert!(net.peer(0, 1).preshared);
}

#[test]
fn a_side_that_learns_late_of_a_preshared_key_is_not_cut_off() {
    let mut net = Net::mesh(2);
    net.run(MILLIS(100));
    let mut config = net.config(0);
    config.peers[0].preshared_key = Some(PresharedKey(WgKey([1; 32])));
    net.configure(0, &config);
    // Five minutes: the session of the start has ended, and the new key has been tried in vain all the time.
    for n in 0..600u32 {
        net.send(0, 1, &n.to_be_bytes());
        net.send(1, 0, &n.to_be_bytes());
        net.run(MILLIS(500));
    }
    // The side without the key does not notice that its session ends: it takes 15 s of silence (WG section 6.5).
    let received = (net.payloads(0).len(), net.payloads(1).len());
    assert!(received.0 >= 565 && received.1 >= 565, "{received:?} of 600 each");
}

#[test]
fn unequal_preshared_keys_never_agree() {
    let mut net = Net::new(2);
    for node in [0, 1] {
        let mut config = net.config(node);
        config.peers[0].preshared_key = Some(PresharedKey(WgKey([node as u8; 32])));
        net.configure(node, &config);
    }
    for _ in 0..200 {
        net.send(0, 1, b"kept back");
    }
    net.run(SECS(10));
    assert!(net.payloads(1).is_empty());
    assert_eq!(net.drops(0, DropReason::QueueFull), 72, "128 wait");
    assert_eq!(net.drops(0, DropReason::QueueExpired), 128);
    assert!(net.tapped.iter().all(|datagram| datagram.bytes[0] != 4), "no data without a session");
}

#[test]
fn peers_come_and_go_while_the_others_talk_on() {
    let mut net = Net::mesh(3);
    net.run(SECS(5));
    let whole = net.config(0);
    let mut less = whole.clone();
    less.peers.retain(|peer| peer.public_key != net.nodes[2].key.public());
    net.configure(0, &less);
    assert!(net.peer(0, 1).handshake_age_ms.unwrap() >= 4_900, "its session went on");
    net.send(2, 0, b"no longer known");
    net.send(1, 0, b"known");
    net.run(MILLIS(50));
    assert_eq!(net.payloads(0), [b"known"]);
    assert_eq!(net.drops(0, DropReason::UnknownSession), 1);

    net.configure(0, &whole);
    net.run(MILLIS(200));
    net.send(0, 2, b"welcome back");
    net.run(MILLIS(50));
    assert_eq!(net.payloads(2), [b"welcome back"]);
    assert!(net.peer(0, 1).handshake_age_ms.unwrap() >= 5_000);
}

#[test]
fn strangers_get_no_answer() {
    let mut net = Net::new(3);
    for node in [0, 1] {
        let config = net.config(node);
        net.configure(node, &config);
    }
    // Node 0 and 1 know node 2, but it is made to be a stranger: nobody lists it.
    for node in [0, 1] {
        let mut config = net.config(node);
        config.peers.retain(|peer| peer.public_key != net.nodes[2].key.public());
        net.configure(node, &config);
    }
    net.run(MILLIS(100));
    let config = net.config(2);
    net.tapped.clear();
    net.configure(2, &config);
    net.run(MILLIS(100));
    assert_eq!(net.drops(0, DropReason::UnknownPeer), 1);
    let stranger = net.nodes[2].address;
    assert!(net.tapped.iter().all(|datagram| datagram.to != stranger), "silence");
}

#[test]
fn keepalives_only_where_asked_for() {
    let mut net = Net::new(2);
    let mut config = net.config(0);
    config.peers[0].persistent_keepalive_secs = Some(10);
    net.configure(0, &config);
    let other = net.config(1);
    net.configure(1, &other);
    net.run(MILLIS(200));
    net.tapped.clear();
    net.run(SECS(100));
    let from = |node: usize| {
        net.tapped.iter().filter(|datagram| datagram.from == net.nodes[node].address).count()
    };
    assert!((9..=11).contains(&from(0)), "{} keepalives in 100 s", from(0));
    assert_eq!(from(1), 0);
}

#[test]
fn a_way_that_narrows_is_found_and_senders_are_told() {
    let mut net = Net::mesh(2);
    net.run(SECS(1));
    let large = [7; 1400];
    net.send(0, 1, &large);
    net.run(MILLIS(100));
    assert_eq!(net.payloads(1), [large.to_vec()]);
    // Somewhere on the way is a link of 1400 bytes from now on, in both directions.
    net.carries = 1400 - 28;
    for _ in 0..12 {
        net.send(0, 1, &large);
        net.run(SECS(1));
    }
    let found = net.peer(0, 1).mtu.unwrap();
    assert!((1324..=1340).contains(&found), "{found}");
    assert_eq!(net.payloads(1).len(), 0, "packets that may not be cut do not arrive");
    let told = net.nodes[0].told.last().expect("the sender is told");
    assert_eq!((told[9], told[20], told[21]), (1, 3, 4), "ICMP, fragmentation needed");
    assert!((1280..=1340).contains(&u16::from_be_bytes([told[26], told[27]])));
    assert_eq!((&told[12..16], &told[16..20]), (&[10, 244, 1, 1][..], &[10, 244, 0, 7][..]));
    let fits = vec![8; usize::from(found) - 20];
    net.send(0, 1, &fits);
    net.run(MILLIS(100));
    assert_eq!(net.payloads(1), [fits]);
    let config = net.config(0);
    net.hand_over(0, &config);
    assert_eq!(net.peer(0, 1).mtu, Some(found), "a successor does not begin anew");
    assert_eq!(net.peer(1, 0).mtu, Some(1420), "who sends nothing large does not look");
    assert!(net.tapped.iter().all(|d| d.bytes.len() <= 1452));

    net.carries = usize::MAX;
    for _ in 0..90 {
        net.send(0, 1, &large);
        net.run(SECS(1));
    }
    assert_eq!(net.peer(0, 1).mtu, Some(1420), "and back");
    assert_eq!(net.payloads(1).last().unwrap(), &large);
}
