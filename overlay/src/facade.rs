//! The overlay as the agent uses it, whichever engine runs.

use std::path::PathBuf;
use std::sync::Arc;

use mesh_kernel::{IfName, NetNs, wireguard};
use mesh_worker::Client;
use mesh_worker::client::CallError;
use serde::{Deserialize, Serialize};

use crate::config::OverlayConfig;
use crate::kernel_device::{KernelDevice, KernelDeviceError};
use crate::keys::KeyError;
use crate::status::Status;

/// The pause after the kernel's device could not be read.
const FOLLOW_AGAIN: std::time::Duration = std::time::Duration::from_secs(1);

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
    /// The kernel's, where it has one; else ours.
    ///
    /// Asks by making a device for a moment, which also loads the module. Never fails: when in doubt, ours runs
    /// everywhere.
    pub fn detect() -> Self {
        match wireguard::supported(&NetNs::current()) {
            Ok(true) => Self::Kernel,
            Ok(false) => Self::User,
            Err(error) => {
                tracing::warn!(%error, "cannot tell whether the kernel has WireGuard");
                Self::User
            }
        }
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
#[derive(Debug, Clone)]
pub enum Overlay {
    /// A worker process that runs our engine.
    User(Client),
    /// The kernel's device.
    Kernel(Arc<KernelDevice>),
}

/// The overlay could not be configured or asked.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// The worker could not be reached, or refused. After a refusal its configuration is as before.
    #[error("call the overlay worker")]
    Worker(#[from] CallError),
    /// The kernel's device.
    #[error("use the kernel's overlay device")]
    Kernel(#[from] KernelDeviceError),
    /// The call ended early because the program ends.
    #[error("use the kernel's overlay device: interrupted")]
    Interrupted,
}

impl Overlay {
    /// The engine of the worker that listens on `socket`. Does not connect yet.
    pub fn user(socket: impl Into<PathBuf>) -> Self {
        Self::User(Client::new(socket))
    }

    /// The kernel's device `name`, with the node's key, which is made when the file does not exist. Does nothing else yet.
    pub fn kernel(name: IfName, key_file: PathBuf) -> Result<Self, KeyError> {
        Ok(Self::Kernel(Arc::new(KernelDevice::new(name, key_file)?)))
    }

    /// Which engine it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::User(_) => Kind::User,
            Self::Kernel(_) => Kind::Kernel,
        }
    }

    /// Puts a whole configuration in force, by difference: sessions of peers that stay survive.
    ///
    /// Idempotent. It is in force when this returns; our engine has then called all new peers.
    pub async fn configure(&self, config: &OverlayConfig) -> Result<(), OverlayError> {
        match self {
            Self::User(worker) => Ok(worker.set(config).await?),
            Self::Kernel(device) => {
                let config = config.clone();
                blocking(device, move |device| device.configure(&config)).await
            }
        }
    }

    /// Does what the engine does not do by itself; to be called every few seconds.
    pub async fn tend(&self) -> Result<(), OverlayError> {
        match self {
            Self::User(_) => Ok(()),
            Self::Kernel(device) => blocking(device, KernelDevice::tend).await,
        }
    }

    /// Takes packets off relays that are in use no more, where the last packets through one made the engine go back to it. Ours does that
    /// by itself.
    pub async fn leave_relays(&self) -> Result<(), OverlayError> {
        match self {
            Self::User(_) => Ok(()),
            Self::Kernel(device) => blocking(device, KernelDevice::leave_relays).await,
        }
    }

    /// Follows peers that take over to another key; never returns. Our engine does that by itself.
    pub async fn follow(&self) {
        let Self::Kernel(device) = self else { return std::future::pending().await };
        let mut needed = device.following();
        loop {
            // The sender is part of the device.
            let _ = needed.wait_for(|needed| *needed).await;
            let pause = match blocking(device, KernelDevice::follow).await {
                Ok(pause) => pause,
                Err(error) => {
                    tracing::debug!(%error, "peers with two keys were not looked at");
                    FOLLOW_AGAIN
                }
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// Tests how much the ways to peers carry; never returns. Our engine does that by itself.
    pub async fn measure(&self) {
        let Self::Kernel(device) = self else { return std::future::pending().await };
        loop {
            let device = Arc::clone(device);
            // Interrupted only when the program ends.
            let pause = tokio::task::spawn_blocking(move || device.measure()).await;
            tokio::time::sleep(pause.unwrap_or(FOLLOW_AGAIN)).await;
        }
    }

    /// The present state of the device and its peers.
    pub async fn status(&self) -> Result<Status, OverlayError> {
        match self {
            Self::User(worker) => Ok(worker.get().await?),
            Self::Kernel(device) => blocking(device, KernelDevice::status).await,
        }
    }
}

async fn blocking<T: Send + 'static>(
    device: &Arc<KernelDevice>,
    call: impl FnOnce(&KernelDevice) -> Result<T, KernelDeviceError> + Send + 'static,
) -> Result<T, OverlayError> {
    let device = Arc::clone(device);
    match tokio::task::spawn_blocking(move || call(&device)).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(OverlayError::Interrupted),
    }
}
