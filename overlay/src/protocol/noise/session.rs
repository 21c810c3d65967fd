//! A session: the keys that a handshake agreed on, and what they may still be used for (WG sections 5.4.6 and 6).
//!
//! Threads seal and open side by side: a message takes one atomic number, no lock; only the replay window has one.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

use zeroize::Zeroizing;

use super::message::{Data, HEADER_BYTES, SEAL_OVERHEAD, TAG_BYTES, TYPE_DATA};
use super::replay::Window;
use crate::protocol::estate::{Moment, Secret, SessionEstate};

/// Age at which the side that called asks for a new session.
pub const REKEY_AFTER: Duration = Duration::from_secs(120);

/// Age at which a session is dead.
pub const REJECT_AFTER: Duration = Duration::from_secs(180);

/// Messages after which a new session is asked for.
pub const REKEY_AFTER_MESSAGES: u64 = 1 << 60;

/// Messages after which a session is dead.
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// Keys for both directions, with their counters.
pub struct Session {
    index: u32,
    remote_index: u32,
    created: Instant,
    caller: bool,
    sender: LessSafeKey,
    receiver: LessSafeKey,
    /// Of sender and receiver, for a successor: a cipher does not give its key back.
    keys: Zeroizing<[[u8; 32]; 2]>,
    next_counter: AtomicU64,
    window: Mutex<Window>,
    confirmed: AtomicBool,
}

/// What a handshake agreed on.
pub struct Agreement {
    /// Key for messages of the side that called.
    pub caller_key: [u8; 32],
    /// Key for messages of the side that answered.
    pub callee_key: [u8; 32],
    /// By which this side tells the session.
    pub index: u32,
    /// By which the other side does.
    pub remote_index: u32,
}

impl Session {
    /// A session on the side that called: the response has proved that the other side has it too.
    pub fn as_caller(now: Instant, agreement: &Agreement) -> Self {
        Self::new(now, agreement, true)
    }

    /// A session on the side that answered: not to be used before the other side has.
    pub fn as_callee(now: Instant, agreement: &Agreement) -> Self {
        Self::new(now, agreement, false)
    }

    fn new(now: Instant, agreement: &Agreement, caller: bool) -> Self {
        let (own, other) = (&agreement.caller_key, &agreement.callee_key);
        let (sender, receiver) = if caller { (own, other) } else { (other, own) };
        Self {
            index: agreement.index,
            remote_index: agreement.remote_index,
            created: now,
            caller,
            sender: cipher(sender),
            receiver: cipher(receiver),
            keys: Zeroizing::new([*sender, *receiver]),
            next_counter: AtomicU64::new(0),
            window: Mutex::default(),
            confirmed: AtomicBool::new(caller),
        }
    }

    /// Leaves the session to a successor; this one seals nothing more.
    ///
    /// In one step the number of the next message is taken and put out of reach. Who seals at the same time has either got a
    /// number below it before, or gets one that no successor ever reaches.
    pub fn leave(&self, left: Instant) -> SessionEstate {
        let next_counter = self.next_counter.swap(REJECT_AFTER_MESSAGES, Relaxed);
        let (window_next, window) =
            self.window.lock().unwrap_or_else(PoisonError::into_inner).leave();
        SessionEstate {
            index: self.index,
            remote_index: self.remote_index,
            created: Moment::new(left, self.created),
            caller: self.caller,
            confirmed: self.is_confirmed(),
            sender: Secret::new(self.keys[0]),
            receiver: Secret::new(self.keys[1]),
            next_counter,
            window_next,
            window: Secret::new(window),
        }
    }

    /// Goes on with a session that its process has [left](Self::leave), which takes the estate away from everybody else.
    /// None when its age makes no sense.
    pub fn resume(left: Instant, estate: SessionEstate) -> Option<Self> {
        Some(Self {
            index: estate.index,
            remote_index: estate.remote_index,
            created: estate.created.after(left)?,
            caller: estate.caller,
            sender: cipher(estate.sender.bytes()),
            receiver: cipher(estate.receiver.bytes()),
            keys: Zeroizing::new([*estate.sender.bytes(), *estate.receiver.bytes()]),
            next_counter: AtomicU64::new(estate.next_counter),
            window: Mutex::new(Window::resume(estate.window_next, estate.window.bytes())),
            confirmed: AtomicBool::new(estate.confirmed),
        })
    }

