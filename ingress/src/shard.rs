//! One thread of the proxy: its sockets, its connections, its figures.
//!
//! Threads share nothing that a request writes to, but the backends' counts of outstanding requests. The kernel
//! spreads new connections over the threads' sockets (`SO_REUSEPORT`).

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::futures::OwnedNotified;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;

use crate::backend::Registry;
use crate::buffer;
use crate::options::ProxyOptions;
use crate::request::Peer;
use crate::status::{Counters, Problem};
use crate::table::Table;
use crate::tls::CertificateStore;
use crate::{http1, http2};

/// What all threads read.
pub(crate) struct Core {
    pub(crate) options: ProxyOptions,
    pub(crate) table: ArcSwap<Table>,
    pub(crate) certificates: Arc<CertificateStore>,
    pub(crate) certificate_count: AtomicU64,
    pub(crate) tls: Arc<rustls::ServerConfig>,
    pub(crate) registry: Registry,
    pub(crate) counters: Box<[Counters]>,
    pub(crate) problems: Mutex<Vec<Problem>>,
    pub(crate) generation: AtomicU64,
}

/// How far the proxy's life has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Not serving yet: connections wait in the kernel's queue.
    Wait,
    /// Serving.
    Run,
    /// No new connections; those that are idle end, the others end after what they do.
    Drain,
    /// Over.
    Stop,
}

/// One thread's view.
pub(crate) struct Shard {
    pub(crate) core: Arc<Core>,
    pub(crate) index: usize,
    draining: AtomicBool,
    drain: Arc<Notify>,
    slots: Arc<Semaphore>,
}

/// A thread's sockets.
pub(crate) struct Sockets {
    pub(crate) http: Vec<std::net::TcpListener>,
    pub(crate) https: Vec<std::net::TcpListener>,
}

const SWEEP_EVERY: Duration = Duration::from_secs(1);

impl Shard {
    pub(crate) fn new(core: Arc<Core>, index: usize) -> Arc<Self> {
        let slots = (core.options.limits.connections / core.counters.len()).max(1);
        Arc::new(Self {
            core,
            index,
            draining: AtomicBool::new(false),
            drain: Arc::default(),
            slots: Arc::new(Semaphore::new(slots.min(Semaphore::MAX_PERMITS))),
        })
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.core.counters[self.index]
    }

    /// Whether connections should end after what they do.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Ready when draining begins. Made before [`Shard::is_draining`] is asked, it misses nothing.
    pub(crate) fn drained(&self) -> Pin<Box<OwnedNotified>> {
        Box::pin(Arc::clone(&self.drain).notified_owned())
    }

    /// Serves from when `phase` says run, until it says stop, or drain and nothing is left.
    pub(crate) async fn run(
        self: Arc<Self>,
        sockets: Sockets,
        mut phase: watch::Receiver<Phase>,
    ) -> std::io::Result<()> {
        let _ = phase.wait_for(|phase| *phase >= Phase::Run).await;
        let mut accepting = tokio::task::JoinSet::new();
        for (listeners, secure) in [(sockets.http, false), (sockets.https, true)] {
            for listener in listeners {
                let listener = TcpListener::from_std(listener)?;
                accepting.spawn(Arc::clone(&self).accept(listener, secure));
            }
        }
        let sweeper = tokio::spawn(Arc::clone(&self).sweep());
        let _ = phase.wait_for(|phase| *phase >= Phase::Drain).await;
        accepting.shutdown().await;
        self.draining.store(true, Ordering::Relaxed);
        self.drain.notify_waiters();
        let limit = Instant::now() + self.core.options.timeouts.drain;
        while self.counters().connections_open.present() > 0
            && Instant::now() < limit
            && *phase.borrow() < Phase::Stop
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        sweeper.abort();
        Ok(())
    }

    async fn sweep(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(SWEEP_EVERY);
        loop {
            ticks.tick().await;
            self.core.registry.sweep(self.index, self.core.options.timeouts.backend_idle);
            buffer::trim();
        }
    }

    async fn accept(self: Arc<Self>, listener: TcpListener, secure: bool) {
        loop {
            let slot = Arc::clone(&self.slots).acquire_owned().await;
            match listener.accept().await {
                Ok((io, address)) => {
                    let shard = Arc::clone(&self);
                    let open = Open::new(Arc::clone(&self));
                    tokio::spawn(async move {
                        shard.connection(io, address, secure).await;
                        drop((open, slot));
                    });
                }
                // Out of descriptors, mostly: those that end make room.
                Err(error) if is_lasting(&error) => {
                    tracing::warn!(%error, "accepting a connection failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(_) => {}
            }
        }
    }

    async fn connection(self: Arc<Self>, io: TcpStream, address: SocketAddr, secure: bool) {
        let peer = Peer::new(address.ip(), secure);
        let _ = io.set_nodelay(true);
        if !secure {
            return http1::serve(io, peer, self).await;
        }
        let handshake = TlsAcceptor::from(Arc::clone(&self.core.tls)).accept(io);
        match tokio::time::timeout(self.core.options.timeouts.head, handshake).await {
            Ok(Ok(io)) if io.get_ref().1.alpn_protocol() == Some(b"h2") => {
                http2::serve(io, peer, self).await;
            }
            Ok(Ok(io)) => http1::serve(io, peer, self).await,
            Ok(Err(_)) | Err(_) => self.counters().tls_failures.add(),
        }
    }
}

/// Errors that concern the process; the others concern one client that is gone.
fn is_lasting(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    !matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted | WouldBlock)
}

/// Counts a connection while it lives, however its task ends.
struct Open(Arc<Shard>);

impl Open {
    fn new(shard: Arc<Shard>) -> Self {
        shard.counters().connections.add();
        shard.counters().connections_open.add();
        Self(shard)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.counters().connections_open.sub();
    }
}

/// Counts a request while it is in progress.
pub(crate) struct InProgress<'a>(&'a Counters);

impl<'a> InProgress<'a> {
    pub(crate) fn new(counters: &'a Counters) -> Self {
        counters.requests.add();
        counters.requests_open.add();
        Self(counters)
    }
}

impl Drop for InProgress<'_> {
    fn drop(&mut self) {
        self.0.requests_open.sub();
    }
}
