//! The worker process: `mesh-agent overlay`.

mod bound;

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mesh_worker::descriptors::InheritError;
use mesh_worker::privileges::{self, Capability};
use mesh_worker::server::ServeError;
use mesh_worker::{Control, Descriptors, Handler};

use crate::config::OverlayConfig;
use crate::engine::Engine;
use crate::keys::{KeyError, NodeKey};
use crate::protocol::{Outbox, Stamps};
use crate::status::Status;

pub use crate::engine::{EngineFailure, StartError};
pub use crate::os::tun::TunError;

/// How often timers are looked at. The protocol needs 250 ms or less.
const TICK: Duration = Duration::from_millis(100);

/// Where the worker finds things.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// Control socket, to listen on.
    pub socket: PathBuf,
    /// The last configuration; read at the start, written after each change.
    pub state: PathBuf,
    /// Name of the device, at most 15 bytes; created when absent, and left behind.
    pub device: String,
    /// The node's private key; made when absent. Beside it, with the ending `stamp`, is the bound of its handshakes' stamps.
    pub private_key: PathBuf,
}

/// The worker could not start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The agent left something else than it said.
    #[error(transparent)]
    Inherit(#[from] InheritError),
    /// Privileges could not be given up.
    #[error("drop privileges")]
    Privileges(#[source] io::Error),
    /// The node's key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Two workers on one device would each get half of the packets.
    #[error("another overlay worker holds {path}")]
    Running {
        /// Its lock file.
        path: PathBuf,
    },
    /// The lock file could not be used.
    #[error("lock {path}")]
    Lock {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The engine did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The runtime for the control socket did not start.
    #[error("start the control runtime")]
    Runtime(#[source] io::Error),
    /// The control socket.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The engine gave up: start the worker again.
    #[error(transparent)]
    Failed(#[from] EngineFailure),
}

/// Runs the worker until it is killed, or cannot go on. Blocks; call it first thing in `main`, before any thread is started.
///
/// Keeps the capability to configure network devices, which the MTU and opening the device need, and gives up
/// all others for good. When a saved configuration exists, it calls all peers before it listens for the agent.
pub fn run(options: &WorkerOptions) -> Result<(), RunError> {
    // What it makes it keeps for itself yet: the device is opened anew by each worker.
    let kept = Descriptors::inherited()?;
    privileges::drop_all_but(&[Capability::NetAdmin]).map_err(RunError::Privileges)?;
    let key = NodeKey::load_or_create(&options.private_key)?;
    let _alone = lock(&options.state.with_extension("lock"))?;
    let bound = options.private_key.with_extension("stamp");
    let stamps = Stamps::new(Instant::now(), SystemTime::now(), bound::load(&bound));
    let engine = Arc::new(Engine::start(&options.device, &key, stamps)?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(RunError::Runtime)?;
    tracing::info!(device = options.device, key = %key.public(), "overlay engine runs");
    runtime.block_on(async {
        let handler = Arc::new(Configured { engine: Arc::clone(&engine) });
        let control = Control::new(&options.socket, &options.state, kept);
        control.restore(&*handler).await;
        tokio::select! {
            result = control.serve(handler) => Ok(result?),
            failure = engine.failed() => Err(failure.into()),
            () = tick(Arc::clone(&engine), &bound) => Ok(()),
        }
    })
}

fn lock(path: &Path) -> Result<File, RunError> {
    let failed = |source| RunError::Lock { path: path.to_owned(), source };
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(false).mode(0o600).open(path);
    let file = file.map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(RunError::Running { path: path.to_owned() }),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

async fn tick(engine: Arc<Engine>, bound: &Path) {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut outbox = Outbox::default();
    loop {
        interval.tick().await;
        engine.tick(&mut outbox);
        if let Some(reached) = engine.stamps_to_store() {
            bound::store(bound, reached).await;
        }
    }
}

struct Configured {
    engine: Arc<Engine>,
}

impl Handler for Configured {
    type Config = OverlayConfig;
    type Status = Status;

    async fn apply(&self, config: OverlayConfig) -> Result<(), String> {
        let result = self.engine.configure(&config);
        match result {
            Ok(()) => {
                let (peers, port) = (config.peers.len(), config.listen_port);
                tracing::info!(peers, port, mtu = config.mtu, "overlay configuration in force");
                Ok(())
            }
            Err(error) => Err(chain(&error)),
        }
    }

    async fn status(&self) -> Status {
        self.engine.status()
    }
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
