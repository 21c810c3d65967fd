//! The one request to the agent.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use crate::wire::{MAX_LINE_BYTES, Reply, Request};

/// Sends the request and waits for the answer, both together no longer than `limit`.
///
/// On a thread of its own, because connecting to a unix socket has no time limit of its own.
pub fn call(socket: &Path, request: &Request, limit: Duration) -> io::Result<Reply> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    let socket = socket.to_owned();
    let (answer, answered) = mpsc::channel();
    std::thread::Builder::new().spawn(move || {
        // The receiver is gone only when the limit is over; then the process is about to end.
        let _ = answer.send(exchange(&socket, &line));
    })?;
    answered.recv_timeout(limit).unwrap_or_else(|_| {
        Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {limit:?}")))
    })
}

fn exchange(socket: &Path, line: &[u8]) -> io::Result<Reply> {
    let mut stream = UnixStream::connect(socket)?;
    stream.write_all(line)?;
    let mut answer = String::new();
    BufReader::new(stream.take(MAX_LINE_BYTES)).read_line(&mut answer)?;
    if !answer.ends_with('\n') {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the agent hung up"));
    }
    Ok(serde_json::from_str(&answer)?)
}
