//! The Internet checksum (RFC 1071).
//!
//! Sums are over words in the order in which they lie in memory: the one's complement sum does not mind
//! (RFC 1071, section 2B), and no byte has to be swapped.

/// A sum that has not been folded yet. Room for 2^32 words.
pub type Sum = u64;

/// Adds bytes to a sum. Only the last piece of a message may have an odd length.
pub fn add(sum: Sum, bytes: &[u8]) -> Sum {
    // Independent lanes, so that the compiler adds them side by side.
    let mut lanes = [0u64; 8];
    let (blocks, rest) = bytes.as_chunks::<32>();
    for block in blocks {
        let (words, _) = block.as_chunks::<4>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane += u64::from(u32::from_ne_bytes(*word));
        }
    }
    let mut sum = sum + lanes.iter().sum::<u64>();
    let (words, last) = rest.as_chunks::<2>();
    for word in words {
        sum += u64::from(u16::from_ne_bytes(*word));
    }
    if let [byte] = last {
        sum += u64::from(u16::from_ne_bytes([*byte, 0]));
    }
    sum
}

/// Adds a number that stands in a header in network order.
pub fn add_be(sum: Sum, number: u16) -> Sum {
    sum + u64::from(u16::from_ne_bytes(number.to_be_bytes()))
}

/// The 16 bits that a sum stands for, as bytes for a header. Not complemented.
pub fn fold(sum: Sum) -> [u8; 2] {
    let mut sum = (sum >> 32) + (sum & 0xffff_ffff);
    sum = (sum >> 32) + (sum & 0xffff_ffff);
    sum = (sum >> 16) + (sum & 0xffff);
    sum = (sum >> 16) + (sum & 0xffff);
    sum = (sum >> 16) + (sum & 0xffff);
    (sum as u16).to_ne_bytes()
}

/// The checksum: the complement of the folded sum, as bytes for a header.
pub fn finish(sum: Sum) -> [u8; 2] {
    let [a, b] = fold(sum);
    [!a, !b]
}

/// Whether a message that contains its checksum is intact.
pub fn is_intact(sum: Sum) -> bool {
    fold(sum) == [0xff, 0xff]
}

/// Writes a number into a message, and brings the checksum that stands elsewhere in it (RFC 1624, equation 3). The number may stand
/// at an odd place.
pub fn replace(message: &mut [u8], at: usize, number: u16, checksum: usize) {
    let word = |bytes: [u8; 2]| {
        let [a, b] = bytes;
        u64::from(u16::from_ne_bytes(if at % 2 == 1 { [b, a] } else { [a, b] }))
    };
    let [before, old] = [checksum, at].map(|at| [message[at], message[at + 1]]);
    message[at..at + 2].copy_from_slice(&number.to_be_bytes());
    let [a, b] = before.map(|byte| !byte);
    let sum =
        Sum::from(u16::from_ne_bytes([a, b])) + (!word(old) & 0xffff) + word(number.to_be_bytes());
    message[checksum..checksum + 2].copy_from_slice(&finish(sum));
}

/// Addresses and protocol of the pseudo-header of TCP and UDP (RFC 9293 section 3.1, RFC 8200 section 8.1);
/// the length is to be added.
pub fn pseudo_header(ip: &[u8], protocol: u8) -> Sum {
    let addresses = if ip[0] >> 4 == 4 { &ip[12..20] } else { &ip[8..40] };
    add_be(add(0, addresses), u16::from(protocol))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_example_of_rfc_1071() {
        let sum = add(0, &[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(fold(sum), [0xdd, 0xf2]);
        assert_eq!(finish(sum), [0x22, 0x0d]);
    }

    proptest! {
        #[test]
        fn as_word_by_word(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let mut plain = 0u32;
            for pair in bytes.chunks(2) {
                plain += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
                plain = (plain & 0xffff) + (plain >> 16);
            }
            prop_assert_eq!(fold(add(0, &bytes)), (plain as u16).to_be_bytes());
        }
    }
}
