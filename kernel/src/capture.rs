//! Seeing what passes on a link, as an eavesdropper there would: packet(7) sockets.
//!
//! A capture takes nothing from anybody: it gets copies. It ends when it is dropped, also by a killed process.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkMessage;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockType, recvfrom, setsockopt, socket, sockopt,
};

use crate::netlink::device::Device;
use crate::netlink::message::LOOPBACK;
use crate::netlink::{NetlinkError, RouteSocket};
use crate::{IfName, NetNs};

/// What the kernel keeps for us while we do not read, for each link.
const QUEUE_BYTES: usize = 32 << 20;

/// The longest packet: a train of segments that has not been cut yet, with its headers.
pub const LONGEST_PACKET: usize = 68 << 10;

/// Links could not be listed.
#[derive(Debug, thiserror::Error)]
pub enum LinksError {
    /// No netlink socket.
    #[error("open a netlink socket")]
    Socket(#[source] io::Error),
    /// The kernel did not list them.
    #[error("list the links")]
    List(#[from] NetlinkError),
}

/// A link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// Its index.
    pub ifindex: u32,
}

/// The links of the calling thread's namespace that lead out of the node: all that are up, but for the loopback device,
/// the overlay device and the pods' own.
///
/// # Errors
/// When they cannot be listed.
pub fn ways_out(overlay: &IfName) -> Result<Vec<Link>, LinksError> {
    let mut socket = RouteSocket::open_in(&NetNs::current()).map_err(LinksError::Socket)?;
    let links = socket.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    let devices = links.iter().filter_map(|link| Device::in_answer(std::slice::from_ref(link)));
    let leads_out = |device: &Device| {
        device.up
            && device.ifindex != LOOPBACK
            && device.name != overlay.as_str()
            && !device.is_of_pod()
    };
    let link = |device: Device| Link { name: device.name, ifindex: device.ifindex };
    Ok(devices.filter(leads_out).map(link).collect())
}

/// A running capture of all packets on one link, in both directions.
#[derive(Debug)]
pub struct Capture {
    link: Link,
    socket: OwnedFd,
}

/// A packet that passed.
#[derive(Debug)]
pub struct Passed<'b> {
    /// Whether this machine sent it.
    pub outgoing: bool,
    /// Without its link header: mostly from the IP header on.
    pub packet: &'b [u8],
}

impl Capture {
    /// Starts to capture on a link of the calling thread's namespace.
    ///
    /// # Errors
    /// Without CAP_NET_RAW, or when the link is gone.
    pub fn start(link: Link) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        // No protocol yet: it would get the packets of all links until it is bound.
        let socket = socket(AddressFamily::Packet, SockType::Datagram, flags, None)?;
        // Beyond net.core.rmem_max with CAP_NET_ADMIN; what is not granted shows in `lost`.
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &QUEUE_BYTES);
        bind(socket.as_fd(), link.ifindex)?;
        Ok(Self { link, socket })
    }

    /// Where.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// To wait for: readable when a packet is there.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The next packet; nothing when none is there. Never blocks.
    ///
    /// # Errors
    /// When the link is gone.
    pub fn next<'b>(&self, buffer: &'b mut [u8]) -> io::Result<Option<Passed<'b>>> {
        loop {
            let (len, from) = match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), buffer) {
                Ok(received) => received,
                Err(nix::Error::EAGAIN) => return Ok(None),
                Err(nix::Error::EINTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let outgoing = from.is_some_and(|from| from.pkttype() == libc::PACKET_OUTGOING);
            return Ok(Some(Passed { outgoing, packet: &buffer[..len] }));
        }
    }

    /// How many packets passed unseen, because nobody read in time, since this was last asked.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn lost(&self) -> io::Result<u32> {
        let mut statistics = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut len = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        // SAFETY: nix has no PACKET_STATISTICS. The kernel writes at most `len` bytes into a live struct of that size, of
        // two integers, for which every pattern is valid.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut len,
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(statistics.tp_drops) }
    }
}

/// From now on the socket gets every packet of the link.
fn bind(socket: BorrowedFd<'_>, ifindex: u32) -> io::Result<()> {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
        sll_ifindex: ifindex.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: nix cannot make a `sockaddr_ll`. This one is whole, outlives the call, and its size is passed with it.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
