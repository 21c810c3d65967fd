//! One DNS question over UDP (RFC 1035): enough to see that a server answers, and what.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use super::datagram_exchange;

const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;

/// Addresses of `name`, joined by spaces; `NAME?AAAA` asks for IPv6. No records or an error code are errors.
pub(crate) fn query(server: SocketAddr, question: &str) -> io::Result<String> {
    let (name, kind) = match question.strip_suffix("?AAAA") {
        Some(name) => (name, TYPE_AAAA),
        None => (question, TYPE_A),
    };
    let id = (std::process::id() as u16) ^ 0x5a5a;
    let answer = datagram_exchange(server, &encode(id, name, kind)?, Duration::from_secs(1))?;
    let addresses = decode(&answer, id, kind)?;
    if addresses.is_empty() {
        return Err(io::Error::other("no records"));
    }
    Ok(addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" "))
}

fn encode(id: u16, name: &str, kind: u16) -> io::Result<Vec<u8>> {
    let mut out = id.to_be_bytes().to_vec();
    out.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.trim_end_matches('.').split('.') {
        let length = u8::try_from(label.len()).ok().filter(|n| (1..64).contains(n));
        out.push(length.ok_or_else(|| io::Error::other(format!("{name}: not a name")))?);
        out.extend(label.as_bytes());
    }
    out.push(0);
    out.extend(kind.to_be_bytes());
    out.extend([0, 1]);
    Ok(out)
}

fn decode(message: &[u8], id: u16, kind: u16) -> io::Result<Vec<IpAddr>> {
    let cut = || io::Error::other("the answer is cut off");
    let word = |at: usize| Some(u16::from_be_bytes([*message.get(at)?, *message.get(at + 1)?]));
    let (got, flags) = (word(0).ok_or_else(cut)?, word(2).ok_or_else(cut)?);
    if got != id || flags & 0x8000 == 0 {
        return Err(io::Error::other("not the answer to the question"));
    }
    if flags & 15 != 0 {
        return Err(io::Error::other(format!("response code {}", flags & 15)));
    }
    let mut at = skip_name(message, 12).ok_or_else(cut)? + 4;
    let mut found = Vec::new();
    for _ in 0..word(6).ok_or_else(cut)? {
        at = skip_name(message, at).ok_or_else(cut)?;
        let (record, length) = (word(at).ok_or_else(cut)?, word(at + 8).ok_or_else(cut)?);
        at += 10;
        let data = message.get(at..at + usize::from(length)).ok_or_else(cut)?;
        at += usize::from(length);
        if record != kind {
            continue;
        }
        if let Ok(octets) = <[u8; 4]>::try_from(data) {
            found.push(Ipv4Addr::from(octets).into());
        } else if let Ok(octets) = <[u8; 16]>::try_from(data) {
            found.push(Ipv6Addr::from(octets).into());
        }
    }
    Ok(found)
}

fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            n if n & 0xc0 == 0xc0 => return Some(at + 2),
            n => at += 1 + usize::from(n),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_and_a_compressed_answer() {
        let mut message = encode(7, "a.bc.", TYPE_A).unwrap();
        assert_eq!(message[12..18], [1, b'a', 2, b'b', b'c', 0]);
        message[2] |= 0x80;
        message[7] = 1;
        message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 10, 0, 0, 9]);
        assert_eq!(decode(&message, 7, TYPE_A).unwrap(), [IpAddr::from([10, 0, 0, 9])]);
        assert!(decode(&message, 8, TYPE_A).is_err());
        for end in 0..message.len() {
            assert!(decode(&message[..end], 7, TYPE_A).is_err(), "cut at {end}");
        }
        message[3] = 3;
        assert!(decode(&message, 7, TYPE_A).is_err());
        assert!(encode(1, "a..b", TYPE_A).is_err());
    }
}
