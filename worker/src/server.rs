//! The worker's side of its control socket.

use std::fs;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::to_raw_value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, watch};

use crate::descriptors::Descriptors;
use crate::rights;
use crate::wire::{MAX_LINE_BYTES, Reply, Report, Request};

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

    /// Whether there is a [`Handler::hand_over`].
    const YIELDS: bool = false;

    /// Stops for good, and returns what a successor needs to go on; explains in one line why not otherwise.
    fn hand_over(&self) -> impl Future<Output = Result<OwnedFd, String>> + Send {
        std::future::ready(Err("this worker hands nothing over".to_owned()))
    }
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

/// A worker's control socket, its saved configuration, and the descriptors that it shares with its agent.
#[derive(Debug)]
pub struct Control {
    socket: PathBuf,
    state: PathBuf,
    /// Number of the configuration in force.
    applying: Mutex<u64>,
    /// Of the one on disk; held while one is written.
    saved: Arc<Mutex<u64>>,
    progress: watch::Sender<Progress>,
}

#[derive(Debug, Clone)]
struct Progress {
    configured: bool,
    descriptors: Option<Arc<Descriptors>>,
    /// A successor has everything.
    yielded: bool,
}

impl Control {
    /// Applied configurations are saved in `state`. `descriptors` are what the agent should keep for the next worker.
    pub fn new(
        socket: impl Into<PathBuf>,
        state: impl Into<PathBuf>,
        descriptors: Descriptors,
    ) -> Arc<Self> {
        let descriptors = Some(Arc::new(descriptors));
        let progress = Progress { configured: false, descriptors, yielded: false };
        Arc::new(Self {
            socket: socket.into(),
            state: state.into(),
            applying: Mutex::default(),
            saved: Arc::default(),
            progress: watch::Sender::new(progress),
        })
    }

    /// Replaces what the agent should keep.
    pub fn publish(&self, descriptors: Descriptors) {
        self.progress.send_modify(|now| now.descriptors = Some(Arc::new(descriptors)));
    }

    /// Lets go of the descriptors, because the worker ends; the agent keeps its own.
    ///
    /// Without an agent and a successor this closes them, so that clients are refused at once and do not wait for
    /// nobody.
    pub fn release(&self) {
        self.progress.send_modify(|now| now.descriptors = None);
    }

    /// Ready when a configuration is in force: nothing should be served before. Cancel safe.
    pub async fn configured(&self) {
        let mut progress = self.progress.subscribe();
        let _ = progress.wait_for(|now| now.configured).await;
    }

    /// Applies the saved configuration, if any. To be called before [`Control::serve`].
    ///
    /// One that cannot be read or applied is logged and left alone: the agent sends a new one.
    pub async fn restore<H: Handler>(&self, handler: &H) {
        let path = self.state.display();
        let saved = match fs::read(&self.state) {
            Ok(saved) => saved,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => {
                tracing::warn!(%path, %error, "saved configuration unreadable");
                return;
            }
        };
        match serde_json::from_slice(&saved) {
            Ok(config) => match handler.apply(config).await {
                Ok(()) => self.progress.send_modify(|now| now.configured = true),
                Err(error) => tracing::warn!(%path, error, "saved configuration not applied"),
            },
            Err(error) => tracing::warn!(%path, %error, "saved configuration malformed"),
        }
    }

