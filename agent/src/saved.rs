//! The last snapshot on disk: an agent that starts goes on from where the one before was.
//!
//! One file, mode 0600: a whole snapshot, then what changed since, each a line of JSON. A change is appended before it is acted
//! on, with one write of what changed; when as much has been appended as the whole takes, the file is written anew beside
//! it and renamed. An agent that is killed anywhere leaves whole lines and perhaps a part of one, which is not read.
//!
//! A whole snapshot is on the disk before it has the file's name. Appended lines are not waited for: they outlive the agent,
//! and of a node that loses power nothing is left that an older snapshot could do harm to: its maps are empty, and
//! nothing is deleted by a saved snapshot.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_model::Snapshot;

use crate::files::write_atomically;

mod change;
#[cfg(test)]
mod tests;

use change::Change;

/// So much may always be appended.
const LEAST_APPENDED: u64 = 1 << 20;

/// The file, and what it says.
#[derive(Debug)]
pub(crate) struct Saved {
    path: PathBuf,
    written: Option<Written>,
}

#[derive(Debug)]
struct Written {
    file: File,
    snapshot: Arc<Snapshot>,
    /// Length of the whole snapshot, and of all that makes sense.
    whole: u64,
    length: u64,
    /// Whether something else may follow that.
    torn: bool,
}

impl Saved {
    /// The file of an earlier run, with its snapshot, if it can be read.
    pub(crate) fn load(path: PathBuf) -> (Option<Arc<Snapshot>>, Self) {
        let written = match read(&path) {
            Ok(written) => Some(written),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "saved snapshot malformed, waiting for the API");
                None
            }
        };
        (written.as_ref().map(|written| Arc::clone(&written.snapshot)), Self { path, written })
    }

    /// Makes the file say this. What may be acted on after it has been written.
    pub(crate) fn save(&mut self, snapshot: &Arc<Snapshot>) -> io::Result<()> {
        match &mut self.written {
            Some(written) => written.append(snapshot),
            None => self.rewrite(snapshot),
        }
    }

    /// Makes the file short again when it has become long. Nobody has to wait for it.
    pub(crate) fn tidy(&mut self) -> io::Result<()> {
        let long = |w: &&Written| w.length - w.whole > w.whole.max(LEAST_APPENDED);
        match self.written.as_ref().filter(long).map(|written| Arc::clone(&written.snapshot)) {
            Some(snapshot) => self.rewrite(&snapshot),
            None => Ok(()),
        }
    }

    fn rewrite(&mut self, snapshot: &Arc<Snapshot>) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(snapshot)?;
        bytes.push(b'\n');
        write_atomically(&self.path, &bytes)?;
        let (file, whole) = (open(&self.path)?, bytes.len() as u64);
        let snapshot = Arc::clone(snapshot);
        self.written = Some(Written { file, snapshot, whole, length: whole, torn: false });
        Ok(())
    }
}

impl Written {
    fn append(&mut self, snapshot: &Arc<Snapshot>) -> io::Result<()> {
        let Some(change) = Change::between(&self.snapshot, snapshot) else { return Ok(()) };
        let mut line = serde_json::to_vec(&change)?;
        line.push(b'\n');
        if std::mem::replace(&mut self.torn, true) {
            self.file.set_len(self.length)?;
        }
        self.file.write_all_at(&line, self.length)?;
        self.torn = false;
        self.length += line.len() as u64;
        self.snapshot = Arc::clone(snapshot);
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

fn read(path: &Path) -> io::Result<Written> {
    let bytes = std::fs::read(path)?;
    let mut whole = serde_json::Deserializer::from_slice(&bytes).into_iter::<Snapshot>();
    let mut snapshot = whole.next().ok_or(io::ErrorKind::UnexpectedEof)??;
    let start = whole.byte_offset();
    let mut changes = serde_json::Deserializer::from_slice(&bytes[start..]).into_iter::<Change>();
    let mut end = start;
    while let Some(Ok(change)) = changes.next() {
        change.carry_out(&mut snapshot);
        end = start + changes.byte_offset();
    }
    let torn = end < bytes.trim_ascii_end().len();
    if torn {
        tracing::info!(path = %path.display(), "the last change of the saved snapshot was not written to its end");
    }
    let (whole, length) = (start as u64, end as u64);
    Ok(Written { file: open(path)?, snapshot: Arc::new(snapshot), whole, length, torn: true })
}
