//! A device in memory, for tests. It behaves as the kernel's does where that matters for whoever configures it.

mod traffic;

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use ipnet::IpNet;
use mesh_model::snapshot::WgKey;

use super::{
    AllowedIpsChange, DeviceError, Holder, Observed, ObservedPeer, PeerChange, Plan, SecretKey,
    Step, WireGuardDevice,
};

use traffic::Traffic;
pub use traffic::{FakeMessage, FakePacket};

/// A [`WireGuardDevice`] without a kernel.
#[derive(Debug)]
pub struct FakeWireGuard {
    inner: Mutex<Inner>,
    holder: Mutex<Holder>,
}

#[derive(Debug)]
struct Inner {
    state: Observed,
    called: Vec<WgKey>,
    traffic: Traffic,
}

impl Default for FakeWireGuard {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeWireGuard {
    /// A device without key and peers.
    pub fn new() -> Self {
        Self::with_keys(|SecretKey(private)| WgKey(*private))
    }

    /// The same, for tests in which devices speak to each other: how a public key follows from a private one.
    pub fn with_keys(public: fn(&SecretKey) -> WgKey) -> Self {
        let traffic = Traffic::new(public);
        let inner = Inner { state: Observed::default(), called: vec![], traffic };
        Self { inner: Mutex::new(inner), holder: Mutex::default() }
    }

    /// Changes the device behind the user's back: a handshake happens, a peer roams.
    pub fn tamper(&self, change: impl FnOnce(&mut Observed)) {
        change(&mut self.lock().state);
    }

    /// Puts a device of another kind, or none, in its place.
    pub fn put(&self, holder: Holder) {
        *self.holder.lock().unwrap_or_else(PoisonError::into_inner) = holder;
    }

    /// Peers that were called: the kernel does that when a keepalive is turned on while the device is up.
    pub fn called(&self) -> Vec<WgKey> {
        self.lock().called.clone()
    }

    /// The device's clock: it has no other.
    pub fn set_time(&self, now: SystemTime) {
        self.lock().traffic.now = now;
    }

    /// A packet is routed to the device.
    pub fn send(&self, packet: FakePacket) {
        let Inner { state, traffic, .. } = &mut *self.lock();
        traffic.send(state, packet);
    }

    /// A datagram comes from the underlay; the packet that comes out of the device.
    pub fn receive(&self, message: FakeMessage) -> Option<FakePacket> {
        let Inner { state, traffic, .. } = &mut *self.lock();
        traffic.receive(state, message)
    }

    /// The datagrams that the device has sent since this was asked last.
    pub fn take_sent(&self) -> Vec<FakeMessage> {
        std::mem::take(&mut self.lock().traffic.sent)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WireGuardDevice for FakeWireGuard {
    fn holder(&self) -> Result<Holder, DeviceError> {
        Ok(*self.holder.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn ensure(&self) -> Result<bool, DeviceError> {
        let mut holder = self.holder.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::replace(&mut *holder, Holder::WireGuard) == Holder::Nobody)
    }

    fn observe(&self) -> Result<Observed, DeviceError> {
        Ok(self.lock().state.clone())
    }

    fn apply(&self, plan: &Plan) -> Result<(), DeviceError> {
        let inner = &mut *self.lock();
        plan.steps.iter().for_each(|step| inner.carry_out(step));
        Ok(())
    }

    fn remove(&self) -> Result<(), DeviceError> {
        let mut inner = self.lock();
        inner.state = Observed::default();
        inner.traffic.forget();
        self.put(Holder::Nobody);
        Ok(())
    }
}

impl Inner {
    fn carry_out(&mut self, step: &Step) {
        let Self { state, called, traffic } = self;
        match step {
            Step::SetDevice { private_key, listen_port, fwmark } => {
                let key = private_key.map(clamped).or(state.private_key);
                if key != state.private_key {
                    state.private_key = key;
                    traffic.rekeyed();
                }
                state.listen_port = listen_port.unwrap_or(state.listen_port);
                state.fwmark = fwmark.unwrap_or(state.fwmark);
            }
            Step::PutPeer { key, change } => {
                if change.add {
                    state.peers.insert(*key, ObservedPeer::default());
                }
                let Some(peer) = state.peers.get_mut(key) else { return };
                let before = peer.keepalive;
                change_peer(peer, change);
                let called_now = before.is_none() && peer.keepalive.is_some();
                if let Some(change) = &change.allowed_ips {
                    change_allowed_ips(state, key, change);
                }
                if called_now {
                    called.push(*key);
                    traffic.keep_alive(state, key);
                }
                traffic.send_staged(state, key);
            }
            Step::RemovePeer(key) => {
                state.peers.remove(key);
                traffic.forget_peer(key);
            }
        }
    }
}

/// As the kernel keeps a private key (RFC 7748, section 5).
fn clamped(SecretKey(mut key): SecretKey) -> SecretKey {
    key[0] &= 248;
    key[31] = key[31] & 127 | 64;
    SecretKey(key)
}

fn change_peer(peer: &mut ObservedPeer, change: &PeerChange) {
    peer.endpoint = change.endpoint.or(peer.endpoint);
    if let Some(keepalive) = change.keepalive {
        peer.keepalive = Some(keepalive).filter(|k| !k.is_zero());
    }
    if let Some(key) = change.preshared_key {
        peer.preshared_key = Some(key).filter(|k| *k != SecretKey([0; 32]));
    }
}

/// An address is one peer's: whoever gets it takes it from the other.
fn change_allowed_ips(state: &mut Observed, key: &WgKey, change: &AllowedIpsChange) {
    let (nets, replace): (&BTreeSet<IpNet>, bool) = match change {
        AllowedIpsChange::Add(nets) => (nets, false),
        AllowedIpsChange::Replace(nets) => (nets, true),
    };
    for (other, peer) in &mut state.peers {
        if other == key {
            if replace {
                peer.allowed_ips.clear();
            }
            peer.allowed_ips.extend(nets);
        } else {
            peer.allowed_ips.retain(|net| !nets.contains(net));
        }
    }
}
