//! Ports of the node itself.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket};

const BACKLOG: u32 = 128;

/// A socket for both families, or for IPv4 alone where there is no IPv6.
pub(crate) fn listen(port: u16) -> io::Result<TcpListener> {
    of_both_families(port).or_else(|error| match error.kind() {
        io::ErrorKind::AddrInUse => Err(error),
        _ => bind(TcpSocket::new_v4()?, (Ipv4Addr::UNSPECIFIED, port).into()),
    })
}

fn of_both_families(port: u16) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v6()?;
    // Whatever net.ipv6.bindv6only says.
    SockRef::from(&socket).set_only_v6(false)?;
    bind(socket, (Ipv6Addr::UNSPECIFIED, port).into())
}

fn bind(socket: TcpSocket, address: SocketAddr) -> io::Result<TcpListener> {
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}
