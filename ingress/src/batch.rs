//! Many small writes become few large ones: system calls and TLS records cost more than copies.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::buffer::{BIG_BYTES, Buffer};

/// Holds writes back until they are flushed or enough have come together.
pub(crate) struct Batch<IO> {
    io: IO,
    held: Buffer,
}

impl<IO> Batch<IO> {
    pub(crate) fn new(io: IO) -> Self {
        Self { io, held: Buffer::default() }
    }
}

impl<IO: AsyncWrite + Unpin> Batch<IO> {
    fn poll_pass_on(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.held.is_empty() {
            let n = ready!(Pin::new(&mut self.io).poll_write(cx, self.held.filled()))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.held.consume(n);
        }
        self.held.release();
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Batch<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, out)
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Batch<IO> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.held.filled().len() >= BIG_BYTES {
            ready!(self.poll_pass_on(cx))?;
        }
        let mut taken = 0;
        for part in bytes {
            let n = self.held.append(part);
            taken += n;
            if n < part.len() {
                break;
            }
        }
        if taken == 0 && bytes.iter().any(|part| !part.is_empty()) {
            ready!(self.poll_pass_on(cx))?;
            let first = bytes.iter().find(|part| !part.is_empty());
            taken = first.map_or(0, |part| self.held.append(part));
        }
        Poll::Ready(Ok(taken))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_pass_on(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_pass_on(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn bytes_come_out_whole_and_in_order() {
        let (near, mut far) = tokio::io::duplex(1000);
        let input: Vec<u8> = (0..1_000_000u32).map(|i| (i ^ (i >> 8)) as u8).collect();
        let sent = input.clone();
        let writing = tokio::spawn(async move {
            let mut batch = Batch::new(near);
            for part in sent.chunks(30_011) {
                let (head, tail) = part.split_at(9);
                let mut both = &mut [IoSlice::new(head), IoSlice::new(tail)][..];
                while !both.is_empty() {
                    let n = batch.write_vectored(both).await.unwrap();
                    assert_ne!(n, 0);
                    IoSlice::advance_slices(&mut both, n);
                }
            }
            batch.flush().await.unwrap();
            assert!(batch.held.is_empty());
        });
        let mut seen = Vec::new();
        far.read_to_end(&mut seen).await.unwrap();
        assert!(seen == input);
        writing.await.unwrap();
    }

    #[tokio::test]
    async fn nothing_goes_out_before_a_flush() {
        let (near, mut far) = tokio::io::duplex(100);
        let mut batch = Batch::new(near);
        batch.write_all(b"a").await.unwrap();
        batch.write_all(b"b").await.unwrap();
        batch.flush().await.unwrap();
        let mut seen = [0; 9];
        assert_eq!(far.read(&mut seen).await.unwrap(), 2);
    }
}
