//! One request of an HTTP/1 client: to a backend, and the response back, both streaming at once.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::time::Instant;

use super::{After, Connection, Io};
use crate::access::Entry;
use crate::body::Decoder;
use crate::buffer::{self, BIG_BYTES};
use crate::pump::{Pump, PumpError};
use crate::request::{Framing, Prepared, Reject};
use crate::response::{self, Asked, BadResponse, head_end};
use crate::tunnel;
use crate::upstream::{Attempts, Upstream};

const MALFORMED_RESPONSE: Reject = Reject::new(502, "the backend's response is malformed");

/// Why there is no response.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// The client is gone.
    #[error("the client is gone")]
    Client,
    /// The client's body breaks its framing.
    #[error("the request body is malformed")]
    Body,
    /// The client sends its body too slowly.
    #[error("the request body took too long")]
    SlowClient,
    /// The connection to the backend ended; `clean` when not a byte of a response had come.
    #[error("the backend closed the connection")]
    Backend {
        /// Whether the request may be sent again.
        clean: bool,
    },
    /// The response makes no sense.
    #[error(transparent)]
    Response(BadResponse),
    /// The backend takes too long.
    #[error("the backend did not answer in time")]
    SlowBackend,
}

impl Fault {
    /// What the client is told; nothing when it is gone.
    pub(crate) fn reject(&self) -> Option<Reject> {
        Some(match self {
            Self::Client => return None,
            Self::Body => Reject::bad("the request body is malformed"),
            Self::SlowClient => Reject::new(408, "the request body took too long"),
            Self::Backend { .. } => Reject::new(502, "the backend closed the connection"),
            Self::Response(_) => MALFORMED_RESPONSE,
            Self::SlowBackend => Reject::new(504, "the backend did not answer in time"),
        })
    }
}

/// A final response, ready to be passed on.
struct Final {
    status: u16,
    head: Vec<u8>,
    decoder: Decoder,
    chunked: bool,
    keep: bool,
    backend_keeps: bool,
}

enum Received {
    Interim(Vec<u8>),
    Switch(Vec<u8>),
    Final(Final),
}

impl<IO: Io> Connection<IO> {
    /// Carries a request out. The head has been taken from the input; the body has not.
    pub(super) async fn exchange(
        &mut self,
        mut request: Prepared,
        mut log: Option<Entry>,
    ) -> After {
        let shard = Arc::clone(&self.shard);
        let Some(route) = request.route.take() else {
            let reject = Reject::new(404, "no route for this host and path");
            return self.answer(&request, reject, log).await;
        };
        let mut attempts = Attempts::new(&route, &shard);
        let replayable = request.idempotent && request.framing.is_empty();
        loop {
            let mut upstream = match attempts.next().await {
                Ok(upstream) => upstream,
                Err(reject) => return self.answer(&request, reject, log).await,
            };
            if let Some(log) = &mut log {
                log.sent_to(&route, upstream.address());
            }
            let head = if replayable && upstream.reused {
                let mut copy = buffer::take_text();
                copy.extend_from_slice(&request.head);
                copy
            } else {
                std::mem::take(&mut request.head)
            };
            let chunked = request.framing == Framing::Chunked;
            let mut upload = Pump::new(head, request.framing.decoder(), chunked);
            match self.response(&request, &mut upstream, &mut upload).await {
                Err(Fault::Backend { clean: true })
                    if replayable && attempts.was_stale(&upstream) => {}
                Err(fault) => {
                    tracing::debug!(%fault, backend = %upstream.address(), "no response");
                    return match fault.reject() {
                        Some(reject) => self.answer(&request, reject, log).await,
                        None => self.abort(log),
                    };
                }
                Ok(Received::Switch(head)) => return self.tunnel(&head, upstream, log).await,
                Ok(Received::Final(response)) => {
                    buffer::give_text(request.head);
                    return self.download(upstream, upload, response, log).await;
                }
                Ok(Received::Interim(_)) => return self.abort(log),
            }
        }
    }

    /// The proxy's own answer to a request whose body has perhaps not been read.
    async fn answer(&mut self, request: &Prepared, reject: Reject, log: Option<Entry>) -> After {
        let keep = request.keep_alive
            && !request.http10
            && request.framing.is_empty()
            && !self.shard.is_draining();
        let written = self.refuse(reject, request.json, request.is_head, !keep).await;
        if let Some(log) = log {
            log.finish(reject.status, 0);
        }
        match (written, keep) {
            (false, _) => After::Abort,
            (true, true) => After::Next,
            (true, false) => After::Linger,
        }
    }

