//! One request of an HTTP/2 client: to a backend over HTTP/1.1, and the response back.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use base64::Engine as _;
use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use tokio::time::Instant;

use super::Client;
use super::body::{Download, DownloadError, Upload, UploadError};
use super::socket::StreamSocket;
use crate::access::Entry;
use crate::answer;
use crate::body::Decoder;
use crate::buffer::{self, BIG_BYTES, Buffer};
use crate::http1::exchange::{Fault, poll_head};

use crate::request::{Facts, Framing, Line, MAX_FIELDS, Peer, Prepared, Reject, prepare};
use crate::response::{self, Asked, BadResponse};
use crate::shard::InProgress;
use crate::table::Table;
use crate::timer::Timer;
use crate::tunnel;
use crate::upstream::{Attempts, Upstream};

/// Serves one stream.
pub(super) fn serve(
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
    client: Arc<Client>,
) -> impl Future<Output = ()> {
    // The head is read here, so that the task need not hold it.
    let shard = &client.shard;
    let max_target = shard.core.options.limits.target_bytes;
    let (head, body) = request.into_parts();
    let log = Entry::begin_http2(shard, &client.peer, &head);
    let table = shard.core.table.load();
    let prepared = prepare_http2(&head, body.is_end_stream(), max_target, &client.peer, &table);
    let is_head = head.method == Method::HEAD;
    let mut exchange = Exchange { client, respond, timer: Timer::default(), log };
    async move {
        let shard = Arc::clone(&exchange.client.shard);
        let _open = InProgress::new(shard.counters());
        match prepared {
            Ok(prepared) => exchange.run(prepared, body).await,
            Err(reject) => {
                shard.counters().malformed.add();
                exchange.answer(reject, false, is_head);
            }
        }
    }
}

struct Exchange {
    client: Arc<Client>,
    respond: SendResponse<Bytes>,
    timer: Timer,
    log: Option<Entry>,
}

struct Final {
    head: Response<()>,
    decoder: Decoder,
    backend_keeps: bool,
}

enum Received {
    Interim(Response<()>),
    Switch(Response<()>),
    Final(Final),
}

impl Exchange {
    async fn run(&mut self, mut request: Prepared, body: RecvStream) {
        let shard = Arc::clone(&self.client.shard);
        let (json, is_head) = (request.json, request.is_head);
        let Some(route) = request.route.take() else {
            return self.answer(Reject::new(404, "no route for this host and path"), json, is_head);
        };
        let mut attempts = Attempts::new(&route, &shard);
        let has_body = request.framing != Framing::None;
        let replayable = request.idempotent && !has_body;
        let mut body = body;
        loop {
            let mut upstream = match attempts.next().await {
                Ok(upstream) => upstream,
                Err(reject) => return self.answer(reject, json, is_head),
            };
            if let Some(log) = &mut self.log {
                log.sent_to(&route, upstream.address());
            }
            let mut head = buffer::take_text();
            head.extend_from_slice(&request.head);
            let mut upload = Upload::new(head, body, request.framing == Framing::Chunked, has_body);
            match self.response(&request, &mut upstream, &mut upload).await {
                Err(Fault::Backend { clean: true })
                    if replayable && attempts.was_stale(&upstream) =>
                {
                    body = upload.into_body();
                }
                Err(fault) => {
                    tracing::debug!(%fault, backend = %upstream.address(), "no response");
                    return match fault.reject() {
                        Some(reject) => self.answer(reject, json, is_head),
                        None => self.abort(),
                    };
                }
                Ok(Received::Switch(head)) => {
                    return Box::pin(self.tunnel(head, upstream, upload.into_body())).await;
                }
                Ok(Received::Final(response)) => {
                    buffer::give_text(request.head);
                    return self.download(upstream, upload, response).await;
                }
                Ok(Received::Interim(_)) => return self.abort(),
            }
        }
    }

    /// The proxy's own answer.
    fn answer(&mut self, reject: Reject, json: bool, is_head: bool) {
        let counters = self.client.shard.counters();
        counters.own_answers.add();
        counters.answered(reject.status).add();
        let (media_type, text) = answer::body(reject, json);
        let mut response = Response::builder()
            .status(reject.status)
            .header("content-type", media_type)
            .header("content-length", text.len());
        if reject.status == 503 {
            response = response.header("retry-after", answer::RETRY_AFTER_SECS);
        }
        if let Ok(response) = response.body(())
            && let Ok(mut sink) = self.respond.send_response(response, is_head)
            && !is_head
        {
            let _ = sink.send_data(text.into(), true);
        }
        if let Some(log) = self.log.take() {
            log.finish(reject.status, 0);
        }
    }

