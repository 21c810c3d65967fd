//! Who began a flow: what decides which policy is asked about packets that do not tell.

use aya::maps::{HashMap, Map, MapData};
use mesh_abi::maps;
use mesh_model::policy::Ports;
use mesh_model::snapshot::Protocol;

use super::{BOB, Bench, DROP, FAR, IN, NEAR, NEXT, OUT, POD, REDIRECT, rule};
use crate::lab::privileged;
use crate::packets::{self, DATA, INIT, INIT_ACK, sctp, udp};

type Memory = HashMap<MapData, [u8; 40], [u8; 16]>;

impl Bench {
    /// A pod that nothing restricts, where nothing is enforced.
    fn open() -> Self {
        let mut bench = Self::new(0, 0, vec![]);
        bench.set.active = false;
        bench.publish();
        bench
    }

    /// What the programs remember of connections.
    fn memory(&self, name: &str) -> Memory {
        let path =
            self.lab.bpf_dir().join(format!("v{}", mesh_abi::VERSION)).join("maps").join(name);
        let map = Map::LruHashMap(MapData::from_pin(path).unwrap());
        HashMap::try_from(map).unwrap()
    }

    /// Makes all datagram flows that are remembered so much older; returns the seconds at which they were seen last then.
    fn age(&self, name: &str, by_secs: u32) -> Vec<u32> {
        let mut memory = self.memory(name);
        let entries: Vec<_> = memory.iter().map(Result::unwrap).collect();
        let datagrams = entries.into_iter().filter(|(key, _)| is_datagram(key));
        let older = datagrams.map(|(key, mut value)| {
            let seen = seen_secs(&value).saturating_sub(by_secs);
            value[8..12].copy_from_slice(&seen.to_ne_bytes());
            memory.insert(key, value, 0).unwrap();
            seen
        });
        older.collect()
    }

    fn seen(&self, name: &str) -> Vec<u32> {
        let memory = self.memory(name);
        let datagrams = memory.iter().map(Result::unwrap).filter(|(key, _)| is_datagram(key));
        datagrams.map(|(_, value)| seen_secs(&value)).collect()
    }
}

/// By [`mesh_abi::ConnectionKey::protocol`]: the stacks of node and pods have their own to say, too.
fn is_datagram(key: &[u8; 40]) -> bool {
    key[36] == 17
}

/// [`mesh_abi::Connection::seen_secs`].
fn seen_secs(value: &[u8; 16]) -> u32 {
    u32::from_ne_bytes(value[8..12].try_into().unwrap())
}

fn six(pod_sends: bool, from_port: u16, to_port: u16) -> Vec<u8> {
    let (pod, far) = ("fd10:244:0:1::5", "fd10:244:0:2::7");
    let (from, to) = if pod_sends { (pod, far) } else { (far, pod) };
    packets::ipv6(from, to, 17, from_port, to_port, None)
}

/// Answers are under way when the first policy comes: they are answers still.
#[test]
fn a_flow_older_than_the_first_policy_has_the_direction_in_which_it_began() {
    if !privileged() {
        return;
    }
    // The ports of the last one tell nothing.
    for (client, server) in [(40_000, 53), (53, 40_000), (5_000, 5_000)] {
        let heard = || (udp(FAR, client, POD, server), six(false, client, server));
        let answer = || (udp(POD, server, FAR, client), six(true, server, client));
        let said = || (udp(POD, client, FAR, server), six(true, client, server));
        let answered = || (udp(FAR, server, POD, client), six(false, server, client));
        let arrive =
            |bench: &Bench, (v4, v6): (Vec<u8>, Vec<u8>)| (bench.arrives(&v4), bench.arrives(&v6));
        let send =
            |bench: &Bench, (v4, v6): (Vec<u8>, Vec<u8>)| (bench.sends(&v4), bench.sends(&v6));
        let (passed, denied) = ((REDIRECT, REDIRECT), (DROP, DROP));

        let mut served = Bench::open();
        assert_eq!(arrive(&served, heard()), passed);
        served.restrict(IN, 0);
        assert_eq!(send(&served, answer()), denied, "ports {client} and {server}");
        assert_eq!(arrive(&served, heard()), denied);
        assert_eq!(send(&served, answer()), denied);
        served.restrict(0, OUT);
        assert_eq!(send(&served, answer()), (NEXT, NEXT), "it may be asked");

        let mut asking = Bench::open();
        assert_eq!(send(&asking, said()), (NEXT, NEXT));
        asking.restrict(0, OUT);
        assert_eq!(arrive(&asking, answered()), denied, "ports {client} and {server}");
        assert_eq!(send(&asking, said()), denied);
        asking.restrict(IN, 0);
        assert_eq!(arrive(&asking, answered()), passed, "it may ask");
    }
}

