//! The service's own certificates, replaced while it runs: the listener's, the one that agents see, the administrator's.

use std::sync::Arc;
use std::time::Duration;

use super::Names;
use super::tls::Tls;
use crate::api::Agents;
use crate::pki::Authority;

/// Much more often than needed, because this time stands still while a machine sleeps, and clocks are set: an hour after either,
/// all certificates are good again.
const EVERY: Duration = Duration::from_secs(3600);

/// What has certificates.
pub(super) struct Renewal {
    pub(super) authority: Arc<Authority>,
    pub(super) tls: Tls,
    pub(super) names: Names,
    pub(super) agents: Agents,
    /// What the administrator's file leads to.
    pub(super) url: String,
}

impl Renewal {
    /// Never ends. `lifetime` is that of the certificates.
    pub(super) async fn run(self, lifetime: Duration) {
        loop {
            tokio::time::sleep(EVERY.min(lifetime / 6)).await;
            if let Err(error) = self.tls.renew(&self.authority, &self.names) {
                tracing::warn!(%error, "renewing the serving certificate failed");
            }
            if let Err(error) = self.agents.renew(&self.authority) {
                tracing::warn!(%error, "renewing the certificate towards agents failed");
            }
            if let Err(error) = self.authority.admin_kubeconfig(&self.url) {
                tracing::warn!(%error, "renewing the administrator's kubeconfig failed");
            }
        }
    }
}
