//! Bytes in both directions, after a connection has left HTTP (RFC 9110 section 7.8).

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use crate::buffer::Buffer;
use crate::timer::Timer;

/// One end: a socket and what has been read from it.
pub(crate) struct End<'a, IO> {
    pub(crate) io: &'a mut IO,
    pub(crate) input: &'a mut Buffer,
}

#[derive(Default)]
struct Direction {
    read_ended: bool,
    ended: bool,
    moved: u64,
}

/// When one side has ended, the other may still speak, but not be silent for longer than this.
const HALF_CLOSED: Duration = Duration::from_secs(30);

/// Copies until both directions have ended, one fails, or nothing moves for `limit`.
pub(crate) async fn run<A, B>(
    a: End<'_, A>,
    b: End<'_, B>,
    limit: Duration,
    timer: &mut Timer,
) -> io::Result<()>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (mut there, mut back) = (Direction::default(), Direction::default());
    let (mut seen, mut half_closed) = (0, false);
    let mut deadline = Instant::now() + limit;
    poll_fn(|cx| {
        loop {
            let one = there.poll(cx, a.io, a.input, b.io)?;
            let other = back.poll(cx, b.io, b.input, a.io)?;
            if one.is_ready() && other.is_ready() {
                return Poll::Ready(Ok(()));
            }
            if one.is_ready() != other.is_ready() && !half_closed {
                half_closed = true;
                deadline = Instant::now() + limit.min(HALF_CLOSED);
            }
            ready!(timer.poll(cx, deadline));
            if there.moved + back.moved == seen {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            seen = there.moved + back.moved;
            deadline = Instant::now() + if half_closed { limit.min(HALF_CLOSED) } else { limit };
        }
    })
    .await
}

impl Direction {
    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut R,
        input: &mut Buffer,
        sink: &mut W,
    ) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        if self.ended {
            return Poll::Ready(Ok(()));
        }
        loop {
            while !input.is_empty() {
                let n = ready!(Pin::new(&mut *sink).poll_write(cx, input.filled()))?;
                if n == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                input.consume(n);
                self.moved += n as u64;
            }
            if self.read_ended {
                ready!(Pin::new(&mut *sink).poll_shutdown(cx))?;
                self.ended = true;
                return Poll::Ready(Ok(()));
            }
            match input.poll_fill(cx, source)? {
                Poll::Ready(n) => self.read_ended = n == 0,
                Poll::Pending => {
                    let _ = Pin::new(&mut *sink).poll_flush(cx)?;
                    return Poll::Pending;
                }
            }
        }
    }
}
