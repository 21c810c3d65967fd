//! Echoes of a chosen size that may not be cut up on their way.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use socket2::{Domain, Protocol, Socket, Type};

use crate::mtu::CEILING;
use crate::paths::echo::{Echo, MESSAGE_BYTES};

/// Answers to echoes (RFC 792, RFC 4443 section 4.2) are all that the socket is to hear: bits of what is kept from it
/// (linux/icmp.h, linux/icmpv6.h).
const ICMP_FILTER: libc::c_int = 1;
const ONLY_ECHO_REPLIES: u32 = !(1 << 0);
const ICMPV6_FILTER: libc::c_int = 1;
const ONLY_ECHO_REPLIES_V6: [u32; 8] =
    [u32::MAX, u32::MAX, u32::MAX, u32::MAX, !(1 << (129 % 32)), u32::MAX, u32::MAX, u32::MAX];
/// Packets that wait to be read.
const BUFFER_BYTES: usize = 64 * 1024;

/// A socket for echoes over one version of IP.
#[derive(Debug)]
pub(crate) struct EchoSocket {
    /// A raw ICMP socket: used like the other, but without ports.
    socket: UdpSocket,
    echo: Echo,
}

/// What became of an echo.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sent {
    /// It left, or got lost right away.
    Perhaps,
    /// It is larger than the first link carries.
    TooBig,
}

impl EchoSocket {
    /// Needs `CAP_NET_RAW`.
    pub(crate) fn open(v6: bool) -> io::Result<Self> {
        let (domain, protocol, any): (_, _, IpAddr) = if v6 {
            (Domain::IPV6, Protocol::ICMPV6, Ipv6Addr::UNSPECIFIED.into())
        } else {
            (Domain::IPV4, Protocol::ICMPV4, Ipv4Addr::UNSPECIFIED.into())
        };
        let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
        socket.set_nonblocking(true)?;
        socket.set_recv_buffer_size(BUFFER_BYTES)?;
        // Tested is what the way carries, not what the system takes it to carry.
        if v6 {
            set(&socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, &libc::IPV6_PMTUDISC_PROBE)?;
            set(&socket, libc::IPPROTO_ICMPV6, ICMPV6_FILTER, &ONLY_ECHO_REPLIES_V6)?;
        } else {
            set(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, &libc::IP_PMTUDISC_PROBE)?;
            set(&socket, libc::SOL_RAW, ICMP_FILTER, &ONLY_ECHO_REPLIES)?;
        }
        socket.bind(&SocketAddr::new(any, 0).into())?;
        let secret = RandomState::new().hash_one(());
        Ok(Self { socket: socket.into(), echo: Echo::new(secret, v6) })
    }

    /// Sends an echo request of `length` bytes; one that cannot be sent is one that was lost.
    pub(crate) fn send(&self, to: IpAddr, token: u32, length: usize) -> Sent {
        let mut message = vec![0; length.max(MESSAGE_BYTES)];
        self.echo.write(token, &mut message);
        match self.socket.send_to(&message, SocketAddr::new(to, 0)) {
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => Sent::TooBig,
            Err(error) => {
                tracing::trace!(%to, %error, "echo not sent");
                Sent::Perhaps
            }
            Ok(_) => Sent::Perhaps,
        }
    }

    /// The answers that have come: from whom, to which echo, of how many bytes.
    pub(crate) fn answers(&self) -> impl Iterator<Item = (IpAddr, u32, usize)> {
        let mut buffer = vec![0; usize::from(CEILING) + 128];
        std::iter::from_fn(move || {
            // An error is that of an earlier echo; what is behind it is read the next time.
            while let Ok((length, from)) = self.socket.recv_from(&mut buffer) {
                if let Some((token, length)) = self.echo.answer(&buffer[..length]) {
                    return Some((from.ip(), token, length));
                }
            }
            None
        })
    }
}

/// `T` is an integer or an array of them.
fn set<T: Copy>(
    socket: &Socket,
    level: libc::c_int,
    option: libc::c_int,
    value: &T,
) -> io::Result<()> {
    // SAFETY: the option reads as many bytes as the value has, all of them initialised.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
