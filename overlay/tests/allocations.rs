//! The fast path takes no memory, and a peer takes little: counted by the allocator itself.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mesh_overlay::counters::Counters;
use mesh_overlay::offload::coalesce::{Coalescer, Device};
use mesh_overlay::offload::vnet::{Gso, NEEDS_CHECKSUM, VnetHeader};
use mesh_overlay::protocol::{Core, Kept, Outbox, Stamps};
use mesh_overlay::{NodeKey, OverlayConfig, PeerConfig};

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
    static BYTES: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: all calls go to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = COUNT.try_with(|count| count.set(count.get() + 1));
        let _ = BYTES.try_with(|bytes| bytes.set(bytes.get().wrapping_add(layout.size())));
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        let _ = BYTES.try_with(|bytes| bytes.set(bytes.get().wrapping_sub(layout.size())));
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Nowhere;

impl Device for Nowhere {
    fn write(&self, _: &[IoSlice<'_>]) -> io::Result<()> {
        Ok(())
    }

    fn takes_udp_trains(&self) -> bool {
        true
    }

    fn refused(&self, _: usize, _: &io::Error) {}
}

const ENDS: [([u8; 4], u16); 2] = [([192, 0, 2, 1], 51900), ([192, 0, 2, 2], 51900)];

fn core(own: usize, counters: &Arc<Counters>) -> (Core, Outbox) {
    let key = |n: usize| NodeKey::from_bytes([n as u8 + 1; 32]);
    let other = 1 - own;
    let peer = PeerConfig {
        public_key: key(other).public(),
        endpoints: vec![ENDS[other].into()],
        relay: None,
        allowed_ips: vec![format!("10.244.{other}.0/24").parse().unwrap()],
        persistent_keepalive_secs: None,
        preshared_key: None,
        former_preshared_key: None,
        keys: vec![],
    };
    let config =
        OverlayConfig { listen_port: 51900, mtu: 1420, peers: vec![peer], own_keys: vec![] };
    let now = Instant::now();
    let stamps = Stamps::new(now, SystemTime::now(), Kept::default());
    let core = Core::new(now, &key(own), stamps, Arc::clone(counters));
    let mut number = 0;
    let mut fresh = || {
        number += 2;
        number
    };
    let mut outbox = Outbox::default();
    core.configure(now, &config, &mut fresh, &mut outbox).unwrap();
    (core, outbox)
}

/// A train of 30 TCP segments from pod 0 to pod 1.
fn train() -> (Vec<u8>, VnetHeader) {
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 244, 0, 7, 10, 244, 1, 7];
    packet.extend([0x0f, 0xa0, 0, 80, 0, 0, 0, 0, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    packet.resize(40 + 30 * 1380, 0x5a);
    let vnet = VnetHeader {
        flags: NEEDS_CHECKSUM,
        gso: Gso::TcpV4,
        header_bytes: 40,
        gso_bytes: 1380,
        checksum_start: 20,
        checksum_offset: 16,
    };
    (packet, vnet)
}

struct Wire {
    cores: [Core; 2],
    sink: Coalescer<Nowhere>,
    boxes: [Outbox; 2],
    frame: Vec<u8>,
}

impl Wire {
    /// Carries what waits from one core to the other.
    fn carry(&mut self, from: usize) {
        let [zero, one] = &mut self.boxes;
        let (out, back) = if from == 0 { (zero, one) } else { (one, zero) };
        let source: SocketAddr = ENDS[from].into();
        while let Some(train) = out.take() {
            let datagrams = train.bytes.chunks(train.segment).map(|datagram| (source, datagram));
            self.cores[1 - from].inbound(Instant::now(), datagrams, &mut self.sink, back);
        }
        self.sink.flush();
    }

    fn send(&mut self, packet: &[u8], vnet: &VnetHeader) {
        self.frame[..packet.len()].copy_from_slice(packet);
        let frame = (&mut self.frame[..], packet.len());
        self.cores[0].outbound(Instant::now(), frame, vnet, 1420, &mut self.boxes[0]);
    }
}

#[test]
fn sealing_opening_and_joining_allocate_nothing() {
    let counters = Arc::new(Counters::default());
    let (zero, first_call) = core(0, &counters);
    let (one, _) = core(1, &counters);
    let (cores, boxes) = ([zero, one], [first_call, Outbox::default()]);
    let sink = Coalescer::new(Nowhere, 64 << 10);
    let mut wire = Wire { cores, sink, boxes, frame: vec![0; 70_000] };
    let (packet, vnet) = train();
    for _ in 0..20 {
        wire.carry(0);
        wire.carry(1);
        wire.send(&packet, &vnet);
        wire.carry(0);
        wire.carry(1);
    }
    let before = COUNT.with(Cell::get);
    let opened = wire.cores[1].peers(Instant::now())[0].received_bytes;
    let spent_on_status = COUNT.with(Cell::get) - before;
    for _ in 0..200 {
        wire.send(&packet, &vnet);
        wire.carry(0);
        wire.carry(1);
    }
    let spent = COUNT.with(Cell::get) - before - spent_on_status;
    let received = wire.cores[1].peers(Instant::now())[0].received_bytes - opened;
    assert_eq!(received, 200 * 30 * 1420, "all 6000 packets went through");
    assert_eq!(spent, 0, "allocations for 6000 packets");
    assert!(counters.drops().is_empty(), "{:?}", counters.drops());
}

#[test]
fn a_thousand_peers_with_sessions_fit_in_half_of_what_they_may_take() {
    const PEERS: usize = 1000;
    const LIMIT: usize = 16 << 10;
    let now = Instant::now();
    let node = |n: usize| {
        let mut bytes = [7; 32];
        bytes[1..3].copy_from_slice(&(n as u16).to_le_bytes());
        NodeKey::from_bytes(bytes)
    };
    let make = |key: &NodeKey| {
        let stamps = Stamps::new(now, SystemTime::now(), Kept::default());
        Core::new(now, key, stamps, Arc::new(Counters::default()))
    };
    let peer = |n: usize, endpoint: Option<SocketAddr>| PeerConfig {
        public_key: node(n).public(),
        endpoints: endpoint.into_iter().collect(),
        allowed_ips: vec![format!("10.{}.{}.0/24", n / 250, n % 250).parse().unwrap()],
        persistent_keepalive_secs: None,
        preshared_key: None,
        former_preshared_key: None,
        keys: vec![],
        relay: None,
    };
    let hub = make(&node(PEERS));
    let peers: Vec<_> = (0..PEERS).map(|n| peer(n, None)).collect();
    let config = OverlayConfig { listen_port: 51900, mtu: 1420, peers, own_keys: vec![] };
    let (mut number, mut outbox, mut back) = (0, Outbox::default(), Outbox::default());
    let mut fresh = || {
        number += 1;
        number
    };
    let mut sink = Coalescer::new(Nowhere, 64 << 10);
    let before = BYTES.with(Cell::get);
    hub.configure(now, &config, &mut fresh, &mut outbox).unwrap();
    drop(config);
    for n in 0..PEERS {
        // One caller at a time, a tenth of a second after the other: nothing here is under load.
        let now = now + Duration::from_millis(100) * n as u32;
        let address: SocketAddr = ([198, 51, 100, 1], 1000 + n as u16).into();
        let caller = make(&node(n));
        let hub_peer = peer(PEERS, Some(ENDS[0].into()));
        let config = OverlayConfig {
            listen_port: 51900,
            mtu: 1420,
            peers: vec![hub_peer],
            own_keys: vec![],
        };
        caller.configure(now, &config, &mut || 5, &mut back).unwrap();
        for _ in 0..2 {
            while let Some(train) = back.take() {
                let one = std::iter::once((address, train.bytes));
                hub.inbound(now, one, &mut sink, &mut outbox);
            }
            while let Some(train) = outbox.take() {
                let one = std::iter::once((SocketAddr::from(ENDS[0]), train.bytes));
                caller.inbound(now, one, &mut sink, &mut back);
            }
        }
    }
    let end = now + Duration::from_millis(100) * PEERS as u32;
    let alive = hub.peers(end).iter().filter(|peer| peer.handshake_age_ms.is_some()).count();
    assert_eq!(alive, PEERS, "all of them have a session");
    let each = BYTES.with(Cell::get).wrapping_sub(before) / PEERS;
    println!("{each} bytes for each peer");
    assert!(each < LIMIT, "{each} bytes for each peer");
}