#[test]
fn of_a_pod_beside_it_the_direction_is_known_too_and_what_is_new_begins_anew() {
    if !privileged() {
        return;
    }
    let mut bench = Bench::open();
    let near = udp(NEAR, 40_000, POD, 53);
    assert_eq!(bench.sent_by(&bench.other, bench.other_ifindex, &near), REDIRECT);
    bench.restrict(IN, 0);
    assert_eq!(bench.sends(&udp(POD, 53, NEAR, 40_000)), DROP);
    assert_eq!(bench.sends(&udp(POD, 54, NEAR, 40_000)), REDIRECT);
    assert_eq!(
        bench.sent_by(&bench.other, bench.other_ifindex, &udp(NEAR, 40_000, POD, 54)),
        REDIRECT
    );
}

/// A policy goes, and comes back: what was seen of a flow in between is not taken for its beginning.
#[test]
fn what_one_policy_knew_of_a_flow_is_noted_for_the_next() {
    if !privileged() {
        return;
    }
    let mut bench = Bench::new(IN, 0, vec![rule(IN, BOB, Ports::of(Protocol::Udp))]);
    assert_eq!(bench.arrives(&udp(FAR, 40_000, POD, 53)), REDIRECT);
    bench.set.rules = Default::default();
    bench.restrict(0, 0);
    assert_eq!(bench.sends(&udp(POD, 53, FAR, 40_000)), NEXT);
    let mut memory = bench.memory(maps::CONNECTIONS);
    let known: Vec<_> = memory.keys().map(Result::unwrap).collect();
    known.iter().for_each(|key| memory.remove(key).unwrap());
    bench.restrict(IN, 0);
    assert_eq!(bench.sends(&udp(POD, 53, FAR, 40_000)), DROP);
}

/// A server that goes on sending to a client that it may not hear any more never becomes the one who began.
#[test]
fn what_is_denied_is_not_forgotten_while_it_goes_on() {
    if !privileged() {
        return;
    }
    let (heard, answer) = (udp(FAR, 40_000, POD, 53), udp(POD, 53, FAR, 40_000));
    let mut watched = Bench::new(IN, 0, vec![rule(IN, BOB, Ports::of(Protocol::Udp))]);
    assert_eq!((watched.arrives(&heard), watched.sends(&answer)), (REDIRECT, NEXT));
    watched.set.rules = Default::default();
    watched.publish();
    let mut unwatched = Bench::open();
    assert_eq!((unwatched.arrives(&heard), unwatched.sends(&answer)), (REDIRECT, NEXT));
    unwatched.restrict(IN, 0);
    for (bench, name) in [(watched, maps::CONNECTIONS), (unwatched, maps::BEGINNINGS)] {
        let before = bench.age(name, 100);
        assert_eq!(bench.sends(&answer), DROP);
        let after = bench.seen(name);
        assert!(before.len() == 1 && after[0] > before[0], "{name}: {before:?}, {after:?}");
    }
}

#[test]
fn an_association_is_begun_by_who_says_so() {
    if !privileged() {
        return;
    }
    // Both sides with the ports that both always have.
    let (pod, far) = ((POD, 5_000), (FAR, 6_000));
    let bench = Bench::new(IN, OUT, vec![rule(OUT, BOB, Ports::of(Protocol::Sctp))]);
    assert_eq!(bench.arrives(&sctp(far, pod, DATA)), DROP, "nobody knows whose it is");
    assert_eq!(bench.arrives(&sctp(far, pod, INIT)), DROP);
    assert_eq!(bench.sends(&sctp(pod, far, INIT)), NEXT);
    assert_eq!(bench.arrives(&sctp(far, pod, INIT_ACK)), REDIRECT);
    assert_eq!(
        (bench.sends(&sctp(pod, far, DATA)), bench.arrives(&sctp(far, pod, DATA))),
        (NEXT, REDIRECT)
    );
    assert_eq!(bench.arrives(&sctp(far, pod, INIT)), DROP, "another one, the other way round");
    assert_eq!(bench.arrives(&sctp(far, pod, DATA)), REDIRECT);
    // From before there was a policy.
    let mut bench = Bench::open();
    assert_eq!(bench.arrives(&sctp(far, pod, DATA)), REDIRECT);
    bench.restrict(0, OUT);
    assert_eq!(bench.sends(&sctp(pod, far, DATA)), NEXT);
}

#[test]
fn an_echo_reply_begins_nothing() {
    if !privileged() {
        return;
    }
    let bench = Bench::new(IN, 0, vec![]);
    assert_eq!(bench.sends(&packets::echo(true, POD, FAR, 7)), DROP);
    assert_eq!(bench.arrives(&packets::echo(false, FAR, POD, 7)), DROP);
    assert_eq!(bench.sends(&packets::echo(false, POD, FAR, 8)), NEXT);
    assert_eq!(bench.arrives(&packets::echo(true, FAR, POD, 8)), REDIRECT);
}
