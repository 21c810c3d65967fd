//! The kernel's WireGuard device, in the terms of [`OverlayConfig`] and [`Status`].
//!
//! The device knows one endpoint of a peer; others are tried in turn from here when it does not answer ([`rotation`]). It
//! calls a peer when there is something to send and not before; so that a new peer is called at once, there is: its
//! keepalive is turned on, which makes the kernel send one, and off again. What the device cannot do is missing: it tries no
//! endpoint beside a relay, and counts no drops by reason.

mod rotation;
mod secrets;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use mesh_kernel::wireguard::{
    self, Config, DeviceError, KernelWireGuard, Observed, PeerChange, Plan, SecretKey, Step,
    WireGuardDevice,
};
use mesh_kernel::{IfName, NetNs};
use mesh_model::snapshot::WgKey;

use self::rotation::Rotation;
use self::secrets::Secrets;
use crate::config::{InvalidConfig, OverlayConfig, PeerConfig};
use crate::facade::Kind;
use crate::keys::NodeKey;
use crate::mtu::tunnel_mtu;
use crate::os::tun::{self, TunError};
use crate::os::udp;
use crate::paths::SLOTS;
use crate::status::{PeerStatus, Status, Traffic};

/// A session is not used any longer after this (WG section 6.1, Reject-After-Time).
const REJECT_AFTER: Duration = Duration::from_secs(180);

/// Any number of seconds does.
const CALL_KEEPALIVE_SECS: u64 = 25;

/// The node's device in the kernel. Blocks for some milliseconds per call.
pub struct KernelDevice {
    device: Arc<dyn WireGuardDevice>,
    name: String,
    key: NodeKey,
    /// Sets the MTU and brings the device up.
    bring_up: fn(&str, u16) -> Result<(), TunError>,
    mtu: AtomicU16,
    state: Mutex<State>,
}

/// What the device is to have.
#[derive(Debug, Default)]
struct State {
    config: Option<OverlayConfig>,
    secrets: Secrets,
    rotation: Rotation,
}

