//! Nodes with the kernel's device that speak to each other, in memory, while one of them replaces its key.

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_kernel::WireGuardDevice as _;
use mesh_kernel::wireguard::{FakeMessage, FakePacket, FakeWireGuard, PeerStatistics};

use super::super::KernelDevice;
use super::*;
use crate::config::OverlayConfig;
use crate::keys::{NodeKey, NodeKeys};

const A: u8 = 1;
const B: u8 = 2;

/// A node: its device in memory, and what the agent does with it.
struct Node {
    number: u8,
    name: WgKey,
    fake: Arc<FakeWireGuard>,
    device: KernelDevice,
    dir: tempfile::TempDir,
}

impl Node {
    fn new(number: u8) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let public = |key: &mesh_kernel::wireguard::SecretKey| NodeKey::from_bytes(key.0).public();
        let fake = Arc::new(FakeWireGuard::with_keys(public));
        let (name, device) = agent(dir.path(), &fake);
        Self { number, name, fake, device, dir }
    }

    fn file(&self) -> std::path::PathBuf {
        self.dir.path().join("overlay.key")
    }

    /// The agent ends without warning, and another one starts.
    fn restart(&mut self) {
        self.device = agent(self.dir.path(), &self.fake).1;
    }

    /// The machine starts anew: nothing but files is left.
    fn reboot(&mut self) {
        self.fake.remove().unwrap();
        self.restart();
    }

    fn present(&self) -> WgKey {
        NodeKeys::load_or_create(&self.file()).unwrap().present.public()
    }

    /// Hears of the other node's keys.
    fn hear(&self, other: &Self, keys: &[WgKey]) {
        let peer = PeerConfig {
            endpoints: vec![([192, 0, 2, other.number], 51900).into()],
            allowed_ips: vec![format!("10.244.{}.0/24", other.number).parse().unwrap()],
            ..peer(other.name, keys)
        };
        let config = OverlayConfig {
            listen_port: 51900,
            mtu: 1420,
            peers: vec![peer],
            own_keys: vec![self.present()],
        };
        self.device.configure(&config).unwrap();
    }
}

/// A peer that is nowhere, and owns nothing.
fn peer(public_key: WgKey, keys: &[WgKey]) -> PeerConfig {
    PeerConfig {
        public_key,
        keys: keys.to_vec(),
        endpoints: vec![],
        relay: None,
        allowed_ips: vec![],
        persistent_keepalive_secs: None,
        preshared_key: None,
        former_preshared_key: None,
    }
}

fn agent(dir: &std::path::Path, fake: &Arc<FakeWireGuard>) -> (WgKey, KernelDevice) {
    let key_file = dir.join("overlay.key");
    let key = NodeKeys::load_or_create(&key_file).unwrap().present;
    let device = KernelDevice::in_memory(Arc::clone(fake), key_file.clone(), key);
    (NodeKeys::name(&key_file).unwrap(), device)
}

/// Two nodes on an underlay, a millisecond apart.
struct Net {
    nodes: [Node; 2],
    now: SystemTime,
    under_way: [Vec<FakeMessage>; 2],
    sent: [u64; 2],
    /// Numbers of the packets that came from each.
    came: [BTreeSet<u64>; 2],
}

