//! Probes of how much a way carries, and their acknowledgements: inside the tunnel, in the place of a packet.
//!
//! Eleven bytes or more: 0 (no version of IP begins so, and other implementations drop it like a damaged packet), 1 for a
//! probe or 2 for its acknowledgement, `"MTU"`, the size as 16 bits and the number as 32 bits, big-endian. A probe is filled
//! up with zeros to its size.

use super::peer::path_mtu::Probe;

const KIND_PROBE: u8 = 1;
const KIND_ACKNOWLEDGEMENT: u8 = 2;
const MAGIC: [u8; 3] = *b"MTU";
const HEADER_BYTES: usize = 11;

/// Length of an acknowledgement.
pub const ACKNOWLEDGEMENT_BYTES: usize = 16;

/// What is no packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// To be acknowledged.
    Probe(Probe),
    /// A probe of ours arrived.
    Acknowledgement(Probe),
}

impl Message {
    /// Reads what came in the place of a packet; nothing when it is something else.
    pub fn read(inner: &[u8]) -> Option<Self> {
        let header = inner.first_chunk::<HEADER_BYTES>()?;
        let [0, kind, a, b, c, s0, s1, n0, n1, n2, n3] = *header else { return None };
        let size = u16::from_be_bytes([s0, s1]);
        let probe = Probe { number: u32::from_be_bytes([n0, n1, n2, n3]), size };
        match kind {
            _ if [a, b, c] != MAGIC => None,
            // It proves its own length only.
            KIND_PROBE if inner.len() == usize::from(size) => Some(Self::Probe(probe)),
            KIND_ACKNOWLEDGEMENT if inner.len() == ACKNOWLEDGEMENT_BYTES => {
                Some(Self::Acknowledgement(probe))
            }
            _ => None,
        }
    }

    /// The bytes to send.
    pub fn write(self) -> Vec<u8> {
        let (kind, probe, len) = match self {
            Self::Probe(probe) => (KIND_PROBE, probe, usize::from(probe.size)),
            Self::Acknowledgement(probe) => (KIND_ACKNOWLEDGEMENT, probe, ACKNOWLEDGEMENT_BYTES),
        };
        let mut bytes = vec![0; len.max(HEADER_BYTES)];
        bytes[1] = kind;
        bytes[2..5].copy_from_slice(&MAGIC);
        bytes[5..7].copy_from_slice(&probe.size.to_be_bytes());
        bytes[7..HEADER_BYTES].copy_from_slice(&probe.number.to_be_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_prove_their_own_length_and_nothing_else_is_one() {
        let probe = Probe { number: 0x0102_0304, size: 1420 };
        let bytes = Message::Probe(probe).write();
        assert_eq!(bytes.len(), 1420);
        assert_eq!(Message::read(&bytes), Some(Message::Probe(probe)));
        assert_eq!(Message::read(&bytes[..1419]), None);
        let answer = Message::Acknowledgement(probe).write();
        assert_eq!(answer.len(), ACKNOWLEDGEMENT_BYTES);
        assert_eq!(Message::read(&answer), Some(Message::Acknowledgement(probe)));
        assert_eq!(Message::read(&answer[..15]), None);
        for (place, value) in [(0, 0x45), (1, 3), (3, b'x')] {
            let mut other = bytes.clone();
            other[place] = value;
            assert_eq!(Message::read(&other), None);
        }
        assert_eq!(Message::read(&[]), None);
    }
}
