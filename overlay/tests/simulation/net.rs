//! Nodes in one process, joined by a wire that delays, loses, repeats and reorders, and that anybody can read.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mesh_model::snapshot::WgKey;
use mesh_overlay::config::{OverlayConfig, PeerConfig};
use mesh_overlay::counters::Counters;
use mesh_overlay::offload::vnet::VnetHeader;
use mesh_overlay::protocol::ecn::Ecn;
use mesh_overlay::protocol::{Arrival, Core, Estate, Kept, Outbox, Sink, Stamps};
use mesh_overlay::status::PeerStatus;
use mesh_overlay::{DropReason, NodeKey};

/// How far the clock goes in one step.
const STEP: Duration = Duration::from_millis(10);

/// How long a datagram takes without mishap.
const LATENCY: Duration = Duration::from_millis(15);

pub(crate) struct Node {
    pub(crate) core: Core,
    pub(crate) counters: Arc<Counters>,
    pub(crate) key: NodeKey,
    pub(crate) address: SocketAddr,
    /// What the node has on disk of the stamps of its initiations.
    pub(crate) stored: Kept,
    /// Packets that came out of the tunnel.
    pub(crate) received: Inner,
    /// What the senders of packets were told.
    pub(crate) told: Vec<Vec<u8>>,
}

#[derive(Default)]
pub(crate) struct Inner {
    pub(crate) packets: Vec<Vec<u8>>,
    buffer: Vec<u8>,
}

impl Sink for Inner {
    fn room(&mut self, bytes: usize) -> &mut [u8] {
        self.buffer.resize(bytes, 0);
        &mut self.buffer
    }

    fn accept(&mut self, len: usize) {
        self.packets.push(self.buffer[..len].to_vec());
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Datagram {
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    pub(crate) ecn: Ecn,
    pub(crate) bytes: Vec<u8>,
}

/// Per cent of datagrams that have the mishap.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Mishaps {
    pub(crate) lost: u64,
    pub(crate) repeated: u64,
    pub(crate) late: u64,
}

pub(crate) struct Net {
    pub(crate) nodes: Vec<Node>,
    pub(crate) mishaps: Mishaps,
    /// Longer datagrams are lost, and nobody says so.
    pub(crate) carries: usize,
    /// The test's own time, which goes on in [`Net::run`] only.
    pub(crate) now: Instant,
    /// The time of day when `now` began, as a process that starts reads it.
    pub(crate) time_of_day: SystemTime,
    begun: Instant,
    /// All that went over the wire, as an eavesdropper has it.
    pub(crate) tapped: Vec<Datagram>,
    /// Routers mark what says that it may be marked.
    pub(crate) congested: bool,
    /// From and to: what is sent so is lost.
    pub(crate) blocked: Vec<(SocketAddr, SocketAddr)>,
    /// A relay's port, and the two that it forwards between.
    pub(crate) relay: Option<(SocketAddr, [SocketAddr; 2])>,
    under_way: Vec<(Instant, Datagram)>,
    random: u64,
}

impl Net {
    pub(crate) fn new(nodes: u8) -> Self {
        let now = Instant::now();
        let time_of_day = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let node = |n: u8| {
            let counters = Arc::new(Counters::default());
            let key = NodeKey::from_bytes([n + 1; 32]);
            let stamps = Stamps::new(now, time_of_day, Kept::default());
            let stored = stamps.kept();
            let core = Core::new(now, &key, stamps, Arc::clone(&counters));
            let address = ([192, 0, 2, n + 1], 51900).into();
            let received = Inner::default();
            Node { core, counters, key, address, stored, received, told: vec![] }
        };
        Self {
            nodes: (0..nodes).map(node).collect(),
            mishaps: Mishaps::default(),
            carries: usize::MAX,
            now,
            time_of_day,
            begun: now,
            tapped: Vec::new(),
            congested: false,
            blocked: Vec::new(),
            relay: None,
            under_way: Vec::new(),
            random: 42,
        }
    }

    /// All nodes know each other.
    pub(crate) fn mesh(nodes: u8) -> Self {
        let mut net = Self::new(nodes);
        for node in 0..net.nodes.len() {
            let config = net.config(node);
            net.configure(node, &config);
        }
        net
    }

