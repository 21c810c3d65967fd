//! ICMP echo messages (RFC 792, RFC 4443 section 4), which every kernel answers by itself.

const HEADER_BYTES: usize = 8;
/// What an echo carries at least: a secret of this process, so that nobody answers who was not asked, and the probe's number.
const PAYLOAD_BYTES: usize = 12;
/// Length of the shortest message.
pub const MESSAGE_BYTES: usize = HEADER_BYTES + PAYLOAD_BYTES;

/// Requests and answers of one process.
#[derive(Debug, Clone, Copy)]
pub struct Echo {
    secret: u64,
    v6: bool,
}

impl Echo {
    /// Those of a process that knows `secret`, over IPv6 or IPv4.
    pub fn new(secret: u64, v6: bool) -> Self {
        Self { secret, v6 }
    }

    /// The shortest request. Over IPv6 the kernel fills in the checksum.
    pub fn request(&self, token: u32) -> [u8; MESSAGE_BYTES] {
        let mut message = [0; MESSAGE_BYTES];
        self.write(token, &mut message);
        message
    }

    /// A request that fills `message` with zeros behind what it needs; the rest of the message has to be zero.
    ///
    /// # Panics
    /// Below [`MESSAGE_BYTES`].
    pub fn write(&self, token: u32, message: &mut [u8]) {
        message[0] = if self.v6 { 128 } else { 8 };
        message[4..8].copy_from_slice(&self.identifier(token));
        message[8..16].copy_from_slice(&self.secret.to_be_bytes());
        message[16..MESSAGE_BYTES].copy_from_slice(&token.to_be_bytes());
        if !self.v6 {
            let sum = checksum(message);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
        }
    }

    /// The number of the probe that a packet answers, as a raw socket hands it over: over IPv4 with its IP header; and the
    /// length of the message. The kernel has checked the checksum over IPv6, and over IPv4 the secret does.
    pub fn answer(&self, packet: &[u8]) -> Option<(u32, usize)> {
        let message = if self.v6 {
            packet
        } else {
            let header = usize::from(packet.first()? & 0xf) * 4;
            packet.get(header..)?
        };
        let (head, payload) = message.split_first_chunk::<HEADER_BYTES>()?;
        let (secret, token) = payload.split_first_chunk::<8>()?;
        let token = u32::from_be_bytes(*token.first_chunk()?);
        let is_answer = head[0] == if self.v6 { 129 } else { 0 } && head[1] == 0;
        let ours =
            u64::from_be_bytes(*secret) == self.secret && head[4..] == self.identifier(token);
        (is_answer && ours).then_some((token, message.len()))
    }

    /// Identifier and sequence number.
    fn identifier(&self, token: u32) -> [u8; 4] {
        let [.., a, b] = self.secret.to_be_bytes();
        let [.., c, d] = token.to_be_bytes();
        [a, b, c, d]
    }
}

/// RFC 1071.
fn checksum(message: &[u8]) -> u16 {
    let (words, odd) = message.as_chunks::<2>();
    let sum: u32 = words.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    let sum = sum + odd.first().map_or(0, |last| u32::from(*last) << 8);
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_recognised_and_nothing_else_is() {
        for v6 in [false, true] {
            let echo = Echo::new(0x0102_0304_0506_0708, v6);
            let request = echo.request(77);
            let wrap = |message: &[u8]| {
                let header = if v6 { vec![] } else { [&[0x45][..], &[0; 19]].concat() };
                [&header, message].concat()
            };
            let mut answer = request;
            answer[0] = if v6 { 129 } else { 0 };
            assert_eq!(echo.answer(&wrap(&answer)), Some((77, MESSAGE_BYTES)));
            assert_eq!(echo.answer(&wrap(&request)), None, "our own request");
            assert_eq!(Echo::new(9, v6).answer(&wrap(&answer)), None, "another process");
            let longer = [&answer[..], &[0; 100]].concat();
            assert_eq!(echo.answer(&wrap(&longer)), Some((77, MESSAGE_BYTES + 100)));
            for end in 0..wrap(&answer).len() {
                assert_eq!(echo.answer(&wrap(&answer)[..end]), None, "cut after {end}");
            }
        }
    }

    #[test]
    fn the_checksum_of_a_whole_message_is_zero() {
        let echo = Echo::new(0xfeed, false);
        assert_eq!(checksum(&echo.request(123_456)), 0);
        let mut long = [0; 1381];
        echo.write(7, &mut long);
        assert_eq!(checksum(&long), 0);
    }
}
