//! Sockets as they are written down: made once for a node, and then handed from process to process.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

/// A socket that a worker serves on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketSpec {
    /// Which transport.
    pub transport: Transport,
    /// Where it is bound; the address need not exist yet (`IP_FREEBIND`).
    pub address: SocketAddr,
    /// Which one of several on the same address: the kernel spreads clients over them (`SO_REUSEPORT`).
    pub copy: usize,
}

/// A transport, with the size of the queue that bridges the time until somebody reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Listens.
    Tcp {
        /// Connections that wait to be accepted.
        backlog: i32,
    },
    /// Receives datagrams.
    Udp {
        /// Bytes of datagrams, with the kernel's own overhead, that wait to be read.
        receive_buffer_bytes: usize,
    },
}

impl SocketSpec {
    /// The name by which processes hand it on: what it is, and nothing of how it is tuned.
    pub fn name(&self) -> String {
        let transport = match self.transport {
            Transport::Tcp { .. } => "tcp",
            Transport::Udp { .. } => "udp",
        };
        format!("{transport}/{}/{}", self.address, self.copy)
    }

    /// Makes it, non-blocking. A socket of the same user on the same address is no obstacle: were all processes that
    /// held it gone, or hung, a new one takes its place.
    pub fn open(&self) -> io::Result<OwnedFd> {
        let address = self.address;
        let (kind, protocol) = match self.transport {
            Transport::Tcp { .. } => (Type::STREAM, Protocol::TCP),
            Transport::Udp { .. } => (Type::DGRAM, Protocol::UDP),
        };
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
        if let Transport::Udp { receive_buffer_bytes: bytes } = self.transport {
            // Beyond net.core.rmem_max only with CAP_NET_ADMIN.
            if setsockopt(&socket, sockopt::RcvBufForce, &bytes).is_err() {
                let _ = socket.set_recv_buffer_size(bytes);
            }
        }
        socket.bind(&address.into())?;
        if let Transport::Tcp { backlog } = self.transport {
            socket.listen(backlog)?;
        }
        Ok(socket.into())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::time::Duration;

    use super::*;

    fn tcp(port: u16, copy: usize) -> SocketSpec {
        let address = ([127, 0, 0, 1], port).into();
        SocketSpec { transport: Transport::Tcp { backlog: 16 }, address, copy }
    }

    #[test]
    fn a_name_tells_sockets_apart_and_not_how_they_are_tuned() {
        assert_eq!(tcp(80, 1).name(), "tcp/127.0.0.1:80/1");
        let tuned = SocketSpec { transport: Transport::Tcp { backlog: 1 }, ..tcp(80, 1) };
        assert_eq!(tuned.name(), tcp(80, 1).name());
        let udp = Transport::Udp { receive_buffer_bytes: 1 };
        let udp = SocketSpec { transport: udp, address: "[::1]:53".parse().unwrap(), copy: 0 };
        assert_eq!(udp.name(), "udp/[::1]:53/0");
    }

    #[test]
    fn clients_wait_in_a_socket_that_nobody_serves_yet() {
        let listener = TcpListener::from(tcp(0, 0).open().unwrap());
        let address = listener.local_addr().unwrap();
        let second = tcp(address.port(), 1).open();
        assert!(second.is_ok(), "several on one address");
        let _waiting = TcpStream::connect_timeout(&address, Duration::from_secs(5)).unwrap();

        let transport = Transport::Udp { receive_buffer_bytes: 1 << 20 };
        let spec = SocketSpec { transport, ..tcp(0, 0) };
        let udp = UdpSocket::from(spec.open().unwrap());
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.send_to(b"early", udp.local_addr().unwrap()).unwrap();
        udp.set_nonblocking(false).unwrap();
        let mut buffer = [0; 16];
        assert_eq!(udp.recv(&mut buffer).unwrap(), 5);
    }
}
