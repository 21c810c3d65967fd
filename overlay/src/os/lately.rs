//! What was found a moment ago, mostly nothing: read by all threads at once without a lock.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

/// Keys that were noted within some time.
#[derive(Debug)]
pub(crate) struct Lately<K> {
    noted: ArcSwap<BTreeMap<K, Instant>>,
    within: Duration,
}

impl<K: Ord + Copy> Lately<K> {
    /// Nothing.
    pub(crate) fn new(within: Duration) -> Self {
        Self { noted: ArcSwap::default(), within }
    }

    /// Whether the key was noted.
    pub(crate) fn has(&self, key: &K) -> bool {
        let noted = self.noted.load();
        !noted.is_empty() && noted.get(key).is_some_and(|at| at.elapsed() < self.within)
    }

    /// Notes a key, and forgets the old ones.
    pub(crate) fn note(&self, key: K) {
        let now = Instant::now();
        self.noted.rcu(|noted| {
            let young = |at: &Instant| now.saturating_duration_since(*at) < self.within;
            let young = noted.iter().filter(|(_, at)| young(at)).map(|(key, at)| (*key, *at));
            Arc::new(young.chain([(key, now)]).collect())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_known_and_forgotten() {
        let lately = Lately::new(Duration::from_secs(60));
        assert!(!lately.has(&1));
        lately.note(1);
        lately.note(2);
        assert!(lately.has(&1) && lately.has(&2) && !lately.has(&3));
        let never = Lately::new(Duration::ZERO);
        never.note(1);
        never.note(2);
        assert!(!never.has(&2));
        assert_eq!(never.noted.load().len(), 1, "what is old takes no room");
    }
}
