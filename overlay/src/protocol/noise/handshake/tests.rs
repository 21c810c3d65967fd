//! Against ourselves, and against boringtun: an implementation that shares no code with ours.

use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use x25519_dalek::{PublicKey, StaticSecret};

use super::super::cookie::Macs;
use super::super::message::Message;
use super::super::session::Session;
use super::*;

const PSK: Psk = [3; 32];

fn keys() -> (NodeKey, NodeKey) {
    (NodeKey::from_bytes([1; 32]), NodeKey::from_bytes([2; 32]))
}

fn stamp(secs: u64) -> Tai64n {
    Tai64n::from_unix(Duration::from_secs(secs))
}

#[test]
fn both_sides_agree_and_learn_who_the_other_is() {
    let (a, b) = keys();
    let (mut offer, initiation) = Offer::make(&a, &b.public(), &PSK, 7, stamp(5)).unwrap();
    let call = Call::read(&b, &initiation).unwrap();
    assert_eq!((call.caller(), call.stamp()), (a.public(), stamp(5)));
    let (theirs, response) = call.answer(&PSK, 9).unwrap();
    let ours = offer.accept(&response).unwrap();
    assert_eq!((ours.caller_key, ours.callee_key), (theirs.caller_key, theirs.callee_key));
    assert_eq!((ours.index, ours.remote_index), (7, 9));
    assert_eq!((theirs.index, theirs.remote_index), (9, 7));
}

#[test]
fn other_keys_and_altered_messages_do_not_agree() {
    let (a, b) = keys();
    let stranger = NodeKey::from_bytes([5; 32]);
    let (mut offer, initiation) = Offer::make(&a, &b.public(), &PSK, 7, stamp(5)).unwrap();
    assert!(Call::read(&stranger, &initiation).is_none());
    for place in [9, 60, 100] {
        let mut altered = initiation;
        altered[place] ^= 1;
        assert!(Call::read(&b, &altered).is_none(), "byte {place}");
    }
    let answered_with = |psk| Call::read(&b, &initiation).unwrap().answer(psk, 9).unwrap().1;
    assert!(offer.accept(&answered_with(&[4; 32])).is_none(), "another pre-shared key");
    let mut altered = answered_with(&PSK);
    altered[20] ^= 1;
    assert!(offer.accept(&altered).is_none());
    assert!(offer.accept(&answered_with(&PSK)).is_some(), "the right one still counts");
}

/// boringtun with the other key of the pair; its messages carry macs, as ours have to.
fn tunn(own: &NodeKey, other: &NodeKey) -> Tunn {
    let secret = StaticSecret::from(own.private_bytes());
    Tunn::new(secret, PublicKey::from(other.public().0), Some(PSK), None, 1, None)
}

fn sent(result: TunnResult<'_>) -> Vec<u8> {
    match result {
        TunnResult::WriteToNetwork(message) => message.to_vec(),
        other => panic!("{other:?}"),
    }
}

/// An empty IPv4 packet, padded.
fn packet() -> [u8; 32] {
    let mut packet = [0; 32];
    packet[0] = 0x45;
    packet[3] = 20;
    packet
}

#[test]
fn boringtun_answers_our_call() {
    let (a, b) = keys();
    let mut other = tunn(&b, &a);
    let (mut offer, mut initiation) = Offer::make(&a, &b.public(), &PSK, 7, stamp(5)).unwrap();
    Macs::for_receiver(&b.public()).sign(&mut initiation, None);
    let mut out = [0; 200];
    let response = sent(other.decapsulate(None, &initiation, &mut out));
    let agreement = offer.accept(response[..].try_into().unwrap()).unwrap();
    let session = Session::as_caller(Instant::now(), &agreement);
    let len = session.seal(&packet(), &mut out).unwrap();
    let sealed = out[..len].to_vec();
    assert!(matches!(
        other.decapsulate(None, &sealed, &mut out),
        TunnResult::WriteToTunnelV4(plain, _) if plain.len() == 20
    ));
}

#[test]
fn boringtun_calls_and_understands_our_answer() {
    let (a, b) = keys();
    let mut other = tunn(&a, &b);
    let mut out = [0; 200];
    let initiation = sent(other.format_handshake_initiation(&mut out, false));
    let call = Call::read(&b, initiation[..].try_into().unwrap()).unwrap();
    let (agreement, mut response) = call.answer(&PSK, 9).unwrap();
    Macs::for_receiver(&a.public()).sign(&mut response, None);
    let session = Session::as_callee(Instant::now(), &agreement);
    let keepalive = sent(other.decapsulate(None, &response, &mut out));
    let Some(Message::Data(data)) = Message::read(&keepalive) else { panic!("no data") };
    assert_eq!((data.receiver, session.open(&data, &mut [0; 100])), (9, Some(0)));
    let sealed = sent(other.encapsulate(&packet(), &mut out));
    let Some(Message::Data(data)) = Message::read(&sealed) else { panic!("no data") };
    let mut plain = [0; 100];
    assert_eq!(session.open(&data, &mut plain), Some(32));
    assert_eq!(plain[..32], packet());
}
