//! The agent's side of a worker's control socket.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::{RawValue, to_raw_value};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

use crate::wire::{MAX_LINE_BYTES, Reply, Request};

/// Speaks to the worker that listens on a socket; connects anew for every call.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    limit: Duration,
}

/// A call to a worker failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody answers on the socket.
    #[error("reach the worker on {socket}")]
    Unreachable {
        /// Its path.
        socket: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No answer within the limit.
    #[error("the worker on {socket} did not answer in time")]
    TimedOut {
        /// Its path.
        socket: PathBuf,
    },
    /// The worker refused; its configuration is as before.
    #[error("the worker refused: {0}")]
    Refused(String),
    /// The answer makes no sense.
    #[error("understand the worker's answer")]
    Malformed(#[source] serde_json::Error),
}

impl Client {
    /// A client for the worker on `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), limit: Duration::from_secs(5) }
    }

    /// Replaces the worker's configuration. It is in force when this returns.
    pub async fn set<C: Serialize + Sync>(&self, config: &C) -> Result<(), CallError> {
        let config = to_raw_value(config).map_err(CallError::Malformed)?;
        self.call(Request::Set(config)).await.map(drop)
    }

    /// Asks for the worker's status.
    pub async fn get<S: DeserializeOwned>(&self) -> Result<S, CallError> {
        let reply = self.call(Request::Get(())).await?;
        serde_json::from_str(reply.get()).map_err(CallError::Malformed)
    }

    async fn call(&self, request: Request) -> Result<Box<RawValue>, CallError> {
        let line = tokio::time::timeout(self.limit, self.exchange(&request))
            .await
            .map_err(|_| CallError::TimedOut { socket: self.socket.clone() })?
            .map_err(|source| CallError::Unreachable { socket: self.socket.clone(), source })?;
        match serde_json::from_str(&line).map_err(CallError::Malformed)? {
            Reply::Ok(value) => Ok(value),
            Reply::Error(why) => Err(CallError::Refused(why)),
        }
    }

    async fn exchange(&self, request: &Request) -> io::Result<String> {
        let mut stream = UnixStream::connect(&self.socket).await?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line).await?;
        let mut answer = String::new();
        BufReader::new(stream.take(MAX_LINE_BYTES)).read_line(&mut answer).await?;
        if answer.ends_with('\n') { Ok(answer) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}
