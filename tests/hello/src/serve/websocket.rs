//! A WebSocket that echoes (RFC 6455): text and binary messages, ping, close. No extensions, no fragments.

use std::io::{self, Read, Write};

use super::Server;

const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
const MAX_MESSAGE_BYTES: u64 = 1 << 20;

/// Upgrades the connection and echoes messages until the client closes.
pub(super) fn serve(
    server: &Server,
    key: &str,
    input: &mut impl Read,
    output: &mut impl Write,
) -> io::Result<()> {
    write!(
        output,
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {}\r\nX-Host: {}\r\n\r\n",
        accept(key),
        server.host,
    )?;
    loop {
        let (opcode, message) = read_frame(input)?;
        match opcode {
            1 | 2 => write_frame(output, opcode, &message)?,
            8 => return write_frame(output, 8, &message),
            9 => write_frame(output, 10, &message)?,
            _ => {}
        }
    }
}

fn read_frame(input: &mut impl Read) -> io::Result<(u8, Vec<u8>)> {
    let mut start = [0; 2];
    input.read_exact(&mut start)?;
    let length = match start[1] & 0x7f {
        126 => {
            let mut n = [0; 2];
            input.read_exact(&mut n)?;
            u64::from(u16::from_be_bytes(n))
        }
        127 => {
            let mut n = [0; 8];
            input.read_exact(&mut n)?;
            u64::from_be_bytes(n)
        }
        n => u64::from(n),
    };
    // Clients must mask (section 5.1).
    if length > MAX_MESSAGE_BYTES || start[1] & 0x80 == 0 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut mask = [0; 4];
    input.read_exact(&mut mask)?;
    let mut message = vec![0; usize::try_from(length).map_err(|_| io::ErrorKind::InvalidData)?];
    input.read_exact(&mut message)?;
    for (byte, mask) in message.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
    Ok((start[0] & 0x0f, message))
}

fn write_frame(output: &mut impl Write, opcode: u8, message: &[u8]) -> io::Result<()> {
    let mut frame = vec![0x80 | opcode];
    match message.len() {
        n @ 0..=125 => frame.push(u8::try_from(n).expect("at most 125")),
        n @ 126..=0xffff => {
            frame.push(126);
            frame.extend(u16::try_from(n).expect("at most 0xffff").to_be_bytes());
        }
        n => {
            frame.push(127);
            frame.extend((n as u64).to_be_bytes());
        }
    }
    frame.extend(message);
    output.write_all(&frame)
}

fn accept(key: &str) -> String {
    base64(&sha1(&[key.as_bytes(), GUID].concat()))
}

/// SHA-1 (FIPS 180-4), which the handshake asks for; it protects nothing here.
fn sha1(message: &[u8]) -> [u8; 20] {
    let mut state: [u32; 5] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476, 0xc3d2_e1f0];
    let mut padded = message.to_vec();
    padded.push(0x80);
    padded.resize(padded.len().next_multiple_of(64), 0);
    if padded.len() - message.len() < 9 {
        padded.resize(padded.len() + 64, 0);
    }
    let end = padded.len() - 8;
    padded[end..].copy_from_slice(&(message.len() as u64 * 8).to_be_bytes());
    for block in padded.as_chunks::<64>().0 {
        compress(&mut state, block);
    }
    let mut out = [0; 20];
    for (bytes, word) in out.as_chunks_mut::<4>().0.iter_mut().zip(state) {
        *bytes = word.to_be_bytes();
    }
    out
}

fn compress(state: &mut [u32; 5], block: &[u8; 64]) {
    let mut w = [0u32; 80];
    for (word, bytes) in w.iter_mut().zip(block.as_chunks::<4>().0) {
        *word = u32::from_be_bytes(*bytes);
    }
    for i in 16..80 {
        w[i] = (w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16]).rotate_left(1);
    }
    let [mut a, mut b, mut c, mut d, mut e] = *state;
    for (i, word) in w.into_iter().enumerate() {
        let (f, k) = match i / 20 {
            0 => ((b & c) | (!b & d), 0x5a82_7999),
            1 => (b ^ c ^ d, 0x6ed9_eba1),
            2 => ((b & c) | (b & d) | (c & d), 0x8f1b_bcdc),
            _ => (b ^ c ^ d, 0xca62_c1d6u32),
        };
        let next = a.rotate_left(5).wrapping_add(f).wrapping_add(e).wrapping_add(k);
        (e, d, c, b, a) = (d, c, b.rotate_left(30), a, next.wrapping_add(word));
    }
    for (old, new) in state.iter_mut().zip([a, b, c, d, e]) {
        *old = old.wrapping_add(new);
    }
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let word =
            chunk.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let letter = ALPHABET[(word >> (18 - 6 * i)) as usize & 63];
            out.push(if i <= chunk.len() { char::from(letter) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_accept_key_is_that_of_the_rfc() {
        assert_eq!(accept("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn digests_across_the_padding_border() {
        let hex = |b: [u8; 20]| b.iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(hex(sha1(b"abc")), "a9993e364706816aba3e25717850c26c9cd0d89d");
        assert_eq!(hex(sha1(&[b'a'; 55])), "c1c8bbdc22796e28c0e15163d20899b65621d65a");
        assert_eq!(hex(sha1(&[b'a'; 56])), "c2db330f6083854c99d4b5bfb6e8f29f201be699");
        assert_eq!(hex(sha1(&[b'a'; 64])), "0098ba824b5c16427bd7a1122a5a442a25ec644d");
    }

    #[test]
    fn a_masked_frame_comes_back_unmasked() {
        let mut wire = vec![0x81, 0x82, 1, 2, 3, 4];
        wire.extend([b'h' ^ 1, b'i' ^ 2]);
        assert_eq!(read_frame(&mut wire.as_slice()).unwrap(), (1, b"hi".to_vec()));
        let mut out = Vec::new();
        write_frame(&mut out, 1, &[7; 300]).unwrap();
        assert_eq!(out[..4], [0x81, 126, 1, 44]);
        assert!(read_frame(&mut [0x81u8, 0x02, b'h', b'i'].as_slice()).is_err(), "not masked");
    }
}
