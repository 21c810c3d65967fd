//! A node's own key is replaced: peers learn of it late, processes die, the wire is bad.

use std::time::Duration;

use mesh_model::snapshot::WgKey;
use mesh_overlay::keys::NodeKeys;
use mesh_overlay::{NodeKey, OverlayConfig};
use proptest::prelude::*;

use crate::net::{Mishaps, Net};
use crate::{MILLIS, SECS};

/// What one node was told of another's keys.
type Known = Vec<WgKey>;

/// Nodes, what they have on disk, and what each of them knows of the others.
struct Cluster {
    net: Net,
    keys: Vec<NodeKeys>,
    names: Vec<WgKey>,
    /// By who knows it, then by whom it is about.
    known: Vec<Vec<Known>>,
    made: u8,
    sent: Vec<usize>,
}

impl Cluster {
    fn new(nodes: u8) -> Self {
        let net = Net::mesh(nodes);
        let keys: Vec<NodeKeys> = net.nodes.iter().map(|n| n.key.clone().into()).collect();
        let all: Vec<Known> = keys.iter().map(NodeKeys::public).collect();
        let names = all.iter().map(|keys| keys[0]).collect();
        let known = vec![all; nodes.into()];
        let sent = vec![0; nodes.into()];
        let mut cluster = Self { net, keys, names, known, made: 100, sent };
        cluster.net.run(MILLIS(200));
        cluster
    }

    fn config(&self, node: usize) -> OverlayConfig {
        let mut config = self.net.config(node);
        let others = (0..self.keys.len()).filter(|other| *other != node);
        for (peer, other) in config.peers.iter_mut().zip(others) {
            peer.public_key = self.names[other];
            peer.keys.clone_from(&self.known[node][other]);
        }
        config
    }

    /// The node makes a next key. It has it before anybody hears of it.
    fn announce(&mut self, node: usize) {
        self.made += 1;
        self.keys[node].next = Some(NodeKey::from_bytes([self.made; 32]));
        self.net.nodes[node].core.identify(self.keys[node].clone());
    }

    /// A node hears of another's keys as they are now.
    fn learn(&mut self, node: usize, other: usize) {
        self.known[node][other] = self.keys[other].public();
        let config = self.config(node);
        self.net.configure(node, &config);
    }

    /// Whether all others have proved to know the next key.
    fn is_known(&self, node: usize) -> bool {
        let peers = self.net.nodes[node].core.peers(self.net.now);
        self.keys[node].next.is_some() && peers.iter().all(|peer| peer.knows_next_key)
    }

    /// The next key takes over; the one before is gone.
    fn promote(&mut self, node: usize) {
        let next = self.keys[node].next.take().unwrap();
        self.keys[node].present = next.clone();
        self.net.nodes[node].key = next;
        self.net.nodes[node].core.identify(self.keys[node].clone());
    }

    /// Its process dies, and begins with what is on disk.
    fn restart(&mut self, node: usize) {
        self.net.nodes[node].key = self.keys[node].present.clone();
        let mut config = self.config(node);
        let peers = std::mem::take(&mut config.peers);
        self.net.restart(node, &config);
        self.net.nodes[node].core.identify(self.keys[node].clone());
        config.peers = peers;
        self.net.configure(node, &config);
    }

    /// Everybody sends to everybody, twenty times a second.
    fn talk(&mut self, time: Duration) {
        for _ in 0..time.as_millis() / 50 {
            self.send_all();
            self.net.run(MILLIS(50));
        }
    }

    fn send_all(&mut self) {
        let nodes = self.keys.len();
        for (from, to) in (0..nodes).flat_map(|a| (0..nodes).map(move |b| (a, b))) {
            if from != to {
                self.net.send(from, to, b"a packet");
                self.sent[to] += 1;
            }
        }
    }

    /// How many packets each node misses.
    fn missing(&mut self) -> Vec<usize> {
        self.net.run(MILLIS(100));
        let sent = std::mem::take(&mut self.sent);
        self.sent = vec![0; sent.len()];
        (0..sent.len()).map(|node| sent[node] - self.net.payloads(node).len()).collect()
    }

    fn others(&self, node: usize) -> impl Iterator<Item = usize> + use<> {
        (0..self.keys.len()).filter(move |other| *other != node)
    }
}

#[test]
fn a_node_key_is_replaced_without_losing_a_packet() {
    let mut cluster = Cluster::new(3);
    for round in 0..3 {
        cluster.announce(round);
        cluster.talk(SECS(1));
        assert!(!cluster.is_known(round), "nobody has heard of it");
        for other in cluster.others(round) {
            cluster.learn(other, round);
            cluster.talk(SECS(2));
        }
        // One introduction may be beside a handshake that is due.
        cluster.talk(SECS(5));
        assert!(cluster.is_known(round));
        let before = cluster.keys[round].present.public();
        cluster.promote(round);
        cluster.talk(SECS(2));
        for other in cluster.others(round) {
            cluster.learn(other, round);
            cluster.talk(SECS(1));
        }
        // Sessions of before end.
        cluster.talk(SECS(200));
        assert_eq!(cluster.missing(), [0, 0, 0], "round {round}");
        assert_ne!(cluster.net.nodes[round].core.public_key(), before);
    }
}

#[test]
fn both_sides_replace_their_keys_at_once() {
    let mut cluster = Cluster::new(2);
    (0..2).for_each(|node| cluster.announce(node));
    cluster.talk(SECS(1));
    cluster.learn(0, 1);
    cluster.learn(1, 0);
    cluster.talk(SECS(5));
    assert!(cluster.is_known(0) && cluster.is_known(1));
    (0..2).for_each(|node| cluster.promote(node));
    cluster.talk(SECS(400));
    cluster.learn(0, 1);
    cluster.learn(1, 0);
    cluster.talk(SECS(200));
    assert_eq!(cluster.missing(), [0, 0]);
}