/// The kernel's device could not be configured or read.
#[derive(Debug, thiserror::Error)]
pub enum KernelDeviceError {
    /// The configuration contradicts itself; nothing has changed.
    #[error(transparent)]
    Invalid(#[from] InvalidConfig),
    /// The kernel refused.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The device could not be brought up.
    #[error("bring the overlay device up")]
    BringUp(#[from] TunError),
}

impl KernelDevice {
    /// The device `name` in the network namespace of the caller; made at the first configuration.
    pub fn new(name: IfName, key: NodeKey) -> Self {
        let device = Arc::new(KernelWireGuard::new(NetNs::current(), name.clone()));
        let (name, mtu) = (name.to_string(), AtomicU16::new(0));
        Self { device, name, key, bring_up: tun::bring_up, mtu, state: Mutex::default() }
    }

    /// Puts a whole configuration in force, by difference.
    pub fn configure(&self, config: &OverlayConfig) -> Result<(), KernelDeviceError> {
        config.validate(&[self.key.public()])?;
        self.device.ensure()?;
        let observed = self.device.observe()?;
        let mut state = self.lock();
        state.secrets.configure(SystemTime::now(), config);
        let wanted = self.wanted(config, &observed, &state, &BTreeMap::new());
        self.device.apply(&wireguard::plan(&wanted, &observed))?;
        if self.mtu.load(Relaxed) != config.mtu {
            (self.bring_up)(&self.name, config.mtu)?;
            self.mtu.store(config.mtu, Relaxed);
        }
        state.config = Some(config.clone());
        drop(state);
        self.device.apply(&calls(&wanted, &observed))?;
        Ok(())
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
        let moves = state.rotation.tend(now, &config.peers, &observed);
        if rekeyed || !moves.is_empty() {
            let wanted = self.wanted(config, &observed, state, &moves);
            self.device.apply(&wireguard::plan(&wanted, &observed))?;
        }
        Ok(())
    }

    /// The device as it is now.
    pub fn status(&self) -> Result<Status, KernelDeviceError> {
        let observed = self.device.observe()?;
        Ok(Status {
            kind: Kind::Kernel,
            device: self.name.clone(),
            public_key: self.key.public(),
            own_keys: vec![self.key.public()],
            listen_port: observed.listen_port,
            mtu: self.mtu.load(Relaxed),
            peers: {
                let state = self.lock();
                peers(&observed, state.config.as_ref(), &state.secrets, self.mtu.load(Relaxed))
            },
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
            let present = observed.peers.get(&called_by(peer)).and_then(|peer| peer.endpoint);
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
        Config {
            private_key: clamped(self.key.private_bytes()),
            listen_port: config.listen_port,
            fwmark: 0,
            peers: config.peers.iter().map(|p| (called_by(p), peer(p))).collect(),
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

/// What makes the kernel call peers that it has not known. One that has a keepalive is called anyway.
fn calls(wanted: &Config, observed: &Observed) -> Plan {
    let keepalive = |key: WgKey, seconds| {
        let keepalive = Some(Duration::from_secs(seconds));
        Step::PutPeer { key, change: PeerChange { keepalive, ..PeerChange::default() } }
    };
    let unknown = wanted.peers.iter().filter(|(key, peer)| {
        !observed.peers.contains_key(key) && peer.keepalive.is_none() && peer.endpoint.is_some()
    });
    let steps =
        unknown.flat_map(|(key, _)| [keepalive(*key, CALL_KEEPALIVE_SECS), keepalive(*key, 0)]);
    Plan { steps: steps.collect() }
}

/// The device knows a peer by one key: the one that takes over, as soon as it is heard of. The peer has it by then, and
/// learns by the handshake that we have heard of it.
fn called_by(peer: &PeerConfig) -> WgKey {
    peer.keys().last().copied().unwrap_or(peer.public_key)
}

fn peers(
    observed: &Observed,
    config: Option<&OverlayConfig>,
    secrets: &Secrets,
    mtu: u16,
) -> Vec<PeerStatus> {
    let now = SystemTime::now();
    let age = |since: SystemTime| now.duration_since(since).unwrap_or_default();
    let name = |key: &WgKey| {
        let mut known = config.into_iter().flat_map(|config| &config.peers);
        known.find(|peer| called_by(peer) == *key).map_or(*key, |peer| peer.public_key)
    };
    let status = |(key, peer): (&WgKey, &wireguard::ObservedPeer)| PeerStatus {
        public_key: name(key),
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
        preshared_agreed: secrets.agreed(&name(key)),
        relay: None,
        direct_answers: 0,
        keepalive_secs: peer.keepalive.map(|every| every.as_secs() as u16).filter(|&s| s > 0),
        // What its first link carries, and what the system has heard about the rest.
        mtu: peer.endpoint.and_then(|to| Some(tunnel_mtu(udp::path_mtu(to)?, to.ip()).min(mtu))),
        knows_next_key: false,
    };
    observed.peers.iter().map(status).collect()
}

#[cfg(test)]
mod tests {
    use mesh_kernel::wireguard::FakeWireGuard;

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
        let device = KernelDevice {
            device: fake.clone(),
            name: "mesh-wg".into(),
            key: key.clone(),
            bring_up: |_, _| Ok(()),
            mtu: AtomicU16::new(0),
            state: Mutex::default(),
        };
        (fake, device, key)
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
            let moves = state.rotation.tend(at, &config.peers, &observed);
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
        for (wanted, expected) in [(Some(relay), relay), (None, fewer.peers[0].endpoints[0])] {
            fewer.peers[0].relay = wanted;
            device.configure(&fewer).unwrap();
            let status = device.status().unwrap();
            assert_eq!(status.peers[0].endpoint, Some(expected), "to a relay and back");
        }

        let taking_over = WgKey([77; 32]);
        fewer.peers[0].keys = vec![fewer.peers[0].public_key, taking_over];
        device.configure(&fewer).unwrap();
        let observed = fake.observe().unwrap();
        assert_eq!(observed.peers.keys().collect::<Vec<_>>(), [&taking_over]);
        let status = device.status().unwrap();
        assert_eq!(status.peers[0].public_key, WgKey([1; 32]), "it keeps its name");
        fewer.peers[0].keys.clear();

        fewer.peers[0].public_key = key.public();
        assert!(matches!(device.configure(&fewer), Err(KernelDeviceError::Invalid(_))));
    }
}
