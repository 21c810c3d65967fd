//! Memory-backed directories, and removing what a pod has on disk.

use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Mounts memory at `path`, unless it is mounted already; with these permissions, because no directory outlives a reboot.
pub(super) fn memory(
    path: &Path,
    mode: u32,
    group: Option<u32>,
    size_bytes: Option<i64>,
) -> io::Result<()> {
    if mounted_below(path)?.iter().any(|at| at == path) {
        return Ok(());
    }
    let size = size_bytes.map(|bytes| format!(",size={bytes}")).unwrap_or_default();
    let group = group.map(|group| format!(",gid={group}")).unwrap_or_default();
    let options = format!("mode={mode:o}{group}{size}");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    Ok(mount(Some("tmpfs"), path, Some("tmpfs"), flags, Some(options.as_str()))?)
}

/// Unmounts what is mounted below a directory and deletes it. A directory that does not exist is success. Blocks.
pub(crate) fn clean(directory: &Path) -> io::Result<()> {
    let mut mounts = mounted_below(directory)?;
    // The innermost first.
    mounts.sort_by_key(|path| std::cmp::Reverse(path.as_os_str().len()));
    for path in mounts {
        umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
    }
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Mount points at or below a directory, from /proc/self/mountinfo (proc(5)).
fn mounted_below(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let text = std::fs::read_to_string("/proc/self/mountinfo")?;
    let points = text.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
    Ok(points.filter(|point| point.starts_with(directory)).collect())
}

/// Space, tab, newline and backslash are written in octal.
fn unescape(field: &str) -> PathBuf {
    let plain = field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n");
    PathBuf::from(plain.replace("\\134", "\\"))
}
