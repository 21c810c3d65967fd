//! What strangers on the underlay may try: floods, forgeries, recordings, and clocks that lie.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_model::snapshot::WgKey;
use mesh_overlay::DropReason;
use mesh_overlay::protocol::Kept;
use mesh_overlay::protocol::ecn::Ecn;
use mesh_overlay::protocol::noise::cookie::Macs;
use mesh_overlay::protocol::noise::message::{COOKIE_BYTES, INITIATION_BYTES, TYPE_INITIATION};
use proptest::prelude::*;

use crate::net::{Datagram, Net};
use crate::{MILLIS, SECS};

/// Where the stranger is.
fn stranger(port: u16) -> SocketAddr {
    ([203, 0, 113, 5], port).into()
}

/// A call that costs the receiver a key agreement: whoever knows the public key can make the first mac.
fn bogus_call(receiver: &WgKey, n: u32) -> Vec<u8> {
    let mut call = vec![0; INITIATION_BYTES];
    call[0] = TYPE_INITIATION;
    for (place, byte) in call[4..].iter_mut().enumerate() {
        *byte = n.wrapping_mul(0x9e37_79b9).rotate_left(place as u32) as u8;
    }
    Macs::for_receiver(receiver).sign(&mut call, None);
    call
}

#[test]
fn twenty_thousand_bogus_calls_a_second_harm_no_session_and_keep_no_peer_out() {
    let mut net = Net::mesh(3);
    net.run(MILLIS(200));
    let (target, key) = (net.nodes[0].address, net.nodes[0].key.public());
    let config = net.config(2);
    let mut calls = 0u32;
    // Three seconds, in slots of 10 ms with 200 calls each. After the first, a peer starts anew.
    for slot in 0..300u32 {
        for n in 0..200 {
            let bytes = bogus_call(&key, slot * 200 + n);
            net.inject(&Datagram {
                from: stranger(n as u16 + 1),
                to: target,
                ecn: Ecn::NotCapable,
                bytes,
            });
            calls += 1;
        }
        net.send(1, 0, &slot.to_be_bytes());
        net.send(0, 1, &slot.to_be_bytes());
        if slot == 100 {
            net.restart(2, &config);
        }
        net.run(MILLIS(10));
    }
    net.send(2, 0, b"let in all the same");
    net.run(MILLIS(100));
    let mut received = net.payloads(0);
    assert_eq!(received.pop().unwrap(), b"let in all the same");
    assert_eq!((received.len(), net.payloads(1).len()), (300, 300), "nothing was lost");
    let worked_on = net.drops(0, DropReason::BadHandshake);
    assert!(worked_on <= 3 * 1000, "{worked_on} key agreements for strangers in 3 s");
    let refused = net.drops(0, DropReason::UnderLoad);
    assert!(refused + worked_on >= u64::from(calls), "{refused} of {calls} refused");
    let to_stranger = net.tapped.iter().filter(|d| d.to.ip() == stranger(1).ip());
    assert!(to_stranger.clone().count() > 1000, "the load was felt");
    assert!(to_stranger.clone().all(|d| d.bytes.len() == COOKIE_BYTES), "less than they sent");
}

#[test]
fn a_proven_address_still_gets_only_its_share() {
    let mut net = Net::mesh(2);
    net.run(MILLIS(200));
    let (target, key) = (net.nodes[0].address, net.nodes[0].key.public());
    for n in 0..1100 {
        let bytes = bogus_call(&key, n);
        net.inject(&Datagram { from: stranger(1), to: target, ecn: Ecn::NotCapable, bytes });
    }
    // A stranger with a real address and software that knows cookies.
    let mut jar = mesh_overlay::protocol::noise::cookie::Jar::default();
    let macs = Macs::for_receiver(&key);
    let mut call = bogus_call(&key, 1);
    jar.sign(net.now, &macs, &mut call);
    net.tapped.clear();
    net.inject(&Datagram {
        from: stranger(7),
        to: target,
        ecn: Ecn::NotCapable,
        bytes: call.clone(),
    });
    let reply = net.tapped.pop().expect("asked for a cookie");
    assert!(jar.keep(net.now, &macs, reply.bytes[..].try_into().unwrap()));
    let before = net.drops(0, DropReason::BadHandshake);
    for _ in 0..500 {
        jar.sign(net.now, &macs, &mut call);
        net.inject(&Datagram {
            from: stranger(7),
            to: target,
            ecn: Ecn::NotCapable,
            bytes: call.clone(),
        });
    }
    assert_eq!(net.drops(0, DropReason::BadHandshake) - before, 20);
    // The cookie is for one port.
    net.inject(&Datagram { from: stranger(8), to: target, ecn: Ecn::NotCapable, bytes: call });
    assert_eq!(net.tapped.last().unwrap().bytes.len(), COOKIE_BYTES);
}

#[test]
fn what_is_not_for_this_node_is_met_with_silence() {
    let mut net = Net::mesh(2);
    net.run(MILLIS(200));
    net.tapped.clear();
    let to = net.nodes[0].address;
    let other_key = net.nodes[1].key.public();
    for n in 0..200u32 {
        let mut bytes = bogus_call(&other_key, n);
        if n % 2 == 1 {
            bytes.truncate(n as usize % 149);
        }
        net.inject(&Datagram { from: stranger(1), to, ecn: Ecn::NotCapable, bytes });
    }
    assert!(net.tapped.is_empty(), "not one answer");
    assert_eq!(net.drops(0, DropReason::BadMac), 100);
    assert_eq!(net.drops(0, DropReason::NotWireGuard), 100);
}