impl Net {
    fn new() -> Self {
        let nodes = [Node::new(A), Node::new(B)];
        let mut net = Self {
            nodes,
            now: SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000),
            under_way: Default::default(),
            sent: [0; 2],
            came: Default::default(),
        };
        net.set_clocks();
        net.a().hear(net.b(), &[]);
        // Were they to call each other at once, each would keep the other's session as the one before its own, and drop
        // it at the next: the kernel does.
        net.run(5, [false; 2], [false; 2]);
        net.b().hear(net.a(), &[]);
        net
    }

    fn a(&self) -> &Node {
        &self.nodes[0]
    }

    fn b(&self) -> &Node {
        &self.nodes[1]
    }

    fn set_clocks(&self) {
        self.nodes.iter().for_each(|node| node.fake.set_time(self.now));
    }

    /// Time passes; each of the talkers sends a packet every millisecond. Agents that run look every 10 ms.
    fn run(&mut self, millis: u64, talkers: [bool; 2], agents: [bool; 2]) {
        for tick in 0..millis {
            self.now += Duration::from_millis(1);
            self.set_clocks();
            for from in [0, 1] {
                let to = 1 - from;
                for message in std::mem::take(&mut self.under_way[to]) {
                    if let Some(packet) = self.nodes[to].fake.receive(message) {
                        assert!(self.came[from].insert(packet.number), "twice");
                    }
                }
                if talkers[from] {
                    self.sent[from] += 1;
                    let address = |place: usize| [10, 244, self.nodes[place].number, 1].into();
                    let (source, destination) = (address(from), address(to));
                    let number = self.sent[from];
                    self.nodes[from].fake.send(FakePacket { source, destination, number });
                }
                if agents[from] && tick % 10 == 0 {
                    self.nodes[from].device.follow_at(self.now).unwrap();
                }
            }
            for from in [0, 1] {
                let sent = self.nodes[from].fake.take_sent();
                self.under_way[1 - from].extend(sent);
            }
        }
    }

    /// What was sent and did not arrive so far, in each direction.
    fn lost(&self) -> [u64; 2] {
        [0, 1].map(|from| self.sent[from] - self.came[from].len() as u64)
    }
}

const BOTH: [bool; 2] = [true, true];

/// A replaces its key as [`crate::keys`] and the agent have it, up to the exchange.
fn up_to_the_exchange(net: &mut Net) -> [WgKey; 2] {
    net.run(100, BOTH, BOTH);
    assert!(net.lost().iter().all(|lost| *lost <= 1), "under way: {:?}", net.lost());
    let present = net.a().present();
    let next = NodeKeys::prepare_next(&net.a().file()).unwrap().public();
    net.b().hear(net.a(), &[next, present]);
    net.run(100, BOTH, BOTH);
    [next, present]
}

#[test]
fn a_key_is_replaced_under_traffic_at_the_cost_of_one_look() {
    let mut net = Net::new();
    let keys = up_to_the_exchange(&mut net);
    assert!(net.lost().iter().all(|lost| *lost <= 1), "until then nothing: {:?}", net.lost());
    NodeKeys::promote(&net.a().file()).unwrap();
    net.a().hear(net.b(), &[]);
    net.run(300, BOTH, BOTH);
    // To B what comes until it looks; from B nothing, since sessions go on receiving.
    let [to_b, to_a] = net.lost();
    assert!(to_b <= 12 && to_a <= 1, "{:?}", net.lost());
    assert_eq!(net.a().device.status().unwrap().own_keys, [keys[0]]);
    net.b().hear(net.a(), &keys[..1]);
    net.run(100, BOTH, BOTH);
    assert_eq!(net.lost(), [to_b, to_a], "the former key goes unnoticed");
    assert_eq!(net.b().fake.observe().unwrap().peers.len(), 1);
}

#[test]
fn whoever_is_silent_is_called_by_the_new_key() {
    let mut net = Net::new();
    let keys = up_to_the_exchange(&mut net);
    NodeKeys::promote(&net.a().file()).unwrap();
    net.a().hear(net.b(), &[]);
    net.run(20, [false; 2], BOTH);
    let observed = net.b().fake.observe().unwrap();
    assert!(!observed.peers[&keys[0]].allowed_ips.is_empty(), "without a packet of A");
    let before = net.lost();
    net.run(100, [false, true], BOTH);
    assert_eq!(net.lost()[0], before[0]);
    assert!(net.lost()[1] <= before[1] + 1);
}

