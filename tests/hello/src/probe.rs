//! Many exchanges at once: what one pod can reach, in one go.

use std::collections::BTreeSet;
use std::io::{self, BufRead as _, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::ops::RangeInclusive;
use std::os::fd::AsFd as _;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Socket, Type};

use crate::args::Args;
use crate::sctp::Raw;

const QUESTION: &[u8] = b"whoami";
const PASSED: char = '+';
const SILENT: char = '.';
const REFUSED: char = 'R';
const SOMEBODY_ELSE: char = '?';
const NO_NAME: char = 'N';
const FAILED: char = 'E';
/// Source ports of SCTP packets, one for each line as a client would be given one: what is remembered of an earlier line's packets says
/// nothing about this one's. Which target an answer belongs to follows from who sent it.
const SCTP_PORTS: RangeInclusive<u16> = 40_000..=59_999;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    protocol: Protocol,
    v4: bool,
    host: String,
    port: u16,
    /// Who has to answer.
    name: String,
}

impl Target {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('/');
        let (kind, host, port) = (parts.next()?, parts.next()?, parts.next()?.parse().ok()?);
        let (kind, family) = kind.split_at_checked(kind.len().checked_sub(1)?)?;
        let protocol = match kind {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            _ => return None,
        };
        let name = parts.next()?.to_owned();
        Some(Self { protocol, v4: family == "4", host: host.to_owned(), port, name })
    }
}

/// Answers lines until the input ends.
pub(crate) fn run(args: &Args) -> Result<(), String> {
    args.finish()?;
    let mut ports = SCTP_PORTS.cycle();
    for line in io::stdin().lock().lines() {
        let line = line.map_err(|e| format!("read a question: {e}"))?;
        let mut words = line.split_whitespace();
        let limit = words.next().and_then(|w| w.parse().ok()).map(Duration::from_millis);
        let targets = words.map(|word| Target::parse(word).ok_or(word));
        let targets: Result<Vec<_>, _> = targets.collect();
        let targets = targets.map_err(|word| format!("{word}: not a target"))?;
        let port = ports.next().unwrap_or(*SCTP_PORTS.start());
        let answer = round(&targets, limit.ok_or("a line without a limit")?, port);
        let mut out = io::stdout().lock();
        writeln!(out, "{answer}").and_then(|()| out.flush()).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// Asks all targets; what has not answered after `limit` is silent. Names may take half as long again.
fn round(targets: &[Target], limit: Duration, sctp_port: u16) -> String {
    let known = Names::resolve(targets, limit / 2);
    let end = Instant::now() + limit;
    let mut letters = vec![None; targets.len()];
    let mut open = Vec::new();
    let mut raw = Vec::new();
    for (index, target) in targets.iter().enumerate() {
        let Some(address) = known.address(target) else {
            letters[index] = Some(NO_NAME);
            continue;
        };
        if target.protocol == Protocol::Sctp {
            raw.push((index, address));
        } else {
            match Exchange::start(target.protocol, address) {
                Ok(exchange) => open.push((index, exchange)),
                Err(e) => letters[index] = Some(letter(&e)),
            }
        }
    }
    let raws = ask_sctp(&raw, sctp_port, &mut letters);
    loop {
        finish_some(&mut open, targets, &mut letters);
        raws.iter().for_each(|socket| hear_sctp(socket, sctp_port, (targets, &raw), &mut letters));
        let waits = letters.iter().any(Option::is_none);
        let Some(left) = end.checked_duration_since(Instant::now()).filter(|_| waits) else {
            break;
        };
        wait(&open, &raws, left);
    }
    letters.into_iter().map(|letter| letter.unwrap_or(SILENT)).collect()
}

fn letter(error: &io::Error) -> char {
    match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => REFUSED,
        _ => FAILED,
    }
}

fn said(name: &str, answer: &[u8]) -> char {
    if answer == name.as_bytes() { PASSED } else { SOMEBODY_ELSE }
}

fn wait(open: &[(usize, Exchange)], raws: &[Raw], left: Duration) {
    let mut fds: Vec<PollFd> = open
        .iter()
        .map(|(_, exchange)| PollFd::new(exchange.socket.as_fd(), exchange.wants()))
        .collect();
    fds.extend(raws.iter().map(|raw| PollFd::new(raw.socket().as_fd(), PollFlags::POLLIN)));
    // Rounded up, so that the last millisecond is not spent turning.
    let left = u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX);
    let _ = poll(&mut fds, PollTimeout::from(left));
}

fn finish_some(
    open: &mut Vec<(usize, Exchange)>,
    targets: &[Target],
    letters: &mut [Option<char>],
) {
    open.retain_mut(|(index, exchange)| {
        letters[*index] = match exchange.go_on() {
            Ok(None) => return true,
            Ok(Some(answer)) => Some(said(&targets[*index].name, &answer)),
            Err(e) => Some(letter(&e)),
        };
        false
    });
}

/// A question to one target.
struct Exchange {
    socket: Socket,
    asked: bool,
}

impl Exchange {
    fn start(protocol: Protocol, to: SocketAddr) -> io::Result<Self> {
        let kind = if protocol == Protocol::Tcp { Type::STREAM } else { Type::DGRAM };
        let socket = Socket::new(Domain::for_address(to), kind, None)?;
        socket.set_nonblocking(true)?;
        match socket.connect(&to.into()) {
            Err(e) if e.raw_os_error() != Some(nix::errno::Errno::EINPROGRESS as i32) => Err(e),
            _ => Ok(Self { socket, asked: false }),
        }
    }

