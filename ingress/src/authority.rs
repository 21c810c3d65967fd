//! The host that a request names (RFC 9110 section 7.2, RFC 3986 section 3.2).

use std::borrow::Cow;

/// A Host field or `:authority` is not `host [":" port]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a host with an optional port")]
pub(crate) struct InvalidAuthority;

const MAX_BYTES: usize = 255 + 6;

/// The host of an authority as routes are looked up with: lower case, without port and final dot.
///
/// An address in brackets keeps them. User information, percent escapes and empty labels are refused:
/// no public name has them, and programs disagree about what they mean.
pub(crate) fn host(authority: &[u8]) -> Result<Cow<'_, str>, InvalidAuthority> {
    let text = std::str::from_utf8(authority).map_err(|_| InvalidAuthority)?;
    if text.len() > MAX_BYTES {
        return Err(InvalidAuthority);
    }
    if text.starts_with('[') {
        return bracketed(text);
    }
    let host = match text.split_once(':') {
        Some((host, port)) => port_is_valid(port).then_some(host).ok_or(InvalidAuthority)?,
        None => text,
    };
    let host = host.strip_suffix('.').unwrap_or(host);
    let mut upper = false;
    let mut label = 0;
    for byte in host.bytes() {
        match byte {
            b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => label += 1,
            b'A'..=b'Z' => (upper, label) = (true, label + 1),
            b'.' if label > 0 => label = 0,
            _ => return Err(InvalidAuthority),
        }
    }
    match (label, upper) {
        (0, _) => Err(InvalidAuthority),
        (_, false) => Ok(Cow::Borrowed(host)),
        (_, true) => Ok(Cow::Owned(host.to_ascii_lowercase())),
    }
}

fn bracketed(text: &str) -> Result<Cow<'_, str>, InvalidAuthority> {
    let end = text.find(']').ok_or(InvalidAuthority)?;
    let rest = &text[end + 1..];
    let port_ok = rest.is_empty() || rest.strip_prefix(':').is_some_and(port_is_valid);
    let address: std::net::Ipv6Addr = text[1..end].parse().map_err(|_| InvalidAuthority)?;
    if port_ok { Ok(Cow::Owned(format!("[{address}]"))) } else { Err(InvalidAuthority) }
}

fn port_is_valid(port: &str) -> bool {
    port.is_empty() || (port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok())
}

/// Whether two authorities name the same place, but for case, a default port and a final dot.
pub(crate) fn same(a: &[u8], b: &[u8], default_port: u16) -> bool {
    let port = |authority: &[u8]| {
        let text = std::str::from_utf8(authority).unwrap_or_default();
        let after = text.rsplit_once(']').map_or(text, |(_, after)| after);
        after.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or(default_port)
    };
    match (host(a), host(b)) {
        (Ok(left), Ok(right)) => left == right && port(a) == port(b),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_brought_to_one_form() {
        for (text, expected) in [
            ("example.com", "example.com"),
            ("EXAMPLE.com:8080", "example.com"),
            ("example.com.", "example.com"),
            ("example.com.:80", "example.com"),
            ("example.com:", "example.com"),
            ("10.0.0.1:80", "10.0.0.1"),
            ("[::1]:80", "[::1]"),
            ("[0:0::1]", "[::1]"),
            ("a_b.c-d", "a_b.c-d"),
        ] {
            assert_eq!(host(text.as_bytes()).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_host_is_refused() {
        for text in [
            "",
            ".",
            "..",
            "a..b",
            ".a",
            "a b",
            "a/b",
            "user@a",
            "a:80:80",
            "a:x",
            "a:70000",
            "a:+1",
            "a%41",
            "[::1",
            "[::1]x",
            "[fe80::1%25eth0]",
            "a,b",
            "a\\b",
            "a?b",
            "a#b",
            "é",
        ] {
            assert_eq!(host(text.as_bytes()), Err(InvalidAuthority), "{text}");
        }
        assert!(host("a".repeat(300).as_bytes()).is_err());
        assert!(host(&[0xff]).is_err());
    }

    #[test]
    fn sameness_knows_default_ports() {
        assert!(same(b"A.b:80", b"a.b", 80));
        assert!(same(b"[::1]", b"[0::1]:443", 443));
        assert!(!same(b"a.b:81", b"a.b", 80));
        assert!(!same(b"a.b", b"a.c", 80));
        assert!(!same(b"a b", b"a b", 80));
    }
}
