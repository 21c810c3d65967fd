//! The proxy as one object: threads that serve, a configuration to replace, figures to read.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use mesh_model::snapshot::L7Config;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::backend::Registry;
use crate::listen::Listeners;
use crate::options::ProxyOptions;
use crate::shard::{Core, Phase, Shard};
use crate::status::{BackendCounts, Counts, Status};
use crate::table::Table;
use crate::tls::{self, CertificateStore, CertificateTable, TlsError};

/// The proxy cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// TLS cannot be served.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A thread cannot be made.
    #[error("start a thread of the proxy")]
    Thread(#[source] io::Error),
}

/// A running proxy. Dropping it cuts all connections; [`Proxy::drain`] lets them end.
pub struct Proxy {
    core: Arc<Core>,
    phase: watch::Sender<Phase>,
    threads: Vec<JoinHandle<()>>,
    http: Vec<SocketAddr>,
    https: Vec<SocketAddr>,
    started: Instant,
}

impl Proxy {
    /// Serves on `listeners`, from the first [`Proxy::apply`] on: until then, connections wait in the kernel's queue.
    pub fn start(listeners: Listeners, options: ProxyOptions) -> Result<Self, StartError> {
        let threads = listeners.shards.len();
        let certificates = Arc::new(CertificateStore::new()?);
        let tls = tls::server_config(Arc::clone(&certificates))?;
        let core = Arc::new(Core {
            options,
            table: Default::default(),
            certificates,
            certificate_count: Default::default(),
            tls,
            registry: Registry::new(threads),
            counters: (0..threads).map(|_| Default::default()).collect(),
            problems: Default::default(),
            generation: Default::default(),
        });
        let phase = watch::Sender::new(Phase::Wait);
        let mut running = Vec::new();
        for (index, sockets) in listeners.shards.into_iter().enumerate() {
            let shard = Shard::new(Arc::clone(&core), index);
            let phase = phase.subscribe();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(StartError::Thread)?;
            let serve = move || {
                if let Err(error) = runtime.block_on(shard.run(sockets, phase)) {
                    tracing::error!(%error, "a thread of the proxy ended");
                }
            };
            let builder = std::thread::Builder::new().name(format!("ingress-{index}"));
            running.push(builder.spawn(serve).map_err(StartError::Thread)?);
        }
        let (http, https) = (listeners.http, listeners.https);
        Ok(Self { core, phase, threads: running, http, https, started: Instant::now() })
    }

    /// Where plain HTTP is served.
    pub fn http(&self) -> &[SocketAddr] {
        &self.http
    }

    /// Where TLS is served.
    pub fn https(&self) -> &[SocketAddr] {
        &self.https
    }

    /// Puts a configuration in force for requests and handshakes to come. What cannot be used of it is left out
    /// and listed in [`Status::problems`]. No connection and no request in progress notices.
    pub fn apply(&self, config: &L7Config) {
        let (table, mut problems) = Table::new(&config.routes, &self.core.registry);
        let (certificates, more) = CertificateTable::new(&config.certificates);
        problems.extend(more);
        for problem in &problems {
            tracing::warn!(object = problem.object, reason = problem.reason, "not in force");
        }
        self.core.certificate_count.store(certificates.count as u64, Relaxed);
        self.core.certificates.replace(certificates);
        self.core.table.store(Arc::new(table));
        self.core.generation.fetch_add(1, Relaxed);
        *self.core.problems.lock().unwrap_or_else(PoisonError::into_inner) = problems;
        let first = |phase: &mut Phase| {
            let waits = *phase == Phase::Wait;
            *phase = (*phase).max(Phase::Run);
            waits
        };
        self.phase.send_if_modified(first);
    }

    /// The present figures.
    pub fn status(&self) -> Status {
        let core = &self.core;
        let mut counts = Counts::default();
        for counters in &core.counters {
            counters.add_to(&mut counts);
        }
        Status {
            pid: std::process::id(),
            uptime_secs: self.started.elapsed().as_secs(),
            generation: core.generation.load(Relaxed),
            http: self.http.clone(),
            https: self.https.clone(),
            routes: core.table.load().count,
            certificates: core.certificate_count.load(Relaxed) as usize,
            problems: core.problems.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            counts,
            backends: self.backends(),
        }
    }

    fn backends(&self) -> BackendCounts {
        let registry = &self.core.registry;
        let now = registry.millis(Instant::now());
        let all = registry.all();
        let ejected = all.iter().filter(|b| b.is_ejected(now)).map(|b| b.address);
        let mut ejected: Vec<SocketAddr> = ejected.collect();
        ejected.sort();
        let idle_connections = all.iter().map(|b| b.idle_count()).sum();
        BackendCounts { known: all.len(), ejected, idle_connections }
    }

    /// Stops accepting, tells clients to go elsewhere, and returns when all connections have ended or the
    /// drain time is over. Cancel safe; may be called again.
    pub async fn drain(&self) {
        self.phase.send_replace(Phase::Drain);
        while self.threads.iter().any(|thread| !thread.is_finished()) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.phase.send_replace(Phase::Stop);
    }
}
