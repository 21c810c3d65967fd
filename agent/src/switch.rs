//! From one kind of overlay to the other: whoever carried the packets so far makes way.
//!
//! Both kinds have the same name of device, the same key, the same port. So the one ends before the other begins; in
//! between nothing leaves in the clear, because the routes that refuse what no other route takes stay. The other nodes
//! notice a handshake. Killed at any step, the next agent goes on from what it finds.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_kernel::WireGuardDevice;
use mesh_kernel::wireguard::{DeviceError, Holder};
use mesh_model::snapshot::WgKey;
use mesh_overlay::{Kind, Overlay, PeerStatus};
use mesh_worker::supervise::{self, SuperviseError, WorkerSpec};

use crate::errors::chain;
use crate::settings::OverlayChoice;
use crate::workers::{self, Paths};

/// A worker that does not tell by then where the peers are will not.
const ASK_LIMIT: Duration = Duration::from_millis(500);

/// How long peers may take the kernel's calls for replays when it takes over.
const DATED_AHEAD: Duration = Duration::from_secs(1);

/// Where peers were when the overlay changed its kind: they may have no other endpoint, as behind NAT.
pub(crate) type Whereabouts = BTreeMap<WgKey, SocketAddr>;

/// Which kind of overlay it is to be, on a node that has dated calls so far ahead of its clock.
pub(crate) fn kind(choice: OverlayChoice, detect: fn() -> Kind, ahead: Duration) -> Kind {
    let kind = match choice {
        OverlayChoice::Auto => detect(),
        OverlayChoice::User => Kind::User,
        OverlayChoice::Kernel => Kind::Kernel,
    };
    if kind == Kind::User || ahead <= DATED_AHEAD {
        return kind;
    }
    let secs = ahead.as_secs();
    if choice == OverlayChoice::Auto {
        tracing::warn!(
            secs,
            "the clock was set back; until it has caught up, the overlay worker dates calls"
        );
        return Kind::User;
    }
    tracing::warn!(
        secs,
        "the clock was set back; until it has caught up, peers refuse the kernel's calls"
    );
    kind
}

/// The other kind of overlay did not make way.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SwitchError {
    #[error("look at the overlay device")]
    Device(#[from] DeviceError),
    #[error("end the overlay worker")]
    Worker(#[from] SuperviseError),
    #[error("ask: interrupted")]
    Interrupted,
}

/// What there may be of either kind.
pub(crate) struct Switch {
    pub(crate) device: Arc<dyn WireGuardDevice>,
    /// Whether the kernel has WireGuard at all.
    pub(crate) supported: fn() -> bool,
    /// The worker, were it to run.
    pub(crate) worker: WorkerSpec,
    pub(crate) paths: Paths,
}

impl Switch {
    /// Lets `kind` begin. Does nothing where it has carried the packets already.
    pub(crate) async fn to(&self, kind: Kind) -> Result<Whereabouts, SwitchError> {
        match kind {
            Kind::Kernel => self.to_kernel().await,
            Kind::User => self.to_user().await,
        }
    }

    /// Whether the other kind has to make way.
    pub(crate) async fn is_due(&self, kind: Kind) -> Result<bool, SwitchError> {
        let holder = self.ask(|device| device.holder()).await?;
        Ok(match kind {
            Kind::Kernel => holder == Holder::Other || self.worker.identity_file.exists(),
            Kind::User => holder == Holder::WireGuard,
        })
    }

    async fn to_kernel(&self) -> Result<Whereabouts, SwitchError> {
        if !self.is_due(Kind::Kernel).await? {
            return Ok(Whereabouts::new());
        }
        let holder = self.ask(|device| device.holder()).await?;
        if !(self.supported)() {
            tracing::error!("this kernel has no WireGuard; the overlay worker goes on as it is");
            return Ok(Whereabouts::new());
        }
        let worker = Overlay::user(self.paths.worker_socket(workers::OVERLAY));
        let status = tokio::time::timeout(ASK_LIMIT, worker.status()).await;
        let found = status.ok().and_then(Result::ok);
        let found = found.map_or_else(Whereabouts::new, |s| whereabouts(&s.peers, s.listen_port));
        supervise::stop(&self.worker).await?;
        // Peers and keys of today are nothing for a worker that comes back some day.
        match fs::remove_file(self.paths.worker_state(workers::OVERLAY)) {
            // The device has nobody any more who reads from it.
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, "the overlay worker's saved configuration stays");
            }
            _ => {}
        }
        if holder == Holder::Other {
            self.ask(|device| device.remove()).await?;
        }
        tracing::info!(peers = found.len(), "the kernel takes over from the overlay worker");
        Ok(found)
    }

    async fn to_user(&self) -> Result<Whereabouts, SwitchError> {
        if !self.is_due(Kind::User).await? {
            return Ok(Whereabouts::new());
        }
        let observed = self.ask(|device| device.observe()).await;
        if let Err(error) = &observed {
            tracing::warn!(error = chain(error), "not known where the peers are");
        }
        let observed = observed.unwrap_or_default();
        let port = observed.listen_port;
        let heard = observed.peers.iter().filter(|(_, p)| p.statistics.last_handshake.is_some());
        let found = heard.filter_map(|(key, peer)| Some((*key, peer.endpoint?)));
        let found: Whereabouts =
            found.filter(|(_, at)| !mesh_overlay::paths::is_relay_port(port, *at)).collect();
        self.ask(|device| device.remove()).await?;
        tracing::info!(peers = found.len(), "the overlay worker takes over from the kernel");
        Ok(found)
    }

    async fn ask<T: Send + 'static>(
        &self,
        question: fn(&dyn WireGuardDevice) -> Result<T, DeviceError>,
    ) -> Result<T, SwitchError> {
        let device = Arc::clone(&self.device);
        let answer = tokio::task::spawn_blocking(move || question(&*device)).await;
        Ok(answer.map_err(|_| SwitchError::Interrupted)??)
    }
}

/// Where peers are that have been heard, and not through a relay.
fn whereabouts(peers: &[PeerStatus], port: u16) -> Whereabouts {
    let heard = peers.iter().filter(|p| p.handshake_age_ms.is_some() && p.relay.is_none());
    let found = heard.filter_map(|peer| Some((peer.public_key, peer.endpoint?)));
    found.filter(|(_, at)| !mesh_overlay::paths::is_relay_port(port, *at)).collect()
}

#[cfg(test)]
mod tests;
