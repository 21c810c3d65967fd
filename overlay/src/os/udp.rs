//! UDP sockets with segmentation offload, receive offload and batched receiving (quinn-udp).

use std::collections::BTreeSet;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::{Arc, Mutex, PoisonError};

use mesh_worker::{Descriptors, SocketSpec, Transport};
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};

use super::poll::{self, Stop};
use crate::counters::Counters;
use crate::protocol::outbox::Train;
use crate::status::DropReason;

/// Socket buffers, in bytes: some milliseconds at the rates that a core can seal.
const SOCKET_BUFFER: usize = 4 << 20;

/// Messages per receive call; each may be many datagrams that the kernel joined.
const RECEIVE_MESSAGES: usize = 16;

/// Room for one message.
const MESSAGE_BYTES: usize = 64 << 10;

/// A socket of one family, bound to all addresses.
#[derive(Debug)]
pub(crate) struct Udp {
    socket: UdpSocket,
    state: UdpSocketState,
    /// What the system had dropped before this process had it.
    dropped_before: usize,
}

/// Sockets of both families on one port. A machine without IPv6 has only the one.
#[derive(Debug)]
pub(crate) struct Sockets {
    v4: Vec<Udp>,
    v6: Option<Udp>,
    counters: Arc<Counters>,
    /// For whom something was too big.
    refused: Mutex<BTreeSet<SocketAddr>>,
}

impl Sockets {
    /// Binds. With `receivers` above one, the kernel spreads peers over that many sockets. Those of the port that were
    /// inherited are all among them, also when that makes more: somebody has to read what the kernel puts there.
    pub(crate) fn open(
        port: u16,
        receivers: usize,
        inherited: &mut Descriptors,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let any: SocketAddr = (Ipv4Addr::UNSPECIFIED, port).into();
        let mut v4 = (0..)
            .map_while(|copy| inherited.take(&inherited_name(any, copy)))
            .map(|socket| Udp::new(socket.into()))
            .collect::<io::Result<Vec<_>>>()?;
        while v4.len() < receivers.max(1) {
            v4.push(Udp::bind(any)?);
        }
        let any: SocketAddr = (Ipv6Addr::UNSPECIFIED, port).into();
        let v6 = match inherited.take(&inherited_name(any, 0)) {
            Some(socket) => Udp::new(socket.into()),
            None => Udp::bind(any),
        };
        let v6 = match v6 {
            Ok(socket) => Some(socket),
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
                ) =>
            {
                tracing::info!("this machine has no IPv6; the overlay uses IPv4 only");
                None
            }
            Err(error) => return Err(error),
        };
        Ok(Self { v4, v6, counters, refused: Mutex::default() })
    }

    /// Hands a duplicate of each socket to the next worker.
    pub(crate) fn bequeath(&self, port: u16, to: &mut Descriptors) -> io::Result<()> {
        let v4 = self
            .v4
            .iter()
            .enumerate()
            .map(|(n, udp)| ((Ipv4Addr::UNSPECIFIED, port).into(), n, udp));
        let v6 = self.v6.iter().map(|udp| ((Ipv6Addr::UNSPECIFIED, port).into(), 0, udp));
        for (any, copy, udp) in v4.chain(v6) {
            to.insert(inherited_name(any, copy), udp.socket.try_clone()?.into());
        }
        Ok(())
    }

    /// All of them, for those that receive.
    pub(crate) fn len(&self) -> usize {
        self.v4.len() + usize::from(self.v6.is_some())
    }

    /// One of them.
    pub(crate) fn socket(&self, place: usize) -> Option<&Udp> {
        self.v4.get(place).or(self.v6.as_ref().filter(|_| place == self.v4.len()))
    }

    /// Endpoints for which something was too big since the last time.
    pub(crate) fn take_refused(&self) -> BTreeSet<SocketAddr> {
        std::mem::take(&mut self.refused.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Datagrams that the system dropped since the sockets were opened, because nobody had received those before.
    pub(crate) fn overflowed(&self) -> usize {
        self.v4.iter().chain(&self.v6).map(Udp::overflowed).sum()
    }

    /// Sends a train. With `stop`, waits while the socket is full; without, drops then.
    pub(crate) fn send(&self, train: &Train<'_>, stop: Option<&Stop>) {
        let socket = match (train.to, &self.v6) {
            (SocketAddr::V4(_), _) => Some(&self.v4[0]),
            (SocketAddr::V6(_), v6) => v6.as_ref(),
        };
        let Some(socket) = socket else {
            return self.counters.dropped(DropReason::SendFailed, train.datagrams());
        };
        let most = socket.state.max_gso_segments().max(1);
        for part in train.bytes.chunks(train.segment * most) {
            let datagrams = part.len().div_ceil(train.segment);
            match socket.send(train.to, part, train.segment, stop) {
                Ok(()) => self.counters.sent(datagrams),
                Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                    self.counters.dropped(DropReason::TooBig, datagrams);
                    self.refused.lock().unwrap_or_else(PoisonError::into_inner).insert(train.to);
                }
                Err(error) => {
                    tracing::debug!(to = %train.to, %error, "sending failed");
                    self.counters.dropped(DropReason::SendFailed, datagrams);
                }
            }
        }
    }
}

