//! The number of the namespace's nftables rules. Each change of any of them gives another one (`linux/netfilter/nf_tables.h`, `NFT_MSG_GETGEN`).

use netlink_packet_core::{DecodeError, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};
use nix::sys::socket::SockProtocol;

use crate::netlink::{Netlink, NetlinkError};

/// `NFNL_SUBSYS_NFTABLES` and `NFT_MSG_GETGEN`.
const GET: u16 = 10 << 8 | 16;
/// `struct nfgenmsg` before the attributes.
const HEADER: usize = 4;
/// `NFTA_GEN_ID`, a big-endian number.
const ID: u16 = 1;

/// The number now, in the calling thread's namespace.
pub(super) fn now() -> Result<u32, NetlinkError> {
    let mut socket = Netlink::open(SockProtocol::NetlinkNetFilter).map_err(NetlinkError::Socket)?;
    let answer = socket.request(Message(None), 0)?;
    answer.into_iter().find_map(|message| message.0).ok_or(NetlinkError::Incomplete("a generation"))
}

/// The question, and the answer with a number.
#[derive(Debug, PartialEq, Eq)]
struct Message(Option<u32>);

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        GET
    }

    fn buffer_len(&self) -> usize {
        HEADER
    }

    fn serialize(&self, buffer: &mut [u8]) {
        // Of no family in particular, version 0, no resource.
        buffer.fill(0);
    }
}

impl NetlinkDeserializable for Message {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let mut rest = payload.get(HEADER..).unwrap_or_default();
        while let [l0, l1, k0, k1, value @ ..] = rest {
            let length = usize::from(u16::from_ne_bytes([*l0, *l1]));
            if u16::from_ne_bytes([*k0, *k1]) == ID
                && let Some(id) = value.first_chunk()
            {
                return Ok(Self(Some(u32::from_be_bytes(*id))));
            }
            rest = rest.get(length.next_multiple_of(4).max(HEADER)..).unwrap_or_default();
        }
        Ok(Self(None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_found_among_other_attributes() {
        let attribute = |kind: u16, value: &[u8]| {
            let length = u16::try_from(4 + value.len()).unwrap().to_ne_bytes();
            [&length[..], &kind.to_ne_bytes(), value].concat()
        };
        let read = |attributes: &[Vec<u8>]| {
            let payload = [vec![0; HEADER], attributes.concat()].concat();
            Message::deserialize(&NetlinkHeader::default(), &payload).unwrap().0
        };
        let id = attribute(ID, &[0, 0, 1, 2]);
        assert_eq!(read(&[attribute(3, b"nft\0"), id.clone()]), Some(258));
        assert_eq!(read(&[id]), Some(258));
        assert_eq!(read(&[attribute(2, &[0; 4])]), None);
        assert_eq!(read(&[vec![0; 7]]), None, "torn");
        assert_eq!(read(&[attribute(ID, &[1])]), None, "short");
    }
}