    fn abort(&self, log: Option<Entry>) -> After {
        self.shard.counters().aborted.add();
        if let Some(log) = log {
            log.finish(499, 0);
        }
        After::Abort
    }

    /// Sends the request and reads heads until one is not interim.
    async fn response(
        &mut self,
        request: &Prepared,
        upstream: &mut Upstream,
        upload: &mut Pump,
    ) -> Result<Received, Fault> {
        let mut interim = false;
        loop {
            let end = self.response_head(upstream, upload).await.map_err(|fault| match fault {
                Fault::Backend { clean } => Fault::Backend { clean: clean && !interim },
                other => other,
            })?;
            let keep = request.keep_alive && upload.is_done() && !self.shard.is_draining();
            let received = read_head(&upstream.input.filled()[..end], request, keep)
                .map_err(Fault::Response)?;
            upstream.input.consume(end);
            let Received::Interim(head) = received else { return Ok(received) };
            interim = true;
            if !request.http10 && !self.write(&head).await {
                return Err(Fault::Client);
            }
        }
    }

    /// Sends the request, its body as it comes, until a whole head of a response is there. Returns its length.
    async fn response_head(
        &mut self,
        upstream: &mut Upstream,
        upload: &mut Pump,
    ) -> Result<usize, Fault> {
        let options = &self.shard.core.options;
        let limit = options.limits.head_bytes.min(BIG_BYTES - 1);
        let (stall, answer) = (options.timeouts.stall, options.timeouts.response_head);
        let mut sent = false;
        let mut deadline = Instant::now() + stall;
        let mut moved = 0;
        let mut scanned = 0;
        poll_fn(|cx| {
            loop {
                if !sent {
                    let sending = upload.poll(cx, &mut self.io, &mut self.input, &mut upstream.io);
                    if let Some(result) = sent_or_fault(sending) {
                        result?;
                        sent = true;
                        deadline = Instant::now() + answer;
                    }
                }
                if let Poll::Ready(result) = poll_head(cx, upstream, limit, &mut scanned) {
                    return Poll::Ready(result);
                }
                if sent && self.poll_client_gone(cx).is_ready() {
                    return Poll::Ready(Err(Fault::Client));
                }
                ready!(self.timer.poll(cx, deadline));
                if sent || upload.moved() == moved {
                    let of_backend = sent || upload.awaits_sink();
                    let fault = if of_backend { Fault::SlowBackend } else { Fault::SlowClient };
                    return Poll::Ready(Err(fault));
                }
                moved = upload.moved();
                deadline = Instant::now() + stall;
            }
        })
        .await
    }

