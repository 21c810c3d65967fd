//! Bytes between two sockets, in memory that idle connections do not hold.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::io::{AsyncRead, ReadBuf};

/// What a connection reads into at first.
pub(crate) const SMALL_BYTES: usize = 16 << 10;
/// What a head may grow to.
pub(crate) const BIG_BYTES: usize = 64 << 10;
/// What bodies are read into, as long as not too many are.
const HUGE_BYTES: usize = 128 << 10;

/// So many buffers for bodies are in use on one thread at most: 32 MiB.
const MAX_HUGE: usize = 256;
const MAX_SPARE: usize = 256;

/// Buffers of one size that nobody uses at present.
#[derive(Default)]
struct Shelf {
    spare: Vec<Box<[u8]>>,
    /// The fewest since the last trim: those were not needed.
    fewest: usize,
}

impl Shelf {
    fn take(&mut self, bytes: usize) -> Box<[u8]> {
        let storage = self.spare.pop();
        self.fewest = self.fewest.min(self.spare.len());
        storage.unwrap_or_else(|| vec![0; bytes].into_boxed_slice())
    }

    fn give(&mut self, storage: Box<[u8]>) {
        if self.spare.len() < MAX_SPARE {
            self.spare.push(storage);
        }
    }

    fn trim(&mut self) {
        self.spare.truncate(self.spare.len() - self.fewest);
        self.fewest = self.spare.len();
    }
}

#[derive(Default)]
struct Spare {
    small: Shelf,
    big: Shelf,
    huge: Shelf,
    huge_in_use: usize,
    text: Vec<Vec<u8>>,
}

thread_local! {
    static SPARE: RefCell<Spare> = RefCell::default();
}

fn take_small() -> Box<[u8]> {
    SPARE.with_borrow_mut(|s| s.small.take(SMALL_BYTES))
}

fn take_big() -> Box<[u8]> {
    SPARE.with_borrow_mut(|s| s.big.take(BIG_BYTES))
}

fn take_huge() -> Option<Box<[u8]>> {
    SPARE.with_borrow_mut(|spare| {
        let room = spare.huge_in_use < MAX_HUGE;
        spare.huge_in_use += usize::from(room);
        room.then(|| spare.huge.take(HUGE_BYTES))
    })
}

fn give_storage(storage: Box<[u8]>) {
    // The thread's spare buffers may be gone when the thread ends.
    let _ = SPARE.try_with(|spare| {
        let mut spare = spare.borrow_mut();
        match storage.len() {
            SMALL_BYTES => spare.small.give(storage),
            BIG_BYTES => spare.big.give(storage),
            _ => {
                spare.huge_in_use = spare.huge_in_use.saturating_sub(1);
                spare.huge.give(storage);
            }
        }
    });
}

/// Gives memory back that this thread has not needed since the last call.
pub(crate) fn trim() {
    SPARE.with_borrow_mut(|spare| {
        for shelf in [&mut spare.small, &mut spare.big, &mut spare.huge] {
            shelf.trim();
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
            if spare.text.len() < MAX_SPARE / 4 {
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
    bulk: bool,
}

impl Buffer {
    /// A buffer that expects bodies.
    pub(crate) fn bulk() -> Self {
        Self { storage: Box::default(), start: 0, end: 0, bulk: true }
    }

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

    /// Whether it is better to use something before more is read.
    pub(crate) fn is_full(&self) -> bool {
        self.end - self.start >= BIG_BYTES
    }

    /// Copies as much of `bytes` behind what is filled as there is room for; returns how much.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> usize {
        if self.storage.is_empty() {
            self.storage = take_small();
        }
        if self.end + bytes.len() > self.storage.len() {
            self.enlarge();
        }
        let n = bytes.len().min(self.storage.len() - self.end);
        self.storage[self.end..self.end + n].copy_from_slice(&bytes[..n]);
        self.end += n;
        n
    }

    /// Takes the first `n` bytes without copying them, together with the memory they are in; only when that is
    /// worth it, and nothing else is filled.
    pub(crate) fn detach(&mut self, n: usize) -> Option<Bytes> {
        if n < SMALL_BYTES / 2 || n != self.end - self.start {
            return None;
        }
        let storage = std::mem::take(&mut self.storage);
        let piece = Piece { storage, start: self.start, end: self.end };
        (self.start, self.end) = (0, 0);
        Some(Bytes::from_owner(piece))
    }

    /// Reads into big memory from now on: for bodies that are worth it.
    pub(crate) fn enlarge(&mut self) {
        if self.storage.len() < HUGE_BYTES
            && let Some(storage) = take_huge()
        {
            self.move_to(storage);
        }
    }

    /// Gives the memory back, if nothing is left in it.
    pub(crate) fn release(&mut self) {
        if self.is_empty() && !self.storage.is_empty() {
            give_storage(std::mem::take(&mut self.storage));
        }
    }

    /// Reads what there is. `Ok(0)` is the end of the stream. What is filled must be less than [`BIG_BYTES`].
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
            let huge = if self.bulk { take_huge() } else { None };
            self.storage = huge.unwrap_or_else(take_small);
        } else if self.end == self.storage.len() {
            if self.start > 0 {
                self.storage.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
            } else {
                self.move_to(take_big());
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

/// Filled memory that has left its buffer.
struct Piece {
    storage: Box<[u8]>,
    start: usize,
    end: usize,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.storage[self.start..self.end]
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        give_storage(std::mem::take(&mut self.storage));
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

    #[test]
    fn what_was_not_needed_is_given_back() {
        let held: Vec<_> = (0..8).map(|_| take_small()).collect();
        held.into_iter().for_each(give_storage);
        trim();
        let spare = || SPARE.with_borrow(|s| s.small.spare.len());
        assert_eq!(spare(), 8, "all were in use since the last call");
        give_storage(take_small());
        trim();
        assert_eq!(spare(), 1, "one was");
    }

    #[test]
    fn bodies_share_a_limited_number_of_large_buffers() {
        let held: Vec<_> = std::iter::from_fn(take_huge).take(2 * MAX_HUGE).collect();
        assert_eq!(held.len(), MAX_HUGE);
        let mut buffer = Buffer::bulk();
        assert_eq!(fill(&mut buffer, b"x"), 1, "the others use small ones");
        assert_eq!(buffer.storage.len(), SMALL_BYTES);
        held.into_iter().for_each(give_storage);
        buffer.enlarge();
        assert_eq!((buffer.storage.len(), buffer.filled()), (HUGE_BYTES, &b"x"[..]));
    }

    #[test]
    fn whole_contents_leave_without_a_copy() {
        let mut buffer = Buffer::default();
        let input: Vec<u8> = (0..10_000).map(|i| i as u8).collect();
        assert_eq!(buffer.append(&input), input.len());
        assert!(buffer.detach(9000).is_none(), "what is left would be lost");
        buffer.consume(1000);
        let place = buffer.filled().as_ptr();
        let piece = buffer.detach(9000).unwrap();
        assert_eq!((&piece[..], piece.as_ptr()), (&input[1000..], place));
        assert!(buffer.is_empty() && buffer.storage.is_empty());
        assert_eq!(buffer.append(&[0; 2 * HUGE_BYTES]), HUGE_BYTES, "as much as there is room for");
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
