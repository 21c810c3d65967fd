//! SCTP packets by raw sockets: a kernel without SCTP carries and filters them as well, and that is what is asked here.
//!
//! A packet is SCTP's common header (RFC 9260, section 3.1) and text in the place of chunks. The checksum is left zero: nobody on
//! the way looks at it.

use std::io::{self, Read as _};
use std::net::{IpAddr, SocketAddr};
use std::thread;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

const SCTP: i32 = 132;
const HEADER: usize = 12;

/// A packet that came in.
pub(crate) struct Packet {
    /// Who sent it.
    pub(crate) from: IpAddr,
    /// From which port.
    pub(crate) source: u16,
    /// To which port.
    pub(crate) destination: u16,
    /// What it says.
    pub(crate) text: Vec<u8>,
}

/// A raw socket for one family.
pub(crate) struct Raw(Socket);

impl Raw {
    /// Needs the right to open raw sockets.
    pub(crate) fn open(v4: bool) -> io::Result<Self> {
        let domain = if v4 { Domain::IPV4 } else { Domain::IPV6 };
        Socket::new(domain, Type::RAW, Some(Protocol::from(SCTP))).map(Self)
    }

    /// For waiting and for its flags.
    pub(crate) fn socket(&self) -> &Socket {
        &self.0
    }

    /// Sends a packet.
    pub(crate) fn send(&self, to: SocketAddr, source: u16, text: &[u8]) -> io::Result<()> {
        let mut packet = Vec::with_capacity(HEADER + text.len());
        packet.extend(source.to_be_bytes());
        packet.extend(to.port().to_be_bytes());
        packet.extend([0; 8]);
        packet.extend(text);
        // The port of a raw IPv6 socket's address means something else.
        self.0.send_to(&packet, &SockAddr::from(SocketAddr::new(to.ip(), 0))).map(drop)
    }

    /// The next packet; nothing for one that is too short.
    pub(crate) fn receive(&self) -> io::Result<Option<Packet>> {
        let mut buffer = [0; 2048];
        // To `recv_from` the buffer is uninitialised memory, which is unsafe to read; so the sender is peeked at first.
        let (_, from) = self.0.peek_from(&mut [])?;
        let n = (&self.0).read(&mut buffer)?;
        let Some(from) = from.as_socket() else { return Ok(None) };
        // Raw IPv4 sockets are given the IP header as well.
        let skip = if from.is_ipv4() { usize::from(buffer[0] & 15) * 4 } else { 0 };
        Ok(parse(from.ip(), buffer.get(skip..n).unwrap_or_default()))
    }
}

fn parse(from: IpAddr, bytes: &[u8]) -> Option<Packet> {
    let port = |at: usize| Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
    let (source, destination) = (port(0)?, port(2)?);
    Some(Packet { from, source, destination, text: bytes.get(HEADER..)?.to_vec() })
}

/// Answers everything to these ports with `name`, in threads of its own.
pub(crate) fn echo(name: &str, ports: &[u16]) -> Result<(), String> {
    for v4 in [true, false] {
        let raw = Raw::open(v4).map_err(|e| format!("open a raw socket: {e}"))?;
        let (name, ports) = (name.to_owned(), ports.to_vec());
        thread::spawn(move || {
            loop {
                let Ok(Some(packet)) = raw.receive() else { continue };
                if ports.contains(&packet.destination) {
                    let to = SocketAddr::new(packet.from, packet.source);
                    // A lost answer is a lost packet.
                    let _ = raw.send(to, packet.destination, name.as_bytes());
                }
            }
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_common_header_is_read_and_short_packets_are_none() {
        let from: IpAddr = [192, 0, 2, 1].into();
        let packet = parse(from, b"\x00\x50\x10\x01\0\0\0\0\0\0\0\0x-a").unwrap();
        assert_eq!((packet.from, packet.source, packet.destination), (from, 80, 0x1001));
        assert_eq!(packet.text, b"x-a");
        assert!(parse(from, b"\x00\x50\x10\x01").is_none());
    }
}
