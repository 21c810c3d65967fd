//! The relay worker: it runs only where there is, or was, something to forward.

use std::time::Duration;

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
pub(crate) struct Forwarder(watch::Sender<Option<RelayConfig>>);

impl Forwarder {
    /// Starts with whatever worker an earlier agent left.
    pub(crate) fn start(spec: WorkerSpec, worker: Client) -> Self {
        let (sender, wanted) = watch::channel(None);
        tokio::spawn(keep(spec, worker, wanted));
        Self(sender)
    }

    /// Forwards between these pairs and no others.
    pub(super) fn set(&self, first_port: u16, pairs: Vec<RelayedPair>) {
        let config = RelayConfig { first_port, pairs };
        self.0.send_if_modified(|old| {
            let changed = old.as_ref() != Some(&config);
            *old = Some(config);
            changed
        });
    }
}

async fn keep(spec: WorkerSpec, worker: Client, mut wanted: watch::Receiver<Option<RelayConfig>>) {
    if !spec.identity_file.exists() {
        let forwards = |c: &Option<RelayConfig>| c.as_ref().is_some_and(|c| !c.pairs.is_empty());
        if wanted.wait_for(forwards).await.is_err() {
            return;
        }
    }
    tokio::spawn(supervise::keep(spec));
    let mut failures = 0;
    while wanted.wait_for(Option::is_some).await.is_ok() {
        let config = wanted.borrow_and_update().clone();
        if let Some(config) = config
            && let Err(error) = worker.set(&config).await
        {
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
        }
        if wanted.changed().await.is_err() {
            return;
        }
    }
}
