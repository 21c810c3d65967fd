//! Datagrams from anywhere into a node with a peer that called it, and the peer's own messages altered.
//!
//! Input: pieces of a length byte and as many bytes. Length 255 stands for the peer's initiation, with the byte after it
//! flipped into it at the place that the next two bytes give.
#![no_main]

use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};
use std::time::{Instant, SystemTime};

use libfuzzer_sys::fuzz_target;
use mesh_overlay::counters::Counters;
use mesh_overlay::protocol::{Core, Kept, Outbox, Sink, Stamps};
use mesh_overlay::{NodeKey, OverlayConfig, PeerConfig};

struct Packets(Vec<u8>);

impl Sink for Packets {
    fn room(&mut self, bytes: usize) -> &mut [u8] {
        self.0.resize(bytes, 0);
        &mut self.0
    }

    fn accept(&mut self, len: usize) {
        assert!(len <= self.0.len());
    }
}

/// A node, and what it says first.
fn node(own: u8, other: u8) -> (Core, Vec<u8>) {
    let now = Instant::now();
    let stamps = Stamps::new(now, SystemTime::UNIX_EPOCH, Kept::default());
    let core = Core::new(now, &NodeKey::from_bytes([own; 32]), stamps, Arc::new(Counters::default()));
    let peer = PeerConfig {
        public_key: NodeKey::from_bytes([other; 32]).public(),
        endpoints: vec![([192, 0, 2, other], 51900).into()],
        relay: None,
        allowed_ips: vec!["10.0.0.0/8".parse().expect("a prefix")],
        persistent_keepalive_secs: None,
        preshared_key: None,
        former_preshared_key: None,
        keys: vec![],
    };
    let config = OverlayConfig { listen_port: 51900, mtu: 1420, peers: vec![peer], own_keys: vec![] };
    let mut outbox = Outbox::default();
    core.configure(now, &config, &mut || 1, &mut outbox).expect("a sound configuration");
    let first = outbox.take().expect("a call").bytes.to_vec();
    (core, first)
}

static NODES: LazyLock<(Core, Vec<u8>)> = LazyLock::new(|| (node(1, 2).0, node(2, 1).1));

fuzz_target!(|input: &[u8]| {
    let (core, call) = &*NODES;
    let mut datagrams: Vec<Vec<u8>> = Vec::new();
    let mut rest = input;
    while let [len, tail @ ..] = rest {
        if let (255, [bits, low, high, tail @ ..]) = (len, tail) {
            let mut altered = call.clone();
            let place = usize::from(u16::from_le_bytes([*low, *high])) % altered.len();
            altered[place] ^= bits;
            datagrams.push(altered);
            rest = tail;
        } else {
            let (bytes, tail) = tail.split_at(tail.len().min(usize::from(*len)));
            datagrams.push(bytes.to_vec());
            rest = tail;
        }
    }
    let source: SocketAddr = ([192, 0, 2, 2], 51900).into();
    let mut outbox = Outbox::default();
    let pieces = datagrams.iter().map(|bytes| (source, bytes.as_slice()));
    core.inbound(Instant::now(), pieces, &mut Packets(Vec::new()), &mut outbox);
    core.tick(Instant::now(), &mut outbox);
});
