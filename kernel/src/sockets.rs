//! Sockets that are connected to something that is gone: found and ended, so that their owners notice and connect anew.
//!
//! sock_diag(7): `SOCK_DIAG_BY_FAMILY` lists, `SOCK_DESTROY` ends one (`CONFIG_INET_DIAG_DESTROY`, Linux 4.5). Its owner
//! gets `ECONNABORTED`; a datagram socket is not connected any more (sending is `EDESTADDRREQ`) and may be connected again.

mod message;

use std::net::SocketAddr;

use mesh_model::snapshot::Protocol;
use nix::sys::socket::SockProtocol;

use crate::NetNs;
use crate::netlink::{Netlink, NetlinkError, Request};
use message::{DiagMessage, Socket};

/// A connected socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The other side; IPv4 also when the socket is of the IPv6 family.
    pub remote: SocketAddr,
    /// The number by which eBPF programs know it.
    pub cookie: u64,
}

/// What came of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ended {
    /// Sockets that were ended.
    pub ended: usize,
    /// Sockets that were meant and are still there: the kernel cannot end sockets.
    pub refused: usize,
}

/// Ends the connected sockets of a namespace that `meant` names. Only those of `protocols` are looked at.
///
/// # Errors
/// When the namespace cannot be entered or its sockets not be listed.
pub fn end_connections(
    namespace: &NetNs,
    protocols: &[Protocol],
    mut meant: impl FnMut(&Connection) -> bool,
) -> Result<Ended, NetlinkError> {
    let open = || Netlink::<DiagMessage>::open(SockProtocol::NetlinkSockDiag);
    let socket = namespace.run(open).and_then(|opened| opened);
    let mut socket = socket.map_err(NetlinkError::Socket)?;
    let mut found: Vec<(Protocol, Socket)> = vec![];
    for &protocol in protocols {
        for family in [libc::AF_INET, libc::AF_INET6] {
            let listed = socket.dump(DiagMessage::list(family, protocol))?;
            let sockets = listed.into_iter().filter_map(|message| match message {
                DiagMessage::Socket(socket) => Some(socket),
                DiagMessage::Request { .. } => None,
            });
            found.extend(sockets.map(|socket| (protocol, socket)));
        }
    }
    found.retain(|(protocol, socket)| {
        let (protocol, remote, cookie) = (*protocol, socket.remote(), socket.cookie());
        remote.is_some_and(|remote| meant(&Connection { protocol, remote, cookie }))
    });
    let requests = found.into_iter().map(|(protocol, socket)| Request {
        message: DiagMessage::destroy(protocol, socket),
        flags: 0,
    });
    let mut outcome = Ended::default();
    for answer in socket.batch(requests.collect())? {
        match answer {
            Ok(_) => outcome.ended += 1,
            // It has ended by itself.
            Err(error) if error.is_missing() => {}
            Err(NetlinkError::Refused(_)) => outcome.refused += 1,
            Err(error) => return Err(error),
        }
    }
    Ok(outcome)
}