    fn abort(&mut self) {
        self.client.shard.counters().aborted.add();
        self.respond.send_reset(Reason::INTERNAL_ERROR);
        if let Some(log) = self.log.take() {
            log.finish(499, 0);
        }
    }

    async fn response(
        &mut self,
        request: &Prepared,
        upstream: &mut Upstream,
        upload: &mut Upload,
    ) -> Result<Received, Fault> {
        let mut interim = false;
        loop {
            let end = self.response_head(upstream, upload).await.map_err(|fault| match fault {
                Fault::Backend { clean } => Fault::Backend { clean: clean && !interim },
                other => other,
            })?;
            let received = read_head(&upstream.input.filled()[..end], request);
            upstream.input.consume(end);
            match received.map_err(Fault::Response)? {
                Received::Interim(head) => {
                    interim = true;
                    self.respond.send_informational(head).map_err(|_| Fault::Client)?;
                }
                other => return Ok(other),
            }
        }
    }

    async fn response_head(
        &mut self,
        upstream: &mut Upstream,
        upload: &mut Upload,
    ) -> Result<usize, Fault> {
        let options = &self.client.shard.core.options;
        let limit = options.limits.head_bytes.min(BIG_BYTES - 1);
        let (stall, answer) = (options.timeouts.stall, options.timeouts.response_head);
        let (mut sent, mut moved, mut scanned) = (false, 0, 0);
        let mut deadline = Instant::now() + stall;
        poll_fn(|cx| {
            loop {
                if !sent && let Poll::Ready(result) = upload.poll(cx, &mut upstream.io) {
                    if let Err(UploadError::Stream(_)) = result {
                        return Poll::Ready(Err(Fault::Client));
                    }
                    sent = true;
                    deadline = Instant::now() + answer;
                }
                if let Poll::Ready(result) = poll_head(cx, upstream, limit, &mut scanned) {
                    return Poll::Ready(result);
                }
                if self.respond.poll_reset(cx).is_ready() {
                    return Poll::Ready(Err(Fault::Client));
                }
                ready!(self.timer.poll(cx, deadline));
                if sent || upload.moved() == moved {
                    let of_backend = sent || upload.awaits_backend();
                    let fault = if of_backend { Fault::SlowBackend } else { Fault::SlowClient };
                    return Poll::Ready(Err(fault));
                }
                moved = upload.moved();
                deadline = Instant::now() + stall;
            }
        })
        .await
    }

    async fn download(&mut self, mut upstream: Upstream, mut upload: Upload, response: Final) {
        let shard = Arc::clone(&self.client.shard);
        let status = response.head.status().as_u16();
        shard.counters().answered(status).add();
        let ends = response.decoder.is_empty();
        let Ok(sink) = self.respond.send_response(response.head, ends) else {
            return self.abort();
        };
        let mut download = Download::new(response.decoder, sink);
        let result = if ends {
            Ok(())
        } else {
            self.both_ways(&mut upstream, &mut upload, &mut download).await
        };
        if let Some(log) = self.log.take() {
            log.finish(status, download.moved());
        }
        match result {
            Ok(()) if upload.is_done() && response.backend_keeps => upstream.keep(&shard),
            Ok(()) => {}
            Err(error) => {
                tracing::debug!(%error, backend = %upstream.address(), "response broken off");
                shard.counters().aborted.add();
                download.sink().send_reset(Reason::INTERNAL_ERROR);
            }
        }
    }

