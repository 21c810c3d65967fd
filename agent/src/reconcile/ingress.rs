//! The L7 proxy's configuration, without backends on nodes that are away.

use std::sync::Arc;

use mesh_model::Snapshot;
use mesh_worker::Client;
use tokio::sync::Notify;

use super::{Concern, Failures};
use crate::errors::chain;
use crate::observe::Desired;
use crate::paths::outlook::Outlook;

/// Keeps the proxy's configuration as the snapshot says.
pub(crate) struct Ingress {
    pub(crate) worker: Client,
    /// Told when another process has become the worker.
    pub(crate) restarted: Arc<Notify>,
}

/// The snapshot, compared by what the proxy serves, and which nodes are away.
pub(crate) struct Routes(Arc<Snapshot>, Arc<Outlook>);

impl PartialEq for Routes {
    fn eq(&self, other: &Self) -> bool {
        // Where away nodes are is told by the peers.
        let places = self.1.away.is_empty() || self.0.peers == other.0.peers;
        self.0.l7 == other.0.l7 && self.1.away == other.1.away && places
    }
}

impl Concern for Ingress {
    const NAME: &'static str = "ingress";
    type Slice = Routes;

    fn slice(&self, desired: &Desired) -> Option<Routes> {
        Some(Routes(Arc::clone(&desired.snapshot), Arc::clone(&desired.outlook)))
    }

    async fn apply(&mut self, slice: &Routes, _heal: bool) -> Result<(), Failures> {
        let Routes(snapshot, outlook) = slice;
        self.worker.set(&outlook.l7(snapshot)).await.map_err(|error| vec![chain(&error)])
    }

    async fn undone(&self) {
        self.restarted.notified().await;
    }
}
