//! From a request's head to its route and the head that the backend gets.
//!
//! All that is refused is refused here, before a backend hears of it. The same rules serve HTTP/1 and HTTP/2:
//! the versions differ only in how the fields come.

#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::sync::Arc;

use crate::body::{Chunked, Decoder};
use crate::buffer;
use crate::field::{self, Connection, Kind};
use crate::pump::{decimal, field as put};
use crate::table::{Route, Table};
use crate::{authority, path};

/// The request is answered by the proxy, with this status and sentence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reject {
    pub(crate) status: u16,
    pub(crate) reason: &'static str,
}

impl Reject {
    pub(crate) const fn new(status: u16, reason: &'static str) -> Self {
        Self { status, reason }
    }

    pub(crate) const fn bad(reason: &'static str) -> Self {
        Self::new(400, reason)
    }
}

/// The client of a connection.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    text: String,
    secure: bool,
}

impl Peer {
    pub(crate) fn new(address: IpAddr, secure: bool) -> Self {
        Self { text: address.to_canonical().to_string(), secure }
    }

    fn scheme(&self) -> &'static str {
        if self.secure { "https" } else { "http" }
    }

    fn default_port(&self) -> u16 {
        if self.secure { 443 } else { 80 }
    }

    pub(crate) fn address(&self) -> &str {
        &self.text
    }
}

/// How the body is framed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    None,
    Length(u64),
    Chunked,
}

impl Framing {
    pub(crate) fn decoder(self) -> Decoder {
        match self {
            Self::None => Decoder::Length(0),
            Self::Length(length) => Decoder::Length(length),
            Self::Chunked => Decoder::Chunked(Chunked::default()),
        }
    }

    pub(crate) fn is_empty(self) -> bool {
        matches!(self, Self::None | Self::Length(0))
    }
}

/// The first line of a request, or the pseudo-header fields of HTTP/2.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Line<'a> {
    pub(crate) method: &'a [u8],
    /// Path and query, as the backend gets them.
    pub(crate) target: &'a [u8],
    /// The host in an absolute target or `:authority`.
    pub(crate) authority: Option<&'a [u8]>,
    /// The scheme in an absolute target.
    pub(crate) http10: bool,
}

/// A request that may be forwarded.
pub(crate) struct Prepared {
    /// None when no route matches.
    pub(crate) route: Option<Arc<Route>>,
    /// What the backend gets.
    pub(crate) head: Vec<u8>,
    pub(crate) framing: Framing,
    pub(crate) is_head: bool,
    /// May be sent again without doing harm (RFC 9110 section 9.2.2).
    pub(crate) idempotent: bool,
    /// Asks for another protocol on this connection.
    pub(crate) upgrade: bool,
    pub(crate) http10: bool,
    /// The client keeps the connection open.
    pub(crate) keep_alive: bool,
    /// The client would rather read JSON.
    pub(crate) json: bool,
}

/// What the fields say, gathered in one pass.
#[derive(Default)]
pub(crate) struct Facts<'a> {
    pub(crate) host: Option<&'a [u8]>,
    pub(crate) length: Option<u64>,
    pub(crate) chunked: bool,
    pub(crate) connection: Connection,
    pub(crate) upgrade: Option<&'a [u8]>,
    pub(crate) te_trailers: bool,
    pub(crate) expect: bool,
    pub(crate) json: bool,
    pub(crate) cookies: usize,
}

