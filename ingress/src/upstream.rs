//! Connections to backends: found, made, tried again elsewhere.

use std::io;
use std::net::SocketAddr;

use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::backend::{Lease, choose};
use crate::buffer::Buffer;
use crate::request::Reject;
use crate::shard::Shard;
use crate::table::Route;

/// A connection to a backend that carries one request.
pub(crate) struct Upstream {
    pub(crate) io: TcpStream,
    pub(crate) input: Buffer,
    /// Has served other requests: its failure may only mean that the backend had closed it.
    pub(crate) reused: bool,
    lease: Lease,
}

impl Upstream {
    pub(crate) fn address(&self) -> SocketAddr {
        self.lease.0.address
    }

    /// Keeps the connection for later requests; only when nothing of this one is left on it.
    pub(crate) fn keep(self, shard: &Shard) {
        if self.input.is_empty() && !shard.is_draining() {
            let limit = shard.core.options.limits.idle_per_backend;
            self.lease.0.keep_idle(shard.index, self.io, limit);
        }
    }
}

/// The search for a connection on behalf of one request.
pub(crate) struct Attempts<'a> {
    route: &'a Route,
    shard: &'a Shard,
    /// Backends that could not be reached.
    tried: Vec<SocketAddr>,
    /// A backend whose old connection failed.
    stale: Option<SocketAddr>,
    timed_out: bool,
}

/// So many backends are tried before the client is told.
const MAX_TRIED: usize = 4;

impl<'a> Attempts<'a> {
    pub(crate) fn new(route: &'a Route, shard: &'a Shard) -> Self {
        Self { route, shard, tried: Vec::new(), stale: None, timed_out: false }
    }

    /// Asks for another backend, or the same one on a new connection, because an old connection failed
    /// before it gave an answer. May be done once.
    pub(crate) fn was_stale(&mut self, upstream: &Upstream) -> bool {
        let first = upstream.reused && self.stale.is_none();
        if first {
            self.stale = Some(upstream.address());
            self.shard.counters().retries.add();
        }
        first
    }

    /// A connection to the best backend that can be reached.
    pub(crate) async fn next(&mut self) -> Result<Upstream, Reject> {
        if self.route.backends.is_empty() {
            return Err(Reject::new(503, "no backend is ready"));
        }
        while self.tried.len() < MAX_TRIED {
            let Some(lease) = self.choose() else { break };
            if self.stale.is_none()
                && let Some(io) = lease.0.take_idle(self.shard.index)
            {
                self.shard.counters().backend_reuses.add();
                return Ok(Upstream { io, input: Buffer::bulk(), reused: true, lease });
            }
            match self.connect(lease.0.address).await {
                Ok(io) => {
                    lease.0.succeeded();
                    return Ok(Upstream { io, input: Buffer::bulk(), reused: false, lease });
                }
                Err(error) => self.failed(&lease, &error),
            }
        }
        Err(if self.timed_out {
            Reject::new(504, "no backend could be reached in time")
        } else {
            Reject::new(502, "no backend could be reached")
        })
    }

    fn choose(&self) -> Option<Lease> {
        let backends = &self.route.backends;
        let now = self.shard.core.registry.millis(Instant::now());
        let other = self.stale.and_then(|stale| {
            let mut avoided = self.tried.clone();
            avoided.push(stale);
            choose(backends, &avoided, now)
        });
        other.or_else(|| choose(backends, &self.tried, now)).map(Lease::new)
    }

    async fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let limit = self.shard.core.options.timeouts.connect;
        let io = tokio::time::timeout(limit, TcpStream::connect(address)).await??;
        io.set_nodelay(true)?;
        self.shard.counters().backend_connects.add();
        Ok(io)
    }

    fn failed(&mut self, lease: &Lease, error: &io::Error) {
        let (core, backend) = (&self.shard.core, &lease.0);
        let now = core.registry.millis(Instant::now());
        if !backend.is_ejected(now) {
            tracing::info!(backend = %backend.address, ingress = %self.route.ingress, %error, "backend left out: no connection");
        }
        backend.failed(now, core.options.timeouts.ejection);
        self.shard.counters().backend_connect_failures.add();
        self.timed_out = error.kind() == io::ErrorKind::TimedOut;
        self.tried.push(backend.address);
    }
}