#[test]
fn an_old_call_moves_no_peer_even_after_a_restart() {
    let mut net = Net::mesh(2);
    net.run(MILLIS(200));
    let calls: Vec<Datagram> = net
        .tapped
        .iter()
        .filter(|d| d.bytes.len() == INITIATION_BYTES && d.to == net.nodes[0].address)
        .cloned()
        .collect();
    assert!(!calls.is_empty());
    let config = net.config(0);
    net.restart(0, &config);
    for call in calls {
        net.inject(&Datagram { from: stranger(9), ..call });
    }
    assert_eq!(net.peer(0, 1).endpoint, Some(net.nodes[1].address));
    net.run(MILLIS(200));
    net.send(0, 1, b"to the right place");
    net.run(MILLIS(50));
    assert_eq!(net.payloads(1), [b"to the right place"]);
}

/// Node 1 starts anew when its clock has been set back by so much, with what `left` makes of what the process before had on disk. Node 0 does
/// not help with a call of its own.
fn set_back(by: Duration, left: fn(Kept) -> Kept) -> Net {
    let mut net = Net::mesh(2);
    net.run(SECS(10));
    net.time_of_day -= by;
    net.nodes[1].stored = left(net.nodes[1].stored);
    let config = net.config(1);
    net.restart(1, &config);
    only_answers(&mut net, 0);
    net
}

fn only_answers(net: &mut Net, node: usize) {
    let mut waits = net.config(node);
    waits.peers[0].endpoints.clear();
    net.configure(node, &waits);
}

#[test]
fn a_clock_set_back_an_hour_blocks_no_handshake() {
    type Left = fn(Kept) -> Kept;
    let rebooted: Left = |kept| Kept { limit: None, ..kept };
    let cases: [(Left, bool); 3] =
        [(|kept| kept, true), (rebooted, true), (|_| Kept::default(), false)];
    for (left, remembers) in cases {
        let mut net = set_back(SECS(3600), left);
        net.send(1, 0, b"an hour ago");
        net.run(SECS(4));
        let arrived = net.payloads(0) == [b"an hour ago"];
        assert_eq!(arrived, remembers, "what is on disk is what makes the difference");
    }
}

#[test]
fn the_kernels_device_is_heard_right_after_our_engine_was_killed() {
    let mut net = Net::mesh(2);
    net.run(SECS(10));
    only_answers(&mut net, 0);
    let config = net.config(1);
    for killed in 0..3 {
        net.restart(1, &config);
        net.run(SECS(killed) + MILLIS(30));
    }
    net.change_to_kernel(1, &config);
    net.send(1, 0, b"dated by the clock");
    net.run(MILLIS(100));
    assert_eq!(net.payloads(0), [b"dated by the clock"]);
}

#[test]
fn a_machine_that_is_put_back_a_day_is_heard_when_its_clock_is_right_again() {
    let mut net = set_back(SECS(24 * 3600), |_| Kept::default());
    let today = net.time_of_day + SECS(24 * 3600);
    net.send(1, 0, b"yesterday");
    net.run(SECS(4));
    assert!(net.payloads(0).is_empty() && net.drops(0, DropReason::Replayed) > 0);
    net.nodes[1].core.follow_clock(net.now, today + SECS(20));
    net.send(1, 0, b"today");
    net.run(SECS(4));
    assert_eq!(net.payloads(0).last().unwrap(), b"today");
}

#[test]
fn messages_far_out_of_order_arrive_once() {
    let mut net = Net::mesh(2);
    net.run(MILLIS(200));
    net.tapped.clear();
    net.mishaps.lost = 100;
    for n in 0u32..8000 {
        net.send(0, 1, &n.to_be_bytes());
    }
    let mut recorded: Vec<Datagram> = net.tapped.drain(..).collect();
    recorded.retain(|d| d.to == net.nodes[1].address);
    for _ in 0..2 {
        // Last first, as no network would do it.
        recorded.iter().rev().for_each(|datagram| net.inject(datagram));
    }
    assert_eq!(net.payloads(1).len(), 8000);
    assert_eq!(net.drops(1, DropReason::Replayed), 8000);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_datagram_panics_or_harms_a_session(
        junk in prop::collection::vec(
            (prop::collection::vec(any::<u8>(), 0..300), 0u8..6, any::<prop::sample::Index>()),
            1..60,
        ),
        flips in prop::collection::vec(
            (any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>()),
            1..60,
        ),
    ) {
        let mut net = Net::mesh(2);
        net.run(MILLIS(100));
        net.send(0, 1, b"for the record");
        net.run(MILLIS(30));
        for (mut bytes, kind, length) in junk {
            // Often with a type and a length that the protocol knows.
            if let Some(first) = bytes.first_mut().filter(|_| kind > 0) {
                *first = kind;
            }
            if bytes.len() > 4 && kind > 0 {
                bytes[1..4].fill(0);
            }
            let known = [148, 92, 64, 32, 48];
            bytes.resize(known[length.index(known.len())], 7);
            net.inject(&Datagram { from: stranger(5), to: net.nodes[1].address, ecn: Ecn::NotCapable, bytes });
        }
        let recorded = net.tapped.clone();
        for (which, place, bits) in flips {
            let mut datagram = recorded[which.index(recorded.len())].clone();
            let place = place.index(datagram.bytes.len());
            datagram.bytes[place] ^= bits;
            net.inject(&datagram);
        }
        net.run(MILLIS(100));
        net.payloads(1);
        net.send(0, 1, b"unharmed");
        net.run(MILLIS(100));
        prop_assert_eq!(net.payloads(1), [b"unharmed"]);
    }
}
