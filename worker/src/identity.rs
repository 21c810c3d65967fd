//! Who a worker is: written down when it starts, so that the next agent finds it again.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::process::ProcessId;

/// Which process a worker is, and what it was started from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    #[serde(flatten)]
    pub(crate) process: ProcessId,
    pub(crate) program: ProgramId,
    pub(crate) args: Vec<String>,
    /// The one before it, which may still be serving its last clients.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) predecessor: Option<ProcessId>,
}

/// Changes when the file is replaced or rewritten.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProgramId {
    path: PathBuf,
    device: u64,
    inode: u64,
    modified_nanos: i128,
}

impl ProgramId {
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
            modified_nanos: i128::from(metadata.mtime()) * 1_000_000_000
                + i128::from(metadata.mtime_nsec()),
        })
    }
}

impl Identity {
    /// The one written down, if any.
    pub(crate) fn read(path: &Path) -> io::Result<Option<Self>> {
        match fs::read(path) {
            // It is renamed into place, so that only a foreign file cannot be read: as good as none.
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        let fresh = path.with_extension("new");
        fs::write(&fresh, serde_json::to_vec(self)?)?;
        fs::rename(&fresh, path)
    }

    /// All processes that it names.
    pub(crate) fn processes(&self) -> impl Iterator<Item = ProcessId> + use<> {
        self.predecessor.into_iter().chain([self.process])
    }
}
