//! From the head of a backend's response to what the client gets.

use crate::body::{Chunked, Decoder};
use crate::field::{self, Connection, Kind};
use crate::pump::{decimal, field as put};
use crate::request::MAX_FIELDS;

/// The backend's answer makes no sense; the client gets 502.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadResponse {
    /// It is no HTTP/1 response head.
    #[error("the response head is malformed")]
    Head,
    /// Its end cannot be known for sure.
    #[error("the response's framing is ambiguous")]
    Framing,
    /// It switches protocols, which nobody asked for.
    #[error("the backend switched protocols unasked")]
    Upgrade,
}

/// What the request asked for, as far as it decides how the response reads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked {
    pub(crate) head: bool,
    pub(crate) upgrade: bool,
}

/// A response head that has been read.
pub(crate) struct Response<'a> {
    pub(crate) status: u16,
    reason: &'a str,
    fields: &'a [httparse::Header<'a>],
    connection: Connection,
    http10: bool,
    /// Content-Length as the backend said it.
    pub(crate) length: Option<u64>,
    chunked: bool,
    bodiless: bool,
}

/// Where a head ends that begins at the front of `bytes`, counting its final empty line.
///
/// `scanned` remembers how far earlier calls looked. A line feed without carriage return is an error: some
/// programs take it as the end of a line and others do not.
pub(crate) fn head_end(bytes: &[u8], scanned: &mut usize) -> Result<Option<usize>, BareLineFeed> {
    let from = *scanned;
    for at in memchr::memchr_iter(b'\n', &bytes[from..]) {
        let at = from + at;
        if at == 0 || bytes[at - 1] != b'\r' {
            return Err(BareLineFeed);
        }
        if at >= 3 && bytes[at - 3..at - 1] == *b"\r\n" {
            return Ok(Some(at + 1));
        }
    }
    *scanned = bytes.len();
    Ok(None)
}

/// A line of a head ends in a line feed alone.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct BareLineFeed;

