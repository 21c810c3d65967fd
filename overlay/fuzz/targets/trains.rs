//! Decrypted packets joined into trains: nothing is lost, and nothing is made up.
//!
//! Input: pieces of a two-byte length and as many bytes, each made to look like a TCP or UDP packet.
#![no_main]

use std::cell::Cell;
use std::io::{self, IoSlice};

use libfuzzer_sys::fuzz_target;
use mesh_overlay::offload::coalesce::{Coalescer, Device};
use mesh_overlay::protocol::Sink;

#[derive(Default)]
struct Counted(Cell<usize>);

impl Device for Counted {
    fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        self.0.set(self.0.get() + pieces.len() - 1);
        Ok(())
    }

    fn takes_udp_trains(&self) -> bool {
        true
    }

    fn refused(&self, _: usize, _: &io::Error) {}
}

fuzz_target!(|input: &[u8]| {
    let mut joined = Coalescer::new(Counted::default(), 64 << 10);
    let (mut rest, mut count) = (input, 0);
    while let [low, high, tail @ ..] = rest {
        let len = usize::from(u16::from_le_bytes([*low, *high % 8])).max(20).min(tail.len());
        let (bytes, tail) = tail.split_at(len);
        rest = tail;
        if bytes.len() < 20 {
            break;
        }
        let room = joined.room(bytes.len());
        room[..bytes.len()].copy_from_slice(bytes);
        room[0] = if bytes[0] & 1 == 0 || bytes.len() < 40 { 0x45 } else { 0x60 };
        joined.accept(bytes.len());
        count += 1;
    }
    joined.flush();
    assert_eq!(joined.device().0.get(), count);
});