    /// Ready when the client has closed its connection. Reads ahead what it sends meanwhile: the next requests.
    fn poll_client_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while !self.input.is_full() {
            match ready!(self.input.poll_fill(cx, &mut self.io)) {
                Ok(1..) => {}
                Ok(0) | Err(_) => return Poll::Ready(()),
            }
        }
        Poll::Pending
    }

    /// Passes the response on, while the rest of the request still goes the other way.
    async fn download(
        &mut self,
        mut upstream: Upstream,
        mut upload: Pump,
        response: Final,
        log: Option<Entry>,
    ) -> After {
        self.shard.counters().answered(response.status).add();
        let mut download = Pump::new(response.head, response.decoder, response.chunked);
        let result = self.both_ways(&mut upstream, &mut upload, &mut download).await;
        if let Err(error) = &result {
            tracing::debug!(%error, backend = %upstream.address(), "response broken off");
            if download.moved() == 0 && matches!(error, PumpError::Malformed(_)) {
                self.shard.counters().answered(response.status).sub();
                self.refuse(MALFORMED_RESPONSE, false, false, true).await;
                return After::Linger;
            }
            self.shard.counters().aborted.add();
        }
        if let Some(log) = log {
            log.finish(response.status, download.moved());
        }
        if result.is_err() {
            return After::Abort;
        }
        let uploaded = upload.is_done();
        download.recycle();
        upload.recycle();
        if uploaded && response.backend_keeps {
            upstream.keep(&self.shard);
        }
        match (response.keep, uploaded) {
            (true, _) => After::Next,
            (false, true) => After::Close,
            (false, false) => After::Linger,
        }
    }

    async fn both_ways(
        &mut self,
        upstream: &mut Upstream,
        upload: &mut Pump,
        download: &mut Pump,
    ) -> Result<(), PumpError> {
        let stall = self.shard.core.options.timeouts.stall;
        let mut uploaded = upload.is_done();
        let mut deadline = None;
        let mut moved = 0;
        poll_fn(|cx| {
            loop {
                if !uploaded {
                    match upload.poll(cx, &mut self.io, &mut self.input, &mut upstream.io) {
                        // The backend need not hear all before it answers.
                        Poll::Ready(Ok(()) | Err(PumpError::Sink(_))) => uploaded = true,
                        Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                        Poll::Pending => {}
                    }
                }
                let done = download.poll(cx, &mut upstream.io, &mut upstream.input, &mut self.io);
                if done.is_ready() {
                    return done;
                }
                if uploaded && self.poll_client_gone(cx).is_ready() {
                    return Poll::Ready(Err(PumpError::Truncated));
                }
                let until = *deadline.get_or_insert_with(|| Instant::now() + stall);
                ready!(self.timer.poll(cx, until));
                if upload.moved() + download.moved() == moved {
                    return Poll::Ready(Err(PumpError::Stalled));
                }
                moved = upload.moved() + download.moved();
                deadline = None;
            }
        })
        .await
    }

    /// Leaves HTTP.
    async fn tunnel(&mut self, head: &[u8], mut upstream: Upstream, log: Option<Entry>) -> After {
        self.shard.counters().answered(101).add();
        if !self.write(head).await {
            return self.abort(log);
        }
        let limit = self.shard.core.options.timeouts.tunnel;
        let client = tunnel::End { io: &mut self.io, input: &mut self.input };
        let backend = tunnel::End { io: &mut upstream.io, input: &mut upstream.input };
        let result = tunnel::run(client, backend, limit, &mut self.timer).await;
        if let Some(log) = log {
            log.finish(101, 0);
        }
        if result.is_ok() { After::Close } else { After::Abort }
    }
}

/// Whether the request is through (also when the backend does not want the rest of it), or failed for good.
fn sent_or_fault(sending: Poll<Result<(), PumpError>>) -> Option<Result<(), Fault>> {
    match sending {
        Poll::Pending => None,
        // Perhaps the backend has answered before it closed.
        Poll::Ready(Ok(()) | Err(PumpError::Sink(_))) => Some(Ok(())),
        Poll::Ready(Err(PumpError::Malformed(_))) => Some(Err(Fault::Body)),
        Poll::Ready(Err(_)) => Some(Err(Fault::Client)),
    }
}

/// Reads from the backend until a head is complete.
pub(crate) fn poll_head(
    cx: &mut Context<'_>,
    upstream: &mut Upstream,
    limit: usize,
    scanned: &mut usize,
) -> Poll<Result<usize, Fault>> {
    let malformed = || Poll::Ready(Err(Fault::Response(BadResponse::Head)));
    loop {
        let bytes = upstream.input.filled();
        match head_end(bytes, scanned) {
            Ok(Some(end)) if end <= limit => return Poll::Ready(Ok(end)),
            Ok(None) if bytes.len() < limit => {}
            _ => return malformed(),
        }
        match ready!(upstream.input.poll_fill(cx, &mut upstream.io)) {
            Ok(1..) => {}
            Ok(0) | Err(_) => {
                let clean = upstream.input.is_empty();
                return Poll::Ready(Err(Fault::Backend { clean }));
            }
        }
    }
}

fn read_head(head: &[u8], request: &Prepared, keep: bool) -> Result<Received, BadResponse> {
    let asked = Asked { head: request.is_head, upgrade: request.upgrade };
    response::read(head, asked, |response| {
        let mut head = buffer::take_text();
        match response.status {
            101 => {
                response.write_switch(&mut head);
                Received::Switch(head)
            }
            ..200 => {
                response.write_interim(&mut head);
                Received::Interim(head)
            }
            status => {
                let (chunked, keep) = response.write_final(&mut head, request.http10, keep);
                Received::Final(Final {
                    status,
                    head,
                    decoder: response.decoder(),
                    chunked,
                    keep,
                    backend_keeps: response.keeps_connection(),
                })
            }
        }
    })
}
