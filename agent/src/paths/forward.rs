//! The relay worker: it runs only where there is, or was, something to forward.

use std::time::Duration;

use mesh_overlay::paths::Pair;
use mesh_overlay::relay::{RelayConfig, RelayedPair};
use mesh_worker::Client;
use mesh_worker::supervise::{self, WorkerSpec};
use tokio::sync::watch;

use crate::errors::chain;

/// After a failed call: the worker may just be starting.
const RETRY: Duration = Duration::from_millis(100);
/// Failed calls in a row that are worth a warning.
const PATIENCE: u32 = 20;

/// Hands configurations to the relay worker, the latest one only.
pub(crate) struct Forwarder {
    wanted: watch::Sender<Option<Wanted>>,
    /// The pairs that the worker has last confirmed.
    in_force: watch::Receiver<Vec<Pair>>,
}

/// What is to be forwarded, and which pairs that is.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    config: RelayConfig,
    pairs: Vec<Pair>,
}

impl Forwarder {
    /// Starts with whatever worker an earlier agent left.
    pub(crate) fn start(spec: WorkerSpec, worker: Client) -> Self {
        let (wanted, to_keep) = watch::channel(None);
        let (confirm, in_force) = watch::channel(vec![]);
        tokio::spawn(keep(spec, worker, to_keep, confirm));
        Self { wanted, in_force }
    }

    /// Forwards between these pairs and no others.
    pub(super) fn set(&self, first_port: u16, all: Vec<(Pair, RelayedPair)>) {
        let (pairs, relayed) = all.into_iter().unzip();
        let wanted = Wanted { config: RelayConfig { first_port, pairs: relayed }, pairs };
        self.wanted.send_if_modified(|old| {
            let changed = old.as_ref() != Some(&wanted);
            *old = Some(wanted);
            changed
        });
    }

    /// Waits until the worker has confirmed other pairs than before; returns all that it forwards.
    pub(super) async fn confirmed(&mut self) -> Option<Vec<Pair>> {
        self.in_force.changed().await.ok()?;
        Some(self.in_force.borrow_and_update().clone())
    }
}

async fn keep(
    spec: WorkerSpec,
    worker: Client,
    mut wanted: watch::Receiver<Option<Wanted>>,
    confirm: watch::Sender<Vec<Pair>>,
) {
    if !spec.identity_file.exists() {
        let forwards = |w: &Option<Wanted>| w.as_ref().is_some_and(|w| !w.pairs.is_empty());
        if wanted.wait_for(forwards).await.is_err() {
            return;
        }
    }
    tokio::spawn(supervise::keep(spec));
    let mut failures = 0;
    while wanted.wait_for(Option::is_some).await.is_ok() {
        let Some(Wanted { config, pairs }) = wanted.borrow_and_update().clone() else { continue };
        if let Err(error) = worker.set(&config).await {
            // It needs a moment to start; when that lasts, somebody has to look.
            failures += 1;
            match failures == PATIENCE {
                true => tracing::warn!(error = chain(&error), "relay worker not configured"),
                false => tracing::debug!(error = chain(&error), "relay worker not configured yet"),
            }
            tokio::time::sleep(RETRY).await;
            wanted.mark_changed();
        } else {
            failures = 0;
            confirm.send_if_modified(|old| std::mem::replace(old, pairs) != *old);
        }
        if wanted.changed().await.is_err() {
            return;
        }
    }
}
