//! The one request to the agent. On the thread that the process has: each further one would cost more than the request.

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::wire::{MAX_LINE_BYTES, Reply, Request};

/// Sends the request and waits for the answer, both together no longer than `limit`.
pub fn call(socket: &Path, request: &Request, limit: Duration) -> io::Result<Reply> {
    exchange(socket, request, Instant::now() + limit).map_err(|error| match error.kind() {
        // What a socket says when its time is up.
        io::ErrorKind::WouldBlock => {
            io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {limit:?}"))
        }
        _ => error,
    })
}

fn exchange(socket: &Path, request: &Request, deadline: Instant) -> io::Result<Reply> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    let mut stream = open(socket, left(deadline)?)?;
    let mut rest = line.as_slice();
    while !rest.is_empty() {
        stream.set_write_timeout(Some(left(deadline)?))?;
        match stream.write(rest) {
            Ok(length) => rest = &rest[length..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let (mut answer, mut buffer) = (vec![], [0; 4096]);
    while answer.last() != Some(&b'\n') && answer.len() as u64 <= MAX_LINE_BYTES {
        stream.set_read_timeout(Some(left(deadline)?))?;
        match stream.read(&mut buffer) {
            Ok(0) => {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the agent hung up"));
            }
            Ok(length) => answer.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(serde_json::from_slice(&answer)?)
}

/// Connects within `limit`, which only the time limit for sending bounds (unix(7)), set before.
fn open(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let seconds = limit.as_secs().try_into().unwrap_or(i64::MAX);
    let limit = TimeVal::new(seconds, limit.subsec_micros().into());
    setsockopt(&fd, sockopt::SendTimeout, &limit)?;
    connect(fd.as_raw_fd(), &address)?;
    Ok(UnixStream::from(fd))
}

/// Never nothing, which would mean for ever.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left < Duration::from_micros(1) { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(left) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use nix::sys::socket::{Backlog, bind, listen};

    use super::*;

    const LIMIT: Duration = Duration::from_millis(50);

    #[test]
    fn an_agent_that_does_not_answer_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("silent");
        let _listener = UnixListener::bind(&path).unwrap();
        let error = call(&path, &Request::Status, LIMIT).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        let error = call(&dir.path().join("none"), &Request::Status, LIMIT).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error}");
    }

    #[test]
    fn an_agent_that_does_not_accept_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("full");
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
        let fd = fd.unwrap();
        bind(fd.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&fd, Backlog::new(0).unwrap()).unwrap();
        let _waits = UnixStream::connect(&path).unwrap();
        let error = call(&path, &Request::Status, LIMIT).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
    }
}
