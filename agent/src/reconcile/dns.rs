//! The DNS worker's configuration.

use std::net::SocketAddr;
use std::sync::Arc;

use mesh_dns::DnsConfig;
use mesh_model::snapshot::DnsZone;
use mesh_worker::Client;
use tokio::sync::Notify;

use super::{Concern, Failures};
use crate::errors::chain;
use crate::observe::Desired;

/// Keeps the DNS worker's configuration as the snapshot says.
pub(crate) struct Dns {
    pub(crate) worker: Client,
    /// Told when another process has become the worker.
    pub(crate) restarted: Arc<Notify>,
    pub(crate) upstreams: Vec<SocketAddr>,
}

impl Concern for Dns {
    const NAME: &'static str = "dns";
    type Slice = Arc<DnsZone>;

    fn slice(&self, desired: &Desired) -> Option<Arc<DnsZone>> {
        Some(Arc::clone(&desired.snapshot.dns))
    }

    async fn apply(&mut self, slice: &Arc<DnsZone>, _heal: bool) -> Result<(), Failures> {
        let config = DnsConfig { zone: DnsZone::clone(slice), upstreams: self.upstreams.clone() };
        self.worker.set(&config).await.map_err(|error| vec![chain(&error)])
    }

    async fn undone(&self) {
        self.restarted.notified().await;
    }
}
