//! The worker before this one, while it still works: what it is busy with can be asked for.
//!
//! ```text
//!   agent ── starts, with the old one's control socket ──> new worker
//!            new worker ── {"yield": null} ──> old worker: stops for good, and gives one descriptor with all that it knew
//! ```
//!
//! The old one answers once. Where it is killed before, or the new one after, what it knew is gone, and the next worker
//! starts with nothing: never do two have it.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;

use crate::descriptors;
use crate::rights::Receiver;
use crate::wire::{Reply, Request};

/// A worker that is to be replaced by this one.
#[derive(Debug)]
pub struct Predecessor {
    socket: PathBuf,
}

/// The worker before this one gave nothing. It has ended, or goes on as if it had not been asked.
#[derive(Debug, thiserror::Error)]
pub enum YieldError {
    /// It does not answer.
    #[error("speak with the worker to be replaced")]
    Io(#[from] io::Error),
    /// Not in time.
    #[error("the worker to be replaced did not answer in time")]
    TimedOut,
    /// It cannot.
    #[error("the worker to be replaced refused: {0}")]
    Refused(String),
    /// What it said makes no sense.
    #[error("understand the worker to be replaced")]
    Malformed(#[from] serde_json::Error),
    /// It said that it gave something, and did not.
    #[error("the descriptor is missing from the answer of the worker to be replaced")]
    Incomplete,
}

impl Predecessor {
    /// The worker that this process was started to replace; none when there is nobody to replace.
    pub fn of_this_process() -> Option<Self> {
        descriptors::predecessor().map(|socket| Self { socket })
    }

    /// The worker that listens on `socket`.
    pub fn on(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// Makes it stop for good, and takes what it was busy with.
    pub async fn take_over(self, limit: Duration) -> Result<OwnedFd, YieldError> {
        tokio::time::timeout(limit, self.ask()).await.map_err(|_| YieldError::TimedOut)?
    }

    async fn ask(self) -> Result<OwnedFd, YieldError> {
        let mut stream = UnixStream::connect(&self.socket).await?;
        let mut line = serde_json::to_vec(&Request::Yield(()))?;
        line.push(b'\n');
        stream.write_all(&line).await?;
        let mut receiver = Receiver::new(stream);
        let answer = receiver.line().await?;
        match serde_json::from_slice(&answer)? {
            Reply::Ok(_) => receiver.descriptor().ok_or(YieldError::Incomplete),
            Reply::Error(why) => Err(YieldError::Refused(why)),
        }
    }
}
