//! The clients: one exchange over HTTP, TCP, UDP or DNS, with a limit on its time.

mod dns;
mod http;

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs as _, UdpSocket};
use std::time::Duration;

use crate::args::Args;

pub(crate) use http::Http;

/// No exchange takes longer.
pub(crate) const LIMIT: Duration = Duration::from_secs(5);

/// Where a client goes, from its URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// `http`, `tcp`, `udp`, `dns`, `stream`.
    pub(crate) scheme: String,
    /// `name:port` or `address:port`.
    pub(crate) authority: String,
    /// What follows the authority, with its slash.
    pub(crate) path: String,
}

impl Target {
    /// Reads a URL. HTTP may leave out its port.
    pub(crate) fn parse(url: &str) -> Result<Self, String> {
        let (scheme, rest) =
            url.split_once("://").ok_or_else(|| format!("{url}: expected SCHEME://HOST:PORT"))?;
        let (authority, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, "/"),
        };
        let host_end = authority.rfind(']').map_or(0, |at| at + 1);
        let mut authority = authority.to_owned();
        if !authority[host_end..].contains(':') {
            match scheme {
                "http" => authority.push_str(":80"),
                "dns" => authority.push_str(":53"),
                _ => return Err(format!("{url}: the port is missing")),
            }
        }
        Ok(Self { scheme: scheme.to_owned(), authority, path: path.to_owned() })
    }

    /// The first address of the host.
    pub(crate) fn resolve(&self) -> io::Result<SocketAddr> {
        let mut found = self.authority.to_socket_addrs()?;
        found.next().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn text(&self) -> &str {
        self.path.strip_prefix('/').unwrap_or(&self.path)
    }
}

/// `get URL`: prints the answer.
pub(crate) fn print_one(args: &mut Args) -> Result<(), String> {
    let url = args.positional().ok_or("get needs a URL")?;
    let host = args.optional::<String>("--host")?;
    args.finish()?;
    let target = Target::parse(&url)?;
    let explain = |e: io::Error| format!("{url}: {e}");
    let address = target.resolve().map_err(|e| format!("resolve {}: {e}", target.authority))?;
    let answer = match target.scheme.as_str() {
        "http" => {
            let mut http = Http::new(&target, host.as_deref(), false);
            let (status, body) = http.exchange(address).map_err(explain)?;
            if status != 200 {
                return Err(format!("{url}: status {status}: {}", body.trim_end()));
            }
            body
        }
        "tcp" => tcp_exchange(address, target.text()).map_err(explain)?,
        "udp" => udp_exchange(address, target.text()).map_err(explain)?,
        "dns" => dns::query(address, target.text()).map_err(explain)?,
        other => return Err(format!("{url}: cannot speak {other}")),
    };
    println!("{}", answer.trim_end());
    Ok(())
}

/// Sends `text` on a new connection and returns what comes back.
pub(crate) fn tcp_exchange(address: SocketAddr, text: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(text.as_bytes())?;
    let mut buffer = [0; 2048];
    let n = stream.read(&mut buffer)?;
    if n == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(String::from_utf8_lossy(&buffer[..n]).into_owned())
}

/// Sends `text` as one datagram from a new, unconnected socket; the answer must come from `address`.
pub(crate) fn udp_exchange(address: SocketAddr, text: &str) -> io::Result<String> {
    let answer = datagram_exchange(address, text.as_bytes(), Duration::from_secs(1))?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn datagram_exchange(address: SocketAddr, message: &[u8], limit: Duration) -> io::Result<Vec<u8>> {
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(limit))?;
    socket.send_to(message, address)?;
    let mut buffer = vec![0; 64 << 10];
    let (n, from) = socket.recv_from(&mut buffer)?;
    if from != address {
        return Err(io::Error::other(format!("the answer came from {from}")));
    }
    buffer.truncate(n);
    Ok(buffer)
}

/// Asks `address` for the A records of `name`.
pub(crate) fn dns_exchange(address: SocketAddr, target: &Target) -> io::Result<String> {
    dns::query(address, target.text())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_with_and_without_ports() {
        let target = Target::parse("http://hello/x?y=1").unwrap();
        assert_eq!((target.authority.as_str(), target.path.as_str()), ("hello:80", "/x?y=1"));
        let target = Target::parse("tcp://[fd10::5]:9000/whoami").unwrap();
        assert_eq!(target.resolve().unwrap().to_string(), "[fd10::5]:9000");
        assert_eq!(target.text(), "whoami");
        assert_eq!(Target::parse("http://[::1]").unwrap().authority, "[::1]:80");
        assert!(Target::parse("udp://1.2.3.4").is_err());
        assert!(Target::parse("hello").is_err());
    }
}
