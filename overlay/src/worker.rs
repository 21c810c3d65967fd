//! The worker process: `mesh-agent overlay`.

mod bound;

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mesh_model::snapshot::WgKey;
use mesh_worker::descriptors::InheritError;
use mesh_worker::privileges::{self, Capability};
use mesh_worker::server::ServeError;
use mesh_worker::{Control, Descriptors, Handler, Predecessor};

use crate::config::OverlayConfig;
use crate::engine::{Beginning, Engine, Failure, capacity};
use crate::handover::{self, Legacy};
use crate::keys::{KeyError, NodeKeys};
use crate::protocol::Outbox;
use crate::status::Status;

pub use self::bound::dated_ahead;
pub use crate::engine::{EngineFailure, StartError};
pub use crate::os::tun::TunError;

/// How often timers are looked at. The protocol needs 250 ms or less.
const TICK: Duration = Duration::from_millis(100);

/// A worker that does not hand over by then hangs: its threads have a second to finish.
const HANDOVER_LIMIT: Duration = Duration::from_secs(3);

/// A worker that has handed over, or refused to, is gone by then, or stays.
const LOCK_LIMIT: Duration = Duration::from_secs(3);

/// Where the worker finds things.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// Control socket, to listen on.
    pub socket: PathBuf,
    /// The last configuration; read at the start, written after each change.
    pub state: PathBuf,
    /// Name of the device, at most 15 bytes; created when absent, and left behind.
    pub device: String,
    /// The node's private key; made when absent. Beside it, with the ending `stamp`, is what no stamp of its handshakes has exceeded.
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
///
/// When it was started to replace another worker, it makes that one stop, and goes on with its sessions. Where that fails,
/// it calls all peers.
pub fn run(options: &WorkerOptions) -> Result<(), RunError> {
    let inherited = Descriptors::inherited()?;
    let predecessor = Predecessor::of_this_process();
    // Packets wait for nothing that the agent has to do, be it the whole of a node's state after a change of engine.
    if let Err(error) = privileges::come_first() {
        tracing::warn!(%error, "packets wait for other programs where processors are short");
    }
    privileges::drop_all_but(&[Capability::NetAdmin]).map_err(RunError::Privileges)?;
    let keys = NodeKeys::load_or_create(&options.private_key)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(RunError::Runtime)?;
    // Before the worker that is to be replaced stops: nobody carries packets from then on.
    let affords = capacity::handshakes(&keys.present);
    let ended = runtime.block_on(async {
        let path = options.state.with_extension("lock");
        let (alone, legacy) = match predecessor {
            Some(predecessor) => {
                let legacy = succeed(predecessor).await;
                (lock_soon(&path).await?, legacy)
            }
            None => (lock(&path)?, None),
        };
        work(options, (keys, affords), alone, (inherited, legacy)).await
    });
    // What waits for a disk that has stalled is not waited for.
    runtime.shutdown_background();
    ended
}

async fn work(
    options: &WorkerOptions,
    (keys, affords): (NodeKeys, u32),
    alone: File,
    (inherited, legacy): (Descriptors, Option<Legacy>),
) -> Result<(), RunError> {
    let bound = options.private_key.with_extension("stamp");
    let left = legacy.as_ref().map(|legacy| &legacy.estate);
    let goes_on_with = left.map(|estate| estate.peers.len());
    let stamps = bound::begin(&bound, left.map(|estate| estate.last_stamp));
    let beginning = Beginning { stamps, affords, inherited, legacy };
    let engine = Engine::start(&options.device, &keys.present, beginning)?;
    tracing::info!(device = options.device, keys = ?keys.public(), goes_on_with, "overlay engine runs");
    engine.identify(keys);
    let failure = engine.failure();
    let control = Control::new(&options.socket, &options.state, descriptors(&engine));
    let worker = Arc::new(Worker {
        held: Mutex::new(Held::Engine { engine, alone }),
        control: Arc::clone(&control),
        failure: Arc::clone(&failure),
        private_key: options.private_key.clone(),
        bound,
        storing: Arc::default(),
    });
    control.restore(&*worker).await;
    tokio::select! {
        result = control.serve(Arc::clone(&worker)) => Ok(result?),
        failure = failure.happened() => Err(failure.into()),
        () = worker.tick() => Ok(()),
    }
}

