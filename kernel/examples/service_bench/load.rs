//! Load, as much as one thread can make, for a time.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, connect, setsockopt, socket, sockopt,
};

use crate::serve::{ANSWER, CLOSE, KEEP, REQUEST, STREAM};

/// Connections at the same time.
const AT_ONCE: usize = 32;
/// Nothing here takes so long unless something is broken.
const PATIENCE: Duration = Duration::from_secs(5);

/// Does one kind of load and returns its numbers: operations, seconds and, of some, more.
pub(crate) fn run(what: &str, to: SocketAddr, time: Duration) -> Result<Vec<f64>> {
    match what {
        "close" => many(to, time, CLOSE),
        "keep" => many(to, time, KEEP),
        "connect" => one_by_one(to, time),
        "stream" => stream(to, time),
        "datagrams" => datagrams(to, time),
        other => anyhow::bail!("no load {other}"),
    }
}

/// One of the connections.
struct Connection {
    stream: TcpStream,
    asked: bool,
    /// Bytes of the present answer.
    got: usize,
}

/// Requests on new connections, which the server closes, or on kept ones.
fn many(to: SocketAddr, time: Duration, kind: u8) -> Result<Vec<f64>> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut all: Vec<Connection> =
        (0..AT_ONCE).map(|place| open(&epoll, to, place)).collect::<Result<_>>()?;
    let (start, mut done) = (Instant::now(), 0_u32);
    let mut events = [EpollEvent::empty(); AT_ONCE];
    while start.elapsed() < time || done == 0 {
        let ready = epoll.wait(&mut events, EpollTimeout::from(100_u16)).unwrap_or(0);
        for event in &events[..ready] {
            let place = usize::try_from(event.data())?;
            let answers = step(&mut all[place], kind).with_context(|| format!("speak to {to}"))?;
            done += answers;
            if kind == CLOSE && answers > 0 {
                all[place] = open(&epoll, to, place)?;
            }
        }
        ensure!(done > 0 || start.elapsed() < PATIENCE, "{to} does not answer");
    }
    Ok(vec![f64::from(done), start.elapsed().as_secs_f64()])
}

fn open(epoll: &Epoll, to: SocketAddr, place: usize) -> Result<Connection> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket: OwnedFd = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
    setsockopt(&socket, sockopt::TcpNoDelay, &true)?;
    match connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &SockaddrStorage::from(to)) {
        Ok(()) | Err(Errno::EINPROGRESS) => {}
        Err(error) => return Err(error).with_context(|| format!("connect to {to}")),
    }
    let events = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
    epoll.add(&socket, EpollEvent::new(events, place as u64))?;
    Ok(Connection { stream: socket.into(), asked: false, got: 0 })
}

/// Goes on with a connection as far as it can; how many answers are complete.
fn step(connection: &mut Connection, kind: u8) -> Result<u32> {
    let mut done = 0;
    if !connection.asked {
        connection.asked = ask(&mut connection.stream, kind)?;
    }
    let mut buffer = [0; 4 * ANSWER];
    loop {
        match connection.stream.read(&mut buffer) {
            Ok(0) if kind == CLOSE && connection.got >= ANSWER => return Ok(1),
            Ok(0) => anyhow::bail!("closed too early"),
            Ok(length) => connection.got += length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error.into()),
        }
        if kind == KEEP && connection.got >= ANSWER {
            connection.got = 0;
            done += 1;
            connection.asked = ask(&mut connection.stream, kind)?;
        }
    }
    Ok(done)
}

/// Whether the request could be sent; it cannot before the connection stands.
fn ask(stream: &mut TcpStream, kind: u8) -> Result<bool> {
    match stream.write(&[kind; REQUEST]) {
        Ok(length) => Ok(length == REQUEST),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected) => {
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

/// One connection at a time: how many, in which time, and the median and the 99th percentile of connecting, in microseconds.
fn one_by_one(to: SocketAddr, time: Duration) -> Result<Vec<f64>> {
    let (start, mut times) = (Instant::now(), vec![]);
    while start.elapsed() < time {
        let begun = Instant::now();
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        times.push(begun.elapsed().as_secs_f64() * 1e6);
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(&[CLOSE; REQUEST])?;
        let mut rest = vec![];
        stream.read_to_end(&mut rest)?;
        ensure!(rest.len() == ANSWER, "half an answer");
    }
    let secs = start.elapsed().as_secs_f64();
    times.sort_by(f64::total_cmp);
    let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)];
    Ok(vec![f64::from(u32::try_from(times.len())?), secs, at(50), at(99)])
}

/// Kilobytes that arrived over one connection, and in which time.
fn stream(to: SocketAddr, time: Duration) -> Result<Vec<f64>> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let (block, start, mut sent) = ([STREAM; 1 << 17], Instant::now(), 0.0);
    while start.elapsed() < time {
        stream.write_all(&block)?;
        sent += f64::from(1 << 17) / 1e3;
    }
    stream.shutdown(Shutdown::Write)?;
    stream.read_exact(&mut [0])?;
    Ok(vec![sent, start.elapsed().as_secs_f64()])
}

/// Datagrams that were sent, and in which time.
fn datagrams(to: SocketAddr, time: Duration) -> Result<Vec<f64>> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(to)?;
    let (start, mut sent) = (Instant::now(), 0_u32);
    while start.elapsed() < time {
        for _ in 0..64 {
            socket.send(&[b'.'; 22])?;
        }
        sent += 64;
    }
    Ok(vec![f64::from(sent), start.elapsed().as_secs_f64()])
}
