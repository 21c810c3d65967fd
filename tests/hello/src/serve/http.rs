//! HTTP/1.1 as far as a test backend needs it: kept connections, bodies of known length and chunked ones.
//!
//! | Path | Answer |
//! |---|---|
//! | `/healthz` | `ok` |
//! | `/ready` | 200, or 503 after `/ready?set=off`, until `/ready?set=on` |
//! | `/slow?ms=N` | the description, N milliseconds later |
//! | `/echo` | the request's body, as it comes |
//! | `/ws` | a WebSocket that echoes |
//! | else | a description of server and request, JSON |

use std::fmt::Write as _;
use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use super::{Server, wait_for_bytes, websocket};
use crate::outcome::quote;

const MAX_HEAD_BYTES: u64 = 32 << 10;

/// A request's head. Header names are lower-case.
struct Head {
    client: String,
    method: String,
    path: String,
    query: String,
    headers: Vec<(String, String)>,
}

impl Head {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    fn query(&self, name: &str) -> Option<&str> {
        self.query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
    }
}

/// Serves one connection until the client closes it or the process drains.
pub(super) fn connection(server: &Server, stream: TcpStream) -> io::Result<()> {
    let mut input = BufReader::new(stream.try_clone()?);
    let client = stream.peer_addr()?;
    let client = SocketAddr::new(client.ip().to_canonical(), client.port()).to_string();
    let mut output = stream;
    output.set_read_timeout(Some(Duration::from_secs(30)))?;
    loop {
        if input.buffer().is_empty() && !wait_for_bytes(server, &output) {
            return Ok(());
        }
        let Some(head) = read_head(&mut input, &client)? else { return Ok(()) };
        if head.header("upgrade").is_some_and(|u| u.eq_ignore_ascii_case("websocket")) {
            let key = head.header("sec-websocket-key").unwrap_or_default();
            return websocket::serve(server, key, &mut input, &mut output);
        }
        let keep = answer(server, &head, &mut input, &mut output)?;
        if !keep {
            return Ok(());
        }
    }
}

fn read_head(input: &mut BufReader<TcpStream>, client: &str) -> io::Result<Option<Head>> {
    let mut limited = input.take(MAX_HEAD_BYTES);
    let mut line = String::new();
    if limited.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (Some(method), Some(target)) = (words.next(), words.next()) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let (method, path, query) = (method.to_owned(), path.to_owned(), query.to_owned());
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        if limited.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim_end();
        if line.is_empty() {
            return Ok(Some(Head { client: client.to_owned(), method, path, query, headers }));
        }
        let (name, value) = line.split_once(':').ok_or(io::ErrorKind::InvalidData)?;
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
}

/// Answers one request; says whether the connection may be kept.
fn answer(
    server: &Server,
    head: &Head,
    input: &mut BufReader<TcpStream>,
    output: &mut TcpStream,
) -> io::Result<bool> {
    if head.header("expect").is_some_and(|e| e.eq_ignore_ascii_case("100-continue")) {
        output.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    let asked_to_close = head.header("connection").is_some_and(|c| c.eq_ignore_ascii_case("close"));
    if head.path == "/echo" {
        echo(server, head, input, output)?;
        return Ok(!asked_to_close && !server.draining.load(Ordering::SeqCst));
    }
    each_chunk(head, input, |_| Ok(()))?;
    let (status, body) = route(server, head);
    // Read after the work: a request that was under way at SIGTERM says that it is the last one.
    let keep = !asked_to_close && !server.draining.load(Ordering::SeqCst);
    let kind = if body.starts_with('{') { "application/json" } else { "text/plain" };
    let mut text = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{}\r\n",
        body.len(),
        if keep { "" } else { "Connection: close\r\n" },
    );
    if head.method != "HEAD" {
        text.push_str(&body);
    }
    output.write_all(text.as_bytes())?;
    Ok(keep)
}

fn route(server: &Server, head: &Head) -> (&'static str, String) {
    match head.path.as_str() {
        "/healthz" => ("200 OK", "ok\n".to_owned()),
        "/ready" => {
            match head.query("set") {
                Some("off") => server.ready.store(false, Ordering::SeqCst),
                Some("on") => server.ready.store(true, Ordering::SeqCst),
                _ => {}
            }
            if server.ready.load(Ordering::SeqCst) {
                ("200 OK", "ready\n".to_owned())
            } else {
                ("503 Service Unavailable", "not ready\n".to_owned())
            }
        }
        "/slow" => {
            let ms = head.query("ms").and_then(|n| n.parse().ok()).unwrap_or(1000u64);
            thread::sleep(Duration::from_millis(ms.min(60_000)));
            ("200 OK", describe(server, head))
        }
        _ => ("200 OK", describe(server, head)),
    }
}

fn describe(server: &Server, head: &Head) -> String {
    let mut out = String::from("{");
    let _ = write!(out, "\"host\":{},\"version\":{},", quote(&server.host), quote(&server.version));
    let _ = write!(out, "\"client\":{},", quote(&head.client));
    let _ = write!(out, "\"method\":{},\"path\":{},", quote(&head.method), quote(&head.path));
    let headers: Vec<String> =
        head.headers.iter().map(|(n, v)| format!("{}:{}", quote(n), quote(v))).collect();
    let _ = writeln!(out, "\"headers\":{{{}}}}}", headers.join(","));
    out
}

fn echo(
    server: &Server,
    head: &Head,
    input: &mut BufReader<TcpStream>,
    output: &mut TcpStream,
) -> io::Result<()> {
    let close = if server.draining.load(Ordering::SeqCst) { "Connection: close\r\n" } else { "" };
    let start = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n{close}\r\n");
    output.write_all(start.as_bytes())?;
    each_chunk(head, input, |bytes| {
        write!(output, "{:x}\r\n", bytes.len())?;
        output.write_all(bytes)?;
        output.write_all(b"\r\n")
    })?;
    output.write_all(b"0\r\n\r\n")
}

/// Hands the request's body over as it comes.
fn each_chunk(
    head: &Head,
    input: &mut BufReader<TcpStream>,
    mut take: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let chunked =
        head.header("transfer-encoding").is_some_and(|t| t.eq_ignore_ascii_case("chunked"));
    if !chunked {
        let length = head.header("content-length").and_then(|n| n.parse().ok()).unwrap_or(0u64);
        return copy_exactly(input, length, &mut take);
    }
    loop {
        let mut line = String::new();
        input.take(64).read_line(&mut line)?;
        let size = line.trim().split(';').next().unwrap_or_default();
        let size = u64::from_str_radix(size, 16).map_err(|_| io::ErrorKind::InvalidData)?;
        copy_exactly(input, size, &mut take)?;
        let mut end = String::new();
        input.take(2).read_line(&mut end)?;
        if size == 0 {
            return Ok(());
        }
    }
}

fn copy_exactly(
    input: &mut impl Read,
    mut left: u64,
    take: &mut impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = [0; 16 << 10];
    while left > 0 {
        let want = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let n = input.read(&mut buffer[..want])?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        take(&buffer[..n])?;
        left -= n as u64;
    }
    Ok(())
}
