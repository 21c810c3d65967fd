//! What one core does without the network: handshakes, sealing beside the bare cipher, and memory for many peers.

use std::collections::VecDeque;
use std::error::Error;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use mesh_overlay::counters::Counters;
use mesh_overlay::offload::coalesce::{Coalescer, Device};
use mesh_overlay::offload::vnet::{Gso, NEEDS_CHECKSUM, VnetHeader};
use mesh_overlay::protocol::noise::{Call, Offer, Tai64n};
use mesh_overlay::protocol::{Core, Kept, Outbox, Stamps};
use mesh_overlay::{NodeKey, OverlayConfig, PeerConfig};

const TIME: Duration = Duration::from_secs(2);
const PEERS: usize = 1000;
const MTU: u16 = 1420;
const SEGMENTS: usize = 30;
const HUB: ([u8; 4], u16) = ([192, 0, 2, 1], 51900);

fn main() -> Result<(), Box<dyn Error>> {
    handshakes()?;
    let bare = cipher()?;
    sealing(bare)?;
    memory()
}

/// Both sides of whole handshakes, and the part of the side that is called.
fn handshakes() -> Result<(), Box<dyn Error>> {
    let (a, b) = (NodeKey::generate()?, NodeKey::generate()?);
    let (begun, mut count, mut called) = (Instant::now(), 0, Duration::ZERO);
    while begun.elapsed() < TIME {
        let offer = Offer::make(&a, &b.public(), &[1; 32], 1, Tai64n([0; 12]));
        let (mut offer, message) = offer.ok_or("no offer")?;
        let answering = Instant::now();
        let call = Call::read(&b, &message).ok_or("no call")?;
        let (_, response) = call.answer(&[1; 32], 2).ok_or("no answer")?;
        called += answering.elapsed();
        offer.accept(&response).ok_or("not accepted")?;
        count += 1;
    }
    let rate = |time: Duration| f64::from(count) / time.as_secs_f64();
    println!(
        "handshakes per second and core    {:>8.0} answered, {:.0} with both sides on it",
        rate(called),
        rate(begun.elapsed())
    );
    Ok(())
}

/// Gigabits per second of the cipher alone, packet by packet.
fn cipher() -> Result<f64, Box<dyn Error>> {
    let key = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &[1; 32])?);
    let mut packet = vec![0x5a; usize::from(MTU)];
    let (begun, mut bytes) = (Instant::now(), 0);
    while begun.elapsed() < TIME {
        for n in 0..64u8 {
            let nonce = Nonce::assume_unique_for_key([n; 12]);
            let _tag = std::hint::black_box(key.seal_in_place_separate_tag(
                nonce,
                Aad::empty(),
                &mut packet,
            )?);
            bytes += packet.len();
        }
    }
    let rate = gigabits(bytes, begun);
    println!("ChaCha20-Poly1305, {MTU} bytes       {rate:>8.1} Gbit/s");
    Ok(rate)
}

/// A train cut, checked, sealed and laid out for sending, but not sent.
fn sealing(bare: f64) -> Result<(), Box<dyn Error>> {
    let mut net = Net::new(1)?;
    net.connect(0)?;
    let (packet, vnet) = train();
    let mut frame = vec![0; 70_000];
    let (begun, mut bytes) = (Instant::now(), 0);
    while begun.elapsed() < TIME {
        for _ in 0..3 {
            frame[..packet.len()].copy_from_slice(&packet);
            let now = Instant::now();
            net.hub.outbound(now, (&mut frame, packet.len()), &vnet, MTU, &mut net.outbox);
            bytes += packet.len();
        }
        let mut sealed = 0;
        while let Some(train) = net.outbox.take() {
            sealed += train.datagrams();
        }
        if sealed < 3 * SEGMENTS {
            return Err(format!("{sealed} datagrams of {}", 3 * SEGMENTS).into());
        }
    }
    let rate = gigabits(bytes, begun);
    println!(
        "trains cut and sealed             {rate:>8.1} Gbit/s, {:.2} of the cipher",
        rate / bare
    );
    Ok(())
}

