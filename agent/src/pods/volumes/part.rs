//! A part of a volume (`subPath`) on its way to the runtime.
//!
//! The pod's other containers may rename and link inside the volume meanwhile: a path that was checked can lead onto the
//! node a moment later (CVE-2021-25741). So a part is opened once, in a way that cannot leave the volume, and what was
//! opened is mounted at a place that no container reaches. The runtime is given that place.
//!
//! Directories that are made on the way are as open as the volume itself, as with the kubelet: they are for the same containers,
//! which seldom run as root.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, fstat, mkdirat};

use super::MountError;

/// Who may do what, and that files inside get the directory's group.
const PERMISSIONS: u32 = 0o2777;

/// A file or directory of a volume, whatever its name is now.
pub(super) struct Part(OwnedFd);

impl Part {
    /// Opens it; directories that are missing are made. Links are followed as long as they stay inside.
    pub(super) fn open(volume: &Path, sub: &str) -> Result<Self, MountError> {
        let failed = |errno: Errno| match errno {
            Errno::EXDEV | Errno::ELOOP => MountError::SubPath(sub.to_owned()),
            other => MountError::Io { path: sub.to_owned(), cause: other.into() },
        };
        let plain = |c: Component<'_>| matches!(c, Component::Normal(_) | Component::CurDir);
        if !Path::new(sub).components().all(plain) {
            return Err(MountError::SubPath(sub.to_owned()));
        }
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let volume = open(volume, flags, Mode::empty()).map_err(failed)?;
        let mut here = beneath(&volume, Path::new(".")).map_err(failed)?;
        let open_to = fstat(&volume).map_err(failed)?.st_mode & PERMISSIONS;
        let mut walked = PathBuf::new();
        for name in Path::new(sub).components() {
            walked.push(name);
            let found = match beneath(&volume, &walked) {
                Err(Errno::ENOENT) => {
                    match mkdirat(&here, name.as_os_str(), Mode::from_bits_truncate(0o755)) {
                        Ok(()) => opened_to(&here, name.as_os_str(), open_to),
                        // Another container of the pod may want the same directory at the same time.
                        Err(Errno::EEXIST) => beneath(&volume, &walked),
                        Err(errno) => Err(errno),
                    }
                }
                found => found,
            };
            here = found.map_err(failed)?;
        }
        Ok(Self(here))
    }

    /// Mounts it at `place`, instead of what is mounted there.
    pub(super) fn mount(&self, place: &Path) -> io::Result<()> {
        while umount2(place, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
        // Of the kind that an earlier run had.
        let _ = std::fs::remove_file(place).or_else(|_| std::fs::remove_dir(place));
        let source = by_number(&self.0);
        if std::fs::metadata(&source)?.is_dir() {
            std::fs::create_dir_all(place)?;
        } else {
            place.parent().map_or(Ok(()), std::fs::create_dir_all)?;
            File::create(place)?;
        }
        Ok(mount(
            Some(&source),
            place,
            None::<&str>,
            MsFlags::MS_BIND | MsFlags::MS_REC,
            None::<&str>,
        )?)
    }
}

/// A directory that was just made, with these permissions: what mkdir(2) is told is narrowed by the umask. Another one of that name, if
/// somebody was faster; never what a link leads to.
fn opened_to(parent: &OwnedFd, name: &OsStr, permissions: u32) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let made = openat2(parent, name, how)?;
    std::fs::set_permissions(by_number(&made), std::fs::Permissions::from_mode(permissions))
        .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    Ok(made)
}

/// The path of what is open, whatever its name is now.
fn by_number(open: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", open.as_fd().as_raw_fd()))
}

/// What is at a path inside a volume (openat2(2)).
fn beneath(volume: &OwnedFd, path: &Path) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(volume, path, how)
}
