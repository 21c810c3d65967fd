//! The node's side of all handshakes: what is let in, from whom, and how much of it.
//!
//! In this order, so that each step costs a stranger more than it costs us: the form, the first mac (one hash), under
//! load a proof of the address (one more), a limit for each address, and only then the key agreement.

mod load;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwap;
use mesh_model::snapshot::WgKey;

use self::load::Load;
use super::noise::cookie::{Baker, Macs};
use super::noise::message::{COOKIE_BYTES, Data, RESPONSE_BYTES};
use super::noise::{Call, Message, Stamps};
use super::peer::staging::Account;
use crate::keys::{NodeKey, NodeKeys};
use crate::status::DropReason;

/// A key by which the node may be called.
#[derive(Clone)]
pub struct Identity {
    key: NodeKey,
    macs: Macs,
}

/// All of them.
#[derive(Clone)]
pub struct Identities {
    present: Identity,
    next: Option<Identity>,
}

/// Sorts datagrams, and holds what all peers have in common.
pub struct Gate {
    identities: ArcSwap<Identities>,
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

impl Identity {
    fn new(key: NodeKey) -> Self {
        Self { macs: Macs::for_receiver(&key.public()), key }
    }

    /// The key.
    pub fn key(&self) -> &NodeKey {
        &self.key
    }

    /// Its public half.
    pub fn public(&self) -> WgKey {
        self.key.public()
    }
}

impl Identities {
    fn new(keys: NodeKeys) -> Self {
        Self { present: Identity::new(keys.present), next: keys.next.map(Identity::new) }
    }

    /// The one that all peers know.
    pub fn present(&self) -> &Identity {
        &self.present
    }

    /// The one that takes over.
    pub fn next(&self) -> Option<&Identity> {
        self.next.as_ref()
    }

    /// Their public keys, the present one first.
    pub fn public(&self) -> Vec<WgKey> {
        self.all().map(Identity::public).collect()
    }

    fn all(&self) -> impl Iterator<Item = &Identity> {
        [Some(&self.present), self.next.as_ref()].into_iter().flatten()
    }

    /// The one that a message was made for.
    fn addressed(&self, message: &[u8]) -> Option<&Identity> {
        self.all().find(|identity| identity.macs.is_addressed(message))
    }
}

impl Gate {
    /// A gate for the node with this key.
    pub fn new(now: Instant, key: &NodeKey, stamps: Stamps) -> Self {
        Self {
            identities: ArcSwap::from_pointee(Identities::new(key.clone().into())),
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

    /// From now on the node has these keys. Sessions that were made with others go on.
    pub fn identify(&self, keys: NodeKeys) {
        self.identities.store(Arc::new(Identities::new(keys)));
    }

    /// The node's keys.
    pub fn identities(&self) -> Arc<Identities> {
        self.identities.load_full()
    }

    /// The node's public key.
    pub fn public(&self) -> WgKey {
        self.identities.load().present.public()
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
                let identities = self.identities.load();
                self.check(now, source, response, &identities)?;
                Ok(Admission::Response(response))
            }
            Message::Initiation(initiation) => {
                let identities = self.identities.load();
                let callee = self.check(now, source, initiation, &identities)?;
                let call = Call::read(callee.key(), initiation);
                let call = call.ok_or(Refusal::Drop(DropReason::BadHandshake))?;
                Ok(Admission::Call(Box::new(call)))
            }
        }
    }

    /// Checks the macs of a handshake message; returns whom it was made for.
    fn check<'i>(
        &self,
        now: Instant,
        source: SocketAddr,
        message: &[u8],
        identities: &'i Identities,
    ) -> Result<&'i Identity, Refusal> {
        let callee = identities.addressed(message).ok_or(Refusal::Drop(DropReason::BadMac))?;
        if !hold(&self.load).is_over(now) {
            return Ok(callee);
        }
        let cookie = hold(&self.baker).bake(now, source, rand::random);
        if !Macs::shows(message, &cookie) {
            let reply = callee.macs.reply(message, &cookie, &rand::random());
            return Err(Refusal::ShowCookie(reply));
        }
        if hold(&self.load).allows(source.ip()) {
            Ok(callee)
        } else {
            Err(Refusal::Drop(DropReason::UnderLoad))
        }
    }
}

fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
