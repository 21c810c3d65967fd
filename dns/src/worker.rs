//! The worker process: `mesh-agent dns`.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mesh_model::snapshot::DnsZone;
use mesh_worker::privileges::{self, Capability};
use mesh_worker::server::{Handler, ServeError, restore, serve};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use crate::forward::Forwarder;
use crate::listen;
use crate::server::{Server, Tables};
use crate::zone::Zone;

/// A TCP client that says nothing for so long is dropped (RFC 7766, section 6.2.3).
const TCP_IDLE: Duration = Duration::from_secs(10);
const TCP_RESPONSE_BYTES: usize = 65_535;

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
    /// The control socket failed.
    #[error(transparent)]
    Control(#[from] ServeError),
}

/// Drops privileges, binds the sockets and answers until the process ends.
///
/// Blocks; makes a runtime of its own, because capabilities belong to threads and have to go before there
/// are several.
pub fn run(options: WorkerOptions) -> Result<(), RunError> {
    privileges::drop_all_but(&[Capability::NetBindService]).map_err(RunError::Privileges)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(1, usize::from).min(4))
        .enable_all()
        .build()
        .map_err(RunError::Runtime)?;
    runtime.block_on(answer(options))
}

async fn answer(options: WorkerOptions) -> Result<(), RunError> {
    let forwarder = Forwarder::new(&[]).expect("no servers, nothing that can fail");
    let server = Server::new(Tables { zone: Zone::default(), forwarder: Arc::new(forwarder) });
    let worker = Arc::new(Worker { server: server.clone(), upstreams: Mutex::new(vec![]) });
    // Names first, sockets second: a question must never meet an empty zone while a saved one is there.
    restore(&options.state_file, &*worker).await;
    let mut sockets = hickory_server::Server::new(server);
    for address in &options.listen {
        let failed = |source| RunError::Listen { address: *address, source };
        let (udp, tcp) = listen::bind(*address).map_err(failed)?;
        sockets.register_socket(tokio::net::UdpSocket::from_std(udp).map_err(failed)?);
        let tcp = tokio::net::TcpListener::from_std(tcp).map_err(failed)?;
        sockets.register_listener(tcp, TCP_IDLE, TCP_RESPONSE_BYTES);
    }
    tracing::info!(listen = ?options.listen, "answering DNS questions");
    serve(&options.control_socket, &options.state_file, worker).await?;
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
