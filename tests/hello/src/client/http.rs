//! An HTTP/1.1 client that can keep its connection.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use super::{LIMIT, Target};

const MAX_BODY_BYTES: u64 = 16 << 20;

/// One worker's connection and request.
pub(crate) struct Http {
    request: String,
    keep: bool,
    kept: Option<BufReader<TcpStream>>,
}

impl Http {
    /// A client that asks for the target's path, with another Host than the URL's when `host` is given.
    pub(crate) fn new(target: &Target, host: Option<&str>, keep: bool) -> Self {
        let host = host.unwrap_or(&target.authority);
        let connection = if keep { "keep-alive" } else { "close" };
        let request = format!(
            "GET {} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: mesh-hello\r\nConnection: {connection}\r\n\r\n",
            target.path
        );
        Self { request, keep, kept: None }
    }

    /// One request; status and body. A kept connection that the server had closed is replaced once, as
    /// every HTTP client does for requests without side effects (RFC 9110, section 9.2.2).
    pub(crate) fn exchange(&mut self, address: SocketAddr) -> io::Result<(u16, String)> {
        if let Some(mut stream) = self.kept.take() {
            match self.on(&mut stream) {
                Ok((answer, keep)) => {
                    self.kept = keep.then_some(stream);
                    return Ok(answer);
                }
                Err(e) if was_closed(&e) => {}
                Err(e) => return Err(e),
            }
        }
        let stream = TcpStream::connect_timeout(&address, LIMIT)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        let mut stream = BufReader::new(stream);
        let (answer, keep) = self.on(&mut stream)?;
        self.kept = keep.then_some(stream);
        Ok(answer)
    }

    fn on(&self, stream: &mut BufReader<TcpStream>) -> io::Result<((u16, String), bool)> {
        stream.get_mut().write_all(self.request.as_bytes())?;
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let status = line.split(' ').nth(1).and_then(|s| s.parse().ok());
        let status =
            status.ok_or_else(|| io::Error::other(format!("not HTTP: {}", line.trim())))?;
        let head = read_headers(stream)?;
        let body = read_body(stream, &head)?;
        let keep = self.keep && !head.close && (head.chunked || head.length.is_some());
        Ok(((status, body), keep))
    }
}

fn was_closed(e: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(e.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

#[derive(Default)]
struct Framing {
    length: Option<u64>,
    chunked: bool,
    close: bool,
}

fn read_headers(stream: &mut BufReader<TcpStream>) -> io::Result<Framing> {
    let mut framing = Framing::default();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim_end().to_ascii_lowercase();
        match line.split_once(':') {
            None if line.is_empty() => return Ok(framing),
            Some(("content-length", n)) => framing.length = n.trim().parse().ok(),
            Some(("transfer-encoding", t)) => framing.chunked = t.trim() == "chunked",
            Some(("connection", c)) => framing.close = c.trim() == "close",
            _ => {}
        }
    }
}

fn read_body(stream: &mut BufReader<TcpStream>, framing: &Framing) -> io::Result<String> {
    let mut body = Vec::new();
    if !framing.chunked {
        let limit = framing.length.unwrap_or(MAX_BODY_BYTES).min(MAX_BODY_BYTES);
        stream.take(limit).read_to_end(&mut body)?;
        if framing.length.is_some_and(|n| body.len() as u64 != n) {
            return Err(io::Error::other("the body is shorter than announced"));
        }
        return Ok(String::from_utf8_lossy(&body).into_owned());
    }
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let size = u64::from_str_radix(line.trim(), 16).map_err(|_| io::ErrorKind::InvalidData)?;
        if stream.take(size).read_to_end(&mut body)? as u64 != size {
            return Err(io::Error::other("the body ends in the middle of a chunk"));
        }
        stream.read_line(&mut line)?;
        if size == 0 {
            return Ok(String::from_utf8_lossy(&body).into_owned());
        }
    }
}
