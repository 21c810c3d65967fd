//! The proxy's sockets: bound before anything else, so that a taken port is the first thing that one hears of.

use std::io;
use std::net::{Ipv6Addr, SocketAddr, TcpListener};

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

const BACKLOG: i32 = 4096;
const EAFNOSUPPORT: i32 = nix::libc::EAFNOSUPPORT;

/// Sockets for all threads of a proxy.
pub struct Listeners {
    pub(crate) shards: Vec<Sockets>,
    pub(crate) http: Vec<SocketAddr>,
    pub(crate) https: Vec<SocketAddr>,
}

impl Listeners {
    /// Binds each address once for each of `threads` (as in [`ProxyOptions`](crate::ProxyOptions)).
    ///
    /// `[::]` serves IPv6 only, and is left out where the system has none. Another process may hold the same addresses, if it is a proxy of the same user: a new worker starts beside the
    /// old one, and none is refused between them.
    pub fn bind(
        http: &[SocketAddr],
        https: &[SocketAddr],
        threads: usize,
    ) -> Result<Self, BindError> {
        let cpus = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if threads == 0 { cpus() } else { threads };
        let mut shards: Vec<_> =
            (0..threads).map(|_| Sockets { http: Vec::new(), https: Vec::new() }).collect();
        let mut all = |addresses: &[SocketAddr], secure: bool| {
            let mut bound = Vec::new();
            for address in addresses {
                let mut address = *address;
                if address == SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), address.port())
                    && !has_ipv6()
                {
                    tracing::info!(%address, "not served: the system has no IPv6");
                    continue;
                }
                for sockets in &mut shards {
                    let list = if secure { &mut sockets.https } else { &mut sockets.http };
                    let fail = |source| BindError { address, source };
                    let socket = bind(address).map_err(fail)?;
                    // Port 0 becomes a port that all threads share.
                    address = socket.local_addr().map_err(fail)?;
                    list.push(socket);
                }
                bound.push(address);
            }
            Ok(bound)
        };
        let (http, https) = (all(http, false)?, all(https, true)?);
        Ok(Self { shards, http, https })
    }
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

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}
