//! The overlay as the agent uses it, whichever engine runs.

use std::path::PathBuf;

use mesh_worker::Client;
use mesh_worker::client::CallError;
use serde::{Deserialize, Serialize};

use crate::config::OverlayConfig;
use crate::status::Status;

/// Which engine carries the packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Kind {
    /// The kernel's WireGuard device.
    Kernel,
    /// Our engine, in a worker process.
    User,
}

impl Kind {
    /// The kernel's, where it has one that this build can configure; else ours.
    ///
    /// Cheap; asks the kernel once. Never fails: when in doubt, our engine runs everywhere.
    pub fn detect() -> Self {
        // The kernel's device is configured by mesh-kernel, which does not do it yet.
        Self::User
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::User => "user",
        })
    }
}

/// The overlay of a node.
#[derive(Debug)]
#[non_exhaustive]
pub enum Overlay {
    /// A worker process that runs our engine.
    User(Client),
}

/// The overlay could not be configured or asked.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// The worker could not be reached, or refused. After a refusal its configuration is as before.
    #[error("call the overlay worker")]
    Worker(#[from] CallError),
}

impl Overlay {
    /// The engine of the worker that listens on `socket`. Does not connect yet.
    pub fn user(socket: impl Into<PathBuf>) -> Self {
        Self::User(Client::new(socket))
    }

    /// Which engine it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::User(_) => Kind::User,
        }
    }

    /// Puts a whole configuration in force, by difference: sessions of peers that stay survive.
    ///
    /// Idempotent. It is in force when this returns; handshakes with new peers have been started.
    pub async fn configure(&self, config: &OverlayConfig) -> Result<(), OverlayError> {
        match self {
            Self::User(worker) => Ok(worker.set(config).await?),
        }
    }

    /// The present state of the device and its peers.
    pub async fn status(&self) -> Result<Status, OverlayError> {
        match self {
            Self::User(worker) => Ok(worker.get().await?),
        }
    }
}