    /// Serves the control socket until a successor has taken over what this worker is busy with: then it is time to end.
    ///
    /// The socket is open to root only. Cancel safe: dropping the future closes the socket.
    pub async fn serve<H: Handler>(self: &Arc<Self>, handler: Arc<H>) -> Result<(), ServeError> {
        let listen = |source| ServeError::Listen { path: self.socket.clone(), source };
        let listener = bind(&self.socket).map_err(listen)?;
        let mut progress = self.progress.subscribe();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = progress.wait_for(|now| now.yielded) => return Ok(()),
            };
            match accepted {
                Ok((stream, _)) => {
                    let (control, handler) = (Arc::clone(self), Arc::clone(&handler));
                    tokio::spawn(async move {
                        if let Err(error) = control.converse(stream, &*handler).await {
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

    async fn converse<H: Handler>(&self, stream: UnixStream, handler: &H) -> io::Result<()> {
        let mut stream = BufReader::new(stream);
        loop {
            let mut line = Vec::new();
            let n = (&mut stream).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await?;
            if n == 0 {
                return Ok(());
            }
            let reply = match serde_json::from_slice(&line) {
                Ok(Request::Attach(())) => {
                    return self.report_to(stream.into_inner(), H::YIELDS).await;
                }
                Ok(Request::Yield(())) => return self.hand_over(handler, stream.get_ref()).await,
                Ok(Request::Get(())) => ok(&handler.status().await),
                Ok(Request::Set(raw)) => match self.apply(handler, raw.get()).await {
                    Ok(()) => ok(&()),
                    Err(why) => Reply::Error(why),
                },
                Err(error) => Reply::Error(error.to_string()),
            };
            stream.write_all(&line_of(&reply)?).await?;
        }
    }

    async fn hand_over<H: Handler>(&self, handler: &H, stream: &UnixStream) -> io::Result<()> {
        // A configuration that is acknowledged has been put in force, and saved, before; none is any more after.
        let _turn = self.applying.lock().await;
        let _saved = self.saved.lock().await;
        match handler.hand_over().await {
            Ok(estate) => {
                // Whether the successor got it or has died: this worker has nothing left to work with.
                let sent = rights::send(stream, &line_of(&ok(&()))?, &[estate.as_fd()]).await;
                self.progress.send_modify(|now| now.yielded = true);
                sent
            }
            Err(why) => rights::send(stream, &line_of(&Reply::Error(why))?, &[]).await,
        }
    }

    async fn apply<H: Handler>(&self, handler: &H, raw: &str) -> Result<(), String> {
        let mut applied = self.applying.lock().await;
        if self.progress.borrow().yielded {
            return Err("another worker has taken over".to_owned());
        }
        let config = serde_json::from_str(raw).map_err(|error| error.to_string())?;
        handler.apply(config).await?;
        *applied += 1;
        let number = *applied;
        drop(applied);
        self.progress.send_if_modified(|now| !std::mem::replace(&mut now.configured, true));
        self.save(number, raw).await;
        Ok(())
    }

    /// Saves a configuration that is in force, unless a later one has been saved meanwhile. A disk that stalls holds up the answer to
    /// whoever sent it: neither the worker's own work nor the next configuration.
    async fn save(&self, number: u64, raw: &str) {
        let mut saved = Arc::clone(&self.saved).lock_owned().await;
        if *saved > number {
            return;
        }
        let (path, content) = (self.state.clone(), raw.as_bytes().to_vec());
        let written = tokio::task::spawn_blocking(move || {
            let written = save(&path, &content);
            *saved = number;
            written
        });
        // It is in force either way; without the file only a restart would miss it.
        if let Ok(Err(error)) = written.await {
            tracing::warn!(path = %self.state.display(), %error, "configuration not saved");
        }
    }

    /// Reports now and after each change, until the client closes.
    async fn report_to(&self, stream: UnixStream, yields: bool) -> io::Result<()> {
        let mut progress = self.progress.subscribe();
        loop {
            // Nothing of it is kept while we wait: a descriptor that is let go of has to be closed.
            let now = progress.borrow_and_update().clone();
            report(&stream, now, yields).await?;
            tokio::select! {
                changed = progress.changed() => if changed.is_err() { return Ok(()) },
                gone = closed(&stream) => return gone,
            }
        }
    }
}

async fn report(stream: &UnixStream, now: Progress, yields: bool) -> io::Result<()> {
    let all: Option<Vec<(&str, BorrowedFd<'_>)>> =
        now.descriptors.as_ref().map(|descriptors| descriptors.iter().collect());
    let names = |all: &Vec<(&str, _)>| all.iter().map(|(name, _)| (*name).to_owned()).collect();
    let descriptors = all.as_ref().map(names);
    let report = Report { configured: now.configured, descriptors, yields };
    let descriptors: Vec<_> = all.into_iter().flatten().map(|(_, fd)| fd).collect();
    rights::send(stream, &line_of(&ok(&report))?, &descriptors).await
}

/// Ready when the client has closed.
async fn closed(stream: &UnixStream) -> io::Result<()> {
    loop {
        stream.readable().await?;
        match stream.try_read(&mut [0; 64]) {
            Ok(0) => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
    }
}

fn ok<T: Serialize>(value: &T) -> Reply {
    to_raw_value(value).map_or_else(|error| Reply::Error(error.to_string()), Reply::Ok)
}

fn line_of(reply: &Reply) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    Ok(line)
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
mod tests;
