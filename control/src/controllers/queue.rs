//! Which objects to look at next: each at most once at a time, failed ones later and later.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

const FIRST_RETRY: Duration = Duration::from_millis(10);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// A queue of keys. A key that is added again while it is being worked on comes once more afterwards.
pub(crate) struct WorkQueue<T> {
    state: Mutex<State<T>>,
    wake: Notify,
}

struct State<T> {
    ready: VecDeque<T>,
    waiting: HashSet<T>,
    busy: HashSet<T>,
    later: BTreeMap<(Instant, u64), T>,
    due: HashMap<T, (Instant, u64)>,
    failures: HashMap<T, u32>,
    sequence: u64,
}

impl<T: Clone + Eq + Hash> WorkQueue<T> {
    pub(crate) fn new() -> Arc<Self> {
        let state = State {
            ready: VecDeque::new(),
            waiting: HashSet::new(),
            busy: HashSet::new(),
            later: BTreeMap::new(),
            due: HashMap::new(),
            failures: HashMap::new(),
            sequence: 0,
        };
        Arc::new(Self { state: Mutex::new(state), wake: Notify::new() })
    }

    /// Has `key` looked at soon.
    pub(crate) fn add(&self, key: T) {
        if self.lock().add(key) {
            self.wake.notify_one();
        }
    }

    /// Has `key` looked at after a while, or earlier if something else asks for it.
    pub(crate) fn add_after(&self, key: T, delay: Duration) {
        self.lock().add_at(key, Instant::now() + delay);
        self.wake.notify_one();
    }

    /// Has a key that failed looked at again, later each time.
    pub(crate) fn retry(&self, key: T) {
        let mut state = self.lock();
        let failures = state.failures.entry(key.clone()).or_insert(0);
        let delay = FIRST_RETRY.saturating_mul(1 << (*failures).min(16)).min(LAST_RETRY);
        *failures += 1;
        state.add_at(key, Instant::now() + delay);
        drop(state);
        self.wake.notify_one();
    }

    /// Forgets that a key ever failed.
    pub(crate) fn forget(&self, key: &T) {
        self.lock().failures.remove(key);
    }

    /// The next key; call [`done`](Self::done) with it afterwards. Cancel safe.
    pub(crate) async fn next(&self) -> T {
        loop {
            let until = {
                let mut state = self.lock();
                state.promote(Instant::now());
                if let Some(key) = state.ready.pop_front() {
                    state.waiting.remove(&key);
                    state.busy.insert(key.clone());
                    if !state.ready.is_empty() {
                        self.wake.notify_one();
                    }
                    return key;
                }
                state.later.first_key_value().map(|((at, _), _)| *at)
            };
            match until {
                Some(at) => {
                    let _ = tokio::time::timeout_at(at, self.wake.notified()).await;
                }
                None => self.wake.notified().await,
            }
        }
    }

    /// Says that the work on `key` ended.
    pub(crate) fn done(&self, key: &T) {
        let mut state = self.lock();
        state.busy.remove(key);
        if state.waiting.contains(key) {
            state.ready.push_back(key.clone());
            drop(state);
            self.wake.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Clone + Eq + Hash> State<T> {
    /// Whether somebody has to wake up.
    fn add(&mut self, key: T) -> bool {
        if !self.waiting.insert(key.clone()) || self.busy.contains(&key) {
            return false;
        }
        self.ready.push_back(key);
        true
    }

    fn add_at(&mut self, key: T, at: Instant) {
        if let Some(due) = self.due.get(&key) {
            if due.0 <= at {
                return;
            }
            self.later.remove(due);
        }
        self.sequence += 1;
        self.due.insert(key.clone(), (at, self.sequence));
        self.later.insert((at, self.sequence), key);
    }

    fn promote(&mut self, now: Instant) {
        while let Some(entry) = self.later.first_entry() {
            if entry.key().0 > now {
                break;
            }
            let key = entry.remove();
            self.due.remove(&key);
            self.add(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_key_is_worked_on_once_at_a_time_and_once_more_when_added_meanwhile() {
        let queue = WorkQueue::new();
        queue.add("a");
        queue.add("a");
        queue.add("b");
        assert_eq!(queue.next().await, "a");
        queue.add("a");
        assert_eq!(queue.next().await, "b");
        let more = tokio::time::timeout(Duration::from_secs(1), queue.next()).await;
        assert!(more.is_err(), "a is still being worked on");
        queue.done(&"a");
        assert_eq!(queue.next().await, "a");
    }

    #[tokio::test(start_paused = true)]
    async fn delays_keep_the_earliest_and_failures_wait_longer() {
        let queue = WorkQueue::new();
        let start = Instant::now();
        queue.add_after("a", Duration::from_secs(9));
        queue.add_after("a", Duration::from_secs(5));
        queue.add_after("a", Duration::from_secs(7));
        assert_eq!(queue.next().await, "a");
        assert_eq!(start.elapsed().as_secs(), 5);
        queue.done(&"a");
        let mut waits = Vec::new();
        for _ in 0..14 {
            let start = Instant::now();
            queue.retry("a");
            assert_eq!(queue.next().await, "a");
            queue.done(&"a");
            waits.push(start.elapsed());
        }
        assert!(waits.is_sorted() && waits[0] < Duration::from_millis(20));
        assert!(waits[13] >= LAST_RETRY && waits[13] < LAST_RETRY * 2);
        queue.forget(&"a");
        let start = Instant::now();
        queue.retry("a");
        queue.next().await;
        assert!(start.elapsed() < Duration::from_millis(20));
    }

    #[tokio::test(start_paused = true)]
    async fn many_workers_share_the_keys() {
        let queue = WorkQueue::new();
        let mut workers = tokio::task::JoinSet::new();
        for _ in 0..4 {
            let queue = queue.clone();
            workers.spawn(async move {
                let key: u32 = queue.next().await;
                queue.done(&key);
                key
            });
        }
        tokio::task::yield_now().await;
        (0..4).for_each(|n| queue.add(n));
        let mut seen: Vec<_> = workers.join_all().await;
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 3]);
    }
}
