//! What joining needs to know about one packet.

use super::{checksum, partial_checksum};

/// Place of the flags in a TCP header, of its checksum, and of that of UDP.
pub(super) const TCP_FLAGS: usize = 13;
pub(super) const TCP_CHECKSUM: usize = 16;
pub(super) const UDP_CHECKSUM: usize = 6;

/// TCP flags (RFC 9293, section 3.1).
pub(super) const PSH: u8 = 0x08;
const ACK: u8 = 0x10;

const UDP_HEADER: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Tcp,
    Udp,
}

/// A packet's place in its flow.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) kind: Kind,
    pub(super) v4: bool,
    /// A digest of addresses and ports; none when the packet is neither TCP nor UDP, or a fragment.
    pub(super) flow: Option<u64>,
    /// Where the transport header and the payload start, and where the packet ends.
    pub(super) transport: usize,
    pub(super) headers: usize,
    pub(super) len: usize,
    /// TCP sequence number.
    pub(super) sequence: u32,
    /// It may be part of a train.
    pub(super) joins: bool,
    /// It may be the last of a train only.
    pub(super) ends: bool,
}

impl Shape {
    /// Looks at a packet, whose length is that of its IP header.
    pub(super) fn of(packet: &[u8], udp_trains: bool) -> Self {
        let len = packet.len();
        let v4 = packet[0] >> 4 == 4;
        let alone = Self {
            kind: Kind::Udp,
            v4,
            flow: None,
            transport: 0,
            headers: 0,
            len,
            sequence: 0,
            joins: false,
            ends: true,
        };
        // No options, no extensions, no fragments (more follow, or offset).
        let (transport, protocol) = match packet {
            [0x45, _, _, _, _, _, flags, offset, _, protocol, ..]
                if len >= 20 && flags & 0x3f == 0 && *offset == 0 =>
            {
                (20, *protocol)
            }
            [first, _, _, _, _, _, next, ..] if first >> 4 == 6 && len >= 40 => (40, *next),
            _ => return alone,
        };
        let header = &packet[transport..];
        let base = Self { transport, ..alone };
        match protocol {
            6 if header.len() >= 20 => base.tcp(packet, header),
            17 if header.len() >= UDP_HEADER => base.udp(packet, header, udp_trains),
            _ => alone,
        }
    }

    pub(super) fn payload_bytes(&self) -> usize {
        self.len - self.headers
    }

    fn tcp(self, packet: &[u8], header: &[u8]) -> Self {
        let offset = usize::from(header[12] >> 4) * 4;
        let well_formed = (20..=header.len()).contains(&offset);
        let headers = if well_formed { self.transport + offset } else { self.len };
        let flags = header[TCP_FLAGS];
        Self {
            kind: Kind::Tcp,
            flow: Some(digest(packet, self.transport, 6)),
            headers,
            sequence: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
            joins: well_formed && flags & !PSH == ACK && self.len > headers,
            ends: flags & PSH != 0,
            ..self
        }
    }

    fn udp(self, packet: &[u8], header: &[u8], trains: bool) -> Self {
        let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let checked = header[UDP_CHECKSUM..UDP_HEADER] != [0, 0];
        Self {
            kind: Kind::Udp,
            flow: Some(digest(packet, self.transport, 17)),
            headers: self.transport + UDP_HEADER,
            joins: trains && checked && length == header.len() && length > UDP_HEADER,
            ends: false,
            ..self
        }
    }

    /// Whether the headers say that `packet` goes on where a train with this `head` ended; lengths and sequence are
    /// the caller's to compare.
    pub(super) fn continues(&self, first: &Self, head: &[u8], packet: &[u8]) -> bool {
        if (self.kind, self.v4, self.headers) != (first.kind, first.v4, first.headers) {
            return false;
        }
        let same = |from: usize, to: usize| head[from..to] == packet[from..to];
        let ip = if self.v4 {
            // Type of service; don't-fragment; time to live; addresses.
            same(1, 2) && same(6, 7) && same(8, 9) && same(12, 20)
        } else {
            // Class and flow label; hop limit and addresses.
            same(0, 4) && same(7, 40)
        };
        let t = self.transport;
        let transport = match self.kind {
            // Ports; acknowledgement and data offset; window; options.
            Kind::Tcp => {
                same(t, t + 4)
                    && same(t + 8, t + 13)
                    && same(t + 14, t + 16)
                    && same(t + 18, self.headers)
            }
            Kind::Udp => same(t, t + 4),
        };
        ip && transport
    }

    /// Whether the transport checksum is right.
    pub(super) fn is_intact(&self, packet: &[u8]) -> bool {
        let transport = &packet[self.transport..];
        let sum = checksum::pseudo_header(packet, self.protocol());
        let sum = checksum::add_be(sum, transport.len() as u16);
        checksum::is_intact(checksum::add(sum, transport))
    }

    /// Makes the first packet's headers those of a train of `bytes`.
    pub(super) fn finish_train(&self, head: &mut [u8], bytes: usize) {
        let transport_bytes = bytes - self.transport;
        if self.v4 {
            head[2..4].copy_from_slice(&(bytes as u16).to_be_bytes());
            head[10..12].fill(0);
            let sum = checksum::finish(checksum::add(0, &head[..20]));
            head[10..12].copy_from_slice(&sum);
        } else {
            head[4..6].copy_from_slice(&((bytes - 40) as u16).to_be_bytes());
        }
        let place = match self.kind {
            Kind::Tcp => self.transport + TCP_CHECKSUM,
            Kind::Udp => {
                let length = self.transport + 4;
                head[length..length + 2].copy_from_slice(&(transport_bytes as u16).to_be_bytes());
                self.transport + UDP_CHECKSUM
            }
        };
        let sum = partial_checksum(head, self.protocol(), transport_bytes);
        head[place..place + 2].copy_from_slice(&sum);
    }

    fn protocol(&self) -> u8 {
        match self.kind {
            Kind::Tcp => 6,
            Kind::Udp => 17,
        }
    }
}

/// Tells flows apart quickly. That two flows share one only costs a comparison.
fn digest(packet: &[u8], transport: usize, protocol: u8) -> u64 {
    let addresses = if transport == 20 { &packet[12..20] } else { &packet[8..40] };
    let ports = &packet[transport..transport + 4];
    let mix = |hash: u64, word: &[u8]| {
        let word = u32::from_ne_bytes([word[0], word[1], word[2], word[3]]);
        (hash ^ u64::from(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
    };
    let hash = addresses.chunks_exact(4).fold(u64::from(protocol), mix);
    mix(hash, ports)
}
