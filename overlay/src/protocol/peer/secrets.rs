//! The pre-shared key of a peer, and the one before it while the peer may not have learned of the change.

use std::time::{Duration, Instant};

use crate::config::PresharedKey;
use crate::protocol::estate::{Moment, Secret, SecretsEstate};
use crate::protocol::noise::Psk;

/// How long the key before serves after a handshake with the present one has succeeded: for calls under way.
const OVERLAP: Duration = Duration::from_secs(10);

/// Which pre-shared keys to try. Handshakes that fail tell nothing, so that both keys take turns while there are two.
#[derive(Debug)]
pub(super) struct Secrets {
    present: Psk,
    former: Option<Psk>,
    /// When a handshake with the present one succeeded.
    proven: Option<Instant>,
    /// Answers since one was taken.
    answers: u32,
}

impl Secrets {
    pub(super) fn new(key: Option<PresharedKey>) -> Self {
        Self { present: psk(key), former: None, proven: None, answers: 0 }
    }

    /// The keys, for a successor.
    pub(super) fn leave(&self, left: Instant) -> SecretsEstate {
        SecretsEstate {
            present: Secret::new(self.present),
            former: self.former.map(Secret::new),
            proven: self.proven.map(|at| Moment::new(left, at)),
        }
    }

    /// The keys that another one left.
    pub(super) fn resume(left: Instant, estate: &SecretsEstate) -> Self {
        Self {
            present: *estate.present.bytes(),
            former: estate.former.as_ref().map(|former| *former.bytes()),
            proven: estate.proven.and_then(|at| at.after(left)),
            answers: 0,
        }
    }

    /// Takes over a key; returns whether it is another one. `former` is one that the peer is known to have had, for a
    /// process that was not there when it was used.
    pub(super) fn replace(
        &mut self,
        key: Option<PresharedKey>,
        former: Option<PresharedKey>,
    ) -> bool {
        let key = psk(key);
        let changed = key != self.present;
        if changed {
            // A key that never agreed is nothing to go back to.
            if self.proven.take().is_some() {
                self.former = Some(self.present);
            }
            self.present = key;
            self.answers = 0;
        }
        if self.proven.is_none() && self.former.is_none() {
            self.former = former.map(|former| psk(Some(former))).filter(|former| *former != key);
        }
        changed
    }

    /// Whether there is a key, and a handshake with it has succeeded.
    pub(super) fn is_agreed(&self) -> bool {
        self.proven.is_some() && self.present != psk(None)
    }

    /// Whether no handshake with the present key has succeeded, though one with a former key has.
    pub(super) fn is_pending(&self) -> bool {
        self.proven.is_none() && self.former.is_some()
    }

    /// The key for a call: the present one, but each second time the former when a session is needed badly.
    pub(super) fn for_call(&self, attempt: u32, badly: bool) -> Psk {
        match self.former {
            Some(former) if badly && self.proven.is_none() && attempt % 2 == 1 => former,
            _ => self.present,
        }
    }

    /// The key for an answer: the present one, and the other one when the peer calls again without having used it.
    pub(super) fn for_answer(&mut self) -> Psk {
        let attempt = self.answers;
        self.answers = self.answers.wrapping_add(1);
        self.former.filter(|_| attempt % 2 == 1).unwrap_or(self.present)
    }

    /// A handshake with the key has succeeded.
    pub(super) fn agreed(&mut self, now: Instant, key: &Psk) {
        self.answers = 0;
        if *key == self.present {
            self.proven.get_or_insert(now);
        }
    }

    /// Forgets the former key when it is of no more use.
    pub(super) fn retire(&mut self, now: Instant) {
        let proven = self.proven.is_some_and(|at| now.saturating_duration_since(at) >= OVERLAP);
        if proven {
            self.former = None;
        }
    }
}

fn psk(key: Option<PresharedKey>) -> Psk {
    key.map_or([0; 32], |key| key.0.0)
}

#[cfg(test)]
mod tests {
    use mesh_model::snapshot::WgKey;

    use super::*;

    fn key(n: u8) -> Option<PresharedKey> {
        Some(PresharedKey(WgKey([n; 32])))
    }

    #[test]
    fn the_former_key_serves_until_the_new_one_has() {
        let now = Instant::now();
        let mut secrets = Secrets::new(key(1));
        secrets.agreed(now, &[1; 32]);
        assert!(!secrets.replace(key(1), None) && secrets.is_agreed());
        assert!(secrets.replace(key(2), None) && secrets.is_pending() && !secrets.is_agreed());
        assert_eq!([0, 1].map(|n| secrets.for_call(n, true)[0]), [2, 1]);
        assert_eq!([0, 1].map(|n| secrets.for_call(n, false)[0]), [2, 2], "the session holds");
        assert_eq!([(); 3].map(|()| secrets.for_answer()[0]), [2, 1, 2]);

        assert!(secrets.replace(key(3), key(9)), "changed again before it was ever used");
        assert_eq!([0, 1].map(|n| secrets.for_call(n, true)[0]), [3, 1]);
        secrets.agreed(now, &[1; 32]);
        assert!(secrets.is_pending());
        secrets.agreed(now, &[3; 32]);
        assert!(!secrets.is_pending());
        secrets.retire(now + OVERLAP);
        assert_eq!([(); 2].map(|()| secrets.for_answer()[0]), [3, 3]);
    }

    #[test]
    fn a_new_process_is_told_what_the_peer_had() {
        let now = Instant::now();
        let mut secrets = Secrets::new(key(5));
        assert!(!secrets.replace(key(5), key(2)) && secrets.is_pending());
        assert_eq!([0, 1].map(|n| secrets.for_call(n, true)[0]), [5, 2]);
        secrets.agreed(now, &[2; 32]);
        assert!(secrets.is_pending(), "it has the old one still");
        secrets.agreed(now, &[5; 32]);
        secrets.retire(now + OVERLAP);
        assert!(!secrets.replace(key(5), key(2)));
        assert_eq!([(); 2].map(|()| secrets.for_answer()[0]), [5, 5], "what is over is over");
        let mut none = Secrets::new(None);
        none.agreed(now, &[0; 32]);
        assert!(!none.is_agreed(), "no key is no secret");
    }
}
