//! The sockets.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};

use socket2::{Domain, Protocol, Socket, Type};

const BACKLOG: i32 = 1024;
/// Enough for a burst of some thousand questions while the process is being replaced.
const RECEIVE_BUFFER_BYTES: usize = 4 << 20;

/// One UDP and one TCP socket on an address.
///
/// The address need not exist yet (`IP_FREEBIND`), and an older worker may still hold it (`SO_REUSEPORT`).
pub(crate) fn bind(address: SocketAddr) -> io::Result<(UdpSocket, TcpListener)> {
    let udp = socket(address, Type::DGRAM, Protocol::UDP)?;
    let _ = udp.set_recv_buffer_size(RECEIVE_BUFFER_BYTES);
    udp.bind(&address.into())?;
    let tcp = socket(address, Type::STREAM, Protocol::TCP)?;
    tcp.bind(&address.into())?;
    tcp.listen(BACKLOG)?;
    Ok((udp.into(), tcp.into()))
}

fn socket(address: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
        socket.set_freebind_v6(true)?;
    } else {
        socket.set_freebind_v4(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}
