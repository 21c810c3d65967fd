//! A WireGuard device in memory, for tests of those who use it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{
    DeviceError, Observed, ObservedPeer, PeerChange, Plan, SecretKey, Step, WireGuardDevice,
};

/// A [`WireGuardDevice`] without a kernel.
#[derive(Debug, Default)]
pub struct FakeWireGuard {
    state: Mutex<Observed>,
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

    fn lock(&self) -> MutexGuard<'_, Observed> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WireGuardDevice for FakeWireGuard {
    fn ensure(&self) -> Result<(), DeviceError> {
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
                    state.private_key = private_key.or(state.private_key);
                    state.listen_port = listen_port.unwrap_or(state.listen_port);
                    state.fwmark = fwmark.unwrap_or(state.fwmark);
                }
                Step::PutPeer { key, change } => {
                    if change.add {
                        state.peers.insert(*key, ObservedPeer::default());
                    }
                    if let Some(peer) = state.peers.get_mut(key) {
                        change_peer(peer, change);
                    }
                }
                Step::RemovePeer(key) => drop(state.peers.remove(key)),
            }
        }
        Ok(())
    }

    fn remove(&self) -> Result<(), DeviceError> {
        *self.lock() = Observed::default();
        Ok(())
    }
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
