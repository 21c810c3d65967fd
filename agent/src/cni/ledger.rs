//! Pool and journal together: what is answered is in the journal.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;
use mesh_cni::wire::{Owner, Wishes};

use super::journal::{Journal, Record, Storage};
use super::pool::{Lease, Pool, ReserveError};

/// A change was not made, or is not durable. All leases are as before.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// There is no address to give.
    #[error(transparent)]
    Reserve(#[from] ReserveError),
    /// There is nothing to commit.
    #[error("no reservation for {0}")]
    NoLease(Owner),
    /// An address of an adopted interface belongs to somebody else.
    #[error("an address of {owner} belongs to {other}")]
    Conflict {
        /// The interface's owner.
        owner: Owner,
        /// The lease's owner.
        other: Owner,
    },
    /// The journal could not be written.
    #[error("write the address journal")]
    Journal(#[source] Arc<io::Error>),
    /// The ledger has ended.
    #[error("the address ledger has ended")]
    Ended,
}

/// A change to make.
#[derive(Debug, Clone)]
pub enum Change {
    /// Set addresses aside.
    Reserve(Owner, Arc<[IpNet]>, Wishes),
    /// The interface exists.
    Commit(Owner),
    /// The interface is about to go: whoever finds this in the journal removes it, as after an ADD that did not finish.
    Retire(Owner),
    /// The interface is gone.
    Release(Owner),
    /// An interface exists that the journal does not know.
    Adopt(Owner, Lease),
}

impl Change {
    /// Whose lease it is about.
    fn owner(&self) -> &Owner {
        match self {
            Self::Reserve(owner, ..)
            | Self::Commit(owner)
            | Self::Retire(owner)
            | Self::Release(owner)
            | Self::Adopt(owner, _) => owner,
        }
    }
}

/// What came of it: the lease, where there is one.
pub type Outcome = Result<Option<Lease>, LedgerError>;

/// Leases and their journal.
pub struct Ledger {
    pool: Pool,
    journal: Journal,
}

impl Ledger {
    /// Reads the journal; also the number of lines in it that made no sense.
    pub fn open(storage: Box<dyn Storage>, boot: &str) -> io::Result<(Self, usize)> {
        let (journal, pool, damaged) = Journal::open(storage, boot)?;
        Ok((Self { pool, journal }, damaged))
    }

    /// The leases.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Makes all changes with one write. Either the write succeeds, or no change has happened.
    pub fn change(&mut self, changes: &[Change], now_secs: u64) -> Vec<Outcome> {
        let mut records = vec![];
        // Not all of the pool: of that a node with many pods would have to copy much, twice for each.
        let mut before = vec![];
        let outcomes: Vec<Outcome> = changes
            .iter()
            .map(|change| {
                before.push(self.pool.mark(change.owner()));
                self.one(change, now_secs, &mut records)
            })
            .collect();
        match self.journal.append(&records, &self.pool) {
            Ok(()) => outcomes,
            Err(error) => {
                before.into_iter().rev().for_each(|mark| self.pool.return_to(mark));
                let error = Arc::new(error);
                outcomes
                    .into_iter()
                    .map(|outcome| outcome.and(Err(LedgerError::Journal(Arc::clone(&error)))))
                    .collect()
            }
        }
    }

    fn one(&mut self, change: &Change, now_secs: u64, records: &mut Vec<Record>) -> Outcome {
        match change {
            Change::Reserve(owner, blocks, wishes) => {
                let lease = self.pool.reserve_as(owner, blocks, wishes, now_secs)?;
                records.push(self.journal.reserve(owner, &lease));
                Ok(Some(lease))
            }
            Change::Commit(owner) => {
                if !self.pool.commit(owner) {
                    return Err(LedgerError::NoLease(owner.clone()));
                }
                records.push(Record::Commit { owner: owner.clone() });
                Ok(self.pool.lease(owner).cloned())
            }
            Change::Retire(owner) => {
                let lease = self.pool.retire(owner);
                records.extend(lease.as_ref().map(|lease| self.journal.reserve(owner, lease)));
                Ok(lease)
            }
            Change::Release(owner) => {
                let lease = self.pool.release(owner, now_secs);
                if lease.is_some() {
                    records.push(Record::Release { owner: owner.clone(), at: now_secs });
                }
                Ok(lease)
            }
            Change::Adopt(owner, lease) => {
                let conflict = |other| LedgerError::Conflict { owner: owner.clone(), other };
                self.pool.adopt(owner.clone(), lease.clone()).map_err(conflict)?;
                records.push(self.journal.reserve(owner, lease));
                records.push(Record::Commit { owner: owner.clone() });
                Ok(Some(lease.clone()))
            }
        }
    }
}

/// Many callers share one ledger. A write may take long where the disk is busy, so what is async here waits on a thread for that.
#[derive(Clone)]
pub struct LedgerHandle(Arc<Mutex<Ledger>>);

impl LedgerHandle {
    /// Shares a ledger.
    pub fn start(ledger: Ledger) -> io::Result<Self> {
        Ok(Self(Arc::new(Mutex::new(ledger))))
    }

    /// Makes a change, on a thread that may block; it outlives this process when this returns.
    pub fn apply(&self, change: Change) -> Outcome {
        let outcomes = self.lock().change(&[change], now());
        outcomes.into_iter().next().unwrap_or(Err(LedgerError::Ended))
    }

    /// Looks at the leases, on a thread that may block.
    pub fn look<T>(&self, question: impl FnOnce(&Pool) -> T) -> T {
        question(self.lock().pool())
    }

    /// Makes a change. A caller that gives up leaves it made.
    pub async fn change(&self, change: Change) -> Outcome {
        let handle = self.clone();
        let applied = tokio::task::spawn_blocking(move || handle.apply(change)).await;
        applied.unwrap_or(Err(LedgerError::Ended))
    }

    /// Looks at the leases.
    pub async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Pool) -> T + Send + 'static,
    ) -> Result<T, LedgerError> {
        let handle = self.clone();
        let answer = tokio::task::spawn_blocking(move || handle.look(question)).await;
        answer.map_err(|_| LedgerError::Ended)
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Seconds since 1970, which mean the same after the agent has been restarted.
pub fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;
