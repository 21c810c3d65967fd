//! Moves one message from a socket to another: a ready-made head, then a body that is checked and framed anew.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite};

use crate::body::{BodyError, Decoder, Step, trailer_fields};
use crate::buffer::{self, BIG_BYTES, Buffer, SMALL_BYTES};

/// Which side ended a transfer early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PumpError {
    /// Reading failed.
    #[error("read a body")]
    Source(#[source] io::Error),
    /// The stream ended within the body.
    #[error("a body ended early")]
    Truncated,
    /// The body breaks its framing.
    #[error(transparent)]
    Malformed(#[from] BodyError),
    /// Writing failed.
    #[error("write a message")]
    Sink(#[source] io::Error),
    /// Nothing moved for too long.
    #[error("a transfer stalled")]
    Stalled,
}

/// A transfer on its way.
pub(crate) struct Pump {
    decoder: Decoder,
    /// Whether the receiver gets chunks.
    chunked: bool,
    /// Written before anything else.
    pending: Vec<u8>,
    written: usize,
    /// Bytes at the front of the source's buffer that go out as they are.
    direct: usize,
    decoded: bool,
    flushed: bool,
    moved: u64,
}

/// Bodies up to this size share a write with the head by being copied behind it.
const COPIED_BYTES: usize = 2 << 10;

impl Pump {
    /// Sends `head`, then a body framed by `decoder` at the source and, when `chunked`, in chunks to the sink.
    pub(crate) fn new(head: Vec<u8>, decoder: Decoder, chunked: bool) -> Self {
        let decoded = decoder.is_empty();
        Self {
            decoder,
            chunked,
            pending: head,
            written: 0,
            direct: 0,
            decoded,
            flushed: false,
            moved: 0,
        }
    }

    /// Bytes written so far; grows whenever there is progress.
    pub(crate) fn moved(&self) -> u64 {
        self.moved
    }

    /// Whether all of the message has been read and written.
    pub(crate) fn is_done(&self) -> bool {
        self.decoded && self.direct == 0 && self.written == self.pending.len() && self.flushed
    }

    /// Whether something waits to be written.
    pub(crate) fn awaits_sink(&self) -> bool {
        self.direct > 0 || self.written < self.pending.len()
    }

    /// Makes progress until the message is through or a socket is not ready.
    pub(crate) fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut R,
        input: &mut Buffer,
        sink: &mut W,
    ) -> Poll<Result<(), PumpError>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        loop {
            let starved = self.decode(input)?;
            ready!(self.poll_write(cx, input, sink)).map_err(PumpError::Sink)?;
            if self.decoded && self.direct == 0 {
                ready!(Pin::new(sink).poll_flush(cx)).map_err(PumpError::Sink)?;
                self.flushed = true;
                return Poll::Ready(Ok(()));
            }
            if !starved {
                continue;
            }
            match input.poll_fill(cx, source) {
                Poll::Ready(Ok(0)) => self.source_ended()?,
                Poll::Ready(Ok(n)) => self.expect_more(n, input),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(PumpError::Source(error))),
                Poll::Pending => {
                    // What the sink holds back must not wait for what the source sends next.
                    let flushed = Pin::new(sink).poll_flush(cx);
                    if let Poll::Ready(Err(error)) = flushed {
                        return Poll::Ready(Err(PumpError::Sink(error)));
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    /// Gives the memory of the head back.
    pub(crate) fn recycle(self) {
        buffer::give_text(self.pending);
    }

    fn expect_more(&mut self, n: usize, input: &mut Buffer) {
        let much = match self.decoder {
            Decoder::Length(left) => left > SMALL_BYTES as u64,
            Decoder::Chunked(_) | Decoder::UntilClose => n >= SMALL_BYTES / 2,
        };
        if much && input.filled().len() >= SMALL_BYTES / 2 {
            input.enlarge();
        }
    }

    fn source_ended(&mut self) -> Result<(), PumpError> {
        if !self.decoder.may_end() {
            return Err(PumpError::Truncated);
        }
        self.finish(&[])
    }

    /// Takes from the input what can be written next. Returns whether it has to be read on before there is more.
    fn decode(&mut self, input: &mut Buffer) -> Result<bool, PumpError> {
        while !self.decoded && self.direct == 0 && self.pending.len() - self.written < BIG_BYTES {
            match self.decoder.step(input.filled())? {
                Step::NeedMore => return Ok(true),
                Step::Data { skip, len } => {
                    input.consume(skip);
                    self.take(input, len);
                }
                Step::End { used, trailers } => {
                    input.consume(used);
                    self.finish(&trailers)?;
                }
            }
        }
        Ok(false)
    }

    fn take(&mut self, input: &mut Buffer, len: usize) {
        if self.chunked {
            chunk_head(&mut self.pending, len);
            self.pending.extend_from_slice(&input.filled()[..len]);
            self.pending.extend_from_slice(b"\r\n");
            input.consume(len);
        } else if len <= COPIED_BYTES && self.written < self.pending.len() {
            self.pending.extend_from_slice(&input.filled()[..len]);
            input.consume(len);
        } else {
            self.direct = len;
        }
    }

    fn finish(&mut self, trailers: &[u8]) -> Result<(), PumpError> {
        self.decoded = true;
        if self.chunked {
            self.pending.extend_from_slice(b"0\r\n");
            for (name, value) in trailer_fields(trailers)? {
                field(&mut self.pending, name.as_bytes(), &value);
            }
            self.pending.extend_from_slice(b"\r\n");
        }
        Ok(())
    }

    fn poll_write<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        input: &mut Buffer,
        sink: &mut W,
    ) -> Poll<io::Result<()>> {
        loop {
            let (head, body) = (&self.pending[self.written..], &input.filled()[..self.direct]);
            let wrote = match (head.is_empty(), body.is_empty()) {
                (true, true) => break,
                (false, true) => Pin::new(&mut *sink).poll_write(cx, head),
                (true, false) => Pin::new(&mut *sink).poll_write(cx, body),
                (false, false) => {
                    let both = [IoSlice::new(head), IoSlice::new(body)];
                    Pin::new(&mut *sink).poll_write_vectored(cx, &both)
                }
            };
            let n = ready!(wrote)?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            let of_head = n.min(head.len());
            self.written += of_head;
            self.moved += n as u64;
            input.consume(n - of_head);
            self.direct -= n - of_head;
        }
        self.pending.clear();
        self.written = 0;
        Poll::Ready(Ok(()))
    }
}

/// Appends a chunk's size line.
pub(crate) fn chunk_head(out: &mut Vec<u8>, len: usize) {
    let mut digits = [0; 16];
    let mut at = digits.len();
    let mut rest = len;
    while rest > 0 || at == digits.len() {
        at -= 1;
        digits[at] = b"0123456789abcdef"[rest & 15];
        rest >>= 4;
    }
    out.extend_from_slice(&digits[at..]);
    out.extend_from_slice(b"\r\n");
}

/// Appends a field line.
pub(crate) fn field(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// Appends a number in decimal.
pub(crate) fn decimal(out: &mut Vec<u8>, mut number: u64) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    while number > 0 || at == digits.len() {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
    }
    out.extend_from_slice(&digits[at..]);
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncReadExt as _;

    use super::*;
    use crate::body::Chunked;

    async fn pump(
        input: &[u8],
        decoder: Decoder,
        chunked: bool,
    ) -> (Result<(), PumpError>, String) {
        let (mut sink, mut reader) = tokio::io::duplex(7);
        let reading = tokio::spawn(async move {
            let mut seen = Vec::new();
            reader.read_to_end(&mut seen).await.unwrap();
            String::from_utf8(seen).unwrap()
        });
        let mut source = input;
        let mut buffer = Buffer::default();
        let mut pump = Pump::new(b"head;".to_vec(), decoder, chunked);
        let result = poll_fn(|cx| pump.poll(cx, &mut source, &mut buffer, &mut sink)).await;
        drop(sink);
        (result, reading.await.unwrap())
    }

    #[tokio::test]
    async fn each_framing_becomes_each_other() {
        let chunks = b"3\r\nabc\r\n2\r\nde\r\n0\r\nx-sum: 1\r\nhost: evil\r\n\r\nrest";
        let chunked = || Decoder::Chunked(Chunked::default());
        let (result, seen) = pump(chunks, chunked(), true).await;
        result.unwrap();
        assert_eq!(seen, "head;3\r\nabc\r\n2\r\nde\r\n0\r\nx-sum: 1\r\n\r\n");
        assert_eq!(pump(chunks, chunked(), false).await.1, "head;abcde");
        assert_eq!(pump(b"abcdef", Decoder::Length(3), false).await.1, "head;abc");
        assert_eq!(pump(b"abc", Decoder::UntilClose, true).await.1, "head;3\r\nabc\r\n0\r\n\r\n");
        assert_eq!(pump(b"", Decoder::Length(0), false).await.1, "head;");
    }

    #[tokio::test]
    async fn an_early_end_is_never_a_proper_one() {
        let (result, seen) = pump(b"3\r\nab", Decoder::Chunked(Chunked::default()), true).await;
        assert!(matches!(result, Err(PumpError::Truncated)));
        assert!(!seen.contains("0\r\n"), "{seen}");
        let (result, _) = pump(b"ab", Decoder::Length(3), false).await;
        assert!(matches!(result, Err(PumpError::Truncated)));
        let (result, _) = pump(b"3\r\nabcd", Decoder::Chunked(Chunked::default()), true).await;
        assert!(matches!(result, Err(PumpError::Malformed(BodyError::ChunkEnd))));
    }

    #[test]
    fn numbers_are_written_as_others_read_them() {
        for number in [0, 1, 9, 10, 15, 16, 255, 65536, usize::MAX] {
            let (mut hex, mut dec) = (Vec::new(), Vec::new());
            chunk_head(&mut hex, number);
            decimal(&mut dec, number as u64);
            assert_eq!(String::from_utf8(hex).unwrap(), format!("{number:x}\r\n"));
            assert_eq!(String::from_utf8(dec).unwrap(), number.to_string());
        }
    }
}