impl Udp {
    fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_port(true)?;
        for option in [libc::SO_RCVBUFFORCE, libc::SO_SNDBUFFORCE] {
            force_buffer(&socket, option);
        }
        socket.bind(&address.into())?;
        Self::new(socket.into())
    }

    fn new(socket: UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        let mut udp = Self { socket, state, dropped_before: 0 };
        udp.dropped_before = udp.dropped();
        Ok(udp)
    }

    fn overflowed(&self) -> usize {
        self.dropped().saturating_sub(self.dropped_before)
    }

    /// Datagrams that the system dropped since the socket was made. Zero where it does not say.
    fn dropped(&self) -> usize {
        /// Place in what `SO_MEMINFO` returns, and how much that is (linux/sock_diag.h).
        const DROPS: usize = 8;
        let mut info = [0u32; 9];
        let mut length = size_of_val(&info) as libc::socklen_t;
        // SAFETY: the option writes at most `length` bytes to an array that lives here.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_MEMINFO,
                info.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        if result == 0 { info[DROPS] as usize } else { 0 }
    }

    /// Waits for datagrams; returns false when it is time to stop.
    pub(crate) fn wait(&self, stop: &Stop) -> io::Result<bool> {
        poll::readable(&self.socket.as_fd(), stop)
    }

    fn send(
        &self,
        to: SocketAddr,
        bytes: &[u8],
        segment: usize,
        stop: Option<&Stop>,
    ) -> io::Result<()> {
        let transmit = Transmit {
            destination: to,
            ecn: None,
            contents: bytes,
            segment_size: (bytes.len() > segment).then_some(segment),
            src_ip: None,
        };
        loop {
            match (self.state.try_send((&self.socket).into(), &transmit), stop) {
                (Err(error), Some(stop)) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !poll::writable(&self.socket.as_fd(), stop)? {
                        return Err(error);
                    }
                }
                (result, _) => return result,
            }
        }
    }
}

/// Processes hand sockets on by these names.
fn inherited_name(address: SocketAddr, copy: usize) -> String {
    let transport = Transport::Udp { receive_buffer_bytes: SOCKET_BUFFER };
    SocketSpec { transport, address, copy }.name()
}

/// What the system knows that the way to an endpoint carries, in bytes.
pub(crate) fn path_mtu(to: SocketAddr) -> Option<u16> {
    let any: SocketAddr = match to {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(to).ok()?; // only looks up the route
    let (level, option) = match to {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU),
    };
    let mut mtu: libc::c_int = 0;
    let mut length = size_of_val(&mtu) as libc::socklen_t;
    // SAFETY: the option writes an int that lives here.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut mtu).cast(), &raw mut length)
    };
    if result == 0 { u16::try_from(mtu).ok() } else { None }
}

/// Beyond the system's limit when privileged, as far as it goes otherwise.
fn force_buffer(socket: &Socket, option: libc::c_int) {
    let bytes = SOCKET_BUFFER as libc::c_int;
    // SAFETY: the option reads an int that lives here.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const bytes).cast(),
            size_of_val(&bytes) as libc::socklen_t,
        )
    };
    if result != 0 {
        let _ = if option == libc::SO_RCVBUFFORCE {
            socket.set_recv_buffer_size(SOCKET_BUFFER)
        } else {
            socket.set_send_buffer_size(SOCKET_BUFFER)
        };
    }
}

/// Buffers of one receiving thread. Pages that no datagram has touched take no memory.
pub(crate) struct Inbox {
    bytes: Vec<u8>,
    metas: [RecvMeta; RECEIVE_MESSAGES],
    messages: usize,
}

impl Default for Inbox {
    fn default() -> Self {
        Self::of(RECEIVE_MESSAGES)
    }
}

impl Inbox {
    /// Room for so many messages, at most the default.
    pub(crate) fn of(messages: usize) -> Self {
        Self {
            bytes: vec![0; messages.min(RECEIVE_MESSAGES) * MESSAGE_BYTES],
            metas: [RecvMeta::default(); RECEIVE_MESSAGES],
            messages: 0,
        }
    }

    /// Bytes received last.
    pub(crate) fn bytes(&self) -> usize {
        self.metas[..self.messages].iter().map(|meta| meta.len).sum()
    }

    /// Receives what is there, without waiting. Returns the number of datagrams.
    pub(crate) fn receive(&mut self, from: &Udp) -> io::Result<usize> {
        self.messages = 0;
        let room = self.bytes.len() / MESSAGE_BYTES;
        let mut chunks = self.bytes.chunks_exact_mut(MESSAGE_BYTES);
        let mut slices: [IoSliceMut<'_>; RECEIVE_MESSAGES] =
            std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
        let slices = &mut slices[..room];
        self.messages = from.state.recv((&from.socket).into(), slices, &mut self.metas)?;
        let metas = &self.metas[..self.messages];
        Ok(metas.iter().map(|meta| meta.len.div_ceil(meta.stride.max(1))).sum())
    }

    /// The datagrams received last, with their sources.
    pub(crate) fn datagrams(&self) -> impl Iterator<Item = (SocketAddr, &[u8])> {
        let messages = self.bytes.chunks_exact(MESSAGE_BYTES).zip(&self.metas[..self.messages]);
        messages.flat_map(|(bytes, meta)| {
            let datagrams = bytes[..meta.len].chunks(meta.stride.max(1));
            datagrams.map(|datagram| (meta.addr, datagram))
        })
    }
}