/// Reads a complete head and hands it to `use_it`.
pub(crate) fn read<T>(
    head: &[u8],
    asked: Asked,
    use_it: impl FnOnce(&Response<'_>) -> T,
) -> Result<T, BadResponse> {
    let mut fields = [const { std::mem::MaybeUninit::uninit() }; MAX_FIELDS];
    let mut parsed = httparse::Response::new(&mut []);
    let config = httparse::ParserConfig::default();
    match config.parse_response_with_uninit_headers(&mut parsed, head, &mut fields) {
        Ok(httparse::Status::Complete(used)) if used == head.len() => {}
        _ => return Err(BadResponse::Head),
    }
    let (Some(status), Some(version)) = (parsed.code, parsed.version) else {
        return Err(BadResponse::Head);
    };
    if status < 100 {
        return Err(BadResponse::Head);
    }
    let mut response = Response {
        status,
        reason: parsed.reason.unwrap_or_default(),
        fields: parsed.headers,
        connection: Connection::default(),
        http10: version == 0,
        length: None,
        chunked: false,
        bodiless: asked.head || matches!(status, ..200 | 204 | 304),
    };
    response.read_framing()?;
    if status == 101 && !asked.upgrade {
        return Err(BadResponse::Upgrade);
    }
    Ok(use_it(&response))
}

impl<'a> Response<'a> {
    fn read_framing(&mut self) -> Result<(), BadResponse> {
        for header in self.fields {
            match field::kind(header.name.as_bytes()) {
                Kind::ContentLength => {
                    let length = field::content_length(header.value).ok_or(BadResponse::Framing)?;
                    if self.length.replace(length).is_some_and(|earlier| earlier != length) {
                        return Err(BadResponse::Framing);
                    }
                }
                Kind::TransferEncoding => {
                    let known = header.value.eq_ignore_ascii_case(b"chunked");
                    if !known || self.http10 || std::mem::replace(&mut self.chunked, true) {
                        return Err(BadResponse::Framing);
                    }
                }
                Kind::Connection => self.connection.add(header.value),
                _ => {}
            }
        }
        if self.chunked && self.length.is_some() {
            return Err(BadResponse::Framing);
        }
        Ok(())
    }

    /// How the body is framed by the backend (RFC 9112 section 6.3).
    pub(crate) fn decoder(&self) -> Decoder {
        match (self.bodiless, self.chunked, self.length) {
            (true, ..) => Decoder::Length(0),
            (_, true, _) => Decoder::Chunked(Chunked::default()),
            (_, _, Some(length)) => Decoder::Length(length),
            _ => Decoder::UntilClose,
        }
    }

    /// The Content-Length to tell the client.
    pub(crate) fn told_length(&self) -> Option<u64> {
        if self.status < 200 || self.status == 204 { None } else { self.length }
    }

    /// Whether the backend takes another request on the same connection.
    pub(crate) fn keeps_connection(&self) -> bool {
        let willing = if self.http10 { self.connection.keep_alive } else { true };
        let ends = self.bodiless || self.chunked || self.length.is_some();
        willing && ends && !self.connection.close
    }

    /// The fields to pass on.
    pub(crate) fn fields(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> {
        let all = self.fields;
        let nominated = move |name: &[u8]| {
            field::is_nominated(all.iter().map(|f| (f.name.as_bytes(), f.value)), name)
        };
        let names_others = self.connection.names_others;
        all.iter().map(|f| (f.name, f.value)).filter(move |(name, _)| {
            match field::kind(name.as_bytes()) {
                Kind::ContentLength
                | Kind::TransferEncoding
                | Kind::Connection
                | Kind::Upgrade
                | Kind::Te
                | Kind::HopByHop => false,
                _ => !names_others || !nominated(name.as_bytes()),
            }
        })
    }

    /// Writes the head for an HTTP/1 client, all but the fields about connection and framing.
    fn write_start(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"HTTP/1.1 ");
        decimal(out, self.status.into());
        out.push(b' ');
        out.extend_from_slice(self.reason.as_bytes());
        out.extend_from_slice(b"\r\n");
        for (name, value) in self.fields() {
            put(out, name.as_bytes(), value);
        }
    }

    /// Writes the head of a final response for an HTTP/1 client. Returns whether the body goes out in chunks and whether
    /// the client's connection can stay open.
    pub(crate) fn write_final(&self, out: &mut Vec<u8>, http10: bool, keep: bool) -> (bool, bool) {
        self.write_start(out);
        let unsized_body = matches!(self.decoder(), Decoder::Chunked(_) | Decoder::UntilClose);
        let chunked = unsized_body && !http10;
        let keep = keep && (chunked || !unsized_body);
        if chunked {
            out.extend_from_slice(b"transfer-encoding: chunked\r\n");
        } else if let Some(length) = self.told_length() {
            out.extend_from_slice(b"content-length: ");
            decimal(out, length);
            out.extend_from_slice(b"\r\n");
        }
        match (keep, http10) {
            (false, _) => out.extend_from_slice(b"connection: close\r\n"),
            (true, true) => out.extend_from_slice(b"connection: keep-alive\r\n"),
            (true, false) => {}
        }
        out.extend_from_slice(b"\r\n");
        (chunked, keep)
    }

    /// Writes the head of an interim response (RFC 9110 section 15.2).
    pub(crate) fn write_interim(&self, out: &mut Vec<u8>) {
        self.write_start(out);
        out.extend_from_slice(b"\r\n");
    }

    /// Writes the head of a response that ends HTTP on the connection.
    pub(crate) fn write_switch(&self, out: &mut Vec<u8>) {
        self.write_start(out);
        out.extend_from_slice(b"connection: upgrade\r\n");
        for header in self.fields {
            if field::kind(header.name.as_bytes()) == Kind::Upgrade {
                put(out, b"upgrade", header.value);
            }
        }
        out.extend_from_slice(b"\r\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GET: Asked = Asked { head: false, upgrade: false };

    fn through(
        head: &str,
        asked: Asked,
        http10: bool,
    ) -> Result<(String, bool, bool), BadResponse> {
        read(head.as_bytes(), asked, |response| {
            let mut out = Vec::new();
            let (chunked, keep) = response.write_final(&mut out, http10, true);
            (String::from_utf8(out).unwrap(), chunked, keep)
        })
    }

    #[test]
    fn ends_are_found_once_and_strictly() {
        let mut scanned = 0;
        assert_eq!(head_end(b"a\r\nb\r", &mut scanned), Ok(None));
        assert_eq!(head_end(b"a\r\nb\r\n\r", &mut scanned), Ok(None));
        assert_eq!(head_end(b"a\r\nb\r\n\r\nrest\n", &mut scanned), Ok(Some(8)));
        assert_eq!(head_end(b"a\nb", &mut 0), Err(BareLineFeed));
        assert_eq!(head_end(b"\n", &mut 0), Err(BareLineFeed));
        assert_eq!(head_end(b"a\r\n\n", &mut 0), Err(BareLineFeed));
    }

    #[test]
    fn framing_is_written_anew() {
        let head = "HTTP/1.1 200 Fine\r\nServer: x\r\nKeep-Alive: 5\r\nConnection: X-Hop\r\nX-Hop: 1\r\nContent-Length: 5\r\n\r\n";
        let (out, chunked, keep) = through(head, GET, false).unwrap();
        assert_eq!(out, "HTTP/1.1 200 Fine\r\nServer: x\r\ncontent-length: 5\r\n\r\n");
        assert!(!chunked && keep);

        let (out, chunked, keep) = through("HTTP/1.1 200 OK\r\n\r\n", GET, false).unwrap();
        assert_eq!(out, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n");
        assert!(chunked && keep);

        let (out, chunked, keep) = through("HTTP/1.1 200 OK\r\n\r\n", GET, true).unwrap();
        assert_eq!(out, "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n");
        assert!(!chunked && !keep);
    }

    #[test]
    fn answers_without_body_keep_their_length() {
        let head = "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n";
        assert!(through(head, GET, false).unwrap().0.contains("content-length: 5"));
        let asked = Asked { head: true, upgrade: false };
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        let (out, chunked, _) = through(head, asked, false).unwrap();
        assert!(!chunked && !out.contains("chunked"));
        let head = "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n";
        assert!(!through(head, GET, false).unwrap().0.contains("content-length"));
    }

    #[test]
    fn ambiguous_answers_are_refused() {
        for (head, error) in [
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
                BadResponse::Framing,
            ),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\n", BadResponse::Framing),
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
                BadResponse::Framing,
            ),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", BadResponse::Framing),
            ("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", BadResponse::Framing),
            ("HTTP/1.1 200 OK\r\nA : b\r\n\r\n", BadResponse::Head),
            ("HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n", BadResponse::Head),
            ("HTTP/1.1 099 OK\r\n\r\n", BadResponse::Head),
            ("SSH-2.0-x\r\n\r\n", BadResponse::Head),
            ("HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n", BadResponse::Upgrade),
        ] {
            assert_eq!(through(head, GET, false).err(), Some(error), "{head}");
        }
    }

    #[test]
    fn a_backend_that_closes_is_not_used_again() {
        let keeps = |head: &str| read(head.as_bytes(), GET, |r| r.keeps_connection()).unwrap();
        assert!(keeps("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"));
        assert!(keeps("HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: Keep-Alive\r\n\r\n"));
        assert!(!keeps("HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n"));
        assert!(!keeps("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"));
        assert!(!keeps("HTTP/1.1 200 OK\r\n\r\n"));
    }
}
