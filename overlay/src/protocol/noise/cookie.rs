//! The two macs of handshake messages, and the cookies that prove an address (WG sections 5.3, 5.4.4 and 5.4.7).
//!
//! The first mac shows that the sender knows whom it calls; without it nothing is answered. The second one shows, while the
//! node is under load, that the sender receives what is sent to its address and port.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput as _, KeyInit as _, Update as _};
use blake2::{Blake2s256, Blake2sMac, Digest as _};
use chacha20poly1305::{AeadInPlace as _, Tag, XChaCha20Poly1305, XNonce};
use mesh_model::snapshot::WgKey;

use super::message::{COOKIE_BYTES, TYPE_COOKIE, word};

/// A mac, or a cookie.
type Mac = [u8; 16];

/// Both macs, at the end of a message.
const MACS_BYTES: usize = 32;

/// How long a secret makes cookies, and a cookie is shown.
const COOKIE_LIFE: Duration = Duration::from_secs(120);

/// Keys of the macs of messages to one receiver; the other half of the protocol for that receiver itself.
#[derive(Clone)]
pub struct Macs {
    mac1_key: [u8; 32],
    cookie_key: [u8; 32],
}

/// The last cookie of a peer that was under load, and what it has to be an answer to.
#[derive(Debug, Default)]
pub struct Jar {
    last_mac1: Option<Mac>,
    cookie: Option<(Mac, Instant)>,
}

/// Makes cookies, from a secret that is replaced while it is in use.
#[derive(Debug)]
pub struct Baker {
    secret: [u8; 32],
    since: Instant,
}

impl Macs {
    /// The keys for messages to the owner of a public key.
    pub fn for_receiver(key: &WgKey) -> Self {
        Self { mac1_key: labelled(b"mac1----", key), cookie_key: labelled(b"cookie--", key) }
    }

    /// Completes a message with its macs; with the second one when there is a cookie to show. Returns the first.
    pub fn sign(&self, message: &mut [u8], cookie: Option<&Mac>) -> Mac {
        let (body, macs) = message.split_at_mut(message.len() - MACS_BYTES);
        let mac1 = mac(&self.mac1_key, &[body]);
        macs[..16].copy_from_slice(&mac1);
        if let Some(cookie) = cookie {
            let mac2 = mac(cookie, &[body, &mac1]);
            macs[16..].copy_from_slice(&mac2);
        }
        mac1
    }

    /// Whether a message to this receiver has the first mac right.
    pub fn is_addressed(&self, message: &[u8]) -> bool {
        let (body, macs) = message.split_at(message.len() - MACS_BYTES);
        equal(&mac(&self.mac1_key, &[body]), &macs[..16])
    }

    /// Whether the second one is right for the cookie.
    pub fn shows(message: &[u8], cookie: &Mac) -> bool {
        let (signed, mac2) = message.split_at(message.len() - 16);
        equal(&mac(cookie, &[signed]), mac2)
    }

    /// Asks the sender of a message to this receiver to show the cookie; `nonce` is never used twice.
    pub fn reply(&self, message: &[u8], cookie: &Mac, nonce: &[u8; 24]) -> [u8; COOKIE_BYTES] {
        let mac1 = &message[message.len() - MACS_BYTES..message.len() - 16];
        let mut reply = [0; COOKIE_BYTES];
        reply[0] = TYPE_COOKIE;
        reply[4..8].copy_from_slice(&word(message, 4).to_le_bytes());
        reply[8..32].copy_from_slice(nonce);
        reply[32..48].copy_from_slice(cookie);
        let cipher = XChaCha20Poly1305::new(&self.cookie_key.into());
        let tag = cipher
            .encrypt_in_place_detached(XNonce::from_slice(nonce), mac1, &mut reply[32..48])
            .expect("16 bytes can be encrypted");
        reply[48..].copy_from_slice(&tag);
        reply
    }

    fn open(&self, reply: &[u8; COOKIE_BYTES], mac1: &Mac) -> Option<Mac> {
        let mut cookie: Mac = reply[32..48].try_into().ok()?;
        let (nonce, tag) = (XNonce::from_slice(&reply[8..32]), Tag::from_slice(&reply[48..]));
        let cipher = XChaCha20Poly1305::new(&self.cookie_key.into());
        cipher.decrypt_in_place_detached(nonce, mac1, &mut cookie, tag).ok()?;
        Some(cookie)
    }
}

