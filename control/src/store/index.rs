//! The readers' side of a store: all records in memory, and the recent changes of each bucket.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use tokio::sync::watch;

use super::{Change, Compacted, Page, Range, Record, bucket};

/// Changes that are remembered per bucket.
const WINDOW_CHANGES: usize = 4096;
/// Bytes of values that are remembered per bucket, beyond those that are current.
const WINDOW_BYTES: usize = 8 << 20;

/// Records and recent changes. Clones share one state.
#[derive(Debug, Clone, Default)]
pub struct Index(Arc<RwLock<State>>);

#[derive(Debug, Default)]
struct State {
    revision: u64,
    /// What was known at the start, or compacted since, for buckets without a window of their own.
    floor: u64,
    records: BTreeMap<Arc<str>, Arc<Record>>,
    windows: HashMap<String, Window>,
}

#[derive(Debug)]
struct Window {
    changes: VecDeque<Arc<Change>>,
    bytes: usize,
    /// The revision of the newest change that was forgotten.
    floor: u64,
    newest: watch::Sender<u64>,
}

impl Index {
    /// An index of `records`, all of them at or before `revision`; what came before is forgotten.
    pub fn new(revision: u64, records: impl IntoIterator<Item = Record>) -> Self {
        let records = records
            .into_iter()
            .map(|r| (Arc::clone(&r.key), Arc::new(r)))
            .collect::<BTreeMap<_, _>>();
        let state = State { revision, floor: revision, records, windows: HashMap::new() };
        Self(Arc::new(RwLock::new(state)))
    }

    /// The newest revision.
    pub fn revision(&self) -> u64 {
        self.read().revision
    }

    /// The record of a key.
    pub fn get(&self, key: &str) -> Option<Arc<Record>> {
        self.read().records.get(key).cloned()
    }

    /// Records under a prefix; an older snapshot is made by undoing the changes since.
    pub fn range(&self, range: Range<'_>) -> Result<Page, Compacted> {
        let state = self.read();
        let revision = range.revision.unwrap_or(state.revision);
        let undone = state.undone(range.prefix, revision)?;
        let start = match range.after {
            Some(after) if after >= range.prefix => Bound::Excluded(after),
            _ => Bound::Included(range.prefix),
        };
        let current = state
            .records
            .range::<str, _>((start, Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(range.prefix));
        let limit = range.limit.unwrap_or(usize::MAX);
        if undone.is_empty() {
            let mut current = current.map(|(_, record)| record);
            let records: Vec<_> = current.by_ref().take(limit).cloned().collect();
            let remaining = if records.len() == limit { current.count() } else { 0 };
            return Ok(Page { records, revision, remaining });
        }
        let mut all: BTreeMap<&str, Arc<Record>> =
            current.map(|(key, record)| (&**key, Arc::clone(record))).collect();
        for (key, record) in &undone {
            let wanted = key.starts_with(range.prefix) && range.after.is_none_or(|a| **key > *a);
            match record {
                Some(record) if wanted => drop(all.insert(key, Arc::clone(record))),
                _ => drop(all.remove(&**key)),
            }
        }
        let remaining = all.len().saturating_sub(limit);
        Ok(Page { records: all.into_values().take(limit).collect(), revision, remaining })
    }

    /// Makes changes of one transaction visible and wakes those who watch.
    pub fn apply(&self, revision: u64, changes: Vec<Change>) {
        let mut state = self.write();
        state.revision = revision;
        for change in changes {
            match &change.record {
                Some(record) => drop(state.records.insert(Arc::clone(&change.key), record.clone())),
                None => drop(state.records.remove(&change.key)),
            }
            state.window(bucket(&change.key)).push(change);
        }
    }

    /// Changes of `bucket` after `after`, then those to come.
    pub fn watch(&self, bucket: &str, after: u64) -> Watch {
        let newest = self.write().window(bucket).newest.subscribe();
        Watch { index: self.clone(), bucket: bucket.to_owned(), position: after, newest }
    }

    /// Forgets changes up to `revision`.
    pub fn compact(&self, revision: u64) {
        let mut state = self.write();
        state.floor = state.floor.max(revision.min(state.revision));
        let floor = state.floor;
        for window in state.windows.values_mut() {
            while window.changes.front().is_some_and(|change| change.revision <= floor) {
                window.forget();
            }
            window.floor = window.floor.max(floor);
        }
    }

    fn since(&self, bucket: &str, after: u64) -> Result<(Vec<Arc<Change>>, u64), Compacted> {
        let state = self.read();
        let floor = state.windows.get(bucket).map_or(state.floor, |w| w.floor);
        if after < floor {
            return Err(Compacted { asked: after, oldest: floor });
        }
        let changes = state.windows.get(bucket).map(|w| w.after(after).cloned().collect());
        Ok((changes.unwrap_or_default(), state.revision))
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.0.read().expect("no code panics while it holds the index")
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.0.write().expect("no code panics while it holds the index")
    }
}

impl State {
    fn window(&mut self, bucket: &str) -> &mut Window {
        if !self.windows.contains_key(bucket) {
            let window = Window {
                changes: VecDeque::new(),
                bytes: 0,
                floor: self.floor,
                newest: watch::Sender::new(0),
            };
            self.windows.insert(bucket.to_owned(), window);
        }
        self.windows.get_mut(bucket).expect("inserted above")
    }