    async fn both_ways(
        &mut self,
        upstream: &mut Upstream,
        upload: &mut Upload,
        download: &mut Download,
    ) -> Result<(), DownloadError> {
        let stall = self.client.shard.core.options.timeouts.stall;
        let mut uploaded = upload.is_done();
        let (mut deadline, mut moved) = (None, 0);
        poll_fn(|cx: &mut Context<'_>| {
            loop {
                if !uploaded && let Poll::Ready(result) = upload.poll(cx, &mut upstream.io) {
                    if let Err(UploadError::Stream(error)) = result {
                        return Poll::Ready(Err(error.into()));
                    }
                    uploaded = true;
                }
                let done = download.poll(cx, upstream);
                if done.is_ready() {
                    return done;
                }
                if download.sink().poll_reset(cx).is_ready() {
                    return Poll::Ready(Err(DownloadError::Closed));
                }
                let until = *deadline.get_or_insert_with(|| Instant::now() + stall);
                ready!(self.timer.poll(cx, until));
                if upload.moved() + download.moved() == moved {
                    return Poll::Ready(Err(DownloadError::Stalled));
                }
                moved = upload.moved() + download.moved();
                deadline = None;
            }
        })
        .await
    }

    /// Leaves HTTP on this stream (RFC 8441).
    async fn tunnel(&mut self, head: Response<()>, mut upstream: Upstream, body: RecvStream) {
        let shard = Arc::clone(&self.client.shard);
        shard.counters().answered(101).add();
        let Ok(sink) = self.respond.send_response(head, false) else { return self.abort() };
        let mut socket = StreamSocket::new(body, sink);
        let mut input = Buffer::default();
        let client = tunnel::End { io: &mut socket, input: &mut input };
        let backend = tunnel::End { io: &mut upstream.io, input: &mut upstream.input };
        let limit = shard.core.options.timeouts.tunnel;
        if tunnel::run(client, backend, limit, &mut self.timer).await.is_err() {
            socket.reset();
        }
        if let Some(log) = self.log.take() {
            log.finish(101, 0);
        }
    }
}

/// Reads the head of an HTTP/2 request and finds its route. The `h2` crate has checked the form of the fields.
fn prepare_http2(
    head: &http::request::Parts,
    ends: bool,
    max_target: usize,
    peer: &Peer,
    table: &Table,
) -> Result<Prepared, Reject> {
    if head.headers.len() > MAX_FIELDS {
        return Err(Reject::new(431, "too many header fields"));
    }
    let target = head.uri.path_and_query().map_or("", |target| target.as_str()).as_bytes();
    if target.len() > max_target {
        return Err(Reject::new(414, "the request target is too long"));
    }
    let mut fields = Vec::with_capacity(head.headers.len() + 1);
    fields.extend(head.headers.iter().map(|(n, v)| (n.as_str().as_bytes(), v.as_bytes())));
    let authority = head.uri.authority().map(|authority| authority.as_str().as_bytes());
    let mut line =
        Line { method: head.method.as_str().as_bytes(), target, authority, http10: false };
    let mut facts = Facts::of(fields.iter().copied())?;
    if facts.chunked || facts.upgrade.is_some() || facts.connection != Default::default() {
        return Err(Reject::bad("a field about the connection in HTTP/2"));
    }
    let mut framing = match (ends, facts.length) {
        (true, _) => Framing::None,
        (false, Some(length)) => Framing::Length(length),
        (false, None) => Framing::Chunked,
    };
    let key = websocket_key();
    if head.method == Method::CONNECT {
        let protocol = head.extensions.get::<h2::ext::Protocol>();
        let protocol = protocol.ok_or(Reject::new(405, "this is no forward proxy"))?;
        line.method = b"GET";
        framing = Framing::None;
        facts.upgrade = Some(protocol.as_str().as_bytes());
        facts.connection.upgrade = true;
        fields.push((b"sec-websocket-key", key.as_bytes()));
    }
    let prepared = prepare(&line, fields.iter().copied(), &facts, framing, peer, table)?;
    if head.method == Method::CONNECT && !prepared.upgrade {
        return Err(Reject::new(501, "this protocol is not tunnelled"));
    }
    Ok(prepared)
}

/// A nonce as RFC 6455 section 4.1 wants it.
fn websocket_key() -> String {
    base64::engine::general_purpose::STANDARD.encode(rand::random::<[u8; 16]>())
}

fn read_head(head: &[u8], request: &Prepared) -> Result<Received, BadResponse> {
    let asked = Asked { head: request.is_head, upgrade: request.upgrade };
    response::read(head, asked, |response| {
        let status = if response.status == 101 { 200 } else { response.status };
        let mut out = Response::new(());
        *out.status_mut() = StatusCode::from_u16(status).map_err(|_| BadResponse::Head)?;
        for (name, value) in response.fields() {
            if response.status == 101 && name.eq_ignore_ascii_case("sec-websocket-accept") {
                continue;
            }
            let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| BadResponse::Head)?;
            let value = HeaderValue::from_bytes(value).map_err(|_| BadResponse::Head)?;
            out.headers_mut().append(name, value);
        }
        Ok(match response.status {
            101 => Received::Switch(out),
            ..200 => Received::Interim(out),
            _ => {
                if let Some(length) = response.told_length() {
                    out.headers_mut().insert(http::header::CONTENT_LENGTH, length.into());
                }
                Received::Final(Final {
                    head: out,
                    decoder: response.decoder(),
                    backend_keeps: response.keeps_connection(),
                })
            }
        })
    })?
}
