//! Telling the local network that addresses are here now: gratuitous ARP (RFC 5227, section 3) and unsolicited neighbour
//! advertisements (RFC 4861, section 7.2.6).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socket};

const BROADCAST: [u8; 6] = [0xff; 6];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

/// Addresses that this node has on the local network, and the sockets to say so. While it lives, the devices listen to questions
/// for the IPv6 ones, which go to groups that nobody else here is in. Leaves nothing behind.
#[derive(Debug)]
pub struct Announcement {
    addresses: BTreeSet<IpAddr>,
    /// One for each device, with its MAC address.
    sockets: Vec<(OwnedFd, [u8; 6])>,
}

impl Announcement {
    /// Prepares to announce the addresses on these devices (index and MAC address) of the calling thread's namespace.
    ///
    /// # Errors
    /// Without CAP_NET_RAW, or when a device is gone.
    pub fn new(addresses: BTreeSet<IpAddr>, devices: &BTreeMap<u32, [u8; 6]>) -> io::Result<Self> {
        let mut sockets = Vec::new();
        for (&ifindex, &mac) in devices {
            let socket =
                socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
            bind(&socket, ifindex)?;
            for address in &addresses {
                if let IpAddr::V6(address) = address {
                    join(&socket, ifindex, solicited_node_mac(address))?;
                }
            }
            sockets.push((socket, mac));
        }
        Ok(Self { addresses, sockets })
    }

    /// Says it once, on all devices. Goes on after a failure.
    ///
    /// # Errors
    /// The first failure.
    pub fn tell(&self) -> io::Result<()> {
        let mut result = Ok(());
        for (socket, mac) in &self.sockets {
            for address in &self.addresses {
                let frame = match address {
                    IpAddr::V4(address) => gratuitous_arp(*address, *mac),
                    IpAddr::V6(address) => unsolicited_advertisement(*address, *mac),
                };
                if let Err(error) = send(socket.as_raw_fd(), &frame, MsgFlags::empty()) {
                    result = result.and(Err(error.into()));
                }
            }
        }
        result
    }
}

/// Packets go out by the device; none come in, because no protocol is given.
fn bind(socket: &OwnedFd, ifindex: u32) -> io::Result<()> {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: 0,
        sll_ifindex: ifindex.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: nix cannot make a `sockaddr_ll`. This one is whole, outlives the call, and its size is passed with it.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets the device take packets to a group, for as long as the socket is open.
fn join(socket: &OwnedFd, ifindex: u32, group: [u8; 6]) -> io::Result<()> {
    let mut request = libc::packet_mreq {
        mr_ifindex: ifindex.cast_signed(),
        mr_type: libc::PACKET_MR_MULTICAST as u16,
        mr_alen: 6,
        mr_address: [0; 8],
    };
    request.mr_address[..6].copy_from_slice(&group);
    // SAFETY: the request is whole, outlives the call, and its size is passed with it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_ADD_MEMBERSHIP,
            (&raw const request).cast(),
            size_of::<libc::packet_mreq>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The link layer address of the group in which somebody with this address is asked for (RFC 4291, section 2.7.1).
fn solicited_node_mac(address: &Ipv6Addr) -> [u8; 6] {
    let [.., a, b, c] = address.octets();
    [0x33, 0x33, 0xff, a, b, c]
}

/// A request for the own address: what every stack takes as news.
fn gratuitous_arp(address: Ipv4Addr, mac: [u8; 6]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(42);
    frame.extend(BROADCAST);
    frame.extend(mac);
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(address.octets());
    frame.extend([0; 6]);
    frame.extend(address.octets());
    frame
}

fn unsolicited_advertisement(address: Ipv6Addr, mac: [u8; 6]) -> Vec<u8> {
    // Type, code, checksum, "override", target, its link layer address.
    let mut message = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    message.extend(address.octets());
    message.extend([2, 1]);
    message.extend(mac);
    let checksum = checksum(address, ALL_NODES, &message);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    let mut frame = Vec::with_capacity(86);
    frame.extend(ALL_NODES_MAC);
    frame.extend(mac);
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, 58, 255]);
    frame.extend(address.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(message);
    frame
}

/// The checksum of an ICMPv6 message of even length (RFC 8200, section 8.1).
fn checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let words = |bytes: &[u8]| -> u32 {
        bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum()
    };
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    let mut sum = words(&source.octets()) + words(&destination.octets()) + words(message);
    sum += length + 58;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