impl<'a> Facts<'a> {
    /// Reads the fields, refusing what leaves their meaning or the framing in doubt (RFC 9112 section 6.3).
    pub(crate) fn of(fields: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Result<Self, Reject> {
        let mut facts = Self::default();
        for (name, value) in fields {
            match field::kind(name) {
                Kind::Host if facts.host.replace(value).is_some() => {
                    return Err(Reject::bad("more than one Host"));
                }
                Kind::ContentLength => {
                    let length = field::content_length(value)
                        .ok_or(Reject::bad("Content-Length is not a number"))?;
                    if facts.length.replace(length).is_some() {
                        return Err(Reject::bad("more than one Content-Length"));
                    }
                }
                Kind::TransferEncoding => {
                    if !value.eq_ignore_ascii_case(b"chunked") {
                        return Err(Reject::new(501, "only the transfer coding chunked is served"));
                    }
                    if std::mem::replace(&mut facts.chunked, true) {
                        return Err(Reject::bad("more than one Transfer-Encoding"));
                    }
                }
                Kind::Connection => facts.connection.add(value),
                Kind::Upgrade if facts.upgrade.replace(value).is_some() => {
                    return Err(Reject::bad("more than one Upgrade"));
                }
                Kind::Te => facts.te_trailers |= field::tokens(value).any(is_trailers),
                Kind::Expect => {
                    if !value.eq_ignore_ascii_case(b"100-continue") {
                        return Err(Reject::new(417, "only 100-continue can be expected"));
                    }
                    facts.expect = true;
                }
                Kind::Accept => facts.json |= memchr::memmem::find(value, b"json").is_some(),
                Kind::Cookie => facts.cookies += 1,
                _ => {}
            }
        }
        if facts.chunked && facts.length.is_some() {
            return Err(Reject::bad("both Content-Length and Transfer-Encoding"));
        }
        Ok(facts)
    }
}

fn is_trailers(token: &[u8]) -> bool {
    token.eq_ignore_ascii_case(b"trailers")
}

/// Protocols that would start HTTP anew inside the tunnel, past all rules.
fn may_switch_to(protocol: &[u8]) -> bool {
    let name = protocol.split(|b| *b == b'/').next().unwrap_or_default();
    let refused = ["h2c", "h2", "h3", "http", "tls"];
    !name.is_empty()
        && !name.contains(&b',')
        && !refused.iter().any(|r| name.eq_ignore_ascii_case(r.as_bytes()))
}

/// The longest heads have this many fields.
pub(crate) const MAX_FIELDS: usize = 100;

/// Reads the head of an HTTP/1 request, `head` being all of it, and finds its route.
pub(crate) fn prepare_http1(
    head: &[u8],
    max_target: usize,
    peer: &Peer,
    table: &Table,
) -> Result<Prepared, Reject> {
    let mut fields = [const { std::mem::MaybeUninit::uninit() }; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut []);
    match request.parse_with_uninit_headers(head, &mut fields) {
        Ok(httparse::Status::Complete(used)) if used == head.len() => {}
        Err(httparse::Error::TooManyHeaders) => {
            return Err(Reject::new(431, "too many header fields"));
        }
        Err(httparse::Error::Version) => {
            return Err(Reject::new(505, "only HTTP/1.0, HTTP/1.1 and HTTP/2 are served"));
        }
        _ => return Err(Reject::bad("the request head is malformed")),
    }
    let (Some(method), Some(target), Some(version)) =
        (request.method, request.path, request.version)
    else {
        return Err(Reject::bad("the request head is malformed"));
    };
    if target.len() > max_target {
        return Err(Reject::new(414, "the request target is too long"));
    }
    let line = request_line(method.as_bytes(), target.as_bytes(), version == 0)?;
    let fields = request.headers.iter().map(|f| (f.name.as_bytes(), f.value));
    let facts = Facts::of(fields.clone())?;
    if facts.host.is_none() && !line.http10 {
        return Err(Reject::bad("no Host"));
    }
    if line.http10 && facts.chunked {
        return Err(Reject::bad("Transfer-Encoding in HTTP/1.0"));
    }
    let framing = match (facts.chunked, facts.length) {
        (true, _) => Framing::Chunked,
        (false, Some(length)) => Framing::Length(length),
        (false, None) => Framing::None,
    };
    prepare(&line, fields, &facts, framing, peer, table)
}

/// Splits the target by its form (RFC 9112 section 3.2).
fn request_line<'a>(method: &'a [u8], target: &'a [u8], http10: bool) -> Result<Line<'a>, Reject> {
    if method == b"CONNECT" {
        return Err(Reject::new(405, "this is no forward proxy"));
    }
    let line = Line { method, target, authority: None, http10 };
    if target.starts_with(b"/") || (target == b"*" && method == b"OPTIONS") {
        return Ok(line);
    }
    let after_scheme = [&b"http://"[..], b"https://"].into_iter().find_map(|scheme| {
        let start = target.get(..scheme.len())?;
        start.eq_ignore_ascii_case(scheme).then(|| &target[scheme.len()..])
    });
    let Some(rest) = after_scheme else {
        return Err(Reject::bad("the request target has no known form"));
    };
    let end = memchr::memchr3(b'/', b'?', b'#', rest).unwrap_or(rest.len());
    let path = match &rest[end..] {
        [] if method == b"OPTIONS" => b"*",
        [] => b"/",
        path if path[0] == b'/' => path,
        _ => return Err(Reject::bad("the request target has a query without a path")),
    };
    Ok(Line { target: path, authority: Some(&rest[..end]), ..line })
}

/// Finds the route and writes the head for the backend.
pub(crate) fn prepare<'a>(
    line: &Line<'a>,
    fields: impl Iterator<Item = (&'a [u8], &'a [u8])> + Clone,
    facts: &Facts<'a>,
    framing: Framing,
    peer: &Peer,
    table: &Table,
) -> Result<Prepared, Reject> {
    let host = host_of(line, facts, peer)?;
    let route = find_route(line, host, table)?;
    let bodiless = framing.is_empty();
    let upgrade = facts.connection.upgrade
        && !line.http10
        && bodiless
        && facts.upgrade.is_some_and(may_switch_to);
    let mut head = Vec::new();
    if route.as_ref().is_some_and(|route| !route.backends.is_empty()) {
        head = buffer::take_text();
        let out = Out { line, host, facts, framing, peer, upgrade };
        out.write(&mut head, fields);
    }
    Ok(Prepared {
        route,
        head,
        framing,
        is_head: line.method == b"HEAD",
        idempotent: matches!(
            line.method,
            b"GET" | b"HEAD" | b"OPTIONS" | b"TRACE" | b"PUT" | b"DELETE"
        ),
        upgrade,
        http10: line.http10,
        keep_alive: if line.http10 {
            facts.connection.keep_alive && !facts.connection.close
        } else {
            !facts.connection.close
        },
        json: facts.json,
    })
}

