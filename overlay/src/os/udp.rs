//! UDP sockets with segmentation offload, receive offload and batched receiving (quinn-udp).

use std::collections::BTreeSet;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use mesh_worker::{Descriptors, SocketSpec, Transport};
use quinn_udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};

use super::lately::Lately;
use super::poll::{self, Stop};
use super::spread::Spread;
use crate::counters::Counters;
use crate::protocol::ecn::Ecn;
use crate::protocol::outbox::Train;
use crate::protocol::{Arrival, Way};
use crate::status::DropReason;

/// Socket buffers, in bytes: some milliseconds at the rates that a core can seal.
const SOCKET_BUFFER: usize = 4 << 20;

/// Sockets of each family, each with a buffer of its own: few enough that finding one of them costs a datagram nothing.
pub(crate) const EACH_FAMILY: usize = 16;

/// Messages per receive call; each may be many datagrams that the kernel joined.
const RECEIVE_MESSAGES: usize = 16;

/// Room for one message.
const MESSAGE_BYTES: usize = 64 << 10;

/// How long datagrams go one by one to where they cannot go as a train: the way there may have become another.
const APART_FOR: Duration = Duration::from_secs(60);

/// How long nothing is sent from an address that this node has no more: by then the peers have sent to another one.
const GONE_FOR: Duration = Duration::from_secs(10);

/// A socket of one family, bound to all addresses.
#[derive(Debug)]
pub(crate) struct Udp {
    socket: UdpSocket,
    /// Made for a socket with one remote: after an error it sends no trains any more, and marks nothing.
    state: ArcSwap<UdpSocketState>,
    /// What the system had dropped before this process had it.
    dropped_before: usize,
}

