//! The directory of pins on the BPF file system.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::sys;

/// Where the BPF file system is mounted on every distribution.
const USUAL_MOUNT: &str = "/sys/fs/bpf";

/// The directory of pins could not be used.
#[derive(Debug, thiserror::Error)]
#[error("{what} {path}")]
pub struct BpffsError {
    /// What was tried.
    pub what: &'static str,
    /// With what.
    pub path: PathBuf,
    /// The cause.
    #[source]
    pub source: io::Error,
}

impl BpffsError {
    fn new(what: &'static str, path: &Path, source: io::Error) -> Self {
        Self { what, path: path.to_owned(), source }
    }
}

/// Makes `directory` exist on a BPF file system: mounts one at `/sys/fs/bpf` if the directory is below, else at the
/// directory itself, unless there is one already.
///
/// # Errors
/// When it cannot be mounted or the directory not be made.
pub fn ensure_mounted(directory: &Path) -> Result<(), BpffsError> {
    if !on_bpffs(directory) {
        let usual = Path::new(USUAL_MOUNT);
        let target = if directory.starts_with(usual) { usual } else { directory };
        if target != usual {
            std::fs::create_dir_all(target)
                .map_err(|source| BpffsError::new("create", target, source))?;
        }
        let options = Some("mode=0700");
        mount(None::<&str>, target, Some("bpf"), MsFlags::empty(), options)
            .map_err(|error| BpffsError::new("mount a BPF file system at", target, error.into()))?;
    }
    std::fs::create_dir_all(directory)
        .map_err(|source| BpffsError::new("create", directory, source))
}

/// Whether the nearest existing ancestor is on a BPF file system.
fn on_bpffs(directory: &Path) -> bool {
    let existing = directory.ancestors().find(|path| path.exists());
    existing.and_then(|path| statfs(path).ok()).is_some_and(|s| s.filesystem_type() == BPF_FS_MAGIC)
}

/// The pins of one ABI version.
#[derive(Debug)]
pub(super) struct Pins {
    directory: PathBuf,
    version: PathBuf,
}

impl Pins {
    pub(super) fn create(directory: &Path) -> Result<Self, BpffsError> {
        ensure_mounted(directory)?;
        let version = directory.join(format!("v{}", mesh_abi::VERSION));
        for name in ["maps", "links"] {
            let path = version.join(name);
            std::fs::create_dir_all(&path)
                .map_err(|source| BpffsError::new("create", &path, source))?;
        }
        Ok(Self { directory: directory.to_owned(), version })
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.version.join("maps").join(name)
    }

    pub(super) fn link(&self, name: &str) -> PathBuf {
        self.version.join("links").join(name)
    }

    pub(super) fn link_names(&self) -> io::Result<Vec<String>> {
        let entries = std::fs::read_dir(self.version.join("links"))?;
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    pub(super) fn links_error(&self, source: io::Error) -> BpffsError {
        BpffsError::new("list", &self.version.join("links"), source)
    }

    /// Pins of other versions, the highest first.
    pub(super) fn others(&self) -> Result<Vec<Self>, BpffsError> {
        let mut others = versions(&self.directory)?;
        others.retain(|version| *version != self.version);
        let pins = |version| Self { directory: self.directory.clone(), version };
        Ok(others.into_iter().rev().map(pins).collect())
    }

    /// Pins a map of another version as ours too, unless there is one of that name.
    pub(super) fn share(&self, name: &str, map: BorrowedFd<'_>) -> Result<(), BpffsError> {
        let path = self.map(name);
        match sys::pin(map, &path) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                Err(BpffsError::new("share", &path, source))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn remove_other_versions(&self) -> Result<bool, BpffsError> {
        let others = self.others()?;
        others.iter().try_for_each(|other| remove_version(&other.version))?;
        Ok(!others.is_empty())
    }
}

/// Detaches and removes everything of ours below `bpf_dir`: all links, then all maps, of all versions. The directory
/// goes too if nothing else is in it; a mounted file system stays. Nothing there is success.
///
/// # Errors
/// When a file cannot be removed.
pub fn detach_all(bpf_dir: &Path) -> Result<(), BpffsError> {
    if !bpf_dir.exists() || !on_bpffs(bpf_dir) {
        return Ok(());
    }
    for version in versions(bpf_dir)? {
        remove_version(&version)?;
    }
    // Fails when it is a mount point or somebody else keeps files there: then it is not ours to remove.
    let _ = std::fs::remove_dir(bpf_dir);
    Ok(())
}

/// Directories of versions, the lowest first.
fn versions(directory: &Path) -> Result<Vec<PathBuf>, BpffsError> {
    let list = |source| BpffsError::new("list", directory, source);
    let mut versions = BTreeMap::new();
    for entry in std::fs::read_dir(directory).map_err(list)? {
        let entry = entry.map_err(list)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let number = name.strip_prefix('v').and_then(|number| number.parse::<u32>().ok());
        versions.extend(number.map(|number| (number, entry.path())));
    }
    Ok(versions.into_values().collect())
}

fn remove_version(version: &Path) -> Result<(), BpffsError> {
    for name in ["links", "maps"] {
        let directory = version.join(name);
        let Ok(entries) = std::fs::read_dir(&directory) else { continue };
        for entry in entries.flatten() {
            let path = entry.path();
            if name == "links"
                && let Ok(link) = sys::open_pinned(&path)
            {
                // Another process may hold the link. One whose device is gone cannot be detached, and need not be.
                let _ = sys::link_detach(link.as_fd());
            }
            remove_file(&path).map_err(|source| BpffsError::new("remove", &path, source))?;
        }
        std::fs::remove_dir(&directory)
            .map_err(|source| BpffsError::new("remove", &directory, source))?;
    }
    std::fs::remove_dir(version).map_err(|source| BpffsError::new("remove", version, source))
}

/// Removes a file. Nothing there is success.
pub(super) fn remove_file(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
