//! Container logs: the CRI log format, and reading it back.
//!
//! A line of the file is `TIME STREAM TAGS TEXT`. The first tag is `F` for a whole line and `P` for a part of one that was
//! longer than the runtime's buffer; parts are joined again.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

use jiff::Timestamp;

mod follow;
pub(crate) mod links;
pub(crate) mod rotate;
mod serve;
mod tail;

pub(crate) use serve::{Logs, router};

/// What of a log is wanted; the query parameters of `pods/log`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Wait for more at the end.
    pub(crate) follow: bool,
    /// Only so many lines from the end.
    pub(crate) tail_lines: Option<u64>,
    /// Only lines from this time on.
    pub(crate) since: Option<Timestamp>,
    /// Put its time before each line.
    pub(crate) timestamps: bool,
    /// The run before the last one.
    pub(crate) previous: bool,
    /// Stop after so many bytes.
    pub(crate) limit_bytes: Option<u64>,
    /// Standard error or standard output alone.
    pub(crate) stderr: Option<bool>,
}

/// One line of a log file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record<'a> {
    pub(crate) time: &'a str,
    pub(crate) stderr: bool,
    /// More of the same line follows.
    pub(crate) partial: bool,
    pub(crate) text: &'a [u8],
}

/// Reads one line of a log file, without its line feed. None when it is not in the format.
pub(crate) fn parse(line: &[u8]) -> Option<Record<'_>> {
    let mut fields = line.splitn(4, |byte| *byte == b' ');
    let time = std::str::from_utf8(fields.next()?).ok()?;
    let stderr = match fields.next()? {
        b"stdout" => false,
        b"stderr" => true,
        _ => return None,
    };
    let partial = match fields.next()?.split(|byte| *byte == b':').next()? {
        b"F" => false,
        b"P" => true,
        _ => return None,
    };
    // The runtime leaves out the last separator when the line is empty.
    let text = fields.next().unwrap_or_default();
    Some(Record { time, stderr, partial, text })
}

/// Turns lines of the file into what people read.
#[derive(Debug, Clone)]
pub(crate) struct Renderer {
    since: Option<Timestamp>,
    timestamps: bool,
    /// Bytes that may still be written.
    left: Option<u64>,
    /// Standard error or standard output alone.
    stderr: Option<bool>,
    /// The last record of each stream was a part of a line: standard output, standard error.
    open: [bool; 2],
}

impl Renderer {
    pub(crate) fn new(wanted: &Wanted) -> Self {
        Self {
            since: wanted.since,
            timestamps: wanted.timestamps,
            left: wanted.limit_bytes,
            stderr: wanted.stderr,
            open: [false; 2],
        }
    }

    /// Whether the limit has been reached.
    pub(crate) fn is_full(&self) -> bool {
        self.left == Some(0)
    }

    /// Appends one line of the file, given without its line feed.
    pub(crate) fn render(&mut self, line: &[u8], output: &mut Vec<u8>) {
        let Some(record) = parse(line) else { return };
        if self.stderr.is_some_and(|stderr| stderr != record.stderr) {
            return;
        }
        if let Some(since) = self.since {
            if record.time.parse::<Timestamp>().is_ok_and(|time| time < since) {
                return;
            }
            // Times only grow: from here on nothing has to be compared.
            self.since = None;
        }
        let start = output.len();
        let open = &mut self.open[usize::from(record.stderr)];
        if self.timestamps && !*open {
            put_time(record.time, output);
            output.push(b' ');
        }
        output.extend_from_slice(record.text);
        if !record.partial {
            output.push(b'\n');
        }
        *open = record.partial;
        if let Some(left) = &mut self.left {
            let written = (output.len() - start) as u64;
            let kept = written.min(*left);
            output.truncate(start + usize::try_from(kept).unwrap_or(usize::MAX));
            *left -= kept;
        }
    }
}

/// Digits of a second: as many as the kubelet shows.
const DIGITS: usize = 9;

/// Writes a time with all digits of its second. The runtime leaves out zeros at the end, and people sort lines of several containers as
/// text.
fn put_time(time: &str, output: &mut Vec<u8>) {
    // Up to the seconds, and what may follow: a fraction, and the zone.
    let (seconds, rest) = time.split_at_checked("2026-01-01T00:00:00".len()).unwrap_or((time, ""));
    let fraction = rest.strip_prefix('.').unwrap_or(rest);
    let end = fraction.find(|c: char| !c.is_ascii_digit()).unwrap_or(fraction.len());
    let (digits, zone) = fraction.split_at(end);
    let line = match zone {
        "" => time.to_owned(),
        _ => format!("{seconds}.{digits:0<DIGITS$}{zone}"),
    };
    output.extend_from_slice(line.as_bytes());
}

/// How much of a file is read for its last words.
const LAST_BLOCK: u64 = 64 << 10;

/// The end of a file: at most so many bytes, whatever is written meanwhile. Blocks.
pub(crate) fn last_bytes(path: &Path, most: u64) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(most);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// How many lines of a log are last words, as with the kubelet.
const LAST_LINES: usize = 80;

/// The last words of a log file, as people read them: at most so many bytes. Blocks.
pub(crate) fn last_text(path: &Path, most: usize) -> std::io::Result<Vec<u8>> {
    let bytes = last_bytes(path, LAST_BLOCK)?;
    let (mut renderer, mut text) = (Renderer::new(&Wanted::default()), Vec::new());
    for line in bytes.split(|byte| *byte == b'\n') {
        renderer.render(line, &mut text);
    }
    let surplus = text.len().saturating_sub(most).max(before_last_lines(&text));
    text.drain(..surplus);
    Ok(text)
}

/// Where the last lines begin.
fn before_last_lines(text: &[u8]) -> usize {
    let whole = text.strip_suffix(b"\n").unwrap_or(text);
    let mut feeds = (0..whole.len()).rev().filter(|at| whole[*at] == b'\n');
    feeds.nth(LAST_LINES - 1).map_or(0, |at| at + 1)
}

#[cfg(test)]
mod tests;
