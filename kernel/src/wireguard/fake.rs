//! A WireGuard device in memory, for tests of those who use it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use mesh_model::snapshot::WgKey;

use super::{
    DeviceError, Holder, Observed, ObservedPeer, PeerChange, Plan, SecretKey, Step, WireGuardDevice,
};

/// A [`WireGuardDevice`] without a kernel.
#[derive(Debug, Default)]
pub struct FakeWireGuard {
    state: Mutex<Observed>,
    holder: Mutex<Holder>,
    called: Mutex<Vec<WgKey>>,
}

impl FakeWireGuard {
    /// A device without key and peers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Changes the device behind the user's back: a handshake happens, a peer roams.
    pub fn tamper(&self, change: impl FnOnce(&mut Observed)) {
        change(&mut self.lock());
    }

    /// Puts a device of another kind, or none, in its place.
    pub fn put(&self, holder: Holder) {
        *self.holder.lock().unwrap_or_else(PoisonError::into_inner) = holder;
    }

    /// Peers that were called: the kernel does that when a keepalive is turned on while the device is up.
    pub fn called(&self) -> Vec<WgKey> {
        self.called.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn lock(&self) -> MutexGuard<'_, Observed> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WireGuardDevice for FakeWireGuard {
    fn holder(&self) -> Result<Holder, DeviceError> {
        Ok(*self.holder.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn ensure(&self) -> Result<(), DeviceError> {
        self.put(Holder::WireGuard);
        Ok(())
    }

    fn observe(&self) -> Result<Observed, DeviceError> {
        Ok(self.lock().clone())
    }

    fn apply(&self, plan: &Plan) -> Result<(), DeviceError> {
        let mut state = self.lock();
        for step in &plan.steps {
            match step {
                Step::SetDevice { private_key, listen_port, fwmark } => {
                    state.private_key = private_key.map(clamped).or(state.private_key);
                    state.listen_port = listen_port.unwrap_or(state.listen_port);
                    state.fwmark = fwmark.unwrap_or(state.fwmark);
                }
                Step::PutPeer { key, change } => {
                    if change.add {
                        state.peers.insert(*key, ObservedPeer::default());
                    }
                    if let Some(peer) = state.peers.get_mut(key) {
                        let before = peer.keepalive;
                        change_peer(peer, change);
                        if before.is_none() && peer.keepalive.is_some() {
                            self.called.lock().unwrap_or_else(PoisonError::into_inner).push(*key);
                        }
                    }
                }
                Step::RemovePeer(key) => drop(state.peers.remove(key)),
            }
        }
        Ok(())
    }

    fn remove(&self) -> Result<(), DeviceError> {
        *self.lock() = Observed::default();
        self.put(Holder::Nobody);
        Ok(())
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
    if let Some(allowed_ips) = &change.allowed_ips {
        peer.allowed_ips.clone_from(allowed_ips);
    }
    if let Some(keepalive) = change.keepalive {
        peer.keepalive = Some(keepalive).filter(|k| !k.is_zero());
    }
    if let Some(key) = change.preshared_key {
        peer.preshared_key = Some(key).filter(|k| *k != SecretKey([0; 32]));
    }
}
