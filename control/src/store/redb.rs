//! The embedded store: one file, one writer thread, many transactions per commit.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use async_trait::async_trait;
use bytes::Bytes;
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use tokio::sync::{mpsc, oneshot};

use super::{Change, Compacted, Expect, Index, Op, Page, Range, Record, Store, TxnError, Watch};

/// Key -> revision (8 bytes, big endian) and value.
const OBJECTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("objects");
/// `revision` -> revision of the newest transaction.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const REVISION: &str = "revision";
/// The first revision is above the values that have a meaning of their own in requests.
const FIRST_REVISION: u64 = 1;
/// Transactions that share one commit at most.
const BATCH: usize = 512;
/// redb's own cache; the index answers the reads.
const CACHE_BYTES: usize = 4 << 20;

/// The store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file cannot be opened, created or repaired.
    #[error("cannot open the store {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<redb::Error>,
    },
    /// A record is not one that this program wrote.
    #[error("store {path}: the record of {key} is damaged")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
}

/// The embedded store. Dropping it waits for the writes under way.
#[derive(Debug)]
pub struct RedbStore {
    index: Index,
    /// Empty once the store is closed.
    writer: Mutex<Option<Link>>,
}

/// The way to the writer.
#[derive(Debug)]
struct Link {
    requests: mpsc::Sender<Request>,
    thread: JoinHandle<()>,
}

#[derive(Debug)]
struct Request {
    ops: Vec<Op>,
    reply: oneshot::Sender<Result<u64, TxnError>>,
}

impl RedbStore {
    /// Opens or creates the file. After an unclean stop the file is repaired first; no acknowledged write is lost.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let failed = |source: redb::Error| OpenError::Open {
            path: path.to_owned(),
            source: Box::new(source),
        };
        let db = Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create(path)
            .map_err(|e| failed(e.into()))?;
        let (revision, records) = load(&db).map_err(failed)?;
        let mut parsed = Vec::with_capacity(records.len());
        for (key, bytes) in records {
            let Some((head, value)) = bytes.split_first_chunk::<8>() else {
                return Err(OpenError::Damaged { path: path.to_owned(), key });
            };
            let value = Bytes::copy_from_slice(value);
            parsed.push(Record { key: key.into(), revision: u64::from_be_bytes(*head), value });
        }
        let index = Index::new(revision, parsed);
        let (requests, inbox) = mpsc::channel(BATCH);
        let writer = Writer { db, index: index.clone(), revision };
        let thread = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer.run(inbox))
            .map_err(|e| failed(redb::Error::Io(e)))?;
        Ok(Self { index, writer: Mutex::new(Some(Link { requests, thread })) })
    }

    fn link(&self) -> MutexGuard<'_, Option<Link>> {
        self.writer.lock().expect("no code panics while it holds the link to the writer")
    }
}

/// Blocks until the writer has finished and the file is closed.
fn shut(link: Option<Link>) {
    let Some(Link { requests, thread }) = link else { return };
    drop(requests);
    if thread.join().is_err() {
        tracing::error!("the store's writer panicked");
    }
}

impl Drop for RedbStore {
    fn drop(&mut self) {
        let link = self.link().take();
        shut(link);
    }
}

#[async_trait]
impl Store for RedbStore {
    fn revision(&self) -> u64 {
        self.index.revision()
    }

    fn get(&self, key: &str) -> Option<Arc<Record>> {
        self.index.get(key)
    }

    fn range(&self, range: Range<'_>) -> Result<Page, Compacted> {
        self.index.range(range)
    }

    fn watch(&self, bucket: &str, after: u64) -> Watch {
        self.index.watch(bucket, after)
    }

    async fn txn(&self, ops: Vec<Op>) -> Result<u64, TxnError> {
        let (reply, answer) = oneshot::channel();
        let requests = self.link().as_ref().map(|link| link.requests.clone());
        let requests = requests.ok_or(TxnError::Closed)?;
        requests.send(Request { ops, reply }).await.map_err(|_| TxnError::Closed)?;
        answer.await.map_err(|_| TxnError::Closed)?
    }

    async fn close(&self) {
        let link = self.link().take();
        if tokio::task::spawn_blocking(move || shut(link)).await.is_err() {
            tracing::error!("closing the store failed");
        }
    }

    fn compact(&self, revision: u64) {
        self.index.compact(revision);
    }
}

#[allow(clippy::type_complexity)]
fn load(db: &Database) -> Result<(u64, Vec<(String, Vec<u8>)>), redb::Error> {
    let create = db.begin_write()?;
    create.open_table(OBJECTS)?;
    create.open_table(META)?;
    create.commit()?;
    let read = db.begin_read()?;
    let revision = read.open_table(META)?.get(REVISION)?.map_or(FIRST_REVISION, |v| v.value());
    let mut records = Vec::new();
    for entry in read.open_table(OBJECTS)?.iter()? {
        let (key, value) = entry?;
        records.push((key.value().to_owned(), value.value().to_vec()));
    }
    Ok((revision, records))
}

/// The only one who writes.
struct Writer {
    db: Database,
    index: Index,
    revision: u64,
}

/// What a writer is told.
type Outcome = Result<u64, TxnError>;

/// What a batch does to the keys that it touches, before it is durable.
#[derive(Default)]
struct Batch {
    touched: HashMap<String, Option<Arc<Record>>>,
    changes: Vec<(u64, Vec<Change>)>,
    replies: Vec<(oneshot::Sender<Outcome>, Outcome)>,
}

