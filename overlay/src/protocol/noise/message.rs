//! The four messages on the wire (WG sections 5.4.2 to 5.4.7), told apart by type and length.

/// Length of a handshake initiation, the longest message that is not data.
pub const INITIATION_BYTES: usize = 148;

/// Length of a handshake response.
pub const RESPONSE_BYTES: usize = 92;

/// Length of a cookie reply.
pub const COOKIE_BYTES: usize = 64;

/// What sealing adds to a packet: a header and a tag.
pub const SEAL_OVERHEAD: usize = HEADER_BYTES + TAG_BYTES;

/// Header of a data message: type, receiver, counter.
pub const HEADER_BYTES: usize = 16;

/// Length of an authentication tag.
pub const TAG_BYTES: usize = 16;

/// Types, in the first of four bytes; the other three are zero.
pub const TYPE_INITIATION: u8 = 1;
/// Of a handshake response.
pub const TYPE_RESPONSE: u8 = 2;
/// Of a cookie reply.
pub const TYPE_COOKIE: u8 = 3;
/// Of data.
pub const TYPE_DATA: u8 = 4;

/// A datagram that has the form of a message. Nothing in it is authentic yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message<'d> {
    /// Somebody calls.
    Initiation(&'d [u8; INITIATION_BYTES]),
    /// An answer to a call of ours.
    Response(&'d [u8; RESPONSE_BYTES]),
    /// A cookie that we were asked to show.
    Cookie(&'d [u8; COOKIE_BYTES]),
    /// A sealed packet.
    Data(Data<'d>),
}

/// A data message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Data<'d> {
    /// Index of the receiver's session.
    pub receiver: u32,
    /// Number of the message in its session.
    pub counter: u64,
    /// Ciphertext and tag.
    pub sealed: &'d [u8],
}

impl<'d> Message<'d> {
    /// Reads a datagram; none when it is no message of this protocol.
    pub fn read(datagram: &'d [u8]) -> Option<Self> {
        match *datagram.first_chunk()? {
            [TYPE_DATA, 0, 0, 0] if datagram.len() >= SEAL_OVERHEAD => Some(Self::Data(Data {
                receiver: word(datagram, 4),
                counter: u64::from(word(datagram, 8)) | u64::from(word(datagram, 12)) << 32,
                sealed: &datagram[HEADER_BYTES..],
            })),
            [TYPE_INITIATION, 0, 0, 0] => datagram.try_into().ok().map(Self::Initiation),
            [TYPE_RESPONSE, 0, 0, 0] => datagram.try_into().ok().map(Self::Response),
            [TYPE_COOKIE, 0, 0, 0] => datagram.try_into().ok().map(Self::Cookie),
            _ => None,
        }
    }
}

/// A little-endian number in a message; the caller knows that it is long enough.
pub fn word(message: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([message[at], message[at + 1], message[at + 2], message[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn type_and_length_have_to_fit() {
        let of = |kind: u8, len: usize| {
            let mut bytes = vec![0; len];
            bytes[0] = kind;
            bytes
        };
        for (kind, len) in [(1, 148), (2, 92), (3, 64), (4, 32), (4, 1500)] {
            assert!(Message::read(&of(kind, len)).is_some(), "type {kind}, {len} bytes");
        }
        for (kind, len) in
            [(1, 147), (1, 149), (2, 148), (3, 63), (4, 31), (0, 64), (5, 92), (4, 3)]
        {
            assert_eq!(Message::read(&of(kind, len)), None, "type {kind}, {len} bytes");
        }
        let mut reserved = of(4, 32);
        reserved[2] = 1;
        assert_eq!(Message::read(&reserved), None);
        assert_eq!(Message::read(&[]), None);
    }
}