    /// What the node would be configured with: all others, each at its address, owning 10.244.N.0/24.
    pub(crate) fn config(&self, node: usize) -> OverlayConfig {
        let others = self.nodes.iter().enumerate().filter(|&(n, _)| n != node);
        let peers = others.map(|(n, other)| PeerConfig {
            public_key: other.key.public(),
            endpoints: vec![other.address],
            relay: None,
            allowed_ips: vec![format!("10.244.{n}.0/24").parse().unwrap()],
            persistent_keepalive_secs: None,
            preshared_key: None,
            former_preshared_key: None,
            keys: vec![],
        });
        OverlayConfig { listen_port: 51900, mtu: 1420, peers: peers.collect(), own_keys: vec![] }
    }

    pub(crate) fn configure(&mut self, node: usize, config: &OverlayConfig) {
        let mut outbox = Outbox::default();
        let mut random = self.random;
        let mut fresh = || next(&mut random) as u32;
        let core = &self.nodes[node].core;
        core.configure(self.now, config, &mut fresh, &mut outbox).unwrap();
        self.random = random;
        self.post(node, &mut outbox);
    }

    /// The node's process dies and starts again, with its key and configuration.
    pub(crate) fn restart(&mut self, node: usize, config: &OverlayConfig) {
        let stamps = Stamps::new(self.now, self.clock(), self.nodes[node].stored);
        self.nodes[node].stored = stamps.kept();
        self.begin(node, stamps, config);
    }

    /// The node's process makes way for the kernel's device, which dates its calls by the clock and nothing else, rounded down to 2^24 ns.
    pub(crate) fn change_to_kernel(&mut self, node: usize, config: &OverlayConfig) {
        let clock = self.clock();
        let since_epoch = clock.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let cut_off = Duration::from_nanos(u64::from(since_epoch.subsec_nanos()) % (1 << 24));
        let stamps = Stamps::new(self.now, clock - cut_off, Kept::default());
        self.begin(node, stamps, config);
    }

    fn begin(&mut self, node: usize, stamps: Stamps, config: &OverlayConfig) {
        let counters = Arc::new(Counters::default());
        let Node { core, key, counters: counted, .. } = &mut self.nodes[node];
        *core = Core::new(self.now, key, stamps, Arc::clone(&counters));
        *counted = counters;
        self.configure(node, config);
    }

    /// The time of day, as a process that starts reads it.
    fn clock(&self) -> SystemTime {
        self.time_of_day + self.now.duration_since(self.begun)
    }

    /// The node's process leaves everything to a successor, and is gone.
    pub(crate) fn leave(&mut self, node: usize) -> Estate {
        let clock = self.clock();
        let left = &mut self.nodes[node];
        let stamps = Stamps::new(self.now, clock, left.stored);
        let nobody = Core::new(self.now, &left.key, stamps, Arc::clone(&left.counters));
        std::mem::replace(&mut left.core, nobody).leave(self.now)
    }

    /// The node's process is replaced by one that goes on with its sessions.
    pub(crate) fn hand_over(&mut self, node: usize, config: &OverlayConfig) {
        let written = serde_json::to_string(&self.leave(node)).unwrap();
        let estate: Estate = serde_json::from_str(&written).unwrap();
        let clock = self.clock();
        let heir = &mut self.nodes[node];
        let stamps = Stamps::new(self.now, clock, heir.stored).after(self.now, estate.last_stamp);
        heir.stored = stamps.kept();
        let counters = Arc::new(Counters::default());
        heir.core = Core::resume(self.now, &heir.key, stamps, Arc::clone(&counters), estate);
        heir.counters = counters;
        self.configure(node, config);
    }

    /// A packet from a pod of one node to a pod of another.
    pub(crate) fn send(&mut self, from: usize, to: usize, payload: &[u8]) {
        let source = Ipv4Addr::new(10, 244, from as u8, 7);
        self.send_as(from, source, Ipv4Addr::new(10, 244, to as u8, 7), payload);
    }

    pub(crate) fn send_as(&mut self, from: usize, source: Ipv4Addr, to: Ipv4Addr, payload: &[u8]) {
        self.send_packet(from, packet(source, to, payload));
    }

    /// A packet whose sender says that about congestion.
    pub(crate) fn send_marked(&mut self, from: usize, to: usize, ecn: Ecn) {
        let [source, to] = [from, to].map(|n| Ipv4Addr::new(10, 244, n as u8, 7));
        let mut packet = packet(source, to, b"marked");
        packet[1] = ecn as u8;
        self.send_packet(from, packet);
    }

