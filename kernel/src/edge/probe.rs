//! A probe as if a client outside had sent it.
//!
//! The program on the uplink is run on it as on a packet that came in, and what it makes of it goes on for real: to the pod, through
//! the tunnel, or to the node's own stack. So everybody on the way decides as about a client's packet, and the answer goes to that
//! client, which did not ask and says so.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;

use mesh_abi::{LocalPod, programs as names};
use mesh_model::snapshot::Protocol;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, sendto,
    socket,
};

use crate::bpf::test_run::Input;
use crate::{NetNs, Programs, convert};

/// The first packet of a connection, or a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// The client.
    pub source: SocketAddr,
    /// What the client uses; of the same family.
    pub destination: SocketAddr,
    /// TCP or UDP.
    pub protocol: Protocol,
}

/// What became of a probe at the node where it came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entered {
    /// It goes on to a pod of this node.
    ToPod,
    /// It goes on to another node.
    ToNode,
    /// It goes on to the node's own stack.
    ToStack,
    /// It was dropped or refused.
    Ended,
}

/// A probe could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum EnterError {
    /// Source and destination cannot be of one packet.
    #[error("{0} and {1} are not of the same family")]
    Families(SocketAddr, SocketAddr),
    /// There is no device with our program by which clients come in.
    #[error("no uplink carries our program")]
    NoUplink,
    /// A map cannot be read.
    #[error("read the tables of the programs")]
    Map(#[source] io::Error),
    /// The program cannot be run on the packet.
    #[error("run the program of the uplink")]
    Run(#[source] io::Error),
    /// The packet cannot be handed on.
    #[error("hand the packet on")]
    Send(#[source] io::Error),
}

const ETHERNET: usize = 14;
/// Verdict of a program that sends a packet to another device (`TC_ACT_REDIRECT`), and of one that leaves it alone.
const REDIRECT: u32 = 7;
const NEXT: u32 = u32::MAX;

/// Lets a probe come in at the node whose network namespace is `node`.
///
/// # Errors
/// When it cannot be sent on.
pub fn enter(node: &NetNs, programs: &Programs, probe: &Probe) -> Result<Entered, EnterError> {
    if probe.source.is_ipv4() != probe.destination.is_ipv4() {
        return Err(EnterError::Families(probe.source, probe.destination));
    }
    node.run(|| Entry { programs, probe }.enter()).map_err(EnterError::Send)?
}

struct Entry<'e> {
    programs: &'e Programs,
    probe: &'e Probe,
}

impl Entry<'_> {
    fn enter(&self) -> Result<Entered, EnterError> {
        let uplinks = self.programs.edge.uplinks.entries().map_err(EnterError::Map)?;
        let (ifindex, uplink) = uplinks.first().ok_or(EnterError::NoUplink)?;
        let packet = frame(uplink.mac, self.probe);
        let input = Input { packet: &packet, ifindex: *ifindex, repeat: 1 };
        let output = self.programs.test_run(names::FROM_UPLINK, &input);
        let output = output.map_err(EnterError::Run)?;
        let Some(to) = destination(&output.packet) else { return Ok(Entered::Ended) };
        match output.verdict {
            REDIRECT => self.redirected(&output.packet, to),
            NEXT => {
                self.to_stack(&output.packet[ETHERNET..], to)?;
                Ok(Entered::ToStack)
            }
            _ => Ok(Entered::Ended),
        }
    }

    /// Where the program sends a packet shows by whom it is for: a node, when it is wrapped; a pod; or who sent it.
    fn redirected(&self, packet: &[u8], to: IpAddr) -> Result<Entered, EnterError> {
        let key = convert::address(to);
        if self.programs.edge.nodes.lookup(&key).map_err(EnterError::Map)?.is_some() {
            let config = self.programs.node.lookup(&0).map_err(EnterError::Map)?;
            let overlay = config.unwrap_or_default().overlay_ifindex;
            // A device without a link layer.
            transmit(overlay, &packet[ETHERNET..], ethertype(packet)).map_err(EnterError::Send)?;
            return Ok(Entered::ToNode);
        }
        let pod: Option<LocalPod> =
            self.programs.local_pods.lookup(&key).map_err(EnterError::Map)?;
        let Some(pod) = pod else { return Ok(Entered::Ended) };
        transmit(pod.device(), packet, ethertype(packet)).map_err(EnterError::Send)?;
        Ok(Entered::ToPod)
    }

    /// By the way that a packet to oneself takes: the stack believes its source.
    fn to_stack(&self, packet: &[u8], to: IpAddr) -> Result<(), EnterError> {
        let send = || -> nix::Result<()> {
            let (family, flags) = (AddressFamily::Inet, SockFlag::SOCK_CLOEXEC);
            match to {
                IpAddr::V4(to) => {
                    let raw = socket(family, SockType::Raw, flags, SockProtocol::Raw)?;
                    let to = SockaddrIn::from(std::net::SocketAddrV4::new(to, 0));
                    sendto(raw.as_raw_fd(), packet, &to, MsgFlags::empty())?;
                }
                IpAddr::V6(to) => {
                    let family = AddressFamily::Inet6;
                    let raw = socket(family, SockType::Raw, flags, SockProtocol::Raw)?;
                    let to = SockaddrIn6::from(std::net::SocketAddrV6::new(to, 0, 0, 0));
                    sendto(raw.as_raw_fd(), packet, &to, MsgFlags::empty())?;
                }
            }
            Ok(())
        };
        send().map_err(|error| EnterError::Send(error.into()))
    }
}