fn memory() -> Result<(), Box<dyn Error>> {
    let before = resident()?;
    let mut net = Net::new(PEERS)?;
    for n in 0..PEERS {
        net.connect(n)?;
    }
    let each = (resident()? - before) / PEERS as f64;
    let peers = net.hub.peers(Instant::now());
    if peers.iter().any(|peer| peer.handshake_age_ms.is_none()) {
        return Err("not all peers have a session".into());
    }
    println!("memory of {PEERS} peers in session    {each:>8.1} KiB each, resident");
    Ok(())
}

/// A node with peers that are made when they are needed.
struct Net {
    hub: Core,
    begun: Instant,
    outbox: Outbox,
}

impl Net {
    fn new(peers: usize) -> Result<Self, Box<dyn Error>> {
        let begun = Instant::now();
        let hub = core(begun, &key(PEERS));
        let peers = (0..peers).map(|n| peer(n, None)).collect::<Result<_, _>>()?;
        let mut outbox = Outbox::default();
        let mut numbers = 0..;
        let mut fresh = || numbers.next().unwrap_or_default();
        hub.configure(begun, &config(peers), &mut fresh, &mut outbox)?;
        Ok(Self { hub, begun, outbox })
    }

    /// A handshake with peer `n`, one a tenth of a second after the other: nothing is under load.
    fn connect(&mut self, n: usize) -> Result<(), Box<dyn Error>> {
        let now = self.begun + Duration::from_millis(100) * u32::try_from(n)?;
        let (caller, address) = (core(now, &key(n)), SocketAddr::from(([198, 51, 100, 1], 51900)));
        let (mut there, mut sink) = (Outbox::default(), Coalescer::new(Nowhere, 64 << 10));
        let peers = vec![peer(PEERS, Some(HUB.into()))?];
        caller.configure(now, &config(peers), &mut || 5, &mut there)?;
        let mut messages = VecDeque::new();
        for _ in 0..2 {
            while let Some(train) = there.take() {
                messages.push_back(train.bytes.to_vec());
            }
            let calls = messages.iter().map(|message| (address, message.as_slice()));
            self.hub.inbound(now, calls, &mut sink, &mut self.outbox);
            messages.clear();
            while let Some(train) = self.outbox.take() {
                messages.push_back(train.bytes.to_vec());
            }
            let answers =
                messages.iter().map(|message| (SocketAddr::from(HUB), message.as_slice()));
            caller.inbound(now, answers, &mut sink, &mut there);
            messages.clear();
        }
        Ok(())
    }
}

fn core(now: Instant, key: &NodeKey) -> Core {
    let stamps = Stamps::new(now, SystemTime::now(), Kept::default());
    Core::new(now, key, stamps, Arc::new(Counters::default()))
}

fn key(n: usize) -> NodeKey {
    let mut bytes = [7; 32];
    // The first byte is clamped.
    bytes[1..9].copy_from_slice(&n.to_le_bytes());
    NodeKey::from_bytes(bytes)
}

fn peer(n: usize, endpoint: Option<SocketAddr>) -> Result<PeerConfig, Box<dyn Error>> {
    Ok(PeerConfig {
        public_key: key(n).public(),
        endpoints: endpoint.into_iter().collect(),
        allowed_ips: vec![format!("10.{}.{}.0/24", n / 250, n % 250).parse()?],
        persistent_keepalive_secs: None,
        preshared_key: None,
        former_preshared_key: None,
        keys: vec![],
        relay: None,
    })
}

fn config(peers: Vec<PeerConfig>) -> OverlayConfig {
    OverlayConfig { listen_port: HUB.1, mtu: MTU, peers, own_keys: vec![] }
}

/// TCP segments to a pod of peer 0.
fn train() -> (Vec<u8>, VnetHeader) {
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 9, 0, 7, 10, 0, 0, 7];
    packet.extend([0x0f, 0xa0, 0, 80, 0, 0, 0, 0, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    packet.resize(40 + SEGMENTS * 1380, 0x5a);
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

fn gigabits(bytes: usize, begun: Instant) -> f64 {
    bytes as f64 * 8.0 / 1e9 / begun.elapsed().as_secs_f64()
}

/// Of this process, in KiB.
fn resident() -> Result<f64, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.trim_end_matches("kB").trim().parse()?)
}
