//! The socket that the plugin connects to.

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_cni::wire::{Code, Failure, MAX_LINE_BYTES, Reply};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::Cni;

/// A plugin sends its request at once.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);
const SWEEP_INTERVAL: Duration = Duration::from_secs(30);
const QUEUE_INTERVAL: Duration = Duration::from_secs(2);

/// The socket could not be made.
#[derive(Debug, thiserror::Error)]
#[error("listen on {path}")]
pub struct ListenError {
    /// Its path.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Serves the plugin for ever, and keeps journal and interfaces together meanwhile.
pub async fn serve(socket: &Path, cni: Cni) -> Result<Infallible, ListenError> {
    let failed = |source| ListenError { path: socket.to_owned(), source };
    let listener = bind(socket).map_err(failed)?;
    let upkeep = upkeep(cni.clone());
    let burying = cni.clone();
    let accept = async {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let cni = cni.clone();
                    tokio::spawn(async move {
                        if let Err(error) = converse(stream, &cni).await {
                            tracing::debug!(%error, "CNI connection ended");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accepting a CNI connection failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    };
    tokio::select! {
        () = upkeep => unreachable!("upkeep never ends"),
        () = burying.bury() => unreachable!("burying never ends"),
        never = accept => never,
    }
}

/// Binds beside the final path and renames, so that there is never a moment without a socket.
pub(crate) fn bind(socket: &Path) -> io::Result<UnixListener> {
    let fresh = socket.with_extension(format!("{}.new", std::process::id()));
    let _ = std::fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&fresh, socket)?;
    Ok(listener)
}

async fn upkeep(cni: Cni) {
    let mut queue = tokio::time::interval(QUEUE_INTERVAL);
    let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
    loop {
        tokio::select! {
            _ = queue.tick() => cni.drain_queue().await,
            _ = sweep.tick() => if let Err(error) = cni.sweep().await {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "journal and interfaces not compared");
            },
        }
    }
}

async fn converse(mut stream: UnixStream, cni: &Cni) -> io::Result<()> {
    let mut line = String::new();
    let (read, mut write) = stream.split();
    let mut read = BufReader::new(read.take(MAX_LINE_BYTES));
    tokio::time::timeout(REQUEST_LIMIT, read.read_line(&mut line)).await??;
    if line.is_empty() {
        return Ok(());
    }
    let reply = match serde_json::from_str(&line) {
        Ok(request) => {
            // On a task of its own: a plugin that hangs up must not stop an ADD half-way.
            let cni = cni.clone();
            let work = tokio::spawn(async move { cni.handle(request).await });
            work.await.map_err(io::Error::other)?
        }
        Err(error) => {
            let message = "the plugin's request makes no sense to this agent";
            Reply::Failed(Failure::new(Code::Decode, message, error.to_string()))
        }
    };
    let mut answer = serde_json::to_vec(&reply)?;
    answer.push(b'\n');
    write.write_all(&answer).await
}