/// The one host that the request names; empty only in HTTP/1.0.
fn host_of<'a>(line: &Line<'a>, facts: &Facts<'a>, peer: &Peer) -> Result<&'a [u8], Reject> {
    match (line.authority, facts.host) {
        (Some(authority), Some(host)) if !authority::same(authority, host, peer.default_port()) => {
            Err(Reject::bad("Host differs from the request target"))
        }
        // RFC 9112 section 3.2.2: the target counts.
        (Some(authority), _) => Ok(authority),
        (None, Some(host)) => Ok(host),
        (None, None) if line.http10 => Ok(b""),
        (None, None) => Err(Reject::bad("no Host")),
    }
}

fn find_route(line: &Line<'_>, host: &[u8], table: &Table) -> Result<Option<Arc<Route>>, Reject> {
    let name = match host {
        b"" if line.http10 => "".into(),
        _ => authority::host(host).map_err(|_| Reject::bad("Host is not a host"))?,
    };
    if line.target == b"*" && line.method == b"OPTIONS" {
        return Ok(table.routes.find(&name, b"/").cloned());
    }
    let end = memchr::memchr(b'?', line.target).unwrap_or(line.target.len());
    let (path, query) = line.target.split_at(end);
    if query.iter().any(|b| !(0x21..=0x7e).contains(b) || *b == b'#') {
        return Err(Reject::bad("the query has a byte that must be escaped"));
    }
    let path = path::normalise(path).map_err(|error| {
        Reject::bad(match error {
            path::InvalidPath::Relative => "the path does not begin with a slash",
            path::InvalidPath::Byte => "the path has a byte that must be escaped",
            path::InvalidPath::Escape => "the path has a broken escape",
            path::InvalidPath::Nul => "the path has an escaped NUL",
            path::InvalidPath::Dots => "the path has dot segments that leave it",
        })
    })?;
    Ok(table.routes.find(&name, &path).cloned())
}