    /// What the keys of a prefix had at `revision` that differs from what they have now.
    #[allow(clippy::type_complexity)]
    fn undone(
        &self,
        prefix: &str,
        revision: u64,
    ) -> Result<HashMap<Arc<str>, Option<Arc<Record>>>, Compacted> {
        let mut undone = HashMap::new();
        if revision >= self.revision {
            return Ok(undone);
        }
        let window = self.windows.get(bucket(prefix));
        let floor = window.map_or(self.floor, |w| w.floor);
        if revision < floor {
            return Err(Compacted { asked: revision, oldest: floor });
        }
        for change in window.into_iter().flat_map(|w| w.after(revision)) {
            undone.entry(Arc::clone(&change.key)).or_insert_with(|| change.previous.clone());
        }
        Ok(undone)
    }
}

impl Window {
    fn push(&mut self, change: Change) {
        let revision = change.revision;
        self.bytes += size(&change);
        self.changes.push_back(Arc::new(change));
        while self.changes.len() > WINDOW_CHANGES
            || (self.bytes > WINDOW_BYTES && self.changes.len() > 1)
        {
            self.forget();
        }
        self.newest.send_replace(revision);
    }

    fn forget(&mut self) {
        if let Some(change) = self.changes.pop_front() {
            self.bytes -= size(&change);
            self.floor = self.floor.max(change.revision);
        }
    }

    fn after(&self, revision: u64) -> impl Iterator<Item = &Arc<Change>> {
        let start = self.changes.partition_point(|change| change.revision <= revision);
        self.changes.range(start..)
    }
}

fn size(change: &Change) -> usize {
    change.previous.as_ref().map_or(64, |record| record.value.len() + 64)
}

/// A position in the changes of one bucket. Holds no queue: a slow reader costs no memory, and learns with
/// [`Compacted`] that it fell behind what is remembered.
#[derive(Debug)]
pub struct Watch {
    index: Index,
    bucket: String,
    position: u64,
    newest: watch::Receiver<u64>,
}

impl Watch {
    /// The changes since the last call, at least one. Cancel safe: nothing is lost when the call is dropped.
    pub async fn changes(&mut self) -> Result<Vec<Arc<Change>>, Compacted> {
        loop {
            self.newest.borrow_and_update();
            let changes = self.ready()?;
            if !changes.is_empty() {
                return Ok(changes);
            }
            if self.newest.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// The changes since the last call, without waiting; afterwards [`position`](Self::position) is the
    /// newest revision of the whole store.
    pub fn ready(&mut self) -> Result<Vec<Arc<Change>>, Compacted> {
        let (changes, revision) = self.index.since(&self.bucket, self.position)?;
        self.position = self.position.max(revision);
        Ok(changes)
    }

    /// All changes up to this revision have been returned.
    pub fn position(&self) -> u64 {
        self.position
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn put(index: &Index, key: &str, value: &str) -> u64 {
        let revision = index.revision() + 1;
        let key: Arc<str> = key.into();
        let value = Bytes::from(value.to_owned());
        let record = Arc::new(Record { key: Arc::clone(&key), revision, value });
        let previous = index.get(&key);
        index.apply(revision, vec![Change { revision, key, record: Some(record), previous }]);
        revision
    }

    fn delete(index: &Index, key: &str) {
        let revision = index.revision() + 1;
        let previous = index.get(key);
        index.apply(revision, vec![Change { revision, key: key.into(), record: None, previous }]);
    }

    fn keys(page: &Page) -> Vec<&str> {
        page.records.iter().map(|r| &*r.key).collect()
    }

    #[test]
    fn pages_are_of_one_snapshot() {
        let index = Index::default();
        for name in ["a", "b", "c", "d"] {
            put(&index, &format!("core/pods/ns/{name}"), name);
        }
        put(&index, "core/pods/nt/z", "other namespace");
        let range = Range { prefix: "core/pods/ns/", limit: Some(2), ..Range::default() };
        let first = index.range(range).unwrap();
        assert_eq!(keys(&first), ["core/pods/ns/a", "core/pods/ns/b"]);
        assert_eq!((first.revision, first.remaining), (5, 2));

        delete(&index, "core/pods/ns/c");
        put(&index, "core/pods/ns/d", "changed");
        put(&index, "core/pods/ns/bb", "new");
        let range = Range { after: Some("core/pods/ns/b"), revision: Some(5), ..range };
        let second = index.range(range).unwrap();
        assert_eq!(keys(&second), ["core/pods/ns/c", "core/pods/ns/d"]);
        assert_eq!(second.records[1].value, "d");
        assert_eq!(second.remaining, 0);

        index.compact(7);
        assert_eq!(index.range(range).unwrap_err(), Compacted { asked: 5, oldest: 7 });
    }

    #[tokio::test]
    async fn a_watch_sees_its_bucket_only_and_says_when_it_fell_behind() {
        let index = Index::new(10, []);
        let mut watch = index.watch("core/pods/", 10);
        let mut old = index.watch("core/pods/", 9);
        assert_eq!(old.changes().await.unwrap_err(), Compacted { asked: 9, oldest: 10 });
        put(&index, "core/nodes//n", "1");
        put(&index, "core/pods/ns/a", "1");
        let changes = watch.changes().await.unwrap();
        assert_eq!(changes.len(), 1);
        assert_eq!(changes[0].revision, 12);
        assert_eq!(watch.position(), 12);
        for i in 0..=WINDOW_CHANGES {
            put(&index, "core/pods/ns/a", &i.to_string());
        }
        assert_eq!(watch.changes().await.unwrap_err().asked, 12);
    }
}
