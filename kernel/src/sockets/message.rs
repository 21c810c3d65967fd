//! `struct inet_diag_req_v2` and `struct inet_diag_msg` (linux/inet_diag.h), as bytes.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use mesh_model::snapshot::Protocol;
use netlink_packet_core::{DecodeError, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// Length of `struct inet_diag_sockid`: two ports, two addresses, an interface, a cookie.
const ID_BYTES: usize = 48;
/// What comes before it in both messages that hold one.
const REQUEST_HEAD: usize = 8;
const ANSWER_HEAD: usize = 4;

/// States of a socket that has another side (`enum` in net/tcp_states.h, as bits): established, SYN sent, and closing with
/// something still to send or to read. A datagram socket that is connected counts as established.
const STATES: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 8;

/// A message of this kind of netlink.
#[derive(Debug, Clone)]
pub(super) enum DiagMessage {
    /// To the kernel.
    Request { kind: u16, family: u8, protocol: u8, id: [u8; ID_BYTES] },
    /// From it.
    Socket(Socket),
}

/// A socket as the kernel lists it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Socket {
    family: u8,
    id: [u8; ID_BYTES],
}

impl DiagMessage {
    /// All that have another side.
    pub(super) fn list(family: i32, protocol: Protocol) -> Self {
        let family = u8::try_from(family).expect("a small constant");
        let protocol = protocol.number();
        Self::Request { kind: SOCK_DIAG_BY_FAMILY, family, protocol, id: [0; ID_BYTES] }
    }

    /// Exactly this one: its cookie is part of its identity.
    pub(super) fn destroy(protocol: Protocol, socket: Socket) -> Self {
        let (family, id, protocol) = (socket.family, socket.id, protocol.number());
        Self::Request { kind: SOCK_DESTROY, family, protocol, id }
    }
}

impl Socket {
    /// The other side; nothing when there is none.
    pub(super) fn remote(&self) -> Option<SocketAddr> {
        let port = u16::from_be_bytes([self.id[2], self.id[3]]);
        let bytes: [u8; 16] = self.id[20..36].try_into().ok()?;
        let address = if i32::from(self.family) == libc::AF_INET {
            Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into()
        } else {
            Ipv6Addr::from(bytes).to_canonical()
        };
        (port != 0).then(|| SocketAddr::new(address, port))
    }

    pub(super) fn cookie(&self) -> u64 {
        let word = |at: usize| {
            let bytes = [self.id[at], self.id[at + 1], self.id[at + 2], self.id[at + 3]];
            u64::from(u32::from_ne_bytes(bytes))
        };
        word(40) | word(44) << 32
    }
}

impl NetlinkSerializable for DiagMessage {
    fn message_type(&self) -> u16 {
        match self {
            Self::Request { kind, .. } => *kind,
            Self::Socket(_) => SOCK_DIAG_BY_FAMILY,
        }
    }

    fn buffer_len(&self) -> usize {
        REQUEST_HEAD + ID_BYTES
    }

    fn serialize(&self, buffer: &mut [u8]) {
        let Self::Request { family, protocol, id, .. } = self else { return };
        buffer[..4].copy_from_slice(&[*family, *protocol, 0, 0]);
        buffer[4..REQUEST_HEAD].copy_from_slice(&STATES.to_ne_bytes());
        buffer[REQUEST_HEAD..].copy_from_slice(id);
    }
}

impl NetlinkDeserializable for DiagMessage {
    type Error = DecodeError;

    fn deserialize(_header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let id = payload.get(ANSWER_HEAD..ANSWER_HEAD + ID_BYTES);
        let id = id.and_then(|id| id.try_into().ok());
        let id = id.ok_or_else(|| DecodeError::from("a socket that is too short"))?;
        Ok(Self::Socket(Socket { family: payload[0], id }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listed_socket_is_read_and_named_again() {
        let mut bytes = vec![0_u8; 72];
        bytes[0] = u8::try_from(libc::AF_INET6).unwrap();
        bytes[6..8].copy_from_slice(&8080_u16.to_be_bytes());
        bytes[24..40]
            .copy_from_slice(&"10.244.1.5".parse::<Ipv4Addr>().unwrap().to_ipv6_mapped().octets());
        bytes[44..48].copy_from_slice(&7_u32.to_ne_bytes());
        bytes[48..52].copy_from_slice(&1_u32.to_ne_bytes());
        let header = NetlinkHeader::default();
        let Ok(DiagMessage::Socket(socket)) = DiagMessage::deserialize(&header, &bytes) else {
            panic!("not read")
        };
        assert_eq!(socket.remote(), Some("10.244.1.5:8080".parse().unwrap()));
        assert_eq!(socket.cookie(), 1 << 32 | 7);
        let destroy = DiagMessage::destroy(Protocol::Udp, socket);
        let mut buffer = [0; REQUEST_HEAD + ID_BYTES];
        destroy.serialize(&mut buffer);
        assert_eq!((destroy.message_type(), buffer[0], buffer[1]), (SOCK_DESTROY, 10, 17));
        assert_eq!(buffer[REQUEST_HEAD..], bytes[ANSWER_HEAD..ANSWER_HEAD + ID_BYTES]);
        assert!(DiagMessage::deserialize(&header, &bytes[..50]).is_err());
    }
}