/// All that the head for the backend is made of.
struct Out<'o, 'a> {
    line: &'o Line<'a>,
    host: &'a [u8],
    facts: &'o Facts<'a>,
    framing: Framing,
    peer: &'o Peer,
    upgrade: bool,
}

impl Out<'_, '_> {
    fn write<'f>(
        &self,
        out: &mut Vec<u8>,
        fields: impl Iterator<Item = (&'f [u8], &'f [u8])> + Clone,
    ) {
        out.extend_from_slice(self.line.method);
        out.push(b' ');
        out.extend_from_slice(self.line.target);
        out.extend_from_slice(b" HTTP/1.1\r\n");
        put(out, b"host", self.host);
        let mut forwarded_for = false;
        for (name, value) in fields.clone() {
            match field::kind(name) {
                Kind::Other | Kind::Accept => {
                    let nominated = self.facts.connection.names_others
                        && field::is_nominated(fields.clone(), name);
                    if !nominated {
                        put(out, name, value);
                    }
                }
                Kind::Cookie if self.facts.cookies == 1 => put(out, name, value),
                Kind::ForwardedFor => forwarded_for = true,
                Kind::Expect if !self.line.http10 && !self.framing.is_empty() => {
                    put(out, name, value);
                }
                _ => {}
            }
        }
        if self.facts.cookies > 1 {
            join(out, b"cookie", b"; ", fields.clone(), Kind::Cookie);
            out.extend_from_slice(b"\r\n");
        }
        self.write_origin(out, forwarded_for.then_some(fields));
        self.write_connection(out);
        out.extend_from_slice(b"\r\n");
    }

    /// Says who asked and how. Only the list of X-Forwarded-For keeps what the client said, in front.
    fn write_origin<'f>(
        &self,
        out: &mut Vec<u8>,
        said: Option<impl Iterator<Item = (&'f [u8], &'f [u8])>>,
    ) {
        let client = self.peer.text.as_bytes();
        match said {
            Some(fields) => {
                join(out, b"x-forwarded-for", b", ", fields, Kind::ForwardedFor);
                out.extend_from_slice(b", ");
                out.extend_from_slice(client);
                out.extend_from_slice(b"\r\n");
            }
            None => put(out, b"x-forwarded-for", client),
        }
        put(out, b"x-forwarded-proto", self.peer.scheme().as_bytes());
        put(out, b"x-forwarded-host", self.host);
        put(out, b"x-real-ip", client);
    }

    fn write_connection(&self, out: &mut Vec<u8>) {
        match self.framing {
            Framing::None => {}
            Framing::Length(length) => {
                out.extend_from_slice(b"content-length: ");
                decimal(out, length);
                out.extend_from_slice(b"\r\n");
            }
            Framing::Chunked => out.extend_from_slice(b"transfer-encoding: chunked\r\n"),
        }
        if let (true, Some(protocol)) = (self.upgrade, self.facts.upgrade) {
            out.extend_from_slice(b"connection: upgrade\r\n");
            put(out, b"upgrade", protocol);
        } else if self.facts.te_trailers {
            out.extend_from_slice(b"connection: te\r\nte: trailers\r\n");
        }
    }
}

/// Appends one field whose value joins those of all fields of a kind, without the line's end.
fn join<'f>(
    out: &mut Vec<u8>,
    name: &[u8],
    separator: &[u8],
    fields: impl Iterator<Item = (&'f [u8], &'f [u8])>,
    kind: Kind,
) {
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    let mut first = true;
    for (name, value) in fields {
        if field::kind(name) == kind && !value.is_empty() {
            if !std::mem::replace(&mut first, false) {
                out.extend_from_slice(separator);
            }
            out.extend_from_slice(value);
        }
    }
}
