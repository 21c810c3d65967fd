//! The leases on disk: a line for each change, rewritten when most lines are history.
//!
//! What is written outlives this process, however it ends: it is with the kernel. It is not waited for until it is on the disk,
//! which takes milliseconds: when the machine dies, all interfaces die with it, and every lease is of another boot and void. What a
//! dying machine leaves of the file makes no sense or is of another boot; both is left out when it is read.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use mesh_cni::wire::{Owner, Wishes};
use serde::{Deserialize, Serialize};

use super::pool::{Lease, Pool};

/// A change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Record {
    /// Addresses are set aside.
    Reserve {
        /// For whom.
        owner: Owner,
        /// Which.
        addresses: Vec<IpAddr>,
        /// In which life of the machine: namespaces do not survive a boot.
        boot: String,
        /// What was asked for beyond addresses.
        #[serde(default, skip_serializing_if = "Wishes::is_none")]
        wishes: Wishes,
    },
    /// The interface exists.
    Commit {
        /// Whose.
        owner: Owner,
    },
    /// The interface is gone.
    Release {
        /// Whose.
        owner: Owner,
        /// When, in seconds since 1970.
        at: u64,
    },
}

/// Where the journal lies. Every method may fail half-way, and then the next is [`replace`](Self::replace).
pub trait Storage: Send {
    /// All of it; empty when it does not exist.
    fn read(&mut self) -> io::Result<Vec<u8>>;
    /// Adds to the end. What was added outlives this process; it need not outlive the machine's present boot.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Replaces all of it at once and durably: after a crash there is the old or the new.
    fn replace(&mut self, bytes: &[u8]) -> io::Result<()>;
}

/// A file.
#[derive(Debug)]
pub struct FileStorage {
    path: PathBuf,
    file: Option<File>,
}

impl FileStorage {
    /// The file at `path`, made when needed. Its directory must exist.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), file: None }
    }
}

impl Storage for FileStorage {
    fn read(&mut self) -> io::Result<Vec<u8>> {
        match fs::read(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(vec![]),
            other => other,
        }
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none
                .insert(OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path)?),
        };
        file.write_all(bytes)
    }

    fn replace(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file = None;
        crate::files::write_atomically(&self.path, bytes)
    }
}

/// The journal of one node in one life of its machine.
pub struct Journal {
    storage: Box<dyn Storage>,
    boot: String,
    lines: usize,
    /// A write failed: what lies there may end in half a line.
    torn: bool,
}

/// Lines that are not worth rewriting.
const FEW_LINES: usize = 1024;

impl Journal {
    /// Reads the journal. Leases of an earlier boot are dropped; lines that make no sense are counted.
    pub fn open(mut storage: Box<dyn Storage>, boot: &str) -> io::Result<(Self, Pool, usize)> {
        let bytes = storage.read()?;
        let mut pool = Pool::default();
        let mut damaged = 0;
        let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
        for line in bytes[..whole].split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice(line) {
                Ok(record) => damaged += usize::from(!replay(&mut pool, record, boot)),
                Err(_) => damaged += 1,
            }
        }
        let mut journal = Self { storage, boot: boot.to_owned(), lines: 0, torn: true };
        journal.rewrite(&pool)?;
        Ok((journal, pool, damaged))
    }

    /// Adds records; they outlive this process. `pool` is the state with them applied.
    ///
    /// After an error, none or some of them may be on disk; the next call writes everything anew.
    pub fn append(&mut self, records: &[Record], pool: &Pool) -> io::Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        let history = self.lines.saturating_sub(2 * pool.leases().len());
        if self.torn || (self.lines > FEW_LINES && history > self.lines / 2) {
            return self.rewrite(pool);
        }
        self.lines += records.len();
        let result = self.storage.append(&lines(records));
        self.torn |= result.is_err();
        result
    }

    /// A reservation as a record.
    pub fn reserve(&self, owner: &Owner, lease: &Lease) -> Record {
        let (addresses, boot) = (lease.addresses.clone(), self.boot.clone());
        Record::Reserve { owner: owner.clone(), addresses, boot, wishes: lease.wishes.clone() }
    }

    fn rewrite(&mut self, pool: &Pool) -> io::Result<()> {
        self.torn = true;
        let mut records = vec![];
        for (owner, lease) in pool.leases() {
            records.push(self.reserve(owner, lease));
            if lease.committed {
                records.push(Record::Commit { owner: owner.clone() });
            }
        }
        self.storage.replace(&lines(&records))?;
        self.lines = records.len();
        self.torn = false;
        Ok(())
    }
}

/// False when the record contradicts those before it.
fn replay(pool: &mut Pool, record: Record, boot: &str) -> bool {
    match record {
        Record::Reserve { owner, addresses, boot: then, wishes } if then == boot => {
            pool.adopt(owner, Lease { addresses, committed: false, wishes }).is_ok()
        }
        // Of an earlier boot, and so are the commit and the release that follow.
        Record::Reserve { .. } => true,
        Record::Commit { owner } => {
            pool.commit(&owner);
            true
        }
        Record::Release { owner, at } => {
            pool.release(&owner, at);
            true
        }
    }
}

fn lines(records: &[Record]) -> Vec<u8> {
    let mut bytes = vec![];
    for record in records {
        serde_json::to_writer(&mut bytes, record).expect("records have text keys only");
        bytes.push(b'\n');
    }
    bytes
}

/// Which life of the machine this is.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string(Path::new("/proc/sys/kernel/random/boot_id"))?.trim().to_owned())
}
