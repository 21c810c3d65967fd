//! Bytes between two sockets, in memory that idle connections do not hold.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};

/// What a connection reads into at first.
pub(crate) const SMALL_BYTES: usize = 16 << 10;
/// What it reads into once it turns out to carry much.
pub(crate) const BIG_BYTES: usize = 64 << 10;

const KEPT_SMALL: usize = 64;
const KEPT_BIG: usize = 32;

#[derive(Default)]
struct Spare {
    small: Vec<Box<[u8]>>,
    big: Vec<Box<[u8]>>,
    text: Vec<Vec<u8>>,
}

thread_local! {
    static SPARE: RefCell<Spare> = RefCell::default();
}

fn take_storage(big: bool) -> Box<[u8]> {
    let spare = SPARE.with_borrow_mut(|s| if big { s.big.pop() } else { s.small.pop() });
    spare.unwrap_or_else(|| vec![0; if big { BIG_BYTES } else { SMALL_BYTES }].into_boxed_slice())
}

fn give_storage(storage: Box<[u8]>) {
    // The thread's spare buffers may be gone when the thread ends.
    let _ = SPARE.try_with(|spare| {
        let mut spare = spare.borrow_mut();
        let (list, kept) = match storage.len() {
            SMALL_BYTES => (&mut spare.small, KEPT_SMALL),
            BIG_BYTES => (&mut spare.big, KEPT_BIG),
            _ => return,
        };
        if list.len() < kept {
            list.push(storage);
        }
    });
}

/// An empty vector with room for a head; give it back with [`give_text`].
pub(crate) fn take_text() -> Vec<u8> {
    SPARE.with_borrow_mut(|s| s.text.pop()).unwrap_or_else(|| Vec::with_capacity(2 << 10))
}

/// Takes a vector back for the next head.
pub(crate) fn give_text(mut text: Vec<u8>) {
    if (1..=BIG_BYTES).contains(&text.capacity()) {
        text.clear();
        let _ = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if spare.text.len() < KEPT_SMALL {
                spare.text.push(text);
            }
        });
    }
}

/// A window of bytes read and not yet used. Holds no memory while it is empty and nothing arrives.
#[derive(Default)]
pub(crate) struct Buffer {
    storage: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Buffer {
    /// The bytes that have been read and not used.
    pub(crate) fn filled(&self) -> &[u8] {
        &self.storage[self.start..self.end]
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Marks the first `n` bytes as used.
    pub(crate) fn consume(&mut self, n: usize) {
        debug_assert!(n <= self.end - self.start);
        self.start += n;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Whether nothing more can be read before something is used.
    pub(crate) fn is_full(&self) -> bool {
        self.end - self.start >= BIG_BYTES
    }

    /// Reads into big memory from now on: for bodies that are worth it.
    pub(crate) fn enlarge(&mut self) {
        if self.storage.len() < BIG_BYTES {
            self.move_to(take_storage(true));
        }
    }

    /// Gives the memory back, if nothing is left in it.
    pub(crate) fn release(&mut self) {
        if self.is_empty() && !self.storage.is_empty() {
            give_storage(std::mem::take(&mut self.storage));
        }
    }

    /// Reads what there is. `Ok(0)` is the end of the stream. The buffer must not be full.
    pub(crate) fn poll_fill<R: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut R,
    ) -> Poll<io::Result<usize>> {
        debug_assert!(!self.is_full());
        self.make_room();
        let mut window = ReadBuf::new(&mut self.storage[self.end..]);
        let result = Pin::new(source).poll_read(cx, &mut window);
        let n = window.filled().len();
        match ready!(self.unless_pending(result)) {
            Ok(()) => {
                self.end += n;
                Poll::Ready(Ok(n))
            }
            Err(error) => Poll::Ready(Err(error)),
        }
    }

    fn unless_pending<T>(&mut self, result: Poll<T>) -> Poll<T> {
        if result.is_pending() {
            self.release();
        }
        result
    }

    fn make_room(&mut self) {
        if self.storage.is_empty() {
            self.storage = take_storage(false);
        } else if self.end == self.storage.len() {
            if self.start > 0 {
                self.storage.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
            } else {
                self.move_to(take_storage(true));
            }
        }
    }

    fn move_to(&mut self, mut storage: Box<[u8]>) {
        let n = self.end - self.start;
        storage[..n].copy_from_slice(&self.storage[self.start..self.end]);
        let old = std::mem::replace(&mut self.storage, storage);
        (self.start, self.end) = (0, n);
        if !old.is_empty() {
            give_storage(old);
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if !self.storage.is_empty() {
            give_storage(std::mem::take(&mut self.storage));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(buffer: &mut Buffer, mut source: &[u8]) -> usize {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        match buffer.poll_fill(&mut cx, &mut source) {
            Poll::Ready(n) => n.unwrap(),
            Poll::Pending => unreachable!("slices are always ready"),
        }
    }

    #[test]
    fn bytes_come_out_in_order_through_growth_and_compaction() {
        let mut buffer = Buffer::default();
        let input: Vec<u8> = (0..BIG_BYTES + 5000).map(|i| i as u8).collect();
        let mut given = 0;
        let mut seen = Vec::new();
        while seen.len() < input.len() {
            while given < input.len() && !buffer.is_full() {
                given += fill(&mut buffer, &input[given..]);
            }
            let n = buffer.filled().len().min(10_000);
            seen.extend_from_slice(&buffer.filled()[..n]);
            buffer.consume(n);
        }
        assert_eq!(seen, input);
        buffer.release();
        assert!(buffer.storage.is_empty(), "an empty buffer holds no memory");
    }

    #[tokio::test]
    async fn waiting_holds_no_memory() {
        let (mut near, _far) = tokio::io::duplex(16);
        let mut buffer = Buffer::default();
        std::future::poll_fn(|cx| {
            assert!(buffer.poll_fill(cx, &mut near).is_pending());
            Poll::Ready(())
        })
        .await;
        assert!(buffer.storage.is_empty());
    }
}
