//! Bodies between HTTP/2 streams and backends' connections.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use h2::{RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::io::AsyncWrite;

use crate::body::{BodyError, Decoder, Step, trailer_fields};
use crate::buffer::{BIG_BYTES, SMALL_BYTES};
use crate::field;
use crate::pump::{chunk_head, field as put};
use crate::upstream::Upstream;

/// Which side ended an upload early.
#[derive(Debug, thiserror::Error)]
pub(super) enum UploadError {
    #[error("read a stream")]
    Stream(#[from] h2::Error),
    #[error("write to a backend")]
    Backend(#[source] io::Error),
}

/// A request on its way to a backend.
pub(super) struct Upload {
    pending: Vec<u8>,
    written: usize,
    body: RecvStream,
    chunked: bool,
    state: State,
    /// Bytes in `pending` that the client's window has not got back.
    held: usize,
    moved: u64,
}

#[derive(PartialEq, Eq)]
enum State {
    Data,
    Trailers,
    Done,
}

impl Upload {
    pub(super) fn new(head: Vec<u8>, body: RecvStream, chunked: bool, has_body: bool) -> Self {
        let state = if has_body { State::Data } else { State::Done };
        Self { pending: head, written: 0, body, chunked, state, held: 0, moved: 0 }
    }

    pub(super) fn is_done(&self) -> bool {
        self.state == State::Done && self.written == self.pending.len()
    }

    pub(super) fn awaits_backend(&self) -> bool {
        self.written < self.pending.len()
    }

    pub(super) fn moved(&self) -> u64 {
        self.moved
    }

    /// Gives the stream back, to read what follows the request.
    pub(super) fn into_body(self) -> RecvStream {
        self.body
    }

    pub(super) fn poll<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut W,
    ) -> Poll<Result<(), UploadError>> {
        loop {
            while self.state != State::Done && self.pending.len() < SMALL_BYTES {
                match self.poll_read(cx)? {
                    Poll::Ready(()) => {}
                    Poll::Pending => break,
                }
            }
            if self.pending.is_empty() {
                return if self.state == State::Done { Poll::Ready(Ok(())) } else { Poll::Pending };
            }
            while self.written < self.pending.len() {
                let rest = &self.pending[self.written..];
                let n = ready!(Pin::new(&mut *sink).poll_write(cx, rest));
                let n = n.map_err(UploadError::Backend)?;
                if n == 0 {
                    return Poll::Ready(Err(UploadError::Backend(io::ErrorKind::WriteZero.into())));
                }
                self.written += n;
                self.moved += n as u64;
            }
            self.pending.clear();
            self.written = 0;
            self.body.flow_control().release_capacity(std::mem::take(&mut self.held))?;
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
        if self.state == State::Data {
            match ready!(self.body.poll_data(cx)).transpose()? {
                Some(data) => self.take(&data),
                None => self.state = State::Trailers,
            }
            return Poll::Ready(Ok(()));
        }
        let trailers = ready!(self.body.poll_trailers(cx))?;
        if self.chunked {
            self.pending.extend_from_slice(b"0\r\n");
            for (name, value) in trailers.iter().flatten() {
                if field::allowed_in_trailers(name.as_str().as_bytes()) {
                    put(&mut self.pending, name.as_str().as_bytes(), value.as_bytes());
                }
            }
            self.pending.extend_from_slice(b"\r\n");
        }
        self.state = State::Done;
        Poll::Ready(Ok(()))
    }

    fn take(&mut self, data: &Bytes) {
        self.held += data.len();
        if data.is_empty() {
            return; // an empty chunk would end the body
        }
        if self.chunked {
            chunk_head(&mut self.pending, data.len());
        }
        self.pending.extend_from_slice(data);
        if self.chunked {
            self.pending.extend_from_slice(b"\r\n");
        }
    }
}

/// Which side ended a download early.
#[derive(Debug, thiserror::Error)]
pub(super) enum DownloadError {
    #[error("read a response")]
    Backend(#[source] io::Error),
    #[error("a response ended early")]
    Truncated,
    #[error(transparent)]
    Malformed(#[from] BodyError),
    #[error("write a stream")]
    Stream(#[from] h2::Error),
    #[error("the stream is closed")]
    Closed,
    #[error("a transfer stalled")]
    Stalled,
}

/// A response body on its way to the client.
pub(super) struct Download {
    decoder: Decoder,
    sink: SendStream<Bytes>,
    pending: Bytes,
    ended: bool,
    trailers: Option<HeaderMap>,
    moved: u64,
}

impl Download {
    pub(super) fn new(decoder: Decoder, sink: SendStream<Bytes>) -> Self {
        let pending = Bytes::new();
        Self { decoder, sink, pending, ended: false, trailers: None, moved: 0 }
    }

    pub(super) fn moved(&self) -> u64 {
        self.moved
    }

    pub(super) fn sink(&mut self) -> &mut SendStream<Bytes> {
        &mut self.sink
    }

    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        upstream: &mut Upstream,
    ) -> Poll<Result<(), DownloadError>> {
        loop {
            if self.pending.is_empty() && !self.ended {
                self.gather(upstream)?;
            }
            if !self.pending.is_empty() {
                ready!(self.poll_send(cx))?;
                if self.pending.is_empty() && self.ended && self.trailers.is_none() {
                    return Poll::Ready(Ok(()));
                }
                continue;
            }
            if self.ended {
                match self.trailers.take() {
                    Some(trailers) => self.sink.send_trailers(trailers)?,
                    None => self.sink.send_data(Bytes::new(), true)?,
                }
                return Poll::Ready(Ok(()));
            }
            let filled = ready!(upstream.input.poll_fill(cx, &mut upstream.io));
            match filled.map_err(DownloadError::Backend)? {
                0 if self.decoder.may_end() => self.ended = true,
                0 => return Poll::Ready(Err(DownloadError::Truncated)),
                n if n >= SMALL_BYTES / 2 => upstream.input.enlarge(),
                _ => {}
            }
        }
    }

    /// Takes what has been read, as one piece.
    fn gather(&mut self, upstream: &mut Upstream) -> Result<(), DownloadError> {
        let mut piece = BytesMut::new();
        while piece.len() < BIG_BYTES {
            match self.decoder.step(upstream.input.filled())? {
                Step::NeedMore => break,
                Step::Data { skip, len } => {
                    upstream.input.consume(skip);
                    if piece.is_empty()
                        && let Some(whole) = upstream.input.detach(len)
                    {
                        self.pending = whole;
                        return self.end_of_length();
                    }
                    piece.extend_from_slice(&upstream.input.filled()[..len]);
                    upstream.input.consume(len);
                }
                Step::End { used, trailers } => {
                    upstream.input.consume(used);
                    self.ended = true;
                    self.trailers = trailer_map(&trailers)?;
                    break;
                }
            }
        }
        self.pending = piece.freeze();
        Ok(())
    }

    /// A body of known length ends without another byte: its last piece says so.
    fn end_of_length(&mut self) -> Result<(), DownloadError> {
        self.ended = self.decoder.is_empty();
        Ok(())
    }

    /// Sends as much as the client's window takes.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), DownloadError>> {
        while !self.pending.is_empty() {
            self.sink.reserve_capacity(self.pending.len());
            let mut room = self.sink.capacity();
            while room == 0 {
                room = match ready!(self.sink.poll_capacity(cx)) {
                    Some(room) => room?,
                    None => return Poll::Ready(Err(DownloadError::Closed)),
                };
            }
            let part = self.pending.split_to(room.min(self.pending.len()));
            self.moved += part.len() as u64;
            let last = self.pending.is_empty() && self.ended && self.trailers.is_none();
            self.sink.send_data(part, last)?;
        }
        Poll::Ready(Ok(()))
    }
}

fn trailer_map(section: &[u8]) -> Result<Option<HeaderMap>, BodyError> {
    let mut map = HeaderMap::new();
    for (name, value) in trailer_fields(section)? {
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| BodyError::Trailers)?;
        let value = HeaderValue::from_bytes(&value).map_err(|_| BodyError::Trailers)?;
        map.append(name, value);
    }
    Ok((!map.is_empty()).then_some(map))
}
