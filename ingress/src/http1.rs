//! A client's HTTP/1 connection (RFC 9112): one request after the other, until one side has enough.

pub(crate) mod exchange;

use std::future::{Future as _, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::futures::OwnedNotified;
use tokio::time::Instant;

use crate::answer;
use crate::buffer::{self, BIG_BYTES, Buffer};
use crate::http2;
use crate::request::{self, Peer, Reject};
use crate::response::head_end;
use crate::rewind::Rewind;
use crate::shard::{InProgress, Shard};
use crate::timer::Timer;

/// What a connection's socket must be.
pub(crate) trait Io: AsyncRead + AsyncWrite + Unpin + Send + 'static {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Io for T {}

struct Connection<IO> {
    io: IO,
    input: Buffer,
    timer: Timer,
    peer: Peer,
    shard: Arc<Shard>,
    drained: Pin<Box<OwnedNotified>>,
}

/// How a connection goes on after a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    /// With another request.
    Next,
    /// It ends; everything has been said.
    Close,
    /// It ends, but the client may still be sending, and must get to read the answer.
    Linger,
    /// It breaks off: the client must see that the answer is not complete.
    Abort,
}

/// What comes next on a connection.
enum Next {
    /// A head of so many bytes.
    Head(usize),
    /// The preface of HTTP/2.
    Http2,
    /// A request that cannot be read.
    Reject(Reject),
    /// Nothing.
    End,
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const MAX_EMPTY_LINES: usize = 4;
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 1 << 20;

/// Serves a connection until it ends; hands it to [`http2`] when it begins with that version's preface.
pub(crate) async fn serve<IO: Io>(io: IO, peer: Peer, shard: Arc<Shard>) {
    let drained = shard.drained();
    let (input, timer) = (Buffer::default(), Timer::default());
    let mut connection = Connection { io, input, timer, peer, shard, drained };
    let mut first = true;
    loop {
        match connection.next(first).await {
            Next::Head(length) => match connection.request(length).await {
                After::Next => first = false,
                After::Close => return connection.close().await,
                After::Linger => return connection.linger().await,
                After::Abort => return,
            },
            Next::Http2 => {
                let Connection { io, input, peer, shard, .. } = connection;
                return Box::pin(http2::serve(Rewind::new(input, io), peer, shard)).await;
            }
            Next::Reject(reject) => {
                connection.shard.counters().requests.add();
                connection.refuse(reject, false, false, true).await;
                return connection.linger().await;
            }
            Next::End => return connection.close().await,
        }
    }
}

impl<IO: Io> Connection<IO> {
    /// Waits for the next head: long for its first byte, briefly for the rest.
    async fn next(&mut self, first: bool) -> Next {
        let timeouts = &self.shard.core.options.timeouts;
        let (brief, long, last) = (timeouts.head, timeouts.keep_alive, timeouts.drain_idle);
        let begun = Instant::now();
        let mut deadline = begun + if first { brief } else { long };
        let mut waiting = true;
        let mut leaving = false;
        let mut scanned = 0;
        poll_fn(|cx| {
            loop {
                if let Some(next) = self.look(first, &mut scanned) {
                    return Poll::Ready(next);
                }
                if waiting && !self.input.is_empty() {
                    waiting = false;
                    deadline = if first { deadline } else { Instant::now() + brief };
                }
                if waiting
                    && !leaving
                    && (self.shard.is_draining() || self.drained.as_mut().poll(cx).is_ready())
                {
                    leaving = true;
                    deadline = deadline.min(Instant::now() + last);
                }
                match self.input.poll_fill(cx, &mut self.io) {
                    Poll::Ready(Ok(1..)) => {}
                    Poll::Ready(_) => return Poll::Ready(Next::End),
                    Poll::Pending => {
                        ready!(self.timer.poll(cx, deadline));
                        return Poll::Ready(if waiting {
                            Next::End
                        } else {
                            Next::Reject(Reject::new(408, "the request head took too long"))
                        });
                    }
                }
            }
        })
        .await
    }

