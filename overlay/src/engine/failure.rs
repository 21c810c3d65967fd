//! How a thread of the engine says that it cannot go on.

use std::io;
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

/// The engine cannot go on. A new process can: it opens everything anew and calls all peers.
#[derive(Debug, thiserror::Error)]
pub enum EngineFailure {
    /// Somebody deleted the device, or the kernel took it back.
    #[error("the overlay device {device} is gone")]
    DeviceLost {
        /// Its name.
        device: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be waited for.
    #[error("wait for the overlay's socket")]
    SocketLost(#[source] io::Error),
    /// Its threads did not stop when they should, so that nothing could be handed over.
    #[error("the overlay engine did not stop in time")]
    Stuck,
    /// There is nothing left to hand over.
    #[error("another worker has taken over")]
    Left,
    /// What was to be handed over could not be written down.
    #[error("write down the overlay's sessions")]
    Unwritten(#[source] io::Error),
    /// A defect of ours.
    #[error("thread {thread} of the overlay engine panicked")]
    Panicked {
        /// Its name.
        thread: String,
    },
}

/// The first failure, for the one who waits for it.
#[derive(Debug, Default)]
pub(crate) struct Failure {
    first: Mutex<Option<EngineFailure>>,
    happened: Notify,
}

impl Failure {
    /// Reports a failure; only the first counts.
    pub(crate) fn report(&self, failure: EngineFailure) {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failure);
        self.happened.notify_one();
    }

    /// Waits for the first. Each failure is returned once.
    pub(crate) async fn happened(&self) -> EngineFailure {
        loop {
            self.happened.notified().await;
            if let Some(failure) = self.first.lock().unwrap_or_else(PoisonError::into_inner).take()
            {
                return failure;
            }
        }
    }
}
