//! The proxy's sockets: inherited, or bound before anything else, so that a taken port is the first thing that one
//! hears of.

use std::io;
use std::net::{Ipv6Addr, SocketAddr, TcpListener};

use mesh_worker::{Descriptors, SocketSpec, Transport};
use socket2::{Domain, Protocol, Socket, Type};

use crate::shard::Sockets;

/// An address cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("listen on {address}")]
pub struct BindError {
    /// The address.
    pub address: SocketAddr,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Connections that wait on each socket, also while the process is away.
const BACKLOG: i32 = 4096;
const EAFNOSUPPORT: i32 = nix::libc::EAFNOSUPPORT;

/// Sockets for all threads of a proxy.
pub struct Listeners {
    pub(crate) shards: Vec<Sockets>,
    pub(crate) http: Vec<SocketAddr>,
    pub(crate) https: Vec<SocketAddr>,
}

/// What a proxy with these addresses listens on: each once for each of `threads` (as in
/// [`ProxyOptions`](crate::ProxyOptions)). `[::]` serves IPv6 only, and is left out where the system has none.
pub fn sockets(http: &[SocketAddr], https: &[SocketAddr], threads: usize) -> Vec<SocketSpec> {
    let all = http.iter().chain(https).filter(|address| is_served(address));
    let copies = |address: &SocketAddr| {
        let address = *address;
        (0..count(threads)).map(move |copy| spec(address, copy))
    };
    all.flat_map(copies).collect()
}

impl Listeners {
    /// Binds [`sockets`] anew. Another process of the same user may hold the same addresses.
    pub fn bind(
        http: &[SocketAddr],
        https: &[SocketAddr],
        threads: usize,
    ) -> Result<Self, BindError> {
        let (mut inherited, mut kept) = (Descriptors::default(), Descriptors::default());
        Self::take(http, https, threads, &mut inherited, &mut kept)
    }

    /// Takes [`sockets`] out of `inherited`, or binds them, and leaves duplicates in `kept`.
    ///
    /// Were there more threads before, ours take their sockets too: connections wait in them.
    pub fn take(
        http: &[SocketAddr],
        https: &[SocketAddr],
        threads: usize,
        inherited: &mut Descriptors,
        kept: &mut Descriptors,
    ) -> Result<Self, BindError> {
        let threads = count(threads);
        let mut shards: Vec<_> =
            (0..threads).map(|_| Sockets { http: Vec::new(), https: Vec::new() }).collect();
        let mut all = |addresses: &[SocketAddr], secure: bool| {
            let mut bound = Vec::new();
            for address in addresses {
                let mut address = *address;
                if !is_served(&address) {
                    tracing::info!(%address, "not served: the system has no IPv6");
                    continue;
                }
                for copy in 0.. {
                    let spec = spec(address, copy);
                    if copy >= threads && !inherited.contains(&spec.name()) {
                        break;
                    }
                    let fail = |source| BindError { address, source };
                    let socket = TcpListener::from(kept.socket(&spec, inherited).map_err(fail)?);
                    // Port 0 becomes a port that all threads share.
                    address = socket.local_addr().map_err(fail)?;
                    let sockets = &mut shards[copy % threads];
                    if secure { &mut sockets.https } else { &mut sockets.http }.push(socket);
                }
                bound.push(address);
            }
            Ok(bound)
        };
        let (http, https) = (all(http, false)?, all(https, true)?);
        Ok(Self { shards, http, https })
    }
}

fn count(threads: usize) -> usize {
    let cpus = || std::thread::available_parallelism().map_or(1, usize::from);
    if threads == 0 { cpus() } else { threads }
}

fn spec(address: SocketAddr, copy: usize) -> SocketSpec {
    SocketSpec { transport: Transport::Tcp { backlog: BACKLOG }, address, copy }
}

fn is_served(address: &SocketAddr) -> bool {
    *address != SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), address.port()) || has_ipv6()
}

/// Whether any IPv6 address can be bound (the module may be missing, or disabled by sysctl).
fn has_ipv6() -> bool {
    let probe = || {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
        socket.bind(&SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0).into())
    };
    !probe().is_err_and(|error: io::Error| {
        matches!(error.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::Unsupported)
            || error.raw_os_error() == Some(EAFNOSUPPORT)
    })
}