/// Makes another worker stop, and takes what it leaves; none when it leaves nothing that is understood.
async fn succeed(predecessor: Predecessor) -> Option<Legacy> {
    let taken = match predecessor.take_over(HANDOVER_LIMIT).await {
        Ok(file) => handover::take(file),
        Err(error) => {
            tracing::warn!(error = chain(&error), "sessions not handed over, calling all peers");
            return None;
        }
    };
    let failed = |error| tracing::warn!(error = chain(&error), "sessions lost, calling all peers");
    taken.map_err(failed).ok()
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

/// The same for one whose holder is about to end.
async fn lock_soon(path: &Path) -> Result<File, RunError> {
    let end = Instant::now() + LOCK_LIMIT;
    loop {
        match lock(path) {
            Err(RunError::Running { .. }) if Instant::now() < end => {}
            result => return result,
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// What the agent is to keep for the next worker.
fn descriptors(engine: &Engine) -> Descriptors {
    engine.descriptors().unwrap_or_else(|error| {
        tracing::warn!(%error, "the next worker will open everything anew");
        Descriptors::default()
    })
}

struct Worker {
    held: Mutex<Held>,
    control: Arc<Control>,
    failure: Arc<Failure>,
    private_key: PathBuf,
    /// File of the bound of the stamps.
    bound: PathBuf,
    /// Held while the bound is being stored.
    storing: Arc<tokio::sync::Mutex<()>>,
}

/// Only one worker has an engine, and the lock that says so.
enum Held {
    Engine {
        engine: Engine,
        alone: File,
    },
    /// A successor has it; how it was.
    Gone(Status),
}

impl Worker {
    fn hold(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the keys that are on disk when others are asked for. A configuration that is older than they are asks for
    /// what is gone, and is right in everything else.
    fn identify(&self, engine: &Engine, wanted: &[WgKey]) -> Result<(), KeyError> {
        if !wanted.is_empty() && wanted != engine.public_keys() {
            let keys = NodeKeys::load_or_create(&self.private_key)?;
            tracing::info!(keys = ?keys.public(), "the node's keys are read anew");
            engine.identify(keys);
        }
        Ok(())
    }

    async fn tick(&self) {
        let mut interval = tokio::time::interval(TICK);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut outbox = Outbox::default();
        loop {
            interval.tick().await;
            // A disk that stalls stops no timer: the next bound waits for the one that is being stored.
            let turn = Arc::clone(&self.storing).try_lock_owned().ok();
            let kept = match &*self.hold() {
                Held::Engine { engine, .. } => {
                    engine.tick(&mut outbox);
                    turn.as_ref().and_then(|_| engine.stamps_to_store())
                }
                Held::Gone(_) => None,
            };
            if let Some(kept) = kept {
                let path = self.bound.clone();
                tokio::spawn(async move {
                    bound::store(&path, kept).await;
                    // Whoever stores is not overtaken by a successor that does.
                    drop(turn);
                });
            }
        }
    }

    /// Takes the engine apart. What fails here is the end of this worker, one way or the other.
    fn leave(&self) -> Result<OwnedFd, EngineFailure> {
        let mut held = self.hold();
        let status = match &*held {
            Held::Engine { engine, .. } => engine.status(),
            Held::Gone(_) => return Err(EngineFailure::Left),
        };
        let Held::Engine { engine, alone } = std::mem::replace(&mut *held, Held::Gone(status))
        else {
            return Err(EngineFailure::Left);
        };
        let Some(estate) = engine.leave() else {
            // Threads may be at work until the process has ended: only then is the lock free.
            std::mem::forget(alone);
            return Err(EngineFailure::Stuck);
        };
        // The lock is free from here on: nothing is left that reads or seals.
        handover::write(estate).map_err(EngineFailure::Unwritten)
    }
}

impl Handler for Worker {
    type Config = OverlayConfig;
    type Status = Status;

    const YIELDS: bool = true;

    async fn apply(&self, config: OverlayConfig) -> Result<(), String> {
        let held = self.hold();
        let Held::Engine { engine, .. } = &*held else {
            return Err(chain(&EngineFailure::Left));
        };
        self.identify(engine, &config.own_keys).map_err(|error| chain(&error))?;
        match engine.configure(&config) {
            Ok(opened) => {
                if opened {
                    self.control.publish(descriptors(engine));
                }
                let (peers, port) = (config.peers.len(), config.listen_port);
                tracing::info!(peers, port, mtu = config.mtu, "overlay configuration in force");
                Ok(())
            }
            Err(error) => Err(chain(&error)),
        }
    }

    async fn status(&self) -> Status {
        match &*self.hold() {
            Held::Engine { engine, .. } => engine.status(),
            Held::Gone(status) => status.clone(),
        }
    }

    async fn hand_over(&self) -> Result<OwnedFd, String> {
        let _turn = self.storing.lock().await;
        let left = self.leave();
        match left {
            Ok(file) => {
                tracing::info!("sessions handed over to another worker");
                Ok(file)
            }
            Err(failure) => {
                let why = chain(&failure);
                self.failure.report(failure);
                Err(why)
            }
        }
    }
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
