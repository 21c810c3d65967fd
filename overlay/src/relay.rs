//! The relay: forwards sealed datagrams between nodes that cannot reach each other. A worker process of its own, so that
//! it goes on when the agent ends.
//!
//! It has no private keys and looks into nothing that is sealed. At one of its ports a source address belongs to one
//! pair, which tells where a datagram goes; handshakes of a pair are followed to nodes behind NAT ([`switch`]), and what
//! else comes from anywhere is dropped without an answer. Datagrams stay in the trains in which the kernel joined them.

mod switch;

use std::collections::{BTreeMap, HashSet};
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mesh_model::snapshot::WgKey;
use mesh_worker::descriptors::InheritError;
use mesh_worker::privileges;
use mesh_worker::server::ServeError;
use mesh_worker::{Control, Descriptors, Handler};
use quinn_udp::{RecvMeta, UdpSocketState};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;

use self::switch::Switch;
use crate::counters::Counters;
use crate::os::udp::Sockets;
use crate::paths::SLOTS;
use crate::protocol::ecn::Ecn;
use crate::protocol::outbox::Train;

/// Room for one train.
const TRAIN_BYTES: usize = 64 << 10;
/// Trains per system call.
const TRAINS: usize = 8;
/// Socket buffers, in bytes, where the system allows it.
const SOCKET_BUFFER: usize = 4 << 20;

/// Everything to forward, whole every time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RelayConfig {
    /// UDP port of slot 0; the others follow.
    pub first_port: u16,
    /// The pairs.
    pub pairs: Vec<RelayedPair>,
}

/// Two nodes, and the port at which each of them finds the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayedPair {
    /// The port, counted from the first.
    pub slot: u8,
    /// Overlay endpoint of one of them.
    pub a: SocketAddr,
    /// Its public key: behind NAT, it is recognised by the handshakes with it.
    pub a_key: WgKey,
    /// The key that takes over from that one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub a_next_key: Option<WgKey>,
    /// Overlay endpoint of the other.
    pub b: SocketAddr,
    /// Its public key.
    pub b_key: WgKey,
    /// The key that takes over from that one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub b_next_key: Option<WgKey>,
}

/// A configuration that cannot be put in force. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// There is no such port.
    #[error("slot {0} is not one of {SLOTS}, or its port is above 65535")]
    Slot(u8),
    /// It could not tell where a datagram from there goes.
    #[error("endpoint {endpoint} is in two pairs of slot {slot}")]
    Ambiguous {
        /// The endpoint.
        endpoint: SocketAddr,
        /// The slot.
        slot: u8,
    },
    /// It would send to itself, or nowhere.
    #[error("endpoint {0} cannot be relayed to")]
    Endpoint(SocketAddr),
    /// A port could not be opened.
    #[error("listen on UDP {address}")]
    Listen {
        /// Address and port.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What the relay did since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RelayStatus {
    /// Pairs that it forwards between.
    pub pairs: usize,
    /// Datagrams passed on.
    pub forwarded: u64,
    /// Datagrams from strangers, or that the system refused to send.
    pub dropped: u64,
}

/// Where the worker finds things.
#[derive(Debug, Clone)]
pub struct RelayOptions {
    /// Control socket, to listen on.
    pub socket: PathBuf,
    /// The last configuration; read at the start, written after each change.
    pub state: PathBuf,
}