/// Sends a packet out of a device of the calling thread's namespace.
fn transmit(ifindex: u32, packet: &[u8], ethertype: [u8; 2]) -> io::Result<()> {
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: u16::from_ne_bytes(ethertype),
        sll_ifindex: ifindex.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: nix cannot make a `sockaddr_ll`. This one is whole, both buffers outlive the call, and their sizes are passed with them.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            0,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn ethertype(packet: &[u8]) -> [u8; 2] {
    [packet[12], packet[13]]
}

/// To whom a packet goes.
fn destination(packet: &[u8]) -> Option<IpAddr> {
    let ip = packet.get(ETHERNET..)?;
    match ip.first()? >> 4 {
        4 => <[u8; 4]>::try_from(ip.get(16..20)?).ok().map(IpAddr::from),
        6 => <[u8; 16]>::try_from(ip.get(24..40)?).ok().map(IpAddr::from),
        _ => None,
    }
}

/// The probe as it comes in by a device with this address.
fn frame(mac: [u8; 6], probe: &Probe) -> Vec<u8> {
    let (source, destination) = (probe.source.ip(), probe.destination.ip());
    let (number, mut segment, place) = match probe.protocol {
        Protocol::Udp => (17, datagram(probe), 6),
        _ => (6, opening(probe), 16),
    };
    let length = segment.len() as u16;
    let addresses: Vec<u8> = match (source, destination) {
        (IpAddr::V4(from), IpAddr::V4(to)) => [from.octets(), to.octets()].concat(),
        (from, to) => {
            let of = |address| convert::address(address).to_bytes();
            [of(from), of(to)].concat()
        }
    };
    let pseudo = [&addresses[..], &[0, number], &length.to_be_bytes()].concat();
    let checksum = match checksum(&[pseudo, segment.clone()].concat()) {
        // Of UDP, zero means that there is none.
        0 => 0xffff,
        sum => sum,
    };
    segment[place..place + 2].copy_from_slice(&checksum.to_be_bytes());
    // A link layer address of nobody's.
    let mut frame = [&mac[..], &[2, 0, 0, 0, 0, 0]].concat();
    if source.is_ipv4() {
        let [high, low] = (length + 20).to_be_bytes();
        let mut header = vec![0x45, 0, high, low, 0, 0, 0x40, 0, 64, number, 0, 0];
        header.extend(addresses);
        let sum = self::checksum(&header).to_be_bytes();
        header[10..12].copy_from_slice(&sum);
        frame.extend([8, 0]);
        frame.extend(header);
    } else {
        let [high, low] = length.to_be_bytes();
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, high, low, number, 64]);
        frame.extend(addresses);
    }
    frame.extend(segment);
    frame
}

fn ports(probe: &Probe) -> Vec<u8> {
    [probe.source.port().to_be_bytes(), probe.destination.port().to_be_bytes()].concat()
}

/// A SYN without options.
fn opening(probe: &Probe) -> Vec<u8> {
    let mut segment = ports(probe);
    segment.extend([0x6d, 0x65, 0x73, 0x68, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
    segment
}

fn datagram(probe: &Probe) -> Vec<u8> {
    const TEXT: &[u8] = b"mesh trace\n";
    let mut segment = ports(probe);
    segment.extend((8 + TEXT.len() as u16).to_be_bytes());
    segment.extend([0, 0]);
    segment.extend(TEXT);
    segment
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_has_right_lengths_and_sums() {
        for (source, destination) in
            [("192.0.2.7:40000", "192.0.2.1:30001"), ("[2001:db8::7]:40000", "[2001:db8::1]:30001")]
        {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
                let probe = Probe { source, destination, protocol };
                let frame = frame([2; 6], &probe);
                assert_eq!(super::destination(&frame), Some(probe.destination.ip()));
                let ip = &frame[ETHERNET..];
                let (header, said) = if probe.source.is_ipv4() {
                    assert_eq!(checksum(&ip[..20]), 0);
                    (20, usize::from(u16::from_be_bytes([ip[2], ip[3]])))
                } else {
                    (40, 40 + usize::from(u16::from_be_bytes([ip[4], ip[5]])))
                };
                assert_eq!(said, ip.len());
                let length = (ip.len() - header) as u16;
                let addresses = if header == 20 { &ip[12..20] } else { &ip[8..40] };
                let number = if protocol == Protocol::Tcp { 6 } else { 17 };
                let pseudo = [addresses, &[0, number], &length.to_be_bytes()].concat();
                assert_eq!(checksum(&[&pseudo[..], &ip[header..]].concat()), 0);
            }
        }
    }
}