impl Writer {
    fn run(mut self, mut inbox: mpsc::Receiver<Request>) {
        while let Some(first) = inbox.blocking_recv() {
            let mut batch = Batch::default();
            let mut revision = self.revision;
            let mut next = Some(first);
            let mut count = 0;
            while let Some(request) = next {
                let result = batch.add(&self.index, &mut revision, request.ops);
                batch.replies.push((request.reply, result));
                count += 1;
                next = if count < BATCH { inbox.try_recv().ok() } else { None };
            }
            self.finish(batch, revision);
        }
    }

    fn finish(&mut self, batch: Batch, revision: u64) {
        let outcome = if batch.changes.is_empty() { Ok(()) } else { self.commit(&batch, revision) };
        match &outcome {
            Ok(()) => {
                self.revision = revision;
                for (revision, changes) in batch.changes {
                    self.index.apply(revision, changes);
                }
            }
            Err(error) => tracing::error!(%error, "cannot write to the store"),
        }
        for (reply, result) in batch.replies {
            let result = match &outcome {
                Err(error) if result.is_ok() => Err(TxnError::Storage(error.to_string())),
                _ => result,
            };
            // Nobody listens when the caller has gone away: the write stands all the same.
            let _ = reply.send(result);
        }
    }

    fn commit(&self, batch: &Batch, revision: u64) -> Result<(), redb::Error> {
        let mut txn = self.db.begin_write()?;
        txn.set_durability(Durability::Immediate)?;
        {
            let mut objects = txn.open_table(OBJECTS)?;
            for (key, record) in &batch.touched {
                match record {
                    None => drop(objects.remove(key.as_str())?),
                    Some(record) => {
                        let mut bytes = Vec::with_capacity(8 + record.value.len());
                        bytes.extend_from_slice(&record.revision.to_be_bytes());
                        bytes.extend_from_slice(&record.value);
                        objects.insert(key.as_str(), bytes.as_slice())?;
                    }
                }
            }
            txn.open_table(META)?.insert(REVISION, revision)?;
        }
        txn.commit()?;
        Ok(())
    }
}

impl Batch {
    fn add(&mut self, index: &Index, revision: &mut u64, ops: Vec<Op>) -> Result<u64, TxnError> {
        for op in &ops {
            let actual = self.current(index, op.key()).map(|record| record.revision);
            let holds = match op.expect() {
                Expect::Any => true,
                Expect::Absent => actual.is_none(),
                Expect::Revision(revision) => actual == Some(revision),
            };
            if !holds {
                return Err(TxnError::Conflict { key: op.key().to_owned(), actual });
            }
        }
        let number = *revision + 1;
        let mut changes = Vec::new();
        for op in ops {
            let previous = self.current(index, op.key());
            let (key, record) = match op {
                Op::Check { .. } => continue,
                Op::Delete { key, .. } if previous.is_none() => {
                    drop(key);
                    continue;
                }
                Op::Delete { key, .. } => (key, None),
                Op::Put { key, value, .. } => {
                    let record = Record { key: key.as_str().into(), revision: number, value };
                    (key, Some(Arc::new(record)))
                }
            };
            let shared = key.as_str().into();
            changes.push(Change {
                revision: number,
                key: shared,
                record: record.clone(),
                previous,
            });
            self.touched.insert(key, record);
        }
        if !changes.is_empty() {
            *revision = number;
            self.changes.push((number, changes));
        }
        Ok(*revision)
    }

    fn current(&self, index: &Index, key: &str) -> Option<Arc<Record>> {
        self.touched.get(key).cloned().unwrap_or_else(|| index.get(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, value: &str, expect: Expect) -> Op {
        Op::Put { key: key.to_owned(), value: Bytes::from(value.to_owned()), expect }
    }

    #[tokio::test]
    async fn writes_survive_and_conditions_hold() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.redb");
        let store = RedbStore::open(&path).unwrap();
        let first = store.txn(vec![put("a/b/c/d", "1", Expect::Absent)]).await.unwrap();
        let again = store.txn(vec![put("a/b/c/d", "2", Expect::Absent)]).await;
        let conflict = TxnError::Conflict { key: "a/b/c/d".to_owned(), actual: Some(first) };
        assert_eq!(again, Err(conflict.clone()));
        let both = vec![
            put("a/b/c/e", "never", Expect::Any),
            put("a/b/c/d", "2", Expect::Revision(first + 7)),
        ];
        assert_eq!(store.txn(both).await, Err(conflict));
        assert!(store.get("a/b/c/e").is_none(), "all or nothing");
        let second = store.txn(vec![put("a/b/c/d", "2", Expect::Revision(first))]).await.unwrap();
        assert_eq!(second, first + 1);
        let gone = Op::Delete { key: "a/b/c/x".to_owned(), expect: Expect::Any };
        assert_eq!(store.txn(vec![gone]).await.unwrap(), second, "no change, no revision");
        drop(store);

        let store = RedbStore::open(&path).unwrap();
        assert_eq!(store.revision(), second);
        let record = store.get("a/b/c/d").unwrap();
        assert_eq!((record.revision, &*record.value), (second, &b"2"[..]));
    }

    #[tokio::test]
    async fn many_writers_share_commits_and_only_one_wins_each_key() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(RedbStore::open(&dir.path().join("store.redb")).unwrap());
        let start = store.revision();
        let mut tasks = tokio::task::JoinSet::new();
        for i in 0..200 {
            let store = Arc::clone(&store);
            let op = put(&format!("a/b/c/{}", i / 2), "x", Expect::Absent);
            tasks.spawn(async move { store.txn(vec![op]).await.is_ok() });
        }
        let won = tasks.join_all().await.into_iter().filter(|won| *won).count();
        assert_eq!(won, 100);
        assert_eq!(store.revision(), start + 100);
    }
}