    /// By which datagrams name it.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Whether this side called.
    pub fn is_caller(&self) -> bool {
        self.caller
    }

    /// When it was agreed.
    pub fn created(&self) -> Instant {
        self.created
    }

    /// Whether it may still be used.
    pub fn is_alive(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.created) < REJECT_AFTER
            && self.messages() < REJECT_AFTER_MESSAGES
    }

    /// Messages sealed so far.
    pub fn messages(&self) -> u64 {
        self.next_counter.load(Relaxed)
    }

    /// Whether the other side has shown that it has the session.
    pub fn is_confirmed(&self) -> bool {
        self.confirmed.load(Relaxed)
    }

    /// The other side has shown it.
    pub fn confirm(&self) {
        self.confirmed.store(true, Relaxed);
    }

    /// Encrypts a padded packet, or a keepalive when it is empty. Returns the length of the message in `out`; none when
    /// `out` is too short or the session has sealed all that it may.
    pub fn seal(&self, packet: &[u8], out: &mut [u8]) -> Option<usize> {
        let out = out.get_mut(..packet.len() + SEAL_OVERHEAD)?;
        if self.messages() >= REJECT_AFTER_MESSAGES {
            return None;
        }
        let counter = self.next_counter.fetch_add(1, Relaxed);
        let (header, sealed) = out.split_at_mut(HEADER_BYTES);
        header[..4].copy_from_slice(&[TYPE_DATA, 0, 0, 0]);
        header[4..8].copy_from_slice(&self.remote_index.to_le_bytes());
        header[8..].copy_from_slice(&counter.to_le_bytes());
        let (cipher_text, tag) = sealed.split_at_mut(packet.len());
        let (nonce, aad) = (nonce(counter), Aad::empty());
        self.sender.seal_out_of_place_scatter(nonce, aad, packet, cipher_text, &[], tag).ok()?;
        Some(packet.len() + SEAL_OVERHEAD)
    }

    /// Decrypts into `out`. Returns the length of the packet, padding included; none when it is not authentic.
    ///
    /// Says nothing about replay: that is for [`accept`](Self::accept).
    pub fn open(&self, data: &Data<'_>, out: &mut [u8]) -> Option<usize> {
        let (cipher_text, tag) = data.sealed.split_at_checked(data.sealed.len() - TAG_BYTES)?;
        let plain = out.get_mut(..cipher_text.len())?;
        let (nonce, aad) = (nonce(data.counter), Aad::empty());
        self.receiver.open_separate_gather(nonce, aad, cipher_text, tag, plain).ok()?;
        Some(cipher_text.len())
    }

    /// Takes note of an authentic message; false when it is a replay.
    pub fn accept(&self, counter: u64) -> bool {
        counter < REJECT_AFTER_MESSAGES
            && self.window.lock().unwrap_or_else(PoisonError::into_inner).accept(counter)
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("index", &self.index).finish_non_exhaustive()
    }
}

fn cipher(key: &[u8; 32]) -> LessSafeKey {
    let key = UnboundKey::new(&CHACHA20_POLY1305, key).expect("the cipher takes 32 bytes");
    LessSafeKey::new(key)
}

