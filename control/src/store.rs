//! What the API keeps: keys, values, revisions. The contract that the embedded store fulfils and etcd could.
//!
//! One revision counter for the whole store, as in etcd: each transaction that changes something gets the next
//! one. A key is `GROUP/PLURAL/NAMESPACE/NAME`; its first two parts are the *bucket*, the unit of watching, so
//! that a change wakes only those who watch its kind.
//!
//! Reads never block on the disk: an implementation keeps an [`Index`] in memory, which shows durable writes
//! only. An implementation over etcd fills its index from an etcd watch.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

mod index;
mod redb;

pub use index::{Index, Watch};
pub use redb::{OpenError, RedbStore};

/// A value at a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The key.
    pub key: Arc<str>,
    /// The revision of the transaction that wrote it.
    pub revision: u64,
    /// The value.
    pub value: Bytes,
}

/// One key that a transaction changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The revision of the transaction.
    pub revision: u64,
    /// The key.
    pub key: Arc<str>,
    /// What the key has now; absent when it was deleted.
    pub record: Option<Arc<Record>>,
    /// What the key had before; absent when it is new.
    pub previous: Option<Arc<Record>>,
}

/// Part of the records under a prefix, in the order of their keys.
#[derive(Debug, Clone)]
pub struct Page {
    /// The records.
    pub records: Vec<Arc<Record>>,
    /// The revision that the records are a snapshot of.
    pub revision: u64,
    /// How many records follow the last one.
    pub remaining: usize,
}

/// Which records to read.
#[derive(Debug, Clone, Copy, Default)]
pub struct Range<'a> {
    /// Keys start with this: a bucket, or a bucket and a namespace.
    pub prefix: &'a str,
    /// Only keys greater than this one.
    pub after: Option<&'a str>,
    /// At most so many; all when absent.
    pub limit: Option<usize>,
    /// The snapshot to read; the newest when absent.
    pub revision: Option<u64>,
}

/// What a key must have for a transaction to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Nothing.
    Absent,
    /// The value that this revision wrote.
    Revision(u64),
    /// Whatever.
    Any,
}

/// One step of a transaction.
#[derive(Debug, Clone)]
pub enum Op {
    /// Only look.
    Check {
        /// The key.
        key: String,
        /// What it must have.
        expect: Expect,
    },
    /// Write.
    Put {
        /// The key.
        key: String,
        /// The value.
        value: Bytes,
        /// What it must have before.
        expect: Expect,
    },
    /// Delete; deleting what is absent is no change.
    Delete {
        /// The key.
        key: String,
        /// What it must have before.
        expect: Expect,
    },
}

impl Op {
    /// The key that the step is about.
    pub fn key(&self) -> &str {
        match self {
            Self::Check { key, .. } | Self::Put { key, .. } | Self::Delete { key, .. } => key,
        }
    }

    /// What the key must have.
    pub fn expect(&self) -> Expect {
        match self {
            Self::Check { expect, .. } | Self::Put { expect, .. } | Self::Delete { expect, .. } => {
                *expect
            }
        }
    }
}

/// A transaction did not happen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TxnError {
    /// A key does not have what the transaction expects.
    #[error("key {key} is at {actual:?}")]
    Conflict {
        /// The key.
        key: String,
        /// Its revision; none when it is absent.
        actual: Option<u64>,
    },
    /// The medium refused the write. Nothing of it is visible.
    #[error("cannot write to the store: {0}")]
    Storage(String),
    /// The store has been closed.
    #[error("the store is closed")]
    Closed,
}

/// The asked revision is older than what the store remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("revision {asked} is too old: the oldest that is kept is {oldest}")]
pub struct Compacted {
    /// The revision asked for.
    pub asked: u64,
    /// The oldest revision that could be answered.
    pub oldest: u64,
}

/// A key-value store with revisions, conditional transactions and watches.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The revision of the newest durable transaction.
    fn revision(&self) -> u64;

    /// The record of a key.
    fn get(&self, key: &str) -> Option<Arc<Record>>;

    /// Records under a prefix, as of one revision.
    fn range(&self, range: Range<'_>) -> Result<Page, Compacted>;

    /// All changes of a bucket after a revision, then those to come.
    fn watch(&self, bucket: &str, after: u64) -> Watch;

    /// Does all steps or none. Returns once the change is durable and visible, with its revision (the newest
    /// one when nothing had to change). Cancel safety: a dropped call may still take effect.
    async fn txn(&self, ops: Vec<Op>) -> Result<u64, TxnError>;

    /// Finishes the writes under way and lets go of the medium; later writes fail with [`TxnError::Closed`].
    async fn close(&self);

    /// Forgets changes up to `revision`: older watches and pages get [`Compacted`].
    fn compact(&self, revision: u64);
}

/// The bucket of a key: its first two parts, with the final `/`.
pub fn bucket(key: &str) -> &str {
    let end = key.match_indices('/').nth(1).map_or(key.len(), |(at, _)| at + 1);
    &key[..end]
}
