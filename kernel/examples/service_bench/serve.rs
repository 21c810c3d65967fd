//! The other end of the load: one thread for all connections, and one that takes datagrams.

use std::collections::HashMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;

use anyhow::{Context as _, Result};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{Backlog, listen, setsockopt, sockopt};

/// Bytes of a request; the first one says what is wanted.
pub(crate) const REQUEST: usize = 64;
/// Bytes of an answer.
pub(crate) const ANSWER: usize = 128;
/// First byte of a request: answer and close.
pub(crate) const CLOSE: u8 = b'c';
/// First byte of a request: answer and wait for the next.
pub(crate) const KEEP: u8 = b'k';
/// First byte of a stream: read to its end, then answer.
pub(crate) const STREAM: u8 = b's';

/// Serves on so many ports from this one on, as if they were different backends.
pub(crate) const PORTS: u16 = 3;

/// Begins to serve on the ports from this one on.
pub(crate) fn streams(address: SocketAddr) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("make an epoll")?;
    let mut listeners = HashMap::new();
    for offset in 0..PORTS {
        let at = SocketAddr::new(address.ip(), address.port() + offset);
        let listener = TcpListener::bind(at).with_context(|| format!("listen on {at}"))?;
        // As many as the kernel allows may wait.
        listen(&listener, Backlog::new(4096)?).context("listen")?;
        listener.set_nonblocking(true)?;
        let number = listener.as_raw_fd();
        epoll
            .add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, number.cast_unsigned().into()))?;
        listeners.insert(number, listener);
    }
    std::thread::spawn(move || serve(&epoll, &listeners));
    Ok(())
}

/// A connection, and whether it is a stream that is read to its end.
struct Connection {
    stream: TcpStream,
    to_the_end: bool,
}

fn serve(epoll: &Epoll, listeners: &HashMap<i32, TcpListener>) {
    let mut connections: HashMap<i32, Connection> = HashMap::new();
    let mut events = [EpollEvent::empty(); 64];
    let mut buffer = vec![0; 1 << 18];
    loop {
        let ready = epoll.wait(&mut events, EpollTimeout::NONE).unwrap_or(0);
        for event in &events[..ready] {
            let number = u32::try_from(event.data()).unwrap_or_default().cast_signed();
            if let Some(listener) = listeners.get(&number) {
                while let Ok((stream, _)) = listener.accept() {
                    accept(epoll, &mut connections, stream, &mut buffer);
                }
            } else if let Some(connection) = connections.get_mut(&number)
                && !goes_on(connection, &mut buffer)
            {
                // Closing it takes it out of the epoll.
                connections.remove(&number);
            }
        }
    }
}

fn accept(
    epoll: &Epoll,
    connections: &mut HashMap<i32, Connection>,
    stream: TcpStream,
    buffer: &mut [u8],
) {
    let number = stream.as_raw_fd();
    let mut connection = Connection { stream, to_the_end: false };
    let ready = connection.stream.set_nonblocking(true).is_ok()
        && connection.stream.set_nodelay(true).is_ok()
        && goes_on(&mut connection, buffer);
    let event = EpollEvent::new(EpollFlags::EPOLLIN, number.cast_unsigned().into());
    if ready && epoll.add(&connection.stream, event).is_ok() {
        connections.insert(number, connection);
    }
}

/// Does what can be done; whether there will be more.
fn goes_on(connection: &mut Connection, buffer: &mut [u8]) -> bool {
    match connection.stream.read(buffer) {
        Ok(0) => {
            if connection.to_the_end {
                let _ = connection.stream.write(b"!");
            }
            false
        }
        Ok(_) if connection.to_the_end => true,
        Ok(_) => {
            connection.to_the_end = buffer[0] == STREAM;
            let answered = connection.to_the_end
                || connection.stream.write(&[b'.'; ANSWER]).is_ok_and(|n| n == ANSWER);
            answered && buffer[0] != CLOSE
        }
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}

/// Takes datagrams and forgets them.
pub(crate) fn sink(address: SocketAddr) -> Result<()> {
    let socket = UdpSocket::bind(address).with_context(|| format!("bind {address}"))?;
    setsockopt(&socket, sockopt::RcvBuf, &(8 << 20)).context("make room for datagrams")?;
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while socket.recv(&mut buffer).is_ok() {}
    });
    Ok(())
}

/// Datagrams that have reached sockets of this namespace, also those for which there was no room.
pub(crate) fn arrived() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/net/snmp").context("read counters")?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let (names, values) = (lines.next().unwrap_or(""), lines.next().unwrap_or(""));
    let counters = names.split(' ').zip(values.split(' '));
    let wanted = counters.filter(|(name, _)| ["InDatagrams", "RcvbufErrors"].contains(name));
    wanted.map(|(_, value)| Ok(value.parse::<f64>()?)).sum()
}
