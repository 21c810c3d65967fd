//! Where the last lines of a log file begin, found from its end.

use std::io::SeekFrom;

use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};

use super::parse;

const BLOCK: u64 = 64 << 10;

/// The offset at which the last `lines` whole lines begin. Reads no more of the file than that.
pub(super) async fn start_of(file: &mut File, lines: u64) -> std::io::Result<u64> {
    let length = file.seek(SeekFrom::End(0)).await?;
    if lines == 0 {
        return Ok(length);
    }
    let mut counter = Backwards { wanted: lines, seen: 0, start: length };
    // What was read and does not begin with a line feed yet.
    let mut pending: Vec<u8> = Vec::new();
    let mut position = length;
    while position > 0 {
        let size = BLOCK.min(position);
        position -= size;
        file.seek(SeekFrom::Start(position)).await?;
        let mut block = vec![0; usize::try_from(size).unwrap_or(0)];
        file.read_exact(&mut block).await?;
        block.append(&mut pending);
        pending = block;
        if counter.lines(&mut pending, position) {
            return Ok(counter.start);
        }
    }
    counter.line(&pending, 0);
    Ok(if counter.seen > lines { counter.start } else { 0 })
}

struct Backwards {
    wanted: u64,
    /// Ends of whole lines so far.
    seen: u64,
    /// Where the earliest record that is wanted begins.
    start: u64,
}

impl Backwards {
    /// Takes the whole records off the end of `bytes`, which lie at `offset`. True when the start is found.
    fn lines(&mut self, bytes: &mut Vec<u8>, offset: u64) -> bool {
        loop {
            let end = bytes.strip_suffix(b"\n").unwrap_or(bytes).len();
            let Some(feed) = bytes[..end].iter().rposition(|byte| *byte == b'\n') else {
                return false;
            };
            let line = bytes.split_off(feed + 1);
            if self.line(&line, offset + feed as u64 + 1) {
                return true;
            }
        }
    }

    /// One record, later ones first. True when it belongs to a line that is not wanted any more.
    fn line(&mut self, line: &[u8], offset: u64) -> bool {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        if parse(line).is_some_and(|record| !record.partial) {
            self.seen += 1;
        }
        if self.seen > self.wanted {
            return true;
        }
        self.start = offset;
        false
    }
}