    fn send_packet(&mut self, from: usize, mut frame: Vec<u8>) {
        let len = frame.len();
        frame.resize(len + 15, 0xaa);
        let mut outbox = Outbox::default();
        let vnet = VnetHeader::default();
        let core = &self.nodes[from].core;
        let told = core.outbound(self.now, (&mut frame, len), &vnet, 1420, &mut outbox);
        self.nodes[from].told.extend(told);
        self.post(from, &mut outbox);
    }

    /// Lets time pass.
    pub(crate) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += STEP;
            for node in 0..self.nodes.len() {
                let mut outbox = Outbox::default();
                self.nodes[node].core.tick(self.now, &mut outbox);
                if let Some(kept) = self.nodes[node].core.stamps_to_store() {
                    self.nodes[node].stored = kept;
                }
                self.post(node, &mut outbox);
            }
            self.deliver();
        }
    }

    /// Brings a datagram to whoever has its destination address now.
    pub(crate) fn inject(&mut self, datagram: &Datagram) {
        if let Some((port, [a, b])) = self.relay
            && datagram.to == port
        {
            let to = if datagram.from == a { b } else { a };
            return self.carry(Datagram { from: port, to, ..datagram.clone() });
        }
        let Some(node) = self.nodes.iter().position(|node| node.address == datagram.to) else {
            return;
        };
        let mut outbox = Outbox::default();
        let Node { core, received, .. } = &mut self.nodes[node];
        let Datagram { from, ecn, ref bytes, .. } = *datagram;
        let one = std::iter::once(Arrival { back: from.into(), ecn, bytes });
        core.inbound(self.now, one, received, &mut outbox);
        self.post(node, &mut outbox);
    }

    pub(crate) fn peer(&self, node: usize, other: usize) -> PeerStatus {
        let key: WgKey = self.nodes[other].key.public();
        let mut peers = self.nodes[node].core.peers(self.now).into_iter();
        peers.find(|peer| peer.public_key == key).expect("a configured peer")
    }

    pub(crate) fn drops(&self, node: usize, reason: DropReason) -> u64 {
        self.nodes[node].counters.drops().get(&reason).copied().unwrap_or(0)
    }

    /// Payloads that a node has received since it was asked last.
    pub(crate) fn payloads(&mut self, node: usize) -> Vec<Vec<u8>> {
        let packets = std::mem::take(&mut self.nodes[node].received.packets);
        packets.into_iter().map(|packet| packet[20..].to_vec()).collect()
    }

    fn deliver(&mut self) {
        let now = self.now;
        let (due, later) =
            std::mem::take(&mut self.under_way).into_iter().partition(|(at, _)| *at <= now);
        self.under_way = later;
        let due: Vec<(Instant, Datagram)> = due;
        for (_, datagram) in due {
            self.inject(&datagram);
        }
    }

    fn post(&mut self, node: usize, outbox: &mut Outbox) {
        let from = self.nodes[node].address;
        while let Some(train) = outbox.take() {
            for bytes in train.bytes.chunks(train.segment) {
                let (to, ecn, bytes) = (train.way.to, train.ecn, bytes.to_vec());
                let mut datagram = Datagram { from, to, ecn, bytes };
                self.tapped.push(datagram.clone());
                if self.congested && ecn != Ecn::NotCapable {
                    datagram.ecn = Ecn::Congested;
                }
                self.carry(datagram);
            }
        }
    }

    fn carry(&mut self, datagram: Datagram) {
        if self.blocked.contains(&(datagram.from, datagram.to)) {
            return;
        }
        if datagram.bytes.len() > self.carries || self.chance(self.mishaps.lost) {
            return;
        }
        let late = if self.chance(self.mishaps.late) { LATENCY * 4 } else { Duration::ZERO };
        let copies = 1 + usize::from(self.chance(self.mishaps.repeated));
        for copy in 0..copies {
            let at = self.now + LATENCY + late + LATENCY * copy as u32;
            self.under_way.push((at, datagram.clone()));
        }
    }

    fn chance(&mut self, per_cent: u64) -> bool {
        next(&mut self.random) % 100 < per_cent
    }
}

/// Initiations among datagrams.
pub(crate) fn initiations(datagrams: &[Datagram]) -> usize {
    datagrams.iter().filter(|datagram| datagram.bytes[0] == 1).count()
}

fn packet(source: Ipv4Addr, to: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 253, 0, 0];
    packet[2..4].copy_from_slice(&((20 + payload.len()) as u16).to_be_bytes());
    packet.extend(source.octets());
    packet.extend(to.octets());
    packet.extend(payload);
    packet
}

/// splitmix64
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