impl Jar {
    /// Completes a message to a peer, with the cookie while it is fresh.
    pub fn sign(&mut self, now: Instant, macs: &Macs, message: &mut [u8]) {
        let fresh =
            self.cookie.filter(|(_, since)| now.saturating_duration_since(*since) < COOKIE_LIFE);
        self.last_mac1 = Some(macs.sign(message, fresh.as_ref().map(|(cookie, _)| cookie)));
    }

    /// The cookie, and since when there is one.
    pub fn leave(&self) -> Option<(Mac, Instant)> {
        self.cookie
    }

    /// A jar with the cookie of another one.
    pub fn resume(cookie: Option<(Mac, Instant)>) -> Self {
        Self { last_mac1: None, cookie }
    }

    /// Keeps the cookie of a reply to the last message; false when it is no such reply.
    pub fn keep(&mut self, now: Instant, macs: &Macs, reply: &[u8; COOKIE_BYTES]) -> bool {
        let Some(cookie) = self.last_mac1.and_then(|mac1| macs.open(reply, &mac1)) else {
            return false;
        };
        self.cookie = Some((cookie, now));
        self.last_mac1 = None; // a second reply to the same message would be a replay
        true
    }
}

impl Baker {
    /// Starts with a random secret.
    pub fn new(now: Instant, secret: [u8; 32]) -> Self {
        Self { secret, since: now }
    }

    /// The cookie for an address and port; `fresh` gives a new secret when the old one has served long enough.
    pub fn bake(
        &mut self,
        now: Instant,
        source: SocketAddr,
        fresh: impl FnOnce() -> [u8; 32],
    ) -> Mac {
        if now.saturating_duration_since(self.since) >= COOKIE_LIFE {
            *self = Self::new(now, fresh());
        }
        let port = source.port().to_be_bytes();
        match source.ip() {
            IpAddr::V4(ip) => mac(&self.secret, &[&ip.octets(), &port]),
            IpAddr::V6(ip) => mac(&self.secret, &[&ip.octets(), &port]),
        }
    }
}

fn labelled(label: &[u8; 8], key: &WgKey) -> [u8; 32] {
    Blake2s256::new().chain_update(label).chain_update(key.0).finalize().into()
}

fn mac(key: &[u8], parts: &[&[u8]]) -> Mac {
    let mut mac = Blake2sMac::<U16>::new_from_slice(key).expect("keys of up to 32 bytes are taken");
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize_fixed().into()
}

/// In constant time.
fn equal(a: &Mac, b: &[u8]) -> bool {
    aws_lc_rs::constant_time::verify_slices_are_equal(a, b).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOME: &str = "192.0.2.1:51900";

    #[test]
    fn a_cookie_holds_for_an_address_and_a_port_until_the_secret_changes() {
        let now = Instant::now();
        let mut baker = Baker::new(now, [1; 32]);
        let bake = |baker: &mut Baker, at: u64, source: &str| {
            baker.bake(now + Duration::from_secs(at), source.parse().unwrap(), || [2; 32])
        };
        let cookie = bake(&mut baker, 0, HOME);
        assert_eq!(cookie, bake(&mut baker, 119, HOME));
        for other in ["192.0.2.1:51901", "192.0.2.2:51900", "[::192.0.2.1]:51900"] {
            assert_ne!(cookie, bake(&mut baker, 0, other), "{other}");
        }
        assert_ne!(cookie, bake(&mut baker, 120, HOME));
    }

    #[test]
    fn the_caller_shows_the_cookie_it_was_given_and_no_other() {
        let now = Instant::now();
        let macs = Macs::for_receiver(&WgKey([7; 32]));
        let (mut jar, mut message) = (Jar::default(), [5; 148]);
        jar.sign(now, &macs, &mut message);
        assert!(macs.is_addressed(&message));
        assert!(!Macs::for_receiver(&WgKey([8; 32])).is_addressed(&message));
        let cookie = Baker::new(now, [1; 32]).bake(now, HOME.parse().unwrap(), || [2; 32]);
        assert!(!Macs::shows(&message, &cookie));

        let reply = macs.reply(&message, &cookie, &[9; 24]);
        let mut forged = reply;
        forged[40] ^= 1;
        assert!(!jar.keep(now, &macs, &forged));
        assert!(jar.keep(now, &macs, &reply));
        assert!(!jar.keep(now, &macs, &reply), "not twice");
        jar.sign(now, &macs, &mut message);
        assert!(Macs::shows(&message, &cookie));
        message = [5; 148];
        jar.sign(now + COOKIE_LIFE, &macs, &mut message);
        assert!(!Macs::shows(&message, &cookie), "it has gone stale");
    }
}
