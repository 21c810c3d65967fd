//! The sockets on the node's own overlay address. They hear the overlay device only, so that what comes in has been
//! authenticated: its source address belongs to the node whose key sealed it.

use std::io;
use std::net::{IpAddr, SocketAddr};

use mesh_model::wellknown::{OVERLAY_DEVICE, PATHS_PORT};
use mesh_overlay::paths::echo::Echo;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;

/// Echoes and messages of one node address.
pub(super) struct Sockets {
    echo: Echo,
    /// A raw ICMP socket: a datagram socket like the other, but without ports.
    icmp: UdpSocket,
    messages: UdpSocket,
}

impl Sockets {
    /// Opens them on `own`, which has to be there already.
    pub(super) fn open(own: IpAddr, secret: u64) -> io::Result<Self> {
        let (domain, icmp) = match own {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        let icmp = open(domain, Type::RAW, icmp, SocketAddr::new(own, 0))?;
        let messages = SocketAddr::new(own, PATHS_PORT);
        let messages = open(domain, Type::DGRAM, Protocol::UDP, messages)?;
        Ok(Self { echo: Echo::new(secret, own.is_ipv6()), icmp, messages })
    }

    /// Sends an echo request; a full socket is a lost probe.
    pub(super) fn echo(&self, to: IpAddr, token: u32) -> io::Result<()> {
        sent(self.icmp.try_send_to(&self.echo.request(token), SocketAddr::new(to, 0)))
    }

    /// Sends a message.
    pub(super) fn send(&self, to: IpAddr, message: &[u8]) -> io::Result<()> {
        sent(self.messages.try_send_to(message, SocketAddr::new(to, PATHS_PORT)))
    }

    /// Waits until something can be read.
    pub(super) async fn readable(&self) -> io::Result<()> {
        tokio::select! {
            ready = self.icmp.readable() => ready,
            ready = self.messages.readable() => ready,
        }
    }

    /// The next echo that came: from whom, and the number of its probe. Nothing when there is no more.
    pub(super) fn next_echo(&self, buffer: &mut [u8]) -> Option<(IpAddr, u32)> {
        loop {
            let (len, from) = next(&self.icmp, buffer)?;
            if let Some((token, _)) = self.echo.answer(&buffer[..len]) {
                return Some((from.ip(), token));
            }
        }
    }

    /// The next message that came, as bytes. Nothing when there is no more.
    pub(super) fn next_message(&self, buffer: &mut [u8]) -> Option<(SocketAddr, usize)> {
        next(&self.messages, buffer).map(|(len, from)| (from, len))
    }
}

fn open(domain: Domain, kind: Type, protocol: Protocol, own: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(domain, kind, Some(protocol))?;
    socket.bind_device(Some(OVERLAY_DEVICE.as_bytes()))?;
    socket.set_nonblocking(true)?;
    socket.bind(&own.into())?;
    UdpSocket::from_std(socket.into())
}

/// Errors of earlier datagrams (ICMP unreachable) are reported here; they say nothing about the next one.
fn next(socket: &UdpSocket, buffer: &mut [u8]) -> Option<(usize, SocketAddr)> {
    loop {
        match socket.try_recv_from(buffer) {
            Ok(received) => return Some(received),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            Err(error) => tracing::debug!(%error, "receiving about paths failed"),
        }
    }
}

/// What is lost on the way out is lost like on the way itself; only a socket that is of no use any more is an error.
fn sent(result: io::Result<usize>) -> io::Result<()> {
    match result {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => {
            Err(error)
        }
        Err(error) => {
            tracing::trace!(%error, "probe not sent");
            Ok(())
        }
        Ok(_) => Ok(()),
    }
}
