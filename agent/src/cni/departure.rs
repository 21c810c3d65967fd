//! The end of an interface. The caller of DEL waits until it is out of service and its addresses are free; the device, which
//! takes the kernel 20 ms, is deleted with others when no pod comes or goes.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use mesh_cni::wire::Owner;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::Cni;
use super::failure::Trouble;
use super::ledger::Change;
use crate::errors::chain;

/// No pod comes or goes for so long: then nobody waits for the kernel's lock on devices.
const QUIET: Duration = Duration::from_millis(150);
/// On a node where pods come and go without a pause.
const LATEST: Duration = Duration::from_secs(5);
/// So many wait for nothing.
const MANY: usize = 128;

/// Interfaces that are going.
pub(super) struct Departures {
    /// Detached, not deleted yet. Only a hint: the truth is in the kernel, and looked up at every start.
    waiting: AtomicUsize,
    wake: Notify,
    /// Counts requests that change devices.
    activity: watch::Sender<u64>,
    /// Those that could not go.
    failed: Mutex<BTreeSet<Owner>>,
}

impl Default for Departures {
    fn default() -> Self {
        Self {
            waiting: AtomicUsize::new(0),
            wake: Notify::new(),
            activity: watch::Sender::new(0),
            failed: Mutex::default(),
        }
    }
}

impl Departures {
    /// A pod comes or goes.
    pub(super) fn busy(&self) {
        self.activity.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// An interface waits for being deleted.
    pub(super) fn add(&self) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        self.wake.notify_one();
    }

    fn failed(&self) -> std::sync::MutexGuard<'_, BTreeSet<Owner>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when there is something to delete, and a good moment for it.
    async fn moment(&self) {
        while self.waiting.load(Ordering::Relaxed) == 0 {
            self.wake.notified().await;
        }
        let latest = Instant::now() + LATEST;
        let mut activity = self.activity.subscribe();
        while self.waiting.load(Ordering::Relaxed) < MANY && Instant::now() < latest {
            if tokio::time::timeout(QUIET, activity.changed()).await.is_err() {
                return;
            }
        }
    }
}

impl Cni {
    /// Lets an interface go. When that fails its addresses stay with it, and it is tried again.
    pub(super) async fn depart(&self, owner: &Owner) -> Result<(), Trouble> {
        let result = self.release(owner).await;
        if let Err(trouble) = &result {
            tracing::warn!(owner = %owner, error = chain(trouble), "not gone yet");
            // Nobody uses it any more: an agent that dies now leaves that to the next.
            if let Err(error) = self.0.ledger.change(Change::Retire(owner.clone())).await {
                tracing::warn!(owner = %owner, error = chain(&error), "not noted either");
            }
            self.0.departures.failed().insert(owner.clone());
        }
        result
    }

    /// Deletes devices that are out of service, at good moments, for ever.
    pub(super) async fn bury(&self) {
        loop {
            self.0.departures.moment().await;
            let waiting = self.0.departures.waiting.swap(0, Ordering::Relaxed);
            match self.blocking(|network| network.bury()).await {
                Ok(buried) => tracing::debug!(buried, waiting, "interfaces deleted"),
                Err(error) => {
                    let error = chain(&error);
                    tracing::warn!(error, "interfaces that are out of service not deleted yet");
                    tokio::time::sleep(LATEST).await;
                    self.0.departures.add();
                }
            }
        }
    }

    /// Tries again what could not go.
    pub(super) async fn depart_again(&self) {
        let failed: Vec<Owner> = self.0.departures.failed().iter().cloned().collect();
        for owner in failed {
            let _turn = self.turn(&owner).await;
            if let Err(trouble) = self.finish_departure(&owner).await {
                tracing::warn!(owner = %owner, error = chain(&trouble), "still not gone");
            }
        }
    }

    /// What is left of the owner's last interface goes first, or nothing happens; the caller holds the owner's turn.
    pub(super) async fn finish_departure(&self, owner: &Owner) -> Result<(), Trouble> {
        if self.0.departures.failed().contains(owner) {
            self.release(owner).await?;
            self.0.departures.failed().remove(owner);
        }
        Ok(())
    }
}
