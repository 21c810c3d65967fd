//! The kernel's WireGuard device, in the terms of [`OverlayConfig`] and [`Status`].
//!
//! What the device cannot do is missing: it takes the first endpoint of a peer only, calls a peer when there is
//! something to send and not before, tries no endpoint beside a relay, and counts no drops by reason.

mod secrets;

use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use mesh_kernel::wireguard::{
    self, Config, DeviceError, KernelWireGuard, Observed, SecretKey, WireGuardDevice,
};
use mesh_kernel::{IfName, NetNs};

use self::secrets::Secrets;
use crate::config::{InvalidConfig, OverlayConfig, PeerConfig};
use crate::facade::Kind;
use crate::keys::NodeKey;
use crate::os::tun::{self, TunError};
use crate::paths::SLOTS;
use crate::status::{PeerStatus, Status, Traffic};

/// A session is not used any longer after this (WG section 6.1, Reject-After-Time).
const REJECT_AFTER: Duration = Duration::from_secs(180);

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
        config.validate(self.key.public())?;
        self.device.ensure()?;
        let observed = self.device.observe()?;
        let mut state = self.lock();
        state.secrets.configure(SystemTime::now(), config);
        let plan = wireguard::plan(&self.wanted(config, &observed, &state.secrets), &observed);
        self.device.apply(&plan)?;
        if self.mtu.load(Relaxed) != config.mtu {
            (self.bring_up)(&self.name, config.mtu)?;
            self.mtu.store(config.mtu, Relaxed);
        }
        state.config = Some(config.clone());
        Ok(())
    }

    /// Looks after what the kernel does not do by itself; to be called every few seconds.
    pub fn tend(&self) -> Result<(), KernelDeviceError> {
        let mut state = self.lock();
        let State { config: Some(config), secrets } = &mut *state else { return Ok(()) };
        let observed = self.device.observe()?;
        if secrets.tend(SystemTime::now(), &observed) {
            let wanted = self.wanted(config, &observed, secrets);
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
            listen_port: observed.listen_port,
            mtu: self.mtu.load(Relaxed),
            peers: peers(&observed, &self.lock().secrets),
            traffic: Traffic::default(),
            drops: [].into(),
        })
    }

    fn wanted(&self, config: &OverlayConfig, observed: &Observed, secrets: &Secrets) -> Config {
        // What the device learned is left alone, but for a relay's port that is not to be used any more.
        let relay_ports = config.listen_port..=config.listen_port.saturating_add(SLOTS.into());
        let at_relay = |peer: &PeerConfig| {
            let present = observed.peers.get(&peer.public_key).and_then(|peer| peer.endpoint);
            present.is_some_and(|e| !peer.endpoints.contains(&e) && relay_ports.contains(&e.port()))
        };
        let peer = |peer: &PeerConfig| wireguard::PeerConfig {
            endpoint: peer.relay.or(peer.endpoints.first().copied()),
            pinned: peer.relay.is_some() || at_relay(peer),
            allowed_ips: peer.allowed_ips.iter().map(ipnet::IpNet::trunc).collect(),
            keepalive: peer.persistent_keepalive_secs.map(|s| Duration::from_secs(s.into())),
            preshared_key: secrets.key(&peer.public_key).map(|key| SecretKey(key.0.0)),
        };
        Config {
            private_key: SecretKey(self.key.private_bytes()),
            listen_port: config.listen_port,
            fwmark: 0,
            peers: config.peers.iter().map(|p| (p.public_key, peer(p))).collect(),
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

fn peers(observed: &Observed, secrets: &Secrets) -> Vec<PeerStatus> {
    let now = SystemTime::now();
    let age = |since: SystemTime| now.duration_since(since).unwrap_or_default();
    let status = |(key, peer): (&_, &wireguard::ObservedPeer)| PeerStatus {
        public_key: *key,
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
        preshared_agreed: secrets.agreed(key),
        relay: None,
        direct_answers: 0,
        keepalive_secs: peer.keepalive.map(|every| every.as_secs() as u16).filter(|&s| s > 0),
        mtu: None,
    };
    observed.peers.iter().map(status).collect()
}

#[cfg(test)]
mod tests {
    use mesh_kernel::wireguard::FakeWireGuard;
    use mesh_model::snapshot::WgKey;

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
        }
    }

    #[test]
    fn configured_by_difference_and_read_back() {
        let fake = Arc::new(FakeWireGuard::new());
        let key = NodeKey::from_bytes([9; 32]);
        let device = KernelDevice {
            device: fake.clone(),
            name: "mesh-wg".into(),
            key: key.clone(),
            bring_up: |_, _| Ok(()),
            mtu: AtomicU16::new(0),
            state: Mutex::default(),
        };
        let config = OverlayConfig { listen_port: 51900, mtu: 1420, peers: vec![peer(1), peer(2)] };
        device.configure(&config).unwrap();
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

        fewer.peers[0].public_key = key.public();
        assert!(matches!(device.configure(&fewer), Err(KernelDeviceError::Invalid(_))));
    }
}
