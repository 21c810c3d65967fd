//! The header that stands before each packet of a device with `IFF_VNET_HDR` (virtio 1.3, section 5.1.6).

/// Its length; byte order is the machine's.
pub const VNET_HEADER_BYTES: usize = 10;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum field holds the pseudo-header's sum only.
pub const NEEDS_CHECKSUM: u8 = 1;

/// `VIRTIO_NET_HDR_GSO_*` without the ECN bit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Gso {
    /// One packet.
    #[default]
    None,
    /// TCP over IPv4.
    TcpV4,
    /// TCP over IPv6.
    TcpV6,
    /// UDP over either, each segment a datagram of its own.
    Udp,
    /// Some other number.
    Unknown,
}

/// The header's fields.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// [`NEEDS_CHECKSUM`] or nothing.
    pub flags: u8,
    /// What the packet is a train of.
    pub gso: Gso,
    /// Length of all headers of the train. A hint only: others have been seen to get it wrong.
    pub header_bytes: u16,
    /// Payload of each segment but the last.
    pub gso_bytes: u16,
    /// Where the checksum starts: the transport header.
    pub checksum_start: u16,
    /// Where the checksum is, from there.
    pub checksum_offset: u16,
}

const GSO_ECN: u8 = 0x80;

impl VnetHeader {
    /// Reads the header; none when there are too few bytes.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; VNET_HEADER_BYTES] = bytes.get(..VNET_HEADER_BYTES)?.try_into().ok()?;
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let gso = match bytes[1] & !GSO_ECN {
            0 => Gso::None,
            1 => Gso::TcpV4,
            4 => Gso::TcpV6,
            5 => Gso::Udp,
            _ => Gso::Unknown,
        };
        Some(Self {
            flags: bytes[0],
            gso,
            header_bytes: word(2),
            gso_bytes: word(4),
            checksum_start: word(6),
            checksum_offset: word(8),
        })
    }

    /// The header's bytes.
    pub fn bytes(&self) -> [u8; VNET_HEADER_BYTES] {
        let gso = match self.gso {
            Gso::None | Gso::Unknown => 0,
            Gso::TcpV4 => 1,
            Gso::TcpV6 => 4,
            Gso::Udp => 5,
        };
        let mut bytes = [self.flags, gso, 0, 0, 0, 0, 0, 0, 0, 0];
        let words = [self.header_bytes, self.gso_bytes, self.checksum_start, self.checksum_offset];
        for (place, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}
