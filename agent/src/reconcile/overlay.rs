//! The overlay's peers.

use std::sync::Arc;

use mesh_overlay::{Overlay, OverlayConfig, PeerConfig};

use super::{Concern, Failures};
use crate::errors::chain;
use crate::observe::Desired;

/// Keeps the overlay device's peers as the snapshot says.
pub(crate) struct Peers {
    pub(crate) overlay: Arc<Overlay>,
    pub(crate) mtu: u16,
}

impl Concern for Peers {
    const NAME: &'static str = "overlay";
    type Slice = OverlayConfig;

    fn slice(&self, desired: &Desired) -> Option<OverlayConfig> {
        let snapshot = &desired.snapshot;
        Some(OverlayConfig {
            listen_port: snapshot.cluster.overlay_port,
            mtu: self.mtu,
            peers: snapshot.peers.iter().map(PeerConfig::from).collect(),
        })
    }

    async fn apply(&mut self, slice: &OverlayConfig, _heal: bool) -> Result<(), Failures> {
        self.overlay.configure(slice).await.map_err(|error| vec![chain(&error)])
    }
}