    /// Decides by what has been read; none when that is too little.
    fn look(&mut self, first: bool, scanned: &mut usize) -> Option<Next> {
        let mut empty_lines = 0;
        while *scanned == 0 && self.input.filled().starts_with(b"\r\n") {
            self.input.consume(2);
            empty_lines += 1;
            if empty_lines > MAX_EMPTY_LINES {
                return Some(Next::Reject(Reject::bad("the request begins with empty lines")));
            }
        }
        let bytes = self.input.filled();
        if first && bytes.first() == Some(&b'P') {
            let length = bytes.len().min(PREFACE.len());
            if bytes[..length] == PREFACE[..length] {
                return (length == PREFACE.len()).then_some(Next::Http2);
            }
        }
        let limits = &self.shard.core.options.limits;
        let limit = limits.head_bytes.min(BIG_BYTES - 1);
        match head_end(bytes, scanned) {
            Ok(Some(end)) if end <= limit => Some(Next::Head(end)),
            Ok(None) if bytes.len() < limit => None,
            Ok(_) => Some(Next::Reject(too_large(bytes, limits.target_bytes))),
            Err(_) => Some(Next::Reject(Reject::bad("a line ends without carriage return"))),
        }
    }

    async fn request(&mut self, length: usize) -> After {
        let shard = Arc::clone(&self.shard);
        let _open = InProgress::new(shard.counters());
        let head = &self.input.filled()[..length];
        let prepared = {
            let max_target = shard.core.options.limits.target_bytes;
            request::prepare_http1(head, max_target, &self.peer, &shard.core.table.load())
        };
        match prepared {
            Ok(prepared) => {
                let begun = crate::access::Entry::begin_http1(&shard, &self.peer, head);
                self.input.consume(length);
                self.exchange(prepared, begun).await
            }
            Err(reject) => {
                shard.counters().malformed.add();
                let json = memchr::memmem::find(head, b"application/json").is_some();
                self.refuse(reject, json, head.starts_with(b"HEAD "), true).await;
                After::Linger
            }
        }
    }

    /// Answers in place of a backend. Returns whether that could be written.
    async fn refuse(&mut self, reject: Reject, json: bool, is_head: bool, close: bool) -> bool {
        let counters = self.shard.counters();
        counters.own_answers.add();
        counters.answered(reject.status).add();
        let mut text = buffer::take_text();
        answer::write(&mut text, reject, json, is_head, close);
        let written = self.write(&text).await;
        buffer::give_text(text);
        written
    }

    /// Writes and flushes all of `bytes`, unless the client does not take it for too long.
    async fn write(&mut self, bytes: &[u8]) -> bool {
        let deadline = Instant::now() + self.shard.core.options.timeouts.stall;
        let mut rest = bytes;
        poll_fn(|cx| {
            let wrote = poll_write_all(cx, &mut self.io, &mut rest);
            if wrote.is_pending() && self.timer.poll(cx, deadline).is_ready() {
                return Poll::Ready(false);
            }
            wrote.map(|result| result.is_ok())
        })
        .await
    }

    /// Ends the connection for both sides.
    async fn close(mut self) {
        let deadline = Instant::now() + LINGER;
        poll_fn(|cx| {
            let ended = Pin::new(&mut self.io).poll_shutdown(cx).map(drop);
            if ended.is_pending() { self.timer.poll(cx, deadline) } else { ended }
        })
        .await;
    }

    /// Stops writing and reads over what the client still sends, so that the kernel does not
    /// reset the connection under an answer that was not read yet (RFC 9112 section 9.6).
    async fn linger(mut self) {
        let deadline = Instant::now() + LINGER;
        let mut left = LINGER_BYTES;
        let mut shut = false;
        poll_fn(|cx| {
            if !shut {
                shut = Pin::new(&mut self.io).poll_shutdown(cx).is_ready();
            }
            while left > 0 {
                self.input.consume(self.input.filled().len());
                match self.input.poll_fill(cx, &mut self.io) {
                    Poll::Ready(Ok(n @ 1..)) => left = left.saturating_sub(n),
                    Poll::Ready(_) => return Poll::Ready(()),
                    Poll::Pending => return self.timer.poll(cx, deadline),
                }
            }
            Poll::Ready(())
        })
        .await;
    }
}

fn too_large(head: &[u8], max_target: usize) -> Reject {
    let line = memchr::memchr(b'\r', head).unwrap_or(head.len());
    if line > max_target {
        Reject::new(414, "the request target is too long")
    } else {
        Reject::new(431, "the request head is too large")
    }
}

fn poll_write_all<W: AsyncWrite + Unpin>(
    cx: &mut Context<'_>,
    sink: &mut W,
    rest: &mut &[u8],
) -> Poll<std::io::Result<()>> {
    while !rest.is_empty() {
        let n = ready!(Pin::new(&mut *sink).poll_write(cx, rest))?;
        if n == 0 {
            return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into()));
        }
        *rest = &rest[n..];
    }
    Pin::new(sink).poll_flush(cx)
}
