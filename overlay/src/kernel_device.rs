//! The kernel's WireGuard device, in the terms of [`OverlayConfig`] and [`Status`].
//!
//! The device knows one endpoint of a peer; others are tried in turn from here when it does not answer ([`rotation`]). It
//! calls a peer when there is something to send and not before; so that a new peer is called at once, there is: its
//! keepalive is turned on, which makes the kernel send one, and off again. What the device cannot do is missing: it tries no
//! endpoint beside a relay, and counts no drops by reason.
//!
//! A device has one private key. The node's own is exchanged in one step, once all peers know the next ([`KernelDevice::configure`]);
//! a peer that exchanges its own is known under both meanwhile ([`carriers`]).

mod carriers;
mod rotation;
mod secrets;
mod ways;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use mesh_kernel::wireguard::{
    self, Config, DeviceError, FakeWireGuard, KernelWireGuard, Observed, PeerChange, Plan,
    SecretKey, Step, WireGuardDevice,
};
use mesh_kernel::{IfName, NetNs};
use mesh_model::snapshot::WgKey;
use tokio::sync::watch;

use self::carriers::{Carriers, merged};
use self::rotation::Rotation;
use self::secrets::Secrets;
use self::ways::{Question, Seen, Ways};
use crate::config::{InvalidConfig, OverlayConfig, PeerConfig};
use crate::facade::Kind;
use crate::keys::{KeyError, NodeKey, NodeKeys};
use crate::mtu::FLOOR;
use crate::os::echo::{EchoSocket, Sent};
use crate::os::tun::{self, TunError};
use crate::os::udp;
use crate::paths::SLOTS;
use crate::status::{PeerStatus, Status, Traffic};

/// A session is not used any longer after this (WG section 6.1, Reject-After-Time).
const REJECT_AFTER: Duration = Duration::from_secs(180);

/// Any time does.
const CALL_KEEPALIVE: Duration = Duration::from_secs(25);

/// How often the device is looked at while a peer may change its key: until the addresses have followed, its packets are
/// dropped.
const FOLLOW: Duration = Duration::from_millis(10);
/// How often at most: a device with many peers takes longer to read.
const FOLLOW_SHARE: u32 = 10;

/// How often ways are tested while answers are waited for, and else.
const MEASURE: Duration = Duration::from_millis(100);
const MEASURE_IDLE: Duration = Duration::from_secs(1);

/// The node's device in the kernel. Blocks for some milliseconds per call.
pub struct KernelDevice {
    device: Arc<dyn WireGuardDevice>,
    name: String,
    key_file: PathBuf,
    /// Whether a peer has two keys.
    following: watch::Sender<bool>,
    /// Sets the MTU and brings the device up.
    bring_up: fn(&str, u16) -> Result<(), TunError>,
    mtu: AtomicU16,
    /// Echoes over IPv4 and IPv6, opened when there is something to ask.
    echoes: [OnceLock<Option<EchoSocket>>; 2],
    state: Mutex<State>,
}

/// What the device is to have.
#[derive(Debug)]
struct State {
    key: NodeKey,
    config: Option<OverlayConfig>,
    carriers: Carriers,
    secrets: Secrets,
    rotation: Rotation,
    ways: Ways,
}

impl State {
    fn new(key: NodeKey) -> Self {
        let (carriers, secrets, rotation, ways) = Default::default();
        Self { key, config: None, carriers, secrets, rotation, ways }
    }
}

