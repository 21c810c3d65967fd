//! How long a pod that ended waits until it is made again under its name, or on its node: each time twice as long.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use mesh_model::ObjectKey;

use crate::objects;

const FIRST: SignedDuration = SignedDuration::from_secs(1);
const LONGEST: SignedDuration = SignedDuration::from_mins(15);

/// The places of one set whose pods ended lately: nodes, or names. Pure.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Backoff {
    places: HashMap<String, Wait>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Wait {
    since: Timestamp,
    length: SignedDuration,
}

impl Wait {
    fn end(&self) -> Timestamp {
        self.since.checked_add(self.length).unwrap_or(Timestamp::MAX)
    }

    /// Whether nothing ended for so long that the next time is the first one again.
    fn is_over(&self, now: Timestamp) -> bool {
        now.duration_since(self.since) > LONGEST * 2
    }
}

impl Backoff {
    /// Until when the place has to wait; `None` when it need not.
    pub(super) fn until(&self, place: &str, now: Timestamp) -> Option<Timestamp> {
        self.places.get(place).map(Wait::end).filter(|end| *end > now)
    }

    /// Notes that a pod which ended there is made again now.
    pub(super) fn note(&mut self, place: &str, now: Timestamp) {
        self.places.retain(|_, wait| !wait.is_over(now));
        let before = self.places.get(place).map(|wait| wait.length);
        let length = before.map_or(FIRST, |length| (length * 2).min(LONGEST));
        self.places.insert(place.to_owned(), Wait { since: now, length });
    }
}

/// What waits of each set of a kind, for as long as the set asks for the same.
#[derive(Default)]
pub(super) struct Backoffs(Mutex<HashMap<ObjectKey, (Identity, Backoff)>>);

/// Unique id and generation.
type Identity = (Option<String>, Option<i64>);

impl Backoffs {
    /// What waits of a set.
    pub(super) fn of(&self, set: &ObjectMeta) -> Backoff {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = all.get(&key(set)).filter(|(known, _)| *known == identity(set));
        found.map(|(_, backoff)| backoff.clone()).unwrap_or_default()
    }

    /// Notes that a pod of a set is made again.
    pub(super) fn note(&self, set: &ObjectMeta, place: &str, now: Timestamp) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = all.entry(key(set)).or_default();
        if entry.0 != identity(set) {
            *entry = (identity(set), Backoff::default());
        }
        entry.1.note(place, now);
    }

    /// Forgets a set that is gone.
    pub(super) fn forget(&self, set: &ObjectKey) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(set);
    }
}

fn key(set: &ObjectMeta) -> ObjectKey {
    ObjectKey::new(objects::namespace(set), objects::name(set))
}

fn identity(set: &ObjectMeta) -> Identity {
    (set.uid.clone(), set.generation)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + secs).unwrap()
    }

    #[test]
    fn each_wait_is_twice_as_long_and_none_is_longer_than_a_quarter_of_an_hour() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.until("n", at(0)), None, "the first time at once");
        let mut now = 0;
        for length in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900] {
            backoff.note("n", at(now));
            assert_eq!(backoff.until("n", at(now)), Some(at(now + length)));
            assert_eq!(backoff.until("other", at(now)), None);
            now += length;
            assert_eq!(backoff.until("n", at(now)), None);
        }
        now += 1801;
        backoff.note("n", at(now));
        assert_eq!(backoff.until("n", at(now)), Some(at(now + 1)), "it ran for long");
    }

    #[test]
    fn who_asks_for_something_else_does_not_wait() {
        let backoffs = Backoffs::default();
        let set = |generation| ObjectMeta {
            name: Some("s".to_owned()),
            uid: Some("u".to_owned()),
            generation: Some(generation),
            ..ObjectMeta::default()
        };
        backoffs.note(&set(1), "n", at(0));
        assert!(backoffs.of(&set(1)).until("n", at(0)).is_some());
        assert_eq!(backoffs.of(&set(2)), Backoff::default());
        backoffs.note(&set(2), "m", at(0));
        assert!(backoffs.of(&set(2)).until("n", at(0)).is_none());
        backoffs.forget(&key(&set(2)));
        assert_eq!(backoffs.of(&set(2)), Backoff::default());
    }
}
