//! Reads a log file to its end, and further while the container runs.

use std::fs::Metadata;
use std::io::SeekFrom;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio::sync::mpsc;

use super::rotate::put_aside;
use super::tail::start_of;
use super::{Renderer, Wanted};

/// How often the file is looked at for more.
const POLL: Duration = Duration::from_millis(200);
const BLOCK: usize = 64 << 10;

/// Sends what is wanted of a log file. Ends at the end of the file, or, when following, when `runs` says that the
/// container has ended and everything has been sent, or when nobody receives any more.
pub(super) async fn send(
    path: &Path,
    wanted: &Wanted,
    output: &mpsc::Sender<Vec<u8>>,
    runs: impl Fn() -> bool,
) -> std::io::Result<()> {
    let mut file = File::open(path).await?;
    let mut position = match wanted.tail_lines {
        Some(lines) => start_of(&mut file, lines).await?,
        None => 0,
    };
    file.seek(SeekFrom::Start(position)).await?;
    let mut renderer = Renderer::new(wanted);
    let mut pending: Vec<u8> = Vec::new();
    loop {
        // Asked before reading: what is written until the container ends, and to which file, is still read.
        let running = wanted.follow && runs();
        let next = if wanted.follow { successor(path, &file, position).await } else { None };
        if next.is_some() && running {
            // The runtime may write a last line to the old file after it has made the new one.
            tokio::time::sleep(POLL).await;
        }
        let read = read_to_end(&mut file, &mut pending, &mut renderer, output).await?;
        let Some(read) = read else { return Ok(()) };
        position += read;
        if let Some(next) = next {
            file = next;
            position = 0;
            pending.clear();
            continue;
        }
        if !running {
            // A last line that was never finished is a line all the same.
            let mut rest = Vec::new();
            renderer.render(&pending, &mut rest);
            if !rest.is_empty() {
                let _ = output.send(rest).await;
            }
            return Ok(());
        }
        tokio::select! {
            () = output.closed() => return Ok(()),
            () = tokio::time::sleep(POLL) => {}
        }
    }
}

/// Sends all that is there; the number of bytes read. None when nobody wants more.
async fn read_to_end(
    file: &mut File,
    pending: &mut Vec<u8>,
    renderer: &mut Renderer,
    output: &mpsc::Sender<Vec<u8>>,
) -> std::io::Result<Option<u64>> {
    let mut total = 0;
    let mut block = vec![0; BLOCK];
    loop {
        let length = file.read(&mut block).await?;
        if length == 0 {
            return Ok(Some(total));
        }
        total += length as u64;
        pending.extend_from_slice(&block[..length]);
        let mut text = Vec::new();
        let mut start = 0;
        while let Some(feed) = line_feed(&pending[start..]) {
            renderer.render(&pending[start..start + feed], &mut text);
            start += feed + 1;
        }
        pending.drain(..start);
        if !text.is_empty() && output.send(text).await.is_err() {
            return Ok(None);
        }
        if renderer.is_full() {
            return Ok(None);
        }
    }
}

fn line_feed(bytes: &[u8]) -> Option<usize> {
    bytes.iter().position(|byte| *byte == b'\n')
}

/// The file that goes on where this one ends, when the log was rotated: it has become long, or others were put aside after it, while
/// nobody read. Also the file itself, when it was cut off.
async fn successor(path: &Path, file: &File, position: u64) -> Option<File> {
    let (old, new) = (file.metadata().await.ok()?, tokio::fs::metadata(path).await.ok()?);
    if !is_same(&old, &new) {
        let path = path.to_owned();
        let after = tokio::task::spawn_blocking(move || after(&path, &old)).await.ok()?;
        return File::open(after).await.ok();
    }
    if new.len() >= position { None } else { File::open(path).await.ok() }
}

/// The file that was begun after this one; the oldest when this one has been deleted. Blocks.
fn after(path: &Path, old: &Metadata) -> PathBuf {
    let mut aside = put_aside(path).into_iter();
    let is_old = |file: &PathBuf| std::fs::metadata(file).is_ok_and(|file| is_same(&file, old));
    let found = aside.clone().any(|file| is_old(&file));
    if found {
        aside.find(is_old);
    }
    aside.next().unwrap_or_else(|| path.to_owned())
}

fn is_same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}