/// Sockets of both families on one port. A machine without IPv6 has only those of the one.
#[derive(Debug)]
pub(crate) struct Sockets {
    v4: Vec<Udp>,
    v6: Vec<Udp>,
    /// How peers are spread over those of each family.
    spread: Mutex<[Spread; 2]>,
    counters: Arc<Counters>,
    /// For whom something was too big.
    refused: Mutex<BTreeSet<SocketAddr>>,
    /// Where trains do not get through.
    apart: Lately<SocketAddr>,
    /// Addresses that this node had when a peer sent to them.
    gone: Lately<IpAddr>,
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
        let v4 = family((Ipv4Addr::UNSPECIFIED, port).into(), receivers, inherited)?;
        let v6 = match family((Ipv6Addr::UNSPECIFIED, port).into(), receivers, inherited) {
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
                ) =>
            {
                tracing::info!("this machine has no IPv6; the overlay uses IPv4 only");
                vec![]
            }
            sockets => sockets?,
        };
        Ok(Self::with(v4, v6, counters))
    }

    /// Sends by sockets that are open already, one of each family. Somebody else reads them.
    pub(crate) fn sending(
        v4: UdpSocket,
        v6: Option<UdpSocket>,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let v6 = v6.map(Udp::new).transpose()?;
        Ok(Self::with(vec![Udp::new(v4)?], v6.into_iter().collect(), counters))
    }

    fn with(v4: Vec<Udp>, v6: Vec<Udp>, counters: Arc<Counters>) -> Self {
        let (apart, gone) = (Lately::new(APART_FOR), Lately::new(GONE_FOR));
        let (spread, refused) = Default::default();
        Self { v4, v6, spread, counters, refused, apart, gone }
    }

    /// Hands a duplicate of each socket to the next worker.
    pub(crate) fn bequeath(&self, port: u16, to: &mut Descriptors) -> io::Result<()> {
        let families: [(SocketAddr, _); 2] = [
            ((Ipv4Addr::UNSPECIFIED, port).into(), &self.v4),
            ((Ipv6Addr::UNSPECIFIED, port).into(), &self.v6),
        ];
        for (any, sockets) in families {
            for (copy, udp) in sockets.iter().enumerate() {
                to.insert(inherited_name(any, copy), udp.socket.try_clone()?.into());
            }
        }
        Ok(())
    }

    /// Those that lane `lane` of so many receives from.
    pub(crate) fn of_lane(&self, lane: usize, lanes: usize) -> impl Iterator<Item = &Udp> {
        self.v4.iter().chain(&self.v6).skip(lane).step_by(lanes.max(1))
    }

    /// Gives peers that are there a socket each, as far as there are enough.
    pub(crate) fn spread(&self, peers: BTreeSet<SocketAddr>) {
        let (v4, v6) = peers.into_iter().partition(SocketAddr::is_ipv4);
        let mut spread = self.spread.lock().unwrap_or_else(PoisonError::into_inner);
        for ((spread, peers), sockets) in spread.iter_mut().zip([v4, v6]).zip([&self.v4, &self.v6])
        {
            let Some(first) = sockets.first() else { continue };
            if let Err(error) = spread.over(peers, &first.socket, sockets.len()) {
                tracing::debug!(%error, "the kernel spreads peers over sockets as it likes");
            }
        }
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
        let to = train.way.to;
        let sockets = if to.is_ipv4() { &self.v4 } else { &self.v6 };
        let Some(socket) = sockets.first() else {
            return self.counters.dropped(DropReason::SendFailed, train.datagrams());
        };
        let most = if self.apart.has(&to) { 1 } else { socket.most_segments() };
        let way = Way { to, from: train.way.from.filter(|from| !self.gone.has(from)) };
        for bytes in train.bytes.chunks(train.segment * most) {
            self.send_part(socket, Train { bytes, way, ..*train }, stop);
        }
    }

    /// What one system call can send.
    fn send_part(&self, socket: &Udp, mut part: Train<'_>, stop: Option<&Stop>) {
        let mut result = socket.send(&part, stop);
        if let (true, Some(from)) = (result.as_ref().is_err_and(may_be_gone), part.way.from) {
            socket.renew();
            part.way.from = None;
            result = socket.send(&part, stop);
            if result.is_ok() {
                tracing::debug!(%from, "this node has the address no more");
                self.gone.note(from);
            }
        }
        if !result.as_ref().is_err_and(says_little) {
            return self.count(&part, result);
        }
        socket.renew();
        if part.datagrams() == 1 {
            return self.count(&part, result);
        }
        self.send_apart(socket, part, stop);
    }

    /// Sends a train once more, datagram by datagram. Where those go and it does not, no train is tried for a while.
    fn send_apart(&self, socket: &Udp, train: Train<'_>, stop: Option<&Stop>) {
        let (mut left, mut all_went) = (train.bytes, true);
        while !left.is_empty() {
            let (bytes, rest) = left.split_at(train.segment.min(left.len()));
            let one = Train { bytes, ..train };
            let result = socket.send(&one, stop);
            if result.as_ref().is_err_and(says_little) {
                socket.renew();
                return self.count(&Train { bytes: left, ..train }, result);
            }
            all_went &= result.is_ok();
            self.count(&one, result);
            left = rest;
        }
        if all_went {
            tracing::debug!(to = %train.way.to, "trains do not get there, datagrams do");
            self.apart.note(train.way.to);
        }
    }

    fn count(&self, train: &Train<'_>, result: io::Result<()>) {
        match result {
            Ok(()) => self.counters.sent(train.datagrams()),
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                self.counters.dropped(DropReason::TooBig, train.datagrams());
                self.refused.lock().unwrap_or_else(PoisonError::into_inner).insert(train.way.to);
            }
            Err(error) => {
                tracing::debug!(to = %train.way.to, %error, "sending failed");
                self.counters.dropped(DropReason::SendFailed, train.datagrams());
            }
        }
    }
}

/// What the system says where the source address is not this node's, and where there is no route.
fn may_be_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENETUNREACH | libc::EADDRNOTAVAIL))
}

/// Errors that have many reasons: a route that leads nowhere, a device that cannot cut trains up, and on Linux before 6.14 also a
/// link that carries less than a datagram of the train.
fn says_little(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EIO))
}