/// The kernel's device could not be configured or read.
#[derive(Debug, thiserror::Error)]
pub enum KernelDeviceError {
    /// The configuration contradicts itself; nothing has changed.
    #[error(transparent)]
    Invalid(#[from] InvalidConfig),
    /// The node's key file cannot be read.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The node's key file holds another key than the configuration asks for; nothing has changed.
    #[error("the node's present key is {present}, not {wanted}")]
    OtherKey {
        /// What the configuration says.
        wanted: WgKey,
        /// What the file says.
        present: WgKey,
    },
    /// The kernel refused.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The device could not be brought up.
    #[error("bring the overlay device up")]
    BringUp(#[from] TunError),
}

impl KernelDevice {
    /// The device `name` in the network namespace of the caller, with the key in the file; made at the first configuration.
    pub fn new(name: IfName, key_file: PathBuf) -> Result<Self, KeyError> {
        let key = NodeKeys::load_or_create(&key_file)?.present;
        let device = Arc::new(KernelWireGuard::new(NetNs::current(), name.clone()));
        Ok(Self { bring_up: tun::bring_up, ..Self::on(device, name.to_string(), key_file, key) })
    }

    /// The same on a device in memory, for tests.
    pub fn in_memory(device: Arc<FakeWireGuard>, key_file: PathBuf, key: NodeKey) -> Self {
        Self::on(device, "mesh-wg".to_owned(), key_file, key)
    }

    fn on(device: Arc<dyn WireGuardDevice>, name: String, key_file: PathBuf, key: NodeKey) -> Self {
        Self {
            device,
            name,
            key_file,
            following: watch::Sender::new(false),
            bring_up: |_, _| Ok(()),
            mtu: AtomicU16::new(0),
            echoes: Default::default(),
            state: Mutex::new(State::new(key)),
        }
    }

    /// Puts a whole configuration in force, by difference.
    ///
    /// When the node's own key is another one than before, sessions go on receiving, what is to be sent waits in the kernel,
    /// and all peers are called at once.
    pub fn configure(&self, config: &OverlayConfig) -> Result<(), KernelDeviceError> {
        let mut state = self.lock();
        let key = self.key_for(config, &state.key)?;
        config.validate(&[key.public()])?;
        state.key = key;
        if self.device.ensure()? {
            self.mtu.store(0, Relaxed);
        }
        let observed = self.device.observe()?;
        let now = SystemTime::now();
        state.secrets.configure(now, config);
        state.carriers.tend(now, &config.peers, &observed);
        let wanted = self.wanted(config, &observed, &state, &BTreeMap::new());
        self.device.apply(&wireguard::plan(&wanted, &observed))?;
        state.secrets.applied(SystemTime::now());
        if self.mtu.load(Relaxed) != config.mtu {
            (self.bring_up)(&self.name, config.mtu)?;
            self.mtu.store(config.mtu, Relaxed);
        }
        // The kernel makes no call of a device that is down.
        self.device.apply(&calls(&wanted, &observed))?;
        state.config = Some(config.clone());
        self.following.send_replace(state.carriers.is_needed());
        Ok(())
    }

    /// The node's present key, read anew when the configuration asks for another one than there was.
    fn key_for(
        &self,
        config: &OverlayConfig,
        present: &NodeKey,
    ) -> Result<NodeKey, KernelDeviceError> {
        let Some(&wanted) = config.own_keys.first().filter(|key| **key != present.public()) else {
            return Ok(present.clone());
        };
        let key = NodeKeys::load_or_create(&self.key_file)?.present;
        if key.public() == wanted {
            return Ok(key);
        }
        Err(KernelDeviceError::OtherKey { wanted, present: key.public() })
    }

    /// Follows peers to the keys that they take over to, as long as there is one with two keys; returns the pause until the
    /// next look.
    pub fn follow(&self) -> Result<Duration, KernelDeviceError> {
        let start = Instant::now();
        self.follow_at(SystemTime::now())?;
        Ok(FOLLOW.max(start.elapsed() * FOLLOW_SHARE))
    }

    fn follow_at(&self, now: SystemTime) -> Result<(), KernelDeviceError> {
        let mut state = self.lock();
        let Some(config) = state.config.take() else { return Ok(()) };
        let result = self.follow_peers(&mut state, &config, now);
        state.config = Some(config);
        result
    }

    fn follow_peers(
        &self,
        state: &mut State,
        config: &OverlayConfig,
        now: SystemTime,
    ) -> Result<(), KernelDeviceError> {
        let observed = self.device.observe()?;
        if state.carriers.tend(now, &config.peers, &observed) {
            let wanted = self.wanted(config, &observed, state, &BTreeMap::new());
            self.device.apply(&wireguard::plan(&wanted, &observed))?;
        }
        Ok(())
    }

    /// Sends to peers' own endpoints again where the device has learned a relay's port, and no relay is configured.
    pub fn leave_relays(&self) -> Result<(), KernelDeviceError> {
        let state = self.lock();
        let Some(config) = &state.config else { return Ok(()) };
        let observed = self.device.observe()?;
        let wanted = self.wanted(config, &observed, &state, &BTreeMap::new());
        Ok(self.device.apply(&wireguard::plan(&wanted, &observed))?)
    }

    /// Whether [`Self::follow`] is to be called.
    pub fn following(&self) -> watch::Receiver<bool> {
        self.following.subscribe()
    }

    /// Looks after what the kernel does not do by itself; to be called every few seconds.
    pub fn tend(&self) -> Result<(), KernelDeviceError> {
        let mut state = self.lock();
        let Some(config) = state.config.take() else { return Ok(()) };
        let result = self.tend_to(&mut state, &config);
        state.config = Some(config);
        result
    }

    fn tend_to(&self, state: &mut State, config: &OverlayConfig) -> Result<(), KernelDeviceError> {
        let observed = self.device.observe()?;
        let now = SystemTime::now();
        let rekeyed = state.secrets.tend(now, &observed);
        let moves = {
            let State { carriers, rotation, .. } = &mut *state;
            rotation.tend(now, &config.peers, carriers, &observed)
        };
        if rekeyed || !moves.is_empty() {
            let wanted = self.wanted(config, &observed, state, &moves);
            self.device.apply(&wireguard::plan(&wanted, &observed))?;
            state.secrets.applied(SystemTime::now());
        }
        Ok(())
    }

    /// Tests how much the ways to peers carry; returns the pause until the next test. Where the peers are it knows from
    /// the last [`Self::status`].
    pub fn measure(&self) -> Duration {
        let now = Instant::now();
        let mut state = self.lock();
        for socket in self.echoes.iter().filter_map(|socket| socket.get()?.as_ref()) {
            for (from, token, length) in socket.answers() {
                state.ways.answered(now, from, token, length);
            }
        }
        for Question { to, token, length } in state.ways.poll(now) {
            let sent = self.echoes(to).map(|socket| socket.send(to, token, length));
            if sent == Some(Sent::TooBig) {
                state.ways.refused(now, token);
            }
        }
        if state.ways.waiting() { MEASURE } else { MEASURE_IDLE }
    }

    /// None where the system has no such sockets: then no echo is answered.
    fn echoes(&self, to: IpAddr) -> Option<&EchoSocket> {
        let v6 = to.is_ipv6();
        let open = || {
            let opened = EchoSocket::open(v6);
            opened
                .inspect_err(|error| tracing::warn!(%error, v6, "ways to peers are not tested"))
                .ok()
        };
        self.echoes[usize::from(v6)].get_or_init(open).as_ref()
    }

    /// The device as it is now.
    pub fn status(&self) -> Result<Status, KernelDeviceError> {
        let mut state = self.lock();
        let observed = self.device.observe()?;
        let seen = seen(&observed, &state);
        state.ways.observe(Instant::now(), self.mtu.load(Relaxed), &seen, udp::path_mtu);
        // What the device really has counts: whoever asks wants to know whether the key is in force.
        let in_force = observed.private_key == Some(clamped(state.key.private_bytes()));
        Ok(Status {
            kind: Kind::Kernel,
            device: self.name.clone(),
            public_key: state.key.public(),
            own_keys: if in_force { vec![state.key.public()] } else { vec![] },
            listen_port: observed.listen_port,
            mtu: self.mtu.load(Relaxed),
            peers: peers(&observed, &state),
            traffic: Traffic::default(),
            drops: [].into(),
        })
    }

    /// `moves` are the endpoints that count more than what the device has learned.
    fn wanted(
        &self,
        config: &OverlayConfig,
        observed: &Observed,
        state: &State,
        moves: &BTreeMap<WgKey, SocketAddr>,
    ) -> Config {
        // What the device learned is left alone, but for a relay's port that is not to be used any more.
        let relay_ports = config.listen_port..=config.listen_port.saturating_add(SLOTS.into());
        let at_relay = |peer: &PeerConfig| {
            let present = observed.peers.get(&state.carriers.of(peer)).and_then(|p| p.endpoint);
            present.is_some_and(|e| !peer.endpoints.contains(&e) && relay_ports.contains(&e.port()))
        };
        let peer = |peer: &PeerConfig| wireguard::PeerConfig {
            endpoint: peer
                .relay
                .or_else(|| moves.get(&peer.public_key).copied())
                .or_else(|| state.rotation.chosen(peer))
                .or(peer.endpoints.first().copied()),
            pinned: peer.relay.is_some() || at_relay(peer) || moves.contains_key(&peer.public_key),
            allowed_ips: peer.allowed_ips.iter().map(ipnet::IpNet::trunc).collect(),
            keepalive: peer.persistent_keepalive_secs.map(|s| Duration::from_secs(s.into())),
            preshared_key: state.secrets.key(&peer.public_key).map(|key| SecretKey(key.0.0)),
        };
        // Its other key waits to be called by: it has no addresses, and is where the peer is.
        let waiting = |peer: &PeerConfig, carrier: wireguard::PeerConfig| {
            let seen = observed.peers.get(&state.carriers.of(peer)).and_then(|p| p.endpoint);
            wireguard::PeerConfig {
                endpoint: seen.filter(|_| !carrier.pinned).or(carrier.endpoint),
                pinned: true,
                allowed_ips: [].into(),
                keepalive: None,
                ..carrier
            }
        };
        let peers = config.peers.iter().flat_map(|config| {
            let carrier = state.carriers.of(config);
            let others = config.keys().iter().copied().filter(move |key| *key != carrier);
            let waiting = others.map(move |key| (key, waiting(config, peer(config))));
            [(carrier, peer(config))].into_iter().chain(waiting)
        });
        Config {
            private_key: clamped(state.key.private_bytes()),
            listen_port: config.listen_port,
            fwmark: 0,
            peers: peers.collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for KernelDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KernelDevice").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The key as the kernel gives it back (RFC 7748, section 5). Setting another one, even of the same value, ends all sessions.
fn clamped(mut key: [u8; 32]) -> SecretKey {
    key[0] &= 248;
    key[31] = key[31] & 127 | 64;
    SecretKey(key)
}

/// What makes the kernel call peers: those that it has not known, and all when the node's own key has changed. It calls a peer
/// whose keepalive is turned on.
fn calls(wanted: &Config, observed: &Observed) -> Plan {
    let rekeyed = observed.private_key.is_some_and(|key| key != wanted.private_key);
    let step = |key: WgKey, keepalive: Duration| {
        let change = PeerChange { keepalive: Some(keepalive), ..PeerChange::default() };
        Step::PutPeer { key, change }
    };
    let called = wanted.peers.iter().filter(|(key, peer)| {
        // A key that waits is not called: the peer may not have it yet.
        let reason = rekeyed || peer.keepalive.is_none() && !observed.peers.contains_key(key);
        reason && peer.endpoint.is_some() && !peer.allowed_ips.is_empty()
    });
    let off = Duration::ZERO;
    let steps = called.flat_map(|(key, peer)| match peer.keepalive {
        None => [step(*key, CALL_KEEPALIVE), step(*key, off)],
        Some(keepalive) => [step(*key, off), step(*key, keepalive)],
    });
    Plan { steps: steps.collect() }
}

/// The configured peers, by the names that [`peers`] gives them.
fn seen(observed: &Observed, state: &State) -> Vec<Seen> {
    let configured: &[PeerConfig] = state.config.as_ref().map_or(&[], |config| &config.peers);
    let seen = configured.iter().filter_map(|peer| {
        let device = observed.peers.get(&state.carriers.of(peer))?;
        let sent_bytes = device.statistics.sent_bytes;
        Some(Seen { key: peer.public_key, at: device.endpoint?, sent_bytes })
    });
    seen.collect()
}

fn peers(observed: &Observed, state: &State) -> Vec<PeerStatus> {
    let configured: &[PeerConfig] = state.config.as_ref().map_or(&[], |config| &config.peers);
    let ours: BTreeSet<&WgKey> = configured.iter().flat_map(PeerConfig::keys).collect();
    let known = configured.iter().filter_map(|peer| {
        let carrier = state.carriers.of(peer);
        observed.peers.contains_key(&carrier).then(|| {
            let seen = merged(peer, &carrier, observed);
            let status = status(&peer.public_key, &seen, state);
            // An echo goes to the relay; what lies behind that is tested by nobody.
            let mtu = if peer.relay.is_some() { Some(FLOOR) } else { status.mtu };
            PeerStatus { mtu, ..status }
        })
    });
    // Somebody else's, or of a configuration before.
    let strangers = observed.peers.iter().filter(|(key, _)| !ours.contains(key));
    let strangers = strangers.map(|(key, peer)| status(key, peer, state));
    let mut all: Vec<PeerStatus> = known.chain(strangers).collect();
    all.sort_by_key(|peer| peer.public_key);
    all
}

fn status(name: &WgKey, peer: &wireguard::ObservedPeer, state: &State) -> PeerStatus {
    let now = SystemTime::now();
    let age = |since: SystemTime| now.duration_since(since).unwrap_or_default();
    PeerStatus {
        public_key: *name,
        endpoint: peer.endpoint,
        allowed_ips: peer.allowed_ips.iter().copied().collect(),
        handshake_age_ms: peer
            .statistics
            .last_handshake
            .map(age)
            .filter(|age| *age < REJECT_AFTER)
            .map(|age| age.as_millis() as u64),
        received_bytes: peer.statistics.received_bytes,
        sent_bytes: peer.statistics.sent_bytes,
        unanswered: 0,
        preshared: peer.preshared_key.is_some_and(|key| key.0 != [0; 32]),
        preshared_agreed: state.secrets.agreed(name),
        relay: None,
        direct_answers: 0,
        keepalive_secs: peer.keepalive.map(|every| every.as_secs() as u16).filter(|&s| s > 0),
        mtu: state.ways.mtu(name),
        // The device cannot tell; the agents ask each other.
        knows_next_key: false,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;
    use crate::config::PresharedKey;

    fn peer(n: u8) -> PeerConfig {
        PeerConfig {
            public_key: WgKey([n; 32]),
            endpoints: vec![([192, 0, 2, n], 51900).into(), ([198, 51, 100, n], 51900).into()],
            relay: None,
            allowed_ips: vec![format!("10.244.{n}.1/24").parse().unwrap()],
            persistent_keepalive_secs: None,
            preshared_key: Some(PresharedKey(WgKey([n; 32]))),
            former_preshared_key: None,
            keys: vec![],
        }
    }

    fn device() -> (Arc<FakeWireGuard>, KernelDevice, NodeKey) {
        let fake = Arc::new(FakeWireGuard::new());
        let key = NodeKey::from_bytes([0xff; 32]);
        (fake.clone(), KernelDevice::in_memory(fake, "/nonexistent".into(), key.clone()), key)
    }

    thread_local! {
        /// What a test that brings a device up looks at: a plain function knows no other.
        static BROUGHT_UP: RefCell<Arc<FakeWireGuard>> = RefCell::new(Arc::new(FakeWireGuard::new()));
    }

    #[test]
    fn peers_are_called_once_the_device_is_up() {
        let (fake, device, _) = device();
        BROUGHT_UP.set(Arc::clone(&fake));
        let bring_up = |_: &str, _: u16| {
            assert_eq!(BROUGHT_UP.with_borrow(|fake| fake.called()), [], "the device is down");
            Ok(())
        };
        let device = KernelDevice { bring_up, ..device };
        let config =
            OverlayConfig { listen_port: 51900, mtu: 1420, peers: vec![peer(1)], own_keys: vec![] };
        device.configure(&config).unwrap();
        assert_eq!(fake.called(), [WgKey([1; 32])]);
    }

    #[test]
    fn a_device_that_somebody_deleted_is_brought_up_again() {
        thread_local!(static TIMES: Cell<u32> = const { Cell::new(0) });
        let (fake, device, _) = device();
        let bring_up = |_: &str, _: u16| {
            TIMES.set(TIMES.get() + 1);
            Ok(())
        };
        let device = KernelDevice { bring_up, ..device };
        let config =
            OverlayConfig { listen_port: 51900, mtu: 1420, peers: vec![peer(1)], own_keys: vec![] };
        device.configure(&config).unwrap();
        device.configure(&config).unwrap();
        assert_eq!((TIMES.get(), fake.called().len()), (1, 1));
        fake.remove().unwrap();
        device.configure(&config).unwrap();
        assert_eq!((TIMES.get(), fake.called().len()), (2, 2), "and its peers are called");
    }

    #[test]
    fn endpoints_of_a_silent_peer_are_tried_in_turn() {
        let (fake, device, _) = device();
        let mut config =
            OverlayConfig { listen_port: 51900, mtu: 1420, peers: vec![peer(1)], own_keys: vec![] };
        config.peers[0].endpoints.push("[2001:db8::1]:51900".parse().unwrap());
        device.configure(&config).unwrap();
        let now = SystemTime::now();
        let key = WgKey([1; 32]);
        // As the kernel counts: a call every 5 s, and what it hears.
        let step = |secs: u64, heard: bool| {
            fake.tamper(|observed| {
                let peer = observed.peers.get_mut(&key).unwrap();
                peer.statistics.sent_bytes += 148;
                peer.statistics.received_bytes += if heard { 92 } else { 0 };
                if heard {
                    peer.statistics.last_handshake = Some(now + Duration::from_secs(secs));
                }
            });
            let mut state = device.lock();
            let observed = device.device.observe().unwrap();
            let at = now + Duration::from_secs(secs);
            let State { carriers, rotation, .. } = &mut *state;
            let moves = rotation.tend(at, &config.peers, carriers, &observed);
            let wanted = device.wanted(&config, &observed, &state, &moves);
            device.device.apply(&wireguard::plan(&wanted, &observed)).unwrap();
            let present = device.device.observe().unwrap().peers[&key].endpoint.unwrap();
            present.to_string()
        };
        let (first, second, third) =
            ("192.0.2.1:51900", "198.51.100.1:51900", "[2001:db8::1]:51900");
        let tried: Vec<String> = (0..9).map(|n| step(n * 5, false)).collect();
        let expected =
            [first, first, second, second, third, third, first, first, second].map(String::from);
        assert_eq!(tried, expected);
        // The whole configuration again does not begin anew.
        device.configure(&config).unwrap();
        assert_eq!(step(41, false), second);
        for n in 9..20 {
            assert_eq!(step(n * 5, true), second, "it answers there");
        }
        // It roams, is silent, and comes back to where it was heard after the others.
        let roamed = "203.0.113.9:4711";
        fake.tamper(|observed| {
            observed.peers.get_mut(&key).unwrap().endpoint = Some(roamed.parse().unwrap());
        });
        assert_eq!(step(100, true), roamed);
        let mut tried: Vec<String> = (21..41).map(|n| step(n * 5, false)).collect();
        tried.dedup();
        tried.truncate(5);
        assert_eq!(tried, [roamed, first, second, third, roamed].map(String::from));
    }

    #[test]
    fn configured_by_difference_and_read_back() {
        let (fake, device, key) = device();
        let config = OverlayConfig {
            listen_port: 51900,
            mtu: 1420,
            peers: vec![peer(1), peer(2)],
            own_keys: vec![],
        };
        device.configure(&config).unwrap();
        assert_eq!(fake.called(), [WgKey([1; 32]), WgKey([2; 32])], "though nothing is to be sent");
        let as_before = fake.observe().unwrap();
        assert!(as_before.peers.values().all(|peer| peer.keepalive.is_none()));
        device.configure(&config).unwrap();
        assert_eq!(fake.called().len(), 2, "once");
        let wanted = device.wanted(&config, &as_before, &device.lock(), &BTreeMap::new());
        assert_eq!(wireguard::plan(&wanted, &as_before).steps, [], "sessions are left alone");
        let roamed = "203.0.113.1:9".parse().unwrap();
        fake.tamper(|observed| {
            let peer = observed.peers.get_mut(&WgKey([1; 32])).unwrap();
            peer.endpoint = Some(roamed);
            peer.statistics.last_handshake = Some(SystemTime::now());
        });
        device.tend().unwrap();
        assert!(device.status().unwrap().peers[0].preshared_agreed);
        let mut fewer = config.clone();
        fewer.peers.pop();
        device.configure(&fewer).unwrap();

        let status = device.status().unwrap();
        assert_eq!((status.kind, status.listen_port, status.mtu), (Kind::Kernel, 51900, 1420));
        let [only] = status.peers.as_slice() else { panic!("{status:?}") };
        assert_eq!(only.endpoint, Some(roamed), "not overwritten");
        assert_eq!(only.allowed_ips, ["10.244.1.0/24".parse().unwrap()]);
        assert!(only.preshared && only.handshake_age_ms.unwrap() < 60_000);

        let relay = "203.0.113.9:51901".parse().unwrap();
        let direct = fewer.peers[0].endpoints[0];
        for (wanted, expected) in [(Some(relay), (relay, true)), (None, (direct, false))] {
            fewer.peers[0].relay = wanted;
            device.configure(&fewer).unwrap();
            let peer = &device.status().unwrap().peers[0];
            let seen = (peer.endpoint.unwrap(), peer.mtu == Some(FLOOR));
            assert_eq!(seen, expected, "to a relay and back, small packets there");
        }
        for (heard_at, expected) in [(relay, direct), (roamed, roamed)] {
            fake.tamper(|observed| {
                observed.peers.values_mut().for_each(|peer| peer.endpoint = Some(heard_at));
            });
            device.leave_relays().unwrap();
            let seen = device.status().unwrap().peers[0].endpoint;
            assert_eq!(seen, Some(expected), "off a relay, and not where else it is heard");
        }

        let taking_over = WgKey([77; 32]);
        for (keys, carrier) in [
            (vec![fewer.peers[0].public_key, taking_over], fewer.peers[0].public_key),
            (vec![taking_over], taking_over),
        ] {
            fewer.peers[0].keys = keys;
            device.configure(&fewer).unwrap();
            let observed = fake.observe().unwrap();
            let all: BTreeSet<WgKey> = observed.peers.keys().copied().collect();
            assert_eq!(all, fewer.peers[0].keys().iter().copied().collect());
            let holds = observed.peers.iter().filter(|(_, peer)| !peer.allowed_ips.is_empty());
            assert_eq!(holds.map(|(key, _)| *key).collect::<Vec<_>>(), [carrier]);
            assert_eq!(device.status().unwrap().peers.len(), 1, "one peer, whatever its keys");
        }
        let status = device.status().unwrap();
        assert_eq!(status.peers[0].public_key, WgKey([1; 32]), "it keeps its name");
        fewer.peers[0].keys.clear();

        fewer.peers[0].public_key = key.public();
        assert!(matches!(device.configure(&fewer), Err(KernelDeviceError::Invalid(_))));
    }
}
