//! What the agent decides about its proxy: sockets, files, limits and times.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// How `mesh-agent ingress` runs.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// The unix socket on which the agent speaks to the worker.
    pub control_socket: PathBuf,
    /// Where the last configuration is kept (mode 0600: it carries private keys).
    pub state_file: PathBuf,
    /// Addresses for plain HTTP/1.1 and HTTP/2 with prior knowledge.
    pub http: Vec<SocketAddr>,
    /// Addresses for TLS, with HTTP/1.1 and HTTP/2 by ALPN.
    pub https: Vec<SocketAddr>,
    /// How it treats its connections.
    pub proxy: ProxyOptions,
}

impl WorkerOptions {
    /// Ports 80 and 443 on all addresses of both families.
    pub fn new(control_socket: impl Into<PathBuf>, state_file: impl Into<PathBuf>) -> Self {
        let any = |port| {
            let families = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
            families.map(|address| SocketAddr::new(address, port)).to_vec()
        };
        Self {
            control_socket: control_socket.into(),
            state_file: state_file.into(),
            http: any(80),
            https: any(443),
            proxy: ProxyOptions::default(),
        }
    }
}

/// How the proxy treats its connections, whoever runs it.
#[derive(Debug, Clone, Default)]
pub struct ProxyOptions {
    /// Threads, each with its own sockets and connections; one for each CPU when 0.
    pub threads: usize,
    /// Whether each request gives a log line (tracing target `access`).
    pub access_log: bool,
    /// Sizes and counts.
    pub limits: Limits,
    /// Times.
    pub timeouts: Timeouts,
}

/// What a client may ask for at most.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Open client connections; more wait in the kernel's queue until one ends.
    pub connections: usize,
    /// Bytes of a request's or response's head (at most 65536); more is 431 or 502.
    pub head_bytes: usize,
    /// Bytes of a request target; more is 414.
    pub target_bytes: usize,
    /// Concurrent streams of an HTTP/2 connection.
    pub h2_streams: u32,
    /// Idle connections kept for each backend and thread.
    pub idle_per_backend: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 16_384,
            head_bytes: 32 << 10,
            target_bytes: 8 << 10,
            h2_streams: 128,
            idle_per_backend: 256,
        }
    }
}

/// How long the proxy waits for others.
#[derive(Debug, Clone)]
pub struct Timeouts {
    /// For a TLS handshake, and for a request's head from its first byte: then 408 and close.
    pub head: Duration,
    /// For the next request on a connection.
    pub keep_alive: Duration,
    /// For a connection to a backend; then another is tried.
    pub connect: Duration,
    /// For the head of a response after the request has been sent: then 504.
    pub response_head: Duration,
    /// Without a byte in either direction while a body is on its way.
    pub stall: Duration,
    /// Without a byte in either direction of an upgraded connection.
    pub tunnel: Duration,
    /// For an unused connection to a backend.
    pub backend_idle: Duration,
    /// A backend that cannot be reached is left out for this long, doubled with each failure in a row up to eightfold.
    pub ejection: Duration,
    /// For connections to end after SIGTERM; then they are cut.
    pub drain: Duration,
    /// For one more request on an idle HTTP/1 connection after SIGTERM: were it closed at once, the request that is
    /// on its way would fail.
    pub drain_idle: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(10),
            keep_alive: Duration::from_secs(75),
            connect: Duration::from_secs(2),
            response_head: Duration::from_secs(60),
            stall: Duration::from_secs(60),
            tunnel: Duration::from_secs(3600),
            backend_idle: Duration::from_secs(30),
            ejection: Duration::from_secs(3),
            drain: Duration::from_secs(30),
            drain_idle: Duration::from_secs(10),
        }
    }
}