#[test]
fn an_agent_killed_at_any_step_costs_packets_and_not_the_peer() {
    for (a_restarts, b_restarts, b_reboots) in
        [(true, false, false), (false, true, false), (true, true, false), (true, false, true)]
    {
        let mut net = Net::new();
        let keys = up_to_the_exchange(&mut net);
        NodeKeys::promote(&net.a().file()).unwrap();
        if a_restarts {
            // Killed before the device has the key, which the next agent finds in the file.
            net.nodes[0].restart();
            net.run(500, BOTH, [false, true]);
            assert!(net.lost().iter().all(|lost| *lost <= 1), "as before: {:?}", net.lost());
        }
        net.a().hear(net.b(), &[]);
        if b_restarts {
            net.run(1000, BOTH, [true, false]);
            net.nodes[1].restart();
        }
        if b_reboots {
            net.nodes[1].reboot();
        }
        net.b().hear(net.a(), &[keys[0], keys[1]]);
        net.run(12_000, BOTH, BOTH);
        let settled = net.lost();
        net.run(1000, BOTH, BOTH);
        assert_eq!(net.lost(), settled, "{:?}", (a_restarts, b_restarts, b_reboots));
    }
}

#[test]
fn a_peer_that_changed_its_key_unheard_is_found_by_the_other() {
    let mut net = Net::new();
    let [next, present] = up_to_the_exchange(&mut net);
    NodeKeys::promote(&net.a().file()).unwrap();
    // All that A had to say was lost, and it has nothing more to say.
    net.nodes[0].reboot();
    net.a().hear(net.b(), &[]);
    net.a().fake.take_sent();
    net.nodes[1].reboot();
    net.b().hear(net.a(), &[next, present]);
    net.run(15_000, [false, true], BOTH);
    let before = net.lost();
    net.run(1000, [false, true], BOTH);
    assert_eq!(net.lost(), before);
}

fn seen(keys: &[(WgKey, Option<u64>)], received: u64) -> Observed {
    let peer = |shaken: Option<u64>| ObservedPeer {
        statistics: PeerStatistics {
            last_handshake: shaken.map(|s| SystemTime::UNIX_EPOCH + Duration::from_secs(s)),
            received_bytes: received,
            sent_bytes: 1,
        },
        ..ObservedPeer::default()
    };
    let peers = keys.iter().map(|(key, shaken)| (*key, peer(*shaken))).collect();
    Observed { peers, ..Observed::default() }
}

#[test]
fn the_newest_handshake_counts_whichever_way_it_goes() {
    let [first, second] = [A, B].map(|n| WgKey([n; 32]));
    let peer = peer(first, &[first, second]);
    let mut carriers = Carriers::default();
    let at = |secs| SystemTime::UNIX_EPOCH + Duration::from_secs(secs);
    assert_eq!(carriers.of(&peer), second, "as it wants to be called");
    for (n, (shaken, carrier)) in [
        ([Some(10), None], first),
        ([Some(10), Some(20)], second),
        ([Some(30), Some(20)], first),
        ([Some(30), Some(31)], second),
    ]
    .into_iter()
    .enumerate()
    {
        let observed = seen(&[(first, shaken[0]), (second, shaken[1])], n as u64);
        carriers.tend(at(40), std::slice::from_ref(&peer), &observed);
        assert_eq!(carriers.of(&peer), carrier, "{shaken:?}");
    }
    assert!(carriers.is_needed());
    carriers.tend(at(41), &[PeerConfig { keys: vec![second], ..peer }], &Observed::default());
    assert!(!carriers.is_needed());
}

#[test]
fn a_clock_that_is_set_back_hides_no_key_that_takes_over() {
    let [old, new] = [WgKey([1; 32]), WgKey([2; 32])];
    let peer = peer(old, &[old, new]);
    let noon = SystemTime::now();
    let back = |secs: u64| noon - Duration::from_secs(3600) + Duration::from_secs(secs);
    let mut observed = Observed::default();
    let shake = |observed: &mut Observed, key: WgKey, at: SystemTime| {
        observed.peers.entry(key).or_default().statistics.last_handshake = Some(at);
    };
    let mut turn = Turn { carrier: old, shaken: None, sent: 0, received: 0, silent: None };
    shake(&mut observed, old, noon);
    assert!(!turn.look(noon + Duration::from_secs(1), &peer, &observed));
    assert!(!turn.look(back(5), &peer, &observed));
    shake(&mut observed, new, back(10));
    assert!(turn.look(back(11), &peer, &observed));
    assert_eq!(turn.carrier, new);
}