/// The sockets at an address.
fn family(any: SocketAddr, receivers: usize, inherited: &mut Descriptors) -> io::Result<Vec<Udp>> {
    let mut sockets = (0..)
        .map_while(|copy| inherited.take(&inherited_name(any, copy)))
        .map(|socket| Udp::new(socket.into()))
        .collect::<io::Result<Vec<_>>>()?;
    while sockets.len() < receivers.max(1) {
        sockets.push(Udp::bind(any)?);
    }
    Ok(sockets)
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
        let state = ArcSwap::from_pointee(UdpSocketState::new((&socket).into())?);
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

    /// To be watched.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Datagrams of a train that one system call can send.
    fn most_segments(&self) -> usize {
        self.state.load().max_gso_segments().max(1)
    }

    /// Forgets what an error with one remote has changed for all.
    fn renew(&self) {
        match UdpSocketState::new((&self.socket).into()) {
            Ok(state) => self.state.store(Arc::new(state)),
            Err(error) => tracing::debug!(%error, "the socket goes on without trains"),
        }
    }

    fn send(&self, train: &Train<'_>, stop: Option<&Stop>) -> io::Result<()> {
        let transmit = Transmit {
            destination: train.way.to,
            ecn: EcnCodepoint::from_bits(train.ecn as u8),
            contents: train.bytes,
            segment_size: (train.datagrams() > 1).then_some(train.segment),
            src_ip: train.way.from,
        };
        let state = self.state.load();
        loop {
            match (state.try_send((&self.socket).into(), &transmit), stop) {
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

    /// Receives what is there, without waiting, at most so many messages. Returns the number of datagrams.
    pub(crate) fn receive(&mut self, from: &Udp, most: usize) -> io::Result<usize> {
        self.messages = 0;
        let room = most.min(self.bytes.len() / MESSAGE_BYTES);
        let mut chunks = self.bytes.chunks_exact_mut(MESSAGE_BYTES);
        let mut slices: [IoSliceMut<'_>; RECEIVE_MESSAGES] =
            std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
        let slices = &mut slices[..room];
        self.messages = from.state.load().recv((&from.socket).into(), slices, &mut self.metas)?;
        let metas = &self.metas[..self.messages];
        Ok(metas.iter().map(|meta| meta.len.div_ceil(meta.stride.max(1))).sum())
    }

    /// The datagrams received last.
    pub(crate) fn datagrams(&self) -> impl Iterator<Item = Arrival<'_>> {
        let messages = self.bytes.chunks_exact(MESSAGE_BYTES).zip(&self.metas[..self.messages]);
        messages.flat_map(|(bytes, meta)| {
            // The kernel joins only what is marked alike.
            let ecn = Ecn::from_bits(meta.ecn.map_or(0, |ecn| ecn as u8));
            let datagrams = bytes[..meta.len].chunks(meta.stride.max(1));
            let back = Way { to: meta.addr, from: meta.dst_ip };
            datagrams.map(move |bytes| Arrival { back, ecn, bytes })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: [u8; 1000] = [7; 1000];

    struct Pair {
        sockets: Sockets,
        receiver: UdpSocket,
    }

    impl Pair {
        fn new() -> Self {
            let counters = Arc::new(Counters::default());
            let sockets = Sockets::open(0, 1, &mut Descriptors::default(), counters).unwrap();
            let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
            receiver.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            Self { sockets, receiver }
        }

        fn train<'a>(&self, bytes: &'a [u8], segment: usize) -> Train<'a> {
            let way = self.receiver.local_addr().unwrap().into();
            Train { way, ecn: Ecn::NotCapable, bytes, segment }
        }

        /// System calls that it takes to send a train; it has to arrive.
        fn calls(&self, train: &Train<'_>) -> u64 {
            let calls = || self.sockets.counters.traffic().send_calls;
            let before = calls();
            self.sockets.send(train, None);
            self.arrives(train);
            calls() - before
        }

        fn arrives(&self, train: &Train<'_>) {
            let mut buffer = [0; 2000];
            for bytes in train.bytes.chunks(train.segment) {
                let len = self.receiver.recv(&mut buffer).unwrap();
                assert_eq!(buffer[..len], *bytes);
            }
        }

        fn failed(&self) -> u64 {
            let drops = self.sockets.counters.drops();
            drops.get(&DropReason::SendFailed).copied().unwrap_or(0)
        }
    }

    #[test]
    fn an_endpoint_that_nothing_can_be_sent_to_costs_the_others_nothing() {
        let pair = Pair::new();
        let good = pair.train(&BYTES, 250);
        assert_eq!(pair.calls(&good), 1);
        let nowhere: SocketAddr = ([127, 0, 0, 1], 0).into();
        for (segment, failed) in [(1000, 1), (250, 5)] {
            pair.sockets.send(&Train { way: nowhere.into(), segment, ..good }, None);
            assert_eq!(pair.failed(), failed, "each datagram is counted once");
            assert_eq!(pair.calls(&good), 1, "trains go on");
        }
    }

    #[test]
    fn what_cannot_go_as_a_train_goes_one_by_one_there_and_nowhere_else() {
        let (pair, other) = (Pair::new(), Pair::new());
        // More than any kernel takes in one call.
        let long = pair.train(&BYTES, 5);
        pair.sockets.send_part(&pair.sockets.v4[0], long, None);
        pair.arrives(&long);
        assert_eq!(pair.failed(), 0);
        assert_eq!(pair.calls(&pair.train(&BYTES, 250)), 4);
        let elsewhere = other.train(&BYTES, 250);
        let calls = || pair.sockets.counters.traffic().send_calls;
        let before = calls();
        pair.sockets.send(&elsewhere, None);
        other.arrives(&elsewhere);
        assert_eq!(calls() - before, 1);
    }
    #[test]
    fn both_families_have_as_many_sockets_and_hand_all_of_them_on() {
        let open = |inherited: &mut Descriptors| {
            let port = UdpSocket::bind("[::]:0").unwrap().local_addr().unwrap().port();
            let sockets = Sockets::open(port, 3, inherited, Arc::default()).unwrap();
            (sockets, port)
        };
        let (sockets, port) = open(&mut Descriptors::default());
        assert_eq!((sockets.v4.len(), sockets.v6.len()), (3, 3));
        let of_lanes = (0..4).flat_map(|lane| sockets.of_lane(lane, 4));
        let of_lanes: BTreeSet<_> = of_lanes.map(|udp| udp.as_fd().as_raw_fd()).collect();
        assert_eq!(of_lanes.len(), 6, "each is in one lane");
        let mut heritage = Descriptors::default();
        sockets.bequeath(port, &mut heritage).unwrap();
        drop(sockets);
        let heirs = Sockets::open(port, 1, &mut heritage, Arc::default()).unwrap();
        assert_eq!((heirs.v4.len(), heirs.v6.len(), heritage.iter().count()), (3, 3, 0));
    }

    #[test]
    fn what_is_answered_leaves_from_the_address_that_was_asked_while_it_is_there() {
        let pair = Pair::new();
        let train = pair.train(&BYTES, 250);
        let heard_from = |from: [u8; 4], calls: u64| {
            let way = Way { from: Some(from.into()), ..train.way };
            assert_eq!(pair.calls(&Train { way, ..train }), calls);
            pair.sockets.send(&Train { way, segment: 1000, ..train }, None);
            pair.receiver.recv_from(&mut [0; 2000]).unwrap().1.ip()
        };
        // All of 127.0.0.0/8 is this machine's.
        assert_eq!(heard_from([127, 0, 0, 7], 1), IpAddr::from([127, 0, 0, 7]));
        assert_eq!(heard_from([198, 51, 100, 7], 1), IpAddr::from([127, 0, 0, 1]), "gone");
        assert!(pair.sockets.gone.has(&[198, 51, 100, 7].into()) && pair.failed() == 0);
        assert_eq!(heard_from([127, 0, 0, 7], 1), IpAddr::from([127, 0, 0, 7]));
    }
}