/// Four zero bytes, then the counter (WG section 5.4.6).
fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::message::Message;
    use super::*;

    fn pair() -> (Session, Session) {
        let agreement = |index, remote_index| Agreement {
            caller_key: [1; 32],
            callee_key: [2; 32],
            index,
            remote_index,
        };
        let now = Instant::now();
        (Session::as_caller(now, &agreement(7, 9)), Session::as_callee(now, &agreement(9, 7)))
    }

    fn data(message: &[u8]) -> Data<'_> {
        match Message::read(message) {
            Some(Message::Data(data)) => data,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_one_side_seals_the_other_opens_once() {
        let (caller, callee) = pair();
        let (mut wire, mut plain) = ([0; 100], [0; 100]);
        let len = caller.seal(b"sixteen bytes ok", &mut wire).unwrap();
        let data = data(&wire[..len]);
        assert_eq!((data.receiver, data.counter, len), (9, 0, 48));
        assert_eq!(callee.open(&data, &mut plain), Some(16));
        assert_eq!(&plain[..16], b"sixteen bytes ok");
        assert!(callee.accept(data.counter));
        assert!(!callee.accept(data.counter));
        assert_eq!(caller.open(&data, &mut plain), None, "directions have keys of their own");
        assert_eq!(caller.seal(&[0; 69], &mut wire), None, "no room for 101 bytes");
    }

    #[test]
    fn no_flipped_bit_passes() {
        let (caller, callee) = pair();
        let mut wire = [0; 64];
        let len = caller.seal(&[7; 32], &mut wire).unwrap();
        for bit in 64..len * 8 {
            let mut altered = wire;
            altered[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(callee.open(&data(&altered[..len]), &mut [0; 64]), None, "bit {bit}");
        }
    }

    #[test]
    fn a_session_ends_by_age_and_by_count() {
        let (session, _) = pair();
        let created = session.created();
        assert!(session.is_alive(created + REJECT_AFTER - Duration::from_millis(1)));
        assert!(!session.is_alive(created + REJECT_AFTER));
        session.next_counter.store(REJECT_AFTER_MESSAGES - 1, Relaxed);
        assert!(session.seal(&[], &mut [0; 32]).is_some());
        assert!(session.seal(&[], &mut [0; 32]).is_none(), "the last number is never reached");
        assert!(!session.is_alive(created));
        assert!(!session.accept(REJECT_AFTER_MESSAGES));
    }

    #[test]
    fn a_session_goes_on_in_its_successor_and_only_there() {
        let (caller, callee) = pair();
        let (mut wire, mut plain) = ([0; 48], [0; 48]);
        let mut pass = |from: &Session, to: &Session| {
            let len = from.seal(&[5; 16], &mut wire)?;
            let data = data(&wire[..len]);
            to.open(&data, &mut plain)?;
            to.accept(data.counter).then_some(data.counter)
        };
        assert_eq!([(); 3].map(|()| pass(&caller, &callee)), [Some(0), Some(1), Some(2)]);
        let left = Instant::now();
        let (estate, other) = (caller.leave(left), callee.leave(left));
        assert_eq!(pass(&caller, &callee), None, "it has left");
        assert!(!caller.is_alive(left));
        let (heir, peer) =
            (Session::resume(left, estate).unwrap(), Session::resume(left, other).unwrap());
        assert_eq!(pass(&heir, &peer), Some(3));
        assert_eq!(pass(&peer, &heir), Some(0));
        assert!(!peer.accept(1) && !peer.accept(3), "what was seen stays seen");
        assert!(
            heir.is_caller() && heir.is_confirmed() && peer.is_confirmed() == callee.is_confirmed()
        );
        assert_eq!(heir.created(), caller.created());
    }

    #[test]
    fn leaving_while_others_seal_gives_no_number_twice() {
        let (caller, _) = pair();
        let (sealed, heir) = std::thread::scope(|scope| {
            let seal = || {
                let mut wire = [0; 48];
                let mut count = || {
                    let len = caller.seal(&[5; 16], &mut wire)?;
                    Some(data(&wire[..len]).counter)
                };
                std::iter::from_fn(&mut count).take(1_000_000).collect::<Vec<u64>>()
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(seal)).collect();
            std::thread::sleep(Duration::from_millis(2));
            let heir = Session::resume(Instant::now(), caller.leave(Instant::now())).unwrap();
            let sealed = threads.into_iter().flat_map(|thread| thread.join().unwrap());
            (sealed.collect::<Vec<u64>>(), heir)
        });
        let next = heir.messages();
        assert!(sealed.iter().all(|n| *n < next || *n >= REJECT_AFTER_MESSAGES), "{next}");
    }

    #[test]
    fn threads_never_take_the_same_number() {
        let (caller, callee) = pair();
        let numbers: Vec<u64> = std::thread::scope(|scope| {
            let seal = || {
                let mut wire = [0; 48];
                let one = |_| {
                    let len = caller.seal(&[5; 16], &mut wire).unwrap();
                    let data = data(&wire[..len]);
                    assert!(callee.open(&data, &mut [0; 16]).is_some());
                    assert!(callee.accept(data.counter));
                    data.counter
                };
                (0..500).map(one).collect::<Vec<_>>()
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(seal)).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        let unique: std::collections::HashSet<_> = numbers.iter().collect();
        assert_eq!((numbers.len(), unique.len()), (2000, 2000));
    }
}
