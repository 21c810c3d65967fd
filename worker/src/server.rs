//! The worker's side of its control socket.

use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::to_raw_value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Mutex;

use crate::wire::{MAX_LINE_BYTES, Reply, Request};

/// What a worker does with the requests of the agent.
pub trait Handler: Send + Sync + 'static {
    /// Its whole configuration.
    type Config: Serialize + DeserializeOwned + Send;
    /// Its status.
    type Status: Serialize;

    /// Puts a configuration in force, or explains in one line why not and leaves the old one in force.
    fn apply(&self, config: Self::Config) -> impl Future<Output = Result<(), String>> + Send;

    /// The present status.
    fn status(&self) -> impl Future<Output = Self::Status> + Send;
}

/// The control socket could not be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket could not be made.
    #[error("listen on {path}")]
    Listen {
        /// The socket's path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Serves the control socket for ever; applied configurations are saved in `state`.
///
/// The socket is open to root only. Cancel safe: dropping the future closes the socket.
pub async fn serve<H: Handler>(
    socket: &Path,
    state: &Path,
    handler: Arc<H>,
) -> Result<(), ServeError> {
    let listen = |source| ServeError::Listen { path: socket.to_owned(), source };
    let listener = bind(socket).map_err(listen)?;
    let applying = Arc::new(Mutex::new(()));
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (handler, state) = (Arc::clone(&handler), state.to_owned());
                let applying = Arc::clone(&applying);
                tokio::spawn(async move {
                    if let Err(error) = converse(stream, &*handler, &state, &applying).await {
                        tracing::debug!(%error, "control connection ended");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accepting a control connection failed");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

/// Binds beside the final path and renames: whoever connects meets the old worker or the new one, never a gap.
fn bind(socket: &Path) -> io::Result<UnixListener> {
    let fresh = socket.with_extension(format!("{}.new", std::process::id()));
    let _ = fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh)?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600))?;
    fs::rename(&fresh, socket)?;
    Ok(listener)
}

/// Applies the configuration saved in `state`, if any. To be called before the worker's own sockets open.
///
/// One that cannot be read or applied is logged and left alone: the agent sends a new one.
pub async fn restore<H: Handler>(state: &Path, handler: &H) {
    let saved = match fs::read(state) {
        Ok(saved) => saved,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => {
            tracing::warn!(path = %state.display(), %error, "saved configuration unreadable");
            return;
        }
    };
    match serde_json::from_slice(&saved) {
        Ok(config) => {
            if let Err(error) = handler.apply(config).await {
                tracing::warn!(path = %state.display(), error, "saved configuration not applied");
            }
        }
        Err(error) => {
            tracing::warn!(path = %state.display(), %error, "saved configuration malformed");
        }
    }
}

async fn converse<H: Handler>(
    stream: UnixStream,
    handler: &H,
    state: &Path,
    applying: &Mutex<()>,
) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    loop {
        let mut line = Vec::new();
        let n = (&mut read).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await?;
        if n == 0 {
            return Ok(());
        }
        let reply = answer(&line, handler, state, applying).await;
        let mut out = serde_json::to_vec(&reply)?;
        out.push(b'\n');
        write.write_all(&out).await?;
    }
}

async fn answer<H: Handler>(line: &[u8], handler: &H, state: &Path, applying: &Mutex<()>) -> Reply {
    let result = match serde_json::from_slice(line) {
        Ok(Request::Set(raw)) => {
            let _turn = applying.lock().await;
            match serde_json::from_str(raw.get()) {
                Ok(config) => match handler.apply(config).await {
                    Ok(()) => {
                        // The configuration is in force either way; without the file only a restart would miss it.
                        if let Err(error) = save(state, raw.get().as_bytes()) {
                            tracing::warn!(path = %state.display(), %error, "configuration not saved");
                        }
                        to_raw_value(&())
                    }
                    Err(why) => return Reply::Error(why),
                },
                Err(error) => Err(error),
            }
        }
        Ok(Request::Get(())) => to_raw_value(&handler.status().await),
        Err(error) => Err(error),
    };
    match result {
        Ok(value) => Reply::Ok(value),
        Err(error) => Reply::Error(error.to_string()),
    }
}

/// Writes a file that only root can read, so that a crash leaves the old or the new content.
fn save(path: &Path, content: &[u8]) -> io::Result<()> {
    use std::io::Write as _;
    let fresh = path.with_extension("new");
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    file.write_all(content)?;
    file.sync_data()?;
    fs::rename(&fresh, path)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex as StdMutex;

    use super::*;
    use crate::client::{CallError, Client};

    #[derive(Default)]
    struct Echo(StdMutex<Vec<u32>>);

    impl Handler for Echo {
        type Config = Vec<u32>;
        type Status = Vec<u32>;

        async fn apply(&self, config: Vec<u32>) -> Result<(), String> {
            if config.contains(&13) {
                return Err("13 is not served".into());
            }
            *self.0.lock().unwrap() = config;
            Ok(())
        }

        async fn status(&self) -> Vec<u32> {
            self.0.lock().unwrap().clone()
        }
    }

    async fn ready(client: &Client) -> Vec<u32> {
        for _ in 0..200 {
            if let Ok(status) = client.get().await {
                return status;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("the worker never answered");
    }

    #[tokio::test]
    async fn a_configuration_is_applied_kept_and_restored() {
        let dir = std::env::temp_dir().join(format!("mesh-worker-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (socket, state) = (dir.join("w.sock"), dir.join("w.json"));
        let start = || {
            let (socket, state) = (socket.clone(), state.clone());
            tokio::spawn(async move {
                let echo = Arc::new(Echo::default());
                restore(&state, &*echo).await;
                serve(&socket, &state, echo).await
            })
        };
        let client = Client::new(&socket);

        let first = start();
        assert_eq!(ready(&client).await, Vec::<u32>::new());
        client.set(&vec![1, 2]).await.unwrap();
        assert!(matches!(client.set(&vec![13]).await, Err(CallError::Refused(_))));
        assert!(matches!(client.set(&"text").await, Err(CallError::Refused(_))));
        assert_eq!(client.get::<Vec<u32>>().await.unwrap(), [1, 2], "a refusal changes nothing");
        first.abort();
        let _ = first.await;

        let second = start();
        assert_eq!(ready(&client).await, [1, 2], "restored without an agent");
        second.abort();
        fs::remove_dir_all(&dir).unwrap();
    }
}
