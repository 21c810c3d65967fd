//! A client's HTTP/2 connection (RFC 9113): many requests at once, each a task of its own.

mod body;
mod socket;
mod stream;

use std::future::{Future as _, poll_fn};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use h2::server::{Builder, Connection};
use tokio::time::Instant;

use crate::batch::Batch;
use crate::http1::Io;
use crate::request::Peer;
use crate::shard::Shard;
use crate::timer::Timer;

/// What a client may send to one stream before the backend has taken it.
const STREAM_WINDOW: u32 = 256 << 10;
/// What a client may send to all streams together.
const CONNECTION_WINDOW: u32 = 1 << 20;
/// What waits for a client's window, for each stream.
const SEND_BUFFER: usize = 128 << 10;
/// Streams that a client has opened and reset before they were looked at (CVE-2023-44487); then GOAWAY.
const MAX_PENDING_RESETS: usize = 20;
/// Streams that broke the protocol; then GOAWAY.
const MAX_ERROR_RESETS: usize = 256;
/// Streams that we reset and still remember.
const MAX_RESETS_KEPT: usize = 32;
const RESET_KEPT: Duration = Duration::from_secs(1);

/// What the tasks of a connection share; the connection itself counts as one holder.
struct Client {
    peer: Peer,
    shard: Arc<Shard>,
}

/// Serves a connection until it ends.
pub(crate) async fn serve<IO: Io>(io: IO, peer: Peer, shard: Arc<Shard>) {
    let drained = shard.drained();
    let options = &shard.core.options;
    let handshake =
        builder(options.limits.h2_streams, options.limits.head_bytes).handshake(Batch::new(io));
    let handshake = tokio::time::timeout(options.timeouts.head, handshake).await;
    let Ok(Ok(connection)) = handshake else { return };
    let keep_alive = options.timeouts.keep_alive;
    let client = Arc::new(Client { peer, shard: Arc::clone(&shard) });
    let mut serving = Serving {
        connection,
        client,
        timer: Timer::default(),
        idle_since: Instant::now(),
        keep_alive,
        leaving: false,
    };
    let mut drained = drained;
    poll_fn(|cx| {
        if !serving.leaving && (shard.is_draining() || drained.as_mut().poll(cx).is_ready()) {
            serving.leave();
        }
        serving.poll(cx)
    })
    .await;
}

fn builder(streams: u32, head_bytes: usize) -> Builder {
    let mut builder = Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(streams)
        .max_header_list_size(u32::try_from(head_bytes).unwrap_or(u32::MAX))
        .max_send_buffer_size(SEND_BUFFER)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .max_local_error_reset_streams(Some(MAX_ERROR_RESETS))
        .max_concurrent_reset_streams(MAX_RESETS_KEPT)
        .reset_stream_duration(RESET_KEPT)
        .enable_connect_protocol();
    builder
}

struct Serving<IO> {
    connection: Connection<Batch<IO>, Bytes>,
    client: Arc<Client>,
    timer: Timer,
    idle_since: Instant,
    keep_alive: Duration,
    leaving: bool,
}

impl<IO: Io> Serving<IO> {
    /// Tells the client to make another connection; the requests that it has made are still answered.
    fn leave(&mut self) {
        self.leaving = true;
        self.connection.graceful_shutdown();
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match self.connection.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, respond)))) => {
                    let client = Arc::clone(&self.client);
                    tokio::spawn(stream::serve(request, respond, client));
                    self.idle_since = Instant::now();
                }
                Poll::Ready(Some(Err(error))) => {
                    tracing::debug!(%error, "HTTP/2 connection failed");
                    return Poll::Ready(());
                }
                Poll::Ready(None) => return Poll::Ready(()),
                Poll::Pending => break,
            }
        }
        self.poll_idle(cx)
    }

    /// Leaves when no request was open for long, and ends for good when the client does not follow.
    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.timer.poll(cx, self.idle_since + self.keep_alive).is_ready() {
            let busy = Arc::strong_count(&self.client) > 1;
            if self.leaving && !busy {
                return Poll::Ready(());
            }
            if !busy {
                self.leave();
                cx.waker().wake_by_ref();
            }
            self.idle_since = Instant::now();
        }
        Poll::Pending
    }
}
