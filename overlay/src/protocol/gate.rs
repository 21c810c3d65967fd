//! The node's side of all handshakes: what is let in, from whom, and how much of it.
//!
//! In this order, so that each step costs a stranger more than it costs us: the form, the first mac (one hash), under
//! load a proof of the address (one more), a limit for each address, and only then the key agreement.

mod load;

use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mesh_model::snapshot::WgKey;

use self::load::Load;
use super::noise::cookie::{Baker, Macs};
use super::noise::message::{COOKIE_BYTES, Data, RESPONSE_BYTES};
use super::noise::{Call, Message, Stamps};
use super::peer::staging::Account;
use crate::keys::NodeKey;
use crate::status::DropReason;

/// Sorts datagrams, and holds what all peers have in common.
pub struct Gate {
    key: NodeKey,
    macs: Macs,
    stamps: Stamps,
    baker: Mutex<Baker>,
    load: Mutex<Load>,
    account: Account,
}

/// A datagram that is worth more work.
pub enum Admission<'d> {
    /// For the session that it names.
    Data(Data<'d>),
    /// From a peer, or a stranger with a key.
    Call(Box<Call>),
    /// For the offer that it names.
    Response(&'d [u8; RESPONSE_BYTES]),
    /// For the offer that it names.
    Cookie(&'d [u8; COOKIE_BYTES]),
}

/// One that is not.
#[derive(Debug)]
pub enum Refusal {
    /// Silence.
    Drop(DropReason),
    /// The sender shall prove its address with this cookie.
    ShowCookie([u8; COOKIE_BYTES]),
}

impl Gate {
    /// A gate for the node with this key.
    pub fn new(now: Instant, key: &NodeKey, stamps: Stamps) -> Self {
        Self {
            key: key.clone(),
            macs: Macs::for_receiver(&key.public()),
            stamps,
            baker: Mutex::new(Baker::new(now, rand::random())),
            load: Mutex::new(Load::new(now)),
            account: Account::default(),
        }
    }

    /// So many handshakes per second are no load.
    pub fn afford(&mut self, handshakes: u32) {
        self.load.get_mut().unwrap_or_else(PoisonError::into_inner).afford(handshakes);
    }

    /// The node's key.
    pub fn key(&self) -> &NodeKey {
        &self.key
    }

    /// The node's public key.
    pub fn public(&self) -> WgKey {
        self.key.public()
    }

    /// The stamps of the node's initiations.
    pub fn stamps(&self) -> &Stamps {
        &self.stamps
    }

    /// What waits for handshakes with all peers.
    pub fn account(&self) -> &Account {
        &self.account
    }

    /// Finds out what a datagram is. Does nothing but read when it is data.
    pub fn admit<'d>(
        &self,
        now: Instant,
        source: SocketAddr,
        datagram: &'d [u8],
    ) -> Result<Admission<'d>, Refusal> {
        match Message::read(datagram).ok_or(Refusal::Drop(DropReason::NotWireGuard))? {
            Message::Data(data) => Ok(Admission::Data(data)),
            Message::Cookie(reply) => Ok(Admission::Cookie(reply)),
            Message::Response(response) => {
                self.check(now, source, response)?;
                Ok(Admission::Response(response))
            }
            Message::Initiation(initiation) => {
                self.check(now, source, initiation)?;
                let call = Call::read(&self.key, initiation);
                let call = call.ok_or(Refusal::Drop(DropReason::BadHandshake))?;
                Ok(Admission::Call(Box::new(call)))
            }
        }
    }

    /// Checks the macs of a handshake message.
    fn check(&self, now: Instant, source: SocketAddr, message: &[u8]) -> Result<(), Refusal> {
        if !self.macs.is_addressed(message) {
            return Err(Refusal::Drop(DropReason::BadMac));
        }
        if !hold(&self.load).is_over(now) {
            return Ok(());
        }
        let cookie = hold(&self.baker).bake(now, source, rand::random);
        if !Macs::shows(message, &cookie) {
            let reply = self.macs.reply(message, &cookie, &rand::random());
            return Err(Refusal::ShowCookie(reply));
        }
        if hold(&self.load).allows(source.ip()) {
            Ok(())
        } else {
            Err(Refusal::Drop(DropReason::UnderLoad))
        }
    }
}

fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