/// The worker could not start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum RelayRunError {
    /// The agent left something else than it said.
    #[error(transparent)]
    Inherit(#[from] InheritError),
    /// Privileges could not be given up.
    #[error("drop privileges")]
    Privileges(#[source] io::Error),
    /// The runtime did not start.
    #[error("start the runtime")]
    Runtime(#[source] io::Error),
    /// The control socket.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

/// Runs the worker until it is killed. Blocks; call it first thing in `main`: it gives up all capabilities.
pub fn run(options: &RelayOptions) -> Result<(), RelayRunError> {
    let kept = Descriptors::inherited()?;
    privileges::drop_all_but(&[]).map_err(RelayRunError::Privileges)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(RelayRunError::Runtime)?;
    runtime.block_on(async {
        let relay = Arc::new(Relay::default());
        let control = Control::new(&options.socket, &options.state, kept);
        control.restore(&*relay).await;
        Ok(control.serve(relay).await?)
    })
}

/// A running relay. To be used inside a runtime.
#[derive(Default)]
pub struct Relay {
    shared: Arc<Shared>,
    /// The sockets, and what reads them, by port.
    ports: Mutex<BTreeMap<u16, Port>>,
}

#[derive(Default)]
struct Shared {
    /// One thread reads all ports.
    switch: Mutex<Switch>,
    /// What was sent, and what the system refused to send.
    counters: Arc<Counters>,
    /// Datagrams that nobody is to get.
    strange: AtomicU64,
}

impl Shared {
    fn switch(&self) -> MutexGuard<'_, Switch> {
        self.switch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Port(Vec<JoinHandle<()>>);

impl Drop for Port {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

impl Handler for Relay {
    type Config = RelayConfig;
    type Status = RelayStatus;

    async fn apply(&self, config: RelayConfig) -> Result<(), String> {
        self.configure(&config).map_err(|error| match std::error::Error::source(&error) {
            Some(cause) => format!("{error}: {cause}"),
            None => error.to_string(),
        })
    }

    async fn status(&self) -> RelayStatus {
        RelayStatus {
            pairs: self.shared.switch().len(),
            forwarded: self.shared.counters.traffic().datagrams_sent,
            dropped: self.shared.strange.load(Relaxed)
                + self.shared.counters.drops().values().sum::<u64>(),
        }
    }
}

impl Relay {
    /// Forwards between these pairs and no others. Ports that stay in use stay open.
    pub fn configure(&self, config: &RelayConfig) -> Result<(), RelayError> {
        let pairs = checked(config)?;
        let mut ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        for (port, _) in &pairs {
            if !ports.contains_key(port) {
                let opened = self.open(*port)?;
                ports.insert(*port, opened);
            }
        }
        ports.retain(|port, _| pairs.iter().any(|(used, _)| used == port));
        let mut switch = self.shared.switch();
        if pairs.len() != switch.len() {
            tracing::info!(pairs = pairs.len(), "relaying");
        }
        switch.configure(pairs.into_iter());
        Ok(())
    }

    /// Opens a port on both families; a machine without IPv6 has only the one.
    fn open(&self, port: u16) -> Result<Port, RelayError> {
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        let failed = |address| move |source| RelayError::Listen { address, source };
        let bind = |address: SocketAddr| Udp::bind(address).map_err(failed(address));
        let v4 = bind(any)?;
        let v6 = match bind((Ipv6Addr::UNSPECIFIED, port).into()) {
            Ok(v6) => Some(v6),
            Err(RelayError::Listen { source, .. })
                if matches!(
                    source.raw_os_error(),
                    Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
                ) =>
            {
                None
            }
            Err(error) => return Err(error),
        };
        let out = self.out(&v4, v6.as_ref()).map_err(failed(any))?;
        let read = |from: Udp| {
            let ends = Ends { port, from, out: Arc::clone(&out) };
            tokio::spawn(ends.forward(Arc::clone(&self.shared)))
        };
        Ok(Port([Some(v4), v6].into_iter().flatten().map(read).collect()))
    }

    /// The same sockets, to send by: a pair may be of two families.
    fn out(&self, v4: &Udp, v6: Option<&Udp>) -> io::Result<Arc<Sockets>> {
        let same = |udp: &Udp| -> io::Result<std::net::UdpSocket> {
            Ok(udp.socket.as_fd().try_clone_to_owned()?.into())
        };
        let (v4, v6) = (same(v4)?, v6.map(same).transpose()?);
        Ok(Arc::new(Sockets::sending(v4, v6, Arc::clone(&self.shared.counters))?))
    }
}

/// Checks a configuration; the pairs, with their ports.
fn checked(config: &RelayConfig) -> Result<Vec<(u16, RelayedPair)>, RelayError> {
    let mut places = HashSet::new();
    let port = |pair: &RelayedPair| {
        let port = config.first_port.checked_add(pair.slot.into());
        let port = port.filter(|_| pair.slot < SLOTS && config.first_port > 0);
        port.ok_or(RelayError::Slot(pair.slot))
    };
    for pair in &config.pairs {
        let port = port(pair)?;
        for (from, to) in [(pair.a, pair.b), (pair.b, pair.a)] {
            if to.port() == 0 || to.ip().is_unspecified() || to.ip().is_multicast() || from == to {
                return Err(RelayError::Endpoint(to));
            }
            if !places.insert((port, from)) {
                return Err(RelayError::Ambiguous { endpoint: from, slot: pair.slot });
            }
        }
    }
    config.pairs.iter().map(|pair| Ok((port(pair)?, *pair))).collect()
}

#[derive(Debug)]
struct Udp {
    socket: UdpSocket,
    state: UdpSocketState,
}

impl Udp {
    fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        // Smaller ones only cost datagrams under a burst.
        let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
        let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        let socket = std::net::UdpSocket::from(socket);
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Self { socket: UdpSocket::from_std(socket)?, state })
    }
}

/// One socket that is read, and those that are written to.
struct Ends {
    port: u16,
    from: Udp,
    out: Arc<Sockets>,
}

impl Ends {
    async fn forward(self, shared: Arc<Shared>) {
        let mut room = vec![0u8; TRAIN_BYTES * TRAINS];
        loop {
            let mut metas = [RecvMeta::default(); TRAINS];
            let mut buffers = room.chunks_mut(TRAIN_BYTES).map(IoSliceMut::new);
            let mut buffers: [_; TRAINS] =
                std::array::from_fn(|_| buffers.next().expect("there are as many"));
            let udp = &self.from;
            let receive = || udp.state.recv((&udp.socket).into(), &mut buffers, &mut metas);
            match udp.socket.async_io(Interest::READABLE, receive).await {
                Ok(trains) => {
                    for (meta, buffer) in metas.iter().zip(&buffers).take(trains) {
                        self.pass_on(&shared, meta, &buffer[..meta.len]);
                    }
                }
                // Errors of earlier sends (ICMP) are reported here; they mean nothing to a receiver.
                Err(error) => tracing::debug!(%error, "receiving failed"),
            }
        }
    }

    fn pass_on(&self, shared: &Shared, meta: &RecvMeta, train: &[u8]) {
        let (now, stride) = (Instant::now(), meta.stride.max(1));
        // What is in a train of a known sender has one destination. Of others each datagram is looked at.
        let known = shared.switch().knows(self.port, meta.addr);
        for part in train.chunks(if known { train.len().max(1) } else { stride }) {
            let first = &part[..part.len().min(stride)];
            let targets = shared.switch().pass(now, self.port, meta.addr, first);
            if targets.iter().all(Option::is_none) {
                shared.strange.fetch_add(part.len().div_ceil(stride) as u64, Relaxed);
            }
            // As a router does: what congestion has said to it is for the node behind.
            let ecn = Ecn::from_bits(meta.ecn.map_or(0, |ecn| ecn as u8));
            for to in targets.into_iter().flatten() {
                // What does not fit now is dropped, as on any wire.
                self.out.send(&Train { way: to.into(), ecn, bytes: part, segment: stride }, None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use quinn_udp::EcnCodepoint;

    use super::*;

    async fn socket() -> (UdpSocket, SocketAddr) {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        (socket, address)
    }

    async fn heard(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
        let mut buffer = [0; 2000];
        let wait = tokio::time::timeout(Duration::from_secs(10), socket.recv_from(&mut buffer));
        let (len, from) = wait.await.unwrap().unwrap();
        (buffer[..len].to_vec(), from)
    }

    #[tokio::test]
    async fn datagrams_of_a_pair_cross_both_ways_and_those_of_strangers_do_not() {
        let ((a, at_a), (b, at_b), (stranger, _)) =
            (socket().await, socket().await, socket().await);
        // A port that was free a moment ago.
        let first_port = socket().await.1.port();
        let relay = Relay::default();
        let (a_key, b_key) = (WgKey([1; 32]), WgKey([2; 32]));
        let (a_next_key, b_next_key) = (None, None);
        let pair = RelayedPair { slot: 0, a: at_a, a_key, a_next_key, b: at_b, b_key, b_next_key };
        relay.configure(&RelayConfig { first_port, pairs: vec![pair] }).unwrap();
        let at_relay = SocketAddr::from((Ipv4Addr::LOCALHOST, first_port));
        for n in 0..50u8 {
            stranger.send_to(b"let me in", at_relay).await.unwrap();
            a.send_to(&[n; 1400], at_relay).await.unwrap();
            assert_eq!(heard(&b).await, (vec![n; 1400], at_relay));
            b.send_to(&[n; 7], at_relay).await.unwrap();
            assert_eq!(heard(&a).await, (vec![n; 7], at_relay));
        }
        let status = relay.status().await;
        assert_eq!((status.pairs, status.forwarded, status.dropped), (1, 100, 50));

        relay.configure(&RelayConfig { first_port, pairs: vec![] }).unwrap();
        tokio::task::yield_now().await;
        let again = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, first_port));
        assert!(again.is_ok(), "the port is free again: {again:?}");
    }

    #[tokio::test]
    async fn what_is_said_about_congestion_is_passed_on() {
        let ((a, at_a), first_port) = (socket().await, socket().await.1.port());
        let b = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let (state, at_b) = (UdpSocketState::new((&b).into()).unwrap(), b.local_addr().unwrap());
        let b = UdpSocket::from_std(b).unwrap();
        let (a_key, b_key) = (WgKey([1; 32]), WgKey([2; 32]));
        let (a_next_key, b_next_key) = (None, None);
        let pair = RelayedPair { slot: 0, a: at_a, a_key, a_next_key, b: at_b, b_key, b_next_key };
        let relay = Relay::default();
        relay.configure(&RelayConfig { first_port, pairs: vec![pair] }).unwrap();
        for ecn in [None, Some(EcnCodepoint::Ect0), Some(EcnCodepoint::Ce)] {
            socket2::SockRef::from(&a).set_tos_v4(ecn.map_or(0, |ecn| ecn as u32)).unwrap();
            a.send_to(&[7; 100], (Ipv4Addr::LOCALHOST, first_port)).await.unwrap();
            let (mut buffer, mut metas) = ([0; 2000], [RecvMeta::default()]);
            let mut receive =
                || state.recv((&b).into(), &mut [IoSliceMut::new(&mut buffer)], &mut metas);
            let received = b.async_io(Interest::READABLE, &mut receive);
            tokio::time::timeout(Duration::from_secs(10), received).await.unwrap().unwrap();
            assert_eq!(metas[0].ecn, ecn);
        }
    }

    #[test]
    fn contradictions_are_refused_by_name() {
        let end = |n: u8| SocketAddr::from(([192, 0, 2, n], 51900));
        let key = |n: u8| WgKey([n; 32]);
        let pair = |slot, a, b| RelayedPair {
            slot,
            a: end(a),
            a_key: key(a),
            a_next_key: None,
            b: end(b),
            b_key: key(b),
            b_next_key: None,
        };
        let check = |pairs: &[RelayedPair]| {
            checked(&RelayConfig { first_port: 51901, pairs: pairs.to_vec() })
        };
        assert_eq!(check(&[pair(0, 1, 2), pair(1, 1, 3), pair(0, 3, 4)]).unwrap().len(), 3);
        let twice = check(&[pair(0, 1, 2), pair(0, 3, 1)]);
        assert!(matches!(twice, Err(RelayError::Ambiguous { .. })), "{twice:?}");
        assert!(matches!(check(&[pair(SLOTS, 1, 2)]), Err(RelayError::Slot(SLOTS))));
        assert!(matches!(check(&[pair(0, 1, 1)]), Err(RelayError::Endpoint(_))));
        let mut nowhere = pair(0, 1, 2);
        nowhere.b.set_port(0);
        assert!(matches!(check(&[nowhere]), Err(RelayError::Endpoint(_))));
    }
}