    fn wants(&self) -> PollFlags {
        if self.asked { PollFlags::POLLIN } else { PollFlags::POLLOUT }
    }

    /// Does what can be done without waiting; returns the answer.
    fn go_on(&mut self) -> io::Result<Option<Vec<u8>>> {
        if !self.asked {
            match self.socket.send(QUESTION) {
                Ok(_) => self.asked = true,
                Err(e) if not_yet(&e) => return Ok(None),
                Err(e) => return Err(e),
            }
        }
        let mut buffer = [0; 256];
        match (&self.socket).read(&mut buffer) {
            Ok(n) => Ok(Some(buffer[..n].to_vec())),
            Err(e) if not_yet(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// Also what a socket says that is still being connected.
fn not_yet(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::NotConnected)
}

/// One raw socket for each family that is asked for.
fn ask_sctp(targets: &[(usize, SocketAddr)], port: u16, letters: &mut [Option<char>]) -> Vec<Raw> {
    let mut raws = Vec::new();
    for v4 in [true, false] {
        let of_family = || targets.iter().filter(|(_, to)| to.is_ipv4() == v4);
        if of_family().next().is_none() {
            continue;
        }
        let opened = Raw::open(v4).and_then(|raw| raw.socket().set_nonblocking(true).map(|()| raw));
        for (index, to) in of_family() {
            let sent = match &opened {
                Ok(raw) => raw.send(*to, port, QUESTION).map_err(|e| letter(&e)),
                Err(e) => Err(letter(e)),
            };
            letters[*index] = sent.err();
        }
        raws.extend(opened);
    }
    raws
}

fn hear_sctp(
    raw: &Raw,
    port: u16,
    (targets, asked): (&[Target], &[(usize, SocketAddr)]),
    letters: &mut [Option<char>],
) {
    while let Ok(heard) = raw.receive() {
        // To itself a pod's own questions come, too.
        let Some(packet) = heard.filter(|p| p.destination == port && p.text != QUESTION) else {
            continue;
        };
        let from = SocketAddr::new(packet.from, packet.source);
        for (index, _) in asked.iter().filter(|(_, to)| *to == from) {
            letters[*index] = Some(said(&targets[*index].name, &packet.text));
        }
    }
}

/// Addresses of names.
struct Names(Vec<(String, SocketAddr)>);

impl Names {
    /// All at the same time, each in a thread: the C library offers no other way.
    fn resolve(targets: &[Target], limit: Duration) -> Self {
        let hosts = targets.iter().map(|t| &t.host).filter(|h| h.parse::<IpAddr>().is_err());
        let hosts: BTreeSet<&String> = hosts.collect();
        let (send, receive) = mpsc::channel();
        for host in &hosts {
            let (send, host) = (send.clone(), (*host).clone());
            thread::spawn(move || {
                let found = (host.as_str(), 0).to_socket_addrs();
                // Too late, if nobody listens any more.
                let _ = send.send((host, found.into_iter().flatten().collect::<Vec<_>>()));
            });
        }
        let end = Instant::now() + limit;
        let mut names = Vec::new();
        for _ in &hosts {
            let left = end.saturating_duration_since(Instant::now());
            let Ok((host, found)) = receive.recv_timeout(left) else { break };
            names.extend(found.into_iter().map(|address| (host.clone(), address)));
        }
        Self(names)
    }

    fn address(&self, target: &Target) -> Option<SocketAddr> {
        if let Ok(ip) = target.host.parse() {
            return Some(SocketAddr::new(ip, target.port));
        }
        let mut found = self.0.iter().filter(|(host, _)| *host == target.host);
        let (_, address) = found.find(|(_, address)| address.is_ipv4() == target.v4)?;
        Some(SocketAddr::new(address.ip(), target.port))
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    fn target(kind: &str, port: u16, name: &str) -> Target {
        Target::parse(&format!("{kind}/127.0.0.1/{port}/{name}")).unwrap()
    }

    #[test]
    fn each_kind_of_answer_has_its_letter() {
        let (tcp, udp) = (TcpListener::bind("127.0.0.1:0"), UdpSocket::bind("127.0.0.1:0"));
        let (tcp, udp) = (tcp.unwrap(), udp.unwrap());
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        let targets = [
            target("tcp4", port, "me"),
            target("tcp4", port, "you"),
            target("tcp4", closed, "me"),
            target("udp4", udp.local_addr().unwrap().port(), "me"),
            target("udp4", silent.local_addr().unwrap().port(), "me"),
            Target::parse("udp4/no-such-name.invalid/80/me").unwrap(),
        ];
        thread::spawn(move || {
            for _ in 0..2 {
                let (mut stream, _) = tcp.accept().unwrap();
                stream.write_all(b"me").unwrap();
            }
        });
        thread::spawn(move || {
            let mut buffer = [0; 16];
            let (_, from) = udp.recv_from(&mut buffer).unwrap();
            udp.send_to(b"me", from).unwrap();
        });
        assert_eq!(round(&targets, Duration::from_millis(500), 40_000), "+?R+.N");
    }

    #[test]
    fn targets_are_read() {
        let target = Target::parse("sctp6/fd10::5/81/x-a").unwrap();
        assert_eq!((target.protocol, target.v4, target.port), (Protocol::Sctp, false, 81));
        assert!(Target::parse("icmp4/a/1/b").is_none() && Target::parse("tcp4/a/1").is_none());
        assert!(Target::parse("").is_none());
    }
}
