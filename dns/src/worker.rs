//! The worker process: `mesh-agent dns`.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mesh_model::snapshot::DnsZone;
use mesh_worker::descriptors::InheritError;
use mesh_worker::server::ServeError;
use mesh_worker::{Control, Descriptors, Handler, SocketSpec, privileges};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Mutex;

use crate::forward::Forwarder;
use crate::listen::{self, Listeners};
use crate::server::{Server, Tables};
use crate::zone::Zone;

/// Longer than any upstream server is waited for: whoever asked gets an answer before the worker ends.
const DRAIN: Duration = Duration::from_secs(8);

/// How the worker is started.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// Where the agent speaks to it.
    pub control_socket: PathBuf,
    /// Where it keeps its last configuration.
    pub state_file: PathBuf,
    /// Addresses to answer on, UDP and TCP.
    pub listen: Vec<SocketAddr>,
}

/// Its whole configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DnsConfig {
    /// The cluster's names.
    pub zone: DnsZone,
    /// Servers for all other names, the preferred one first; none means that such questions are refused.
    pub upstreams: Vec<SocketAddr>,
}

/// Its status.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DnsStatus {
    /// Names that have records.
    pub names: usize,
    /// Questions answered from the zone since the start.
    pub zone_answers: u64,
    /// Questions sent upstream or answered from the cache since the start.
    pub forwarded: u64,
    /// Questions refused: malformed, of another class, without an upstream server.
    pub refused: u64,
    /// Questions that ended in SERVFAIL.
    pub failed: u64,
}

/// The worker could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The agent left something else than it said.
    #[error(transparent)]
    Inherit(#[from] InheritError),
    /// An address is not free.
    #[error("listen for DNS on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Privileges could not be dropped.
    #[error("drop privileges")]
    Privileges(#[source] io::Error),
    /// The runtime could not be made.
    #[error("start the runtime")]
    Runtime(#[source] io::Error),
    /// Signals cannot be waited for.
    #[error("wait for signals")]
    Signal(#[source] io::Error),
    /// The control socket failed.
    #[error(transparent)]
    Control(#[from] ServeError),
}

/// Takes over its sockets or makes them, drops all privileges, and answers until SIGTERM or SIGINT; what was read until
/// then is answered.
///
/// Blocks; makes a runtime of its own, because capabilities belong to threads and have to go before there
/// are several.
pub fn run(options: WorkerOptions) -> Result<(), RunError> {
    let mut inherited = Descriptors::inherited()?;
    let mut kept = Descriptors::default();
    let mut sockets = Vec::new();
    for spec in listen::sockets(&options.listen) {
        let address = spec.address;
        let socket = kept.socket(&spec, &mut inherited);
        let socket = socket.map_err(|source| RunError::Listen { address, source })?;
        sockets.push((spec, socket));
    }
    drop(inherited);
    privileges::drop_all_but(&[]).map_err(RunError::Privileges)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(1, usize::from).min(4))
        .enable_all()
        .build()
        .map_err(RunError::Runtime)?;
    let control = Control::new(options.control_socket, options.state_file, kept);
    runtime.block_on(answer(control, sockets))
}

async fn answer(
    control: Arc<Control>,
    sockets: Vec<(SocketSpec, OwnedFd)>,
) -> Result<(), RunError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signal)?;
    let forwarder = Forwarder::new(&[]).expect("no servers, nothing that can fail");
    let server = Server::new(Tables { zone: Zone::default(), forwarder: Arc::new(forwarder) });
    let worker = Arc::new(Worker { server: server.clone(), upstreams: Mutex::new(vec![]) });
    control.restore(&*worker).await;
    let listeners = Listeners::new(server);
    let serve = async {
        // Names first: a question must never meet an empty zone. It waits in its socket until there are some.
        control.configured().await;
        for (spec, socket) in sockets {
            let address = spec.address;
            let served = listeners.serve(spec.transport, socket);
            served.map_err(|source| RunError::Listen { address, source })?;
        }
        tracing::info!("answering DNS questions");
        std::future::pending().await
    };
    tokio::select! {
        failed = control.serve(worker) => failed?,
        failed = serve => return failed,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    control.release();
    if tokio::time::timeout(DRAIN, listeners.drain()).await.is_err() {
        tracing::warn!("ended before all questions were answered");
    }
    Ok(())
}

struct Worker {
    server: Server,
    upstreams: Mutex<Vec<SocketAddr>>,
}

impl Handler for Worker {
    type Config = DnsConfig;
    type Status = DnsStatus;

    async fn apply(&self, config: DnsConfig) -> Result<(), String> {
        let mut upstreams = self.upstreams.lock().await;
        // The cache lives in the forwarder: a change of names must not empty it.
        let forwarder = if *upstreams == config.upstreams {
            Arc::clone(&self.server.tables.load().forwarder)
        } else {
            let fresh = Forwarder::new(&config.upstreams).map_err(|e| e.to_string())?;
            upstreams.clone_from(&config.upstreams);
            Arc::new(fresh)
        };
        let zone = Zone::new(&config.zone);
        self.server.tables.store(Arc::new(Tables { zone, forwarder }));
        Ok(())
    }

    async fn status(&self) -> DnsStatus {
        let counters = &self.server.counters;
        DnsStatus {
            names: self.server.tables.load().zone.len(),
            zone_answers: counters.zone.load(Ordering::Relaxed),
            forwarded: counters.forwarded.load(Ordering::Relaxed),
            refused: counters.refused.load(Ordering::Relaxed),
            failed: counters.failed.load(Ordering::Relaxed),
        }
    }
}
