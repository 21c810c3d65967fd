//! The agent's end of an attachment: what a worker reports about itself, and its descriptors.

use std::io;
use std::path::Path;

use serde_json::value::RawValue;
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;

use crate::descriptors::Descriptors;
use crate::process::ProcessId;
use crate::rights::Receiver;
use crate::wire::{Reply, Report, Request};

/// A worker cannot be attached to, or no longer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttachError {
    #[error("speak with the worker")]
    Io(#[from] io::Error),
    #[error("another process answers, {0}")]
    Other(i32),
    #[error("the worker refused: {0}")]
    Refused(String),
    #[error("understand the worker's report")]
    Malformed(#[from] serde_json::Error),
    #[error("descriptors are missing from the worker's report")]
    Incomplete,
}

/// A connection over which a worker reports.
#[derive(Debug)]
pub(crate) struct Attachment(Receiver);

/// What it said last.
#[derive(Debug)]
pub(crate) struct Said {
    /// Whether a configuration is in force.
    pub(crate) configured: bool,
    /// Its descriptors; none when it ends.
    pub(crate) descriptors: Option<Descriptors>,
    /// Whether it can hand over what it is busy with.
    pub(crate) yields: bool,
}

impl Attachment {
    /// Attaches to `process`, if it is the one that listens on `socket`.
    pub(crate) async fn new(socket: &Path, process: ProcessId) -> Result<Self, AttachError> {
        let mut stream = UnixStream::connect(socket).await?;
        let listener = stream.peer_cred()?.pid().unwrap_or_default();
        if listener != process.pid {
            return Err(AttachError::Other(listener));
        }
        let mut line = serde_json::to_vec(&Request::Attach(()))?;
        line.push(b'\n');
        stream.write_all(&line).await?;
        Ok(Self(Receiver::new(stream)))
    }

    /// The next report: the first comes at once, the others after changes. Cancel safe.
    pub(crate) async fn next(&mut self) -> Result<Said, AttachError> {
        let line = self.0.line().await?;
        let value: Box<RawValue> = match serde_json::from_slice(&line)? {
            Reply::Ok(value) => value,
            Reply::Error(why) => return Err(AttachError::Refused(why)),
        };
        let report: Report = serde_json::from_str(value.get())?;
        let Report { configured, yields, .. } = report;
        let Some(names) = report.descriptors else {
            return Ok(Said { configured, descriptors: None, yields });
        };
        let mut descriptors = Descriptors::default();
        for name in names {
            descriptors.insert(name, self.0.descriptor().ok_or(AttachError::Incomplete)?);
        }
        Ok(Said { configured, descriptors: Some(descriptors), yields })
    }
}
