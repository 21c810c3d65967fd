//! Making the node as its snapshot says: one concern per file, each driven on its own.
//!
//! A concern takes its slice of the snapshot, skips what it has done already, looks again from time to time whether
//! somebody else has changed it, and tries again with back-off when something failed. One that fails stops no other.
//!
//! The saved snapshot of an earlier run is as good as a new one here: it is written before it is acted upon, so that
//! acting upon it again deletes nothing that the last complete list had.

use std::future::Future;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::board::Board;
use crate::observe::Desired;

pub(crate) mod conflist;
pub(crate) mod dns;
pub(crate) mod edge;
pub(crate) mod health;
pub(crate) mod ingress;
pub(crate) mod node;
pub(crate) mod overlay;
pub(crate) mod pods;
pub(crate) mod policy;
pub(crate) mod services;

const FIRST_RETRY: Duration = Duration::from_millis(50);
const LAST_RETRY: Duration = Duration::from_secs(10);
/// Waiting for a neighbour is normal for the first moments; that it lasts is not.
const PATIENCE: Duration = Duration::from_secs(1);

/// Why a round was not complete: one line for each thing that failed.
pub(crate) type Failures = Vec<String>;

/// One concern of a node.
pub(crate) trait Concern: Send + Sync + 'static {
    /// Its name in logs and reports.
    const NAME: &'static str;
    /// How often it looks whether all is still as it made it.
    const HEAL: Duration = Duration::from_secs(60);
    /// What it needs to know.
    type Slice: PartialEq + Send + Sync;

    /// Its part of the desired state; nothing when there is nothing to do yet.
    fn slice(&self, desired: &Desired) -> Option<Self::Slice>;

    /// Makes it so. `heal` means that it was made so before, and may have changed since.
    fn apply(
        &mut self,
        slice: &Self::Slice,
        heal: bool,
    ) -> impl Future<Output = Result<(), Failures>> + Send;

    /// Ready when what it made may be undone, so that it has to be made so again at once. Cancel safe.
    fn undone(&self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }
}

/// Drives a concern for ever.
pub(crate) async fn drive<C: Concern>(
    mut concern: C,
    mut desired: watch::Receiver<Option<Desired>>,
    board: Board,
) {
    let mut done: Option<C::Slice> = None;
    let mut retry = FIRST_RETRY;
    loop {
        let known = desired.borrow_and_update().clone();
        let Some(slice) = known.as_ref().and_then(|desired| concern.slice(desired)) else {
            if desired.changed().await.is_err() {
                return;
            }
            continue;
        };
        let revision = known.as_ref().map_or(0, |desired| desired.snapshot.revision);
        let heal = done.as_ref() == Some(&slice);
        let started = Instant::now();
        let wait = match concern.apply(&slice, heal).await {
            Ok(()) => {
                if retry > PATIENCE {
                    tracing::info!(concern = C::NAME, "works again");
                }
                tracing::debug!(concern = C::NAME, heal, took = ?started.elapsed(), "reconciled");
                board.done(C::NAME);
                board.stands_at(C::NAME, revision);
                (done, retry) = (Some(slice), FIRST_RETRY);
                C::HEAL
            }
            Err(failures) => {
                if retry > PATIENCE || heal {
                    tracing::warn!(concern = C::NAME, ?failures, "not as desired, trying again");
                } else {
                    tracing::debug!(concern = C::NAME, ?failures, "not as desired yet");
                }
                board.failed(C::NAME, failures);
                done = None;
                let wait = retry;
                retry = (retry * 2).min(LAST_RETRY);
                wait
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = concern.undone() => done = None,
            changed = slice_changed(&concern, &mut desired, done.as_ref(), &board) => if changed.is_err() { return },
        }
    }
}

/// Waits until the concern's own slice differs from what is done.
async fn slice_changed<C: Concern>(
    concern: &C,
    desired: &mut watch::Receiver<Option<Desired>>,
    done: Option<&C::Slice>,
    board: &Board,
) -> Result<(), watch::error::RecvError> {
    loop {
        desired.changed().await?;
        let known = desired.borrow_and_update().clone();
        let fresh = known.as_ref().and_then(|desired| concern.slice(desired));
        if fresh.is_some() && fresh.as_ref() != done {
            return Ok(());
        }
        if let (Some(_), Some(known)) = (done, &known) {
            // Newer endpoints, and for this concern the same.
            board.stands_at(C::NAME, known.snapshot.revision);
        }
    }
}

#[cfg(test)]
mod tests;
