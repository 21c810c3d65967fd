//! What lies on a machine, to compare it before and after.

use std::fs;
use std::path::{Path, PathBuf};

/// Everything below a folder; nothing when there is none. Files of control groups are the kernel's, and left out.
pub fn below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pending = vec![folder.to_owned()];
    while let Some(folder) = pending.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            pending.extend(is_folder.then(|| entry.path()));
            if is_folder || !entry.path().starts_with("/sys/fs/cgroup") {
                found.push(entry.path());
            }
        }
    }
    found
}