#[test]
fn without_the_control_service_nobody_hears_that_a_key_took_over_and_nothing_is_lost() {
    let mut cluster = Cluster::new(3);
    cluster.announce(0);
    for other in [1, 2] {
        cluster.learn(other, 0);
    }
    cluster.talk(SECS(5));
    assert!(cluster.is_known(0));
    cluster.promote(0);
    // Five sessions long; each process dies once.
    for node in 0..3 {
        cluster.talk(SECS(200));
        assert_eq!(cluster.missing(), [0, 0, 0]);
        cluster.restart(node);
        cluster.net.run(SECS(2));
    }
    cluster.talk(SECS(200));
    assert_eq!(cluster.missing(), [0, 0, 0]);
}

#[test]
fn a_peer_that_was_off_keeps_both_keys_alive_and_is_welcome_with_what_it_knows() {
    let mut cluster = Cluster::new(3);
    let away = cluster.net.nodes[2].address;
    let others = [0, 1].map(|n| cluster.net.nodes[n].address);
    cluster.net.blocked = others.iter().flat_map(|&o| [(o, away), (away, o)]).collect();
    cluster.announce(0);
    cluster.learn(1, 0);
    cluster.net.run(SECS(1000));
    assert!(!cluster.is_known(0), "it waits for the third");
    let peers = cluster.net.nodes[0].core.peers(cluster.net.now);
    assert_eq!(peers.iter().filter(|peer| peer.knows_next_key).count(), 1);
    cluster.net.blocked.clear();
    // It comes back with an old snapshot, and the control service is away.
    cluster.restart(2);
    cluster.net.run(SECS(7));
    cluster.talk(SECS(5));
    assert_eq!(cluster.missing(), [0, 0, 0]);
    assert!(!cluster.is_known(0));
    cluster.learn(2, 0);
    cluster.talk(SECS(40));
    assert!(cluster.is_known(0));
    assert_eq!(cluster.missing(), [0, 0, 0]);
}

#[test]
fn a_process_that_dies_at_any_step_goes_on_from_disk() {
    for victim in [0, 1] {
        let mut cluster = Cluster::new(2);
        let die = |cluster: &mut Cluster| {
            cluster.restart(victim);
            cluster.net.run(SECS(1));
            cluster.talk(SECS(3));
            assert_eq!(cluster.missing(), [0, 0], "victim {victim}");
        };
        cluster.announce(0);
        die(&mut cluster);
        cluster.learn(1, 0);
        die(&mut cluster);
        cluster.talk(SECS(40));
        assert!(cluster.is_known(0), "victim {victim}: what is forgotten is proved again");
        cluster.promote(0);
        die(&mut cluster);
        cluster.learn(1, 0);
        die(&mut cluster);
        cluster.talk(SECS(200));
        assert_eq!(cluster.missing(), [0, 0], "victim {victim}");
    }
}

#[test]
fn a_key_that_was_replaced_opens_no_door() {
    let mut cluster = Cluster::new(3);
    cluster.announce(0);
    cluster.learn(1, 0);
    cluster.net.run(SECS(5));
    // Somebody decided not to wait for the third node.
    cluster.promote(0);
    cluster.restart(0);
    cluster.restart(2);
    cluster.net.run(SECS(30));
    assert_eq!(cluster.net.nodes[2].core.peers(cluster.net.now)[0].handshake_age_ms, None);
    let peers = cluster.net.nodes[0].core.peers(cluster.net.now);
    assert_eq!(peers.iter().filter(|peer| peer.handshake_age_ms.is_some()).count(), 1);
    cluster.learn(2, 0);
    cluster.net.run(SECS(7));
    let peers = cluster.net.nodes[0].core.peers(cluster.net.now);
    assert!(peers.iter().all(|peer| peer.handshake_age_ms.is_some()), "{peers:?}");
}

/// One step of a life.
#[derive(Debug, Clone)]
enum Step {
    Announce(usize),
    Learn(usize, usize),
    PromoteIfKnown(usize),
    Restart(usize),
    Run(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => (0..3usize).prop_map(Step::Announce),
        4 => (0..3usize, 1..3usize).prop_map(|(node, by)| Step::Learn(node, (node + by) % 3)),
        3 => (0..3usize).prop_map(Step::PromoteIfKnown),
        1 => (0..3usize).prop_map(Step::Restart),
        4 => (10..8000u64).prop_map(Step::Run),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever happens in whatever order: whoever could talk before can talk again.
    #[test]
    fn no_order_of_events_parts_two_nodes(steps in prop::collection::vec(step(), 1..40), lost in 0..30u64) {
        let mut cluster = Cluster::new(3);
        cluster.net.mishaps = Mishaps { lost, repeated: 5, late: 10 };
        for step in &steps {
            match *step {
                Step::Announce(node) if cluster.keys[node].next.is_none() => cluster.announce(node),
                Step::PromoteIfKnown(node) if cluster.is_known(node) => cluster.promote(node),
                Step::Learn(node, other) => cluster.learn(node, other),
                Step::Restart(node) => cluster.restart(node),
                Step::Run(time) => cluster.net.run(MILLIS(time)),
                Step::Announce(_) | Step::PromoteIfKnown(_) => {}
            }
        }
        cluster.net.mishaps = Mishaps::default();
        // Beyond the longest pause between calls.
        cluster.net.run(SECS(8));
        // A session whose first message was lost is used by one side only until that one speaks again.
        cluster.talk(MILLIS(100));
        cluster.missing();
        cluster.talk(SECS(2));
        prop_assert_eq!(cluster.missing(), [0, 0, 0]);
    }
}
