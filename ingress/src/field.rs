//! Header fields that mean something to a proxy (RFC 9110 section 7.6, RFC 9112 section 6).

/// What a field is for, as far as the proxy cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Host,
    ContentLength,
    TransferEncoding,
    Connection,
    Upgrade,
    Te,
    Expect,
    Accept,
    Cookie,
    ForwardedFor,
    /// Says where the request came from: set by us, never taken from a client.
    Origin,
    /// Concerns one connection only; never passed on.
    HopByHop,
    Other,
}

/// The kind of a field, by its name in any case.
pub(crate) fn kind(name: &[u8]) -> Kind {
    let is = |known: &str| name.eq_ignore_ascii_case(known.as_bytes());
    match name.len() {
        2 if is("te") => Kind::Te,
        4 if is("host") => Kind::Host,
        // "Proxy" becomes the variable HTTP_PROXY in CGI programs (CVE-2016-5385).
        5 if is("proxy") => Kind::HopByHop,
        6 if is("accept") => Kind::Accept,
        6 if is("cookie") => Kind::Cookie,
        6 if is("expect") => Kind::Expect,
        7 if is("upgrade") => Kind::Upgrade,
        9 if is("forwarded") || is_origin(name, "x-real-ip") => Kind::Origin,
        10 if is("connection") => Kind::Connection,
        10 if is("keep-alive") => Kind::HopByHop,
        14 if is("content-length") => Kind::ContentLength,
        14 if is("http2-settings") => Kind::HopByHop,
        15 if is("x-forwarded-for") => Kind::ForwardedFor,
        15 if is_origin(name, "x-forwarded-for") => Kind::Origin,
        16 if is("proxy-connection") => Kind::HopByHop,
        16 if is_origin(name, "x-forwarded-host") || is_origin(name, "x-forwarded-port") => {
            Kind::Origin
        }
        17 if is("transfer-encoding") => Kind::TransferEncoding,
        17 if is_origin(name, "x-forwarded-proto") => Kind::Origin,
        18 if is("proxy-authenticate") => Kind::HopByHop,
        19 if is("proxy-authorization") => Kind::HopByHop,
        _ => Kind::Other,
    }
}

/// Many backends take `_` for `-`, so a client must not slip a name past us that way.
fn is_origin(name: &[u8], known: &str) -> bool {
    name.iter().zip(known.as_bytes()).all(|(a, b)| {
        let a = if *a == b'_' { b'-' } else { a.to_ascii_lowercase() };
        a == *b
    })
}

/// Whether a trailer field may be passed on: nothing that frames, routes or concerns one connection
/// (RFC 9110 section 6.5.1).
pub(crate) fn allowed_in_trailers(name: &[u8]) -> bool {
    kind(name) == Kind::Other && !name.eq_ignore_ascii_case(b"trailer")
}

/// What the Connection fields of a message say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Connection {
    pub(crate) close: bool,
    pub(crate) keep_alive: bool,
    pub(crate) upgrade: bool,
    /// Names fields of its own that must not be passed on.
    pub(crate) names_others: bool,
}

impl Connection {
    /// Takes one Connection field into account.
    pub(crate) fn add(&mut self, value: &[u8]) {
        for token in tokens(value) {
            if token.eq_ignore_ascii_case(b"close") {
                self.close = true;
            } else if token.eq_ignore_ascii_case(b"keep-alive") {
                self.keep_alive = true;
            } else if token.eq_ignore_ascii_case(b"upgrade") {
                self.upgrade = true;
            } else if kind(token) == Kind::Other {
                self.names_others = true;
            }
        }
    }
}

/// The members of a comma-separated list, without empty ones (RFC 9110 section 5.6.1).
pub(crate) fn tokens(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|b| *b == b',').map(<[u8]>::trim_ascii).filter(|token| !token.is_empty())
}

/// Whether any Connection field among `fields` names `name`.
pub(crate) fn is_nominated<'a>(
    fields: impl Iterator<Item = (&'a [u8], &'a [u8])>,
    name: &[u8],
) -> bool {
    fields
        .filter(|(field, _)| kind(field) == Kind::Connection)
        .any(|(_, value)| tokens(value).any(|token| token.eq_ignore_ascii_case(name)))
}

/// A Content-Length: digits and nothing else.
pub(crate) fn content_length(value: &[u8]) -> Option<u64> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(value).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_known_in_any_case() {
        assert_eq!(kind(b"hOST"), Kind::Host);
        assert_eq!(kind(b"Transfer-Encoding"), Kind::TransferEncoding);
        assert_eq!(kind(b"X-Forwarded-For"), Kind::ForwardedFor);
        assert_eq!(kind(b"X_Forwarded_For"), Kind::Origin);
        assert_eq!(kind(b"x-forwarded_proto"), Kind::Origin);
        assert_eq!(kind(b"transfer_encoding"), Kind::Other);
        assert_eq!(kind(b""), Kind::Other);
        assert_eq!(kind(b"x-real-iq"), Kind::Other);
    }

    #[test]
    fn connection_options_are_found_in_lists() {
        let mut connection = Connection::default();
        connection.add(b"Keep-Alive, ,Upgrade");
        connection.add(b"X-Private");
        let expected =
            Connection { close: false, keep_alive: true, upgrade: true, names_others: true };
        assert_eq!(connection, expected);
        let fields = [(&b"connection"[..], &b"a, X-Private"[..]), (b"x-private", b"1")];
        assert!(is_nominated(fields.into_iter(), b"x-pRIVATE"));
        assert!(!is_nominated(fields.into_iter(), b"x-other"));
    }

    #[test]
    fn lengths_are_digits() {
        assert_eq!(content_length(b"0042"), Some(42));
        for bad in ["", "+1", "-1", " 1", "1 ", "0x1", "1,1", "99999999999999999999999"] {
            assert_eq!(content_length(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn trailers_carry_no_framing() {
        assert!(allowed_in_trailers(b"grpc-status"));
        for name in ["content-length", "Transfer-Encoding", "host", "connection", "trailer", "te"] {
            assert!(!allowed_in_trailers(name.as_bytes()), "{name}");
        }
    }
}
