//! The L7 proxy's configuration, without backends on nodes that are away.

use std::sync::Arc;

use mesh_model::snapshot::L7Config;
use mesh_worker::Client;
use tokio::sync::Notify;

use super::{Concern, Failures};
use crate::errors::chain;
use crate::observe::Desired;

/// Keeps the proxy's configuration as the snapshot says.
pub(crate) struct Ingress {
    pub(crate) worker: Client,
    /// Told when another process has become the worker.
    pub(crate) restarted: Arc<Notify>,
}

impl Concern for Ingress {
    const NAME: &'static str = "ingress";
    type Slice = L7Config;

    fn slice(&self, desired: &Desired) -> Option<L7Config> {
        Some(desired.outlook.l7(&desired.snapshot))
    }

    async fn apply(&mut self, slice: &L7Config, _heal: bool) -> Result<(), Failures> {
        self.worker.set(slice).await.map_err(|error| vec![chain(&error)])
    }

    async fn undone(&self) {
        self.restarted.notified().await;
    }
}
