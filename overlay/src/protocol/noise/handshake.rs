//! The handshake, Noise_IKpsk2 (WG sections 5.4.1 to 5.4.5): two messages, and both sides have the keys of a session.
//!
//! What is in the messages beside the handshake proper, their macs, is added and checked elsewhere ([`super::cookie`]).

use std::sync::LazyLock;

use mesh_model::snapshot::WgKey;
use snow::params::NoiseParams;
use snow::{Builder, HandshakeState};

use super::message::{INITIATION_BYTES, RESPONSE_BYTES, TYPE_INITIATION, TYPE_RESPONSE, word};
use super::session::Agreement;
use super::{Psk, Tai64n};
use crate::keys::NodeKey;

/// What is mixed in first, so that no other protocol can be taken for this one.
const PROLOGUE: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";

/// At which message the pre-shared key is mixed in.
const PSK_PLACE: u8 = 2;

/// Where Noise's own messages are in ours, and where the macs start.
const INITIATION_NOISE: std::ops::Range<usize> = 8..INITIATION_BYTES - 32;
const RESPONSE_NOISE: std::ops::Range<usize> = 12..RESPONSE_BYTES - 32;

static PARAMS: LazyLock<NoiseParams> = LazyLock::new(|| {
    "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s".parse().expect("snow knows the pattern and its ciphers")
});

/// An initiation that we sent, waiting for its response.
pub struct Offer {
    state: HandshakeState,
    index: u32,
}

/// An initiation that we received from somebody who holds the key that it names.
pub struct Call {
    state: HandshakeState,
    caller: WgKey,
    callee: WgKey,
    stamp: Tai64n,
    remote_index: u32,
}

impl Offer {
    /// Calls the peer `remote`. The message is complete but for its macs.
    ///
    /// None when the peer's key is none that one can agree with.
    pub fn make(
        own: &NodeKey,
        remote: &WgKey,
        psk: &Psk,
        index: u32,
        stamp: Tai64n,
    ) -> Option<(Self, [u8; INITIATION_BYTES])> {
        let secret = own.private_bytes();
        let builder = Builder::new(PARAMS.clone()).prologue(PROLOGUE).ok()?;
        let builder = builder.local_private_key(&secret).ok()?.remote_public_key(&remote.0).ok()?;
        let mut state = builder.psk(PSK_PLACE, psk).ok()?.build_initiator().ok()?;
        let mut message = [0; INITIATION_BYTES];
        message[0] = TYPE_INITIATION;
        message[4..8].copy_from_slice(&index.to_le_bytes());
        state.write_message(&stamp.0, &mut message[INITIATION_NOISE]).ok()?;
        Some((Self { state, index }, message))
    }

    /// By which a response names it.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Takes a response. When it is not the right one, nothing has changed, and another may come.
    pub fn accept(&mut self, response: &[u8; RESPONSE_BYTES]) -> Option<Agreement> {
        // The buffer takes the empty payload and, in snow, nothing else.
        self.state.read_message(&response[RESPONSE_NOISE], &mut [0; 16]).ok()?;
        Some(agreement(&mut self.state, self.index, word(response, 4)))
    }
}

impl Call {
    /// Reads an initiation: two key agreements. None when it was not made for this node's key.
    pub fn read(own: &NodeKey, initiation: &[u8; INITIATION_BYTES]) -> Option<Self> {
        let secret = own.private_bytes();
        let builder = Builder::new(PARAMS.clone()).prologue(PROLOGUE).ok()?;
        let mut state = builder.local_private_key(&secret).ok()?.build_responder().ok()?;
        let mut stamp = [0; 12];
        state.read_message(&initiation[INITIATION_NOISE], &mut stamp).ok()?;
        let caller = WgKey(state.get_remote_static()?.try_into().ok()?);
        let (callee, remote_index) = (own.public(), word(initiation, 4));
        Some(Self { state, caller, callee, stamp: Tai64n(stamp), remote_index })
    }

    /// Who calls.
    pub fn caller(&self) -> WgKey {
        self.caller
    }

    /// Which of this node's keys it was made for: the caller knows that one.
    pub fn callee(&self) -> WgKey {
        self.callee
    }

    /// When: older than another call of the same peer, it is a replay.
    pub fn stamp(&self) -> Tai64n {
        self.stamp
    }

    /// Answers. The message is complete but for its macs.
    pub fn answer(mut self, psk: &Psk, index: u32) -> Option<(Agreement, [u8; RESPONSE_BYTES])> {
        let mut message = [0; RESPONSE_BYTES];
        message[0] = TYPE_RESPONSE;
        message[4..8].copy_from_slice(&index.to_le_bytes());
        message[8..12].copy_from_slice(&self.remote_index.to_le_bytes());
        self.state.set_psk(PSK_PLACE.into(), psk).ok()?;
        self.state.write_message(&[], &mut message[RESPONSE_NOISE]).ok()?;
        Some((agreement(&mut self.state, index, self.remote_index), message))
    }
}

fn agreement(state: &mut HandshakeState, index: u32, remote_index: u32) -> Agreement {
    let (caller_key, callee_key) = state.dangerously_get_raw_split();
    Agreement { caller_key, callee_key, index, remote_index }
}

#[cfg(test)]
mod tests;
