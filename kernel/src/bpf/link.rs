//! Links: an attached program with a life of its own.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::bpffs::remove_file;
use super::sys;
use crate::netlink::NetlinkError;
use crate::netlink::tc::Hook;

/// A program could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The kernel refused the link.
    #[error("create the link")]
    Create(#[source] io::Error),
    /// The link exists and cannot be switched to the new program.
    #[error("switch the link to the new program")]
    Update(#[source] io::Error),
    /// The filter that stands in for a link was refused.
    #[error("attach the program as a filter")]
    Filter(#[source] NetlinkError),
    /// The link is attached but cannot be kept.
    #[error("pin the link")]
    Pin(#[source] io::Error),
}

/// What a link attaches to.
pub(super) struct LinkSpec<'a> {
    kind: u32,
    attach_type: u32,
    target: Target<'a>,
}

enum Target<'a> {
    Cgroup { directory: BorrowedFd<'a>, id: u64 },
    Interface(u32),
}

impl<'a> LinkSpec<'a> {
    /// A hook of a cgroup.
    pub(super) fn cgroup(directory: &'a File, attach_type: u32) -> io::Result<Self> {
        // The id of a cgroup is the inode number of its directory.
        let id = directory.metadata()?.ino();
        let target = Target::Cgroup { directory: directory.as_fd(), id };
        Ok(Self { kind: sys::BPF_LINK_TYPE_CGROUP, attach_type, target })
    }

    /// A TC hook of an interface of the calling thread's namespace.
    pub(super) fn tcx(ifindex: u32, hook: Hook) -> Self {
        let attach_type = match hook {
            Hook::Ingress => sys::BPF_TCX_INGRESS,
            Hook::Egress => sys::BPF_TCX_EGRESS,
        };
        Self { kind: sys::BPF_LINK_TYPE_TCX, attach_type, target: Target::Interface(ifindex) }
    }

    fn raw_target(&self) -> u32 {
        match self.target {
            Target::Cgroup { directory, .. } => sys::raw(directory),
            Target::Interface(ifindex) => ifindex,
        }
    }

    /// Whether an existing link is this one. The kernel would accept a program for another hook without complaint.
    fn matches(&self, info: &sys::LinkInfo) -> bool {
        if info.kind != self.kind {
            return false;
        }
        match self.target {
            Target::Cgroup { id, .. } => {
                let seen = u64::from(info.second) << 32 | u64::from(info.first);
                seen == id && info.third == self.attach_type
            }
            Target::Interface(ifindex) => info.first == ifindex && info.second == self.attach_type,
        }
    }
}

/// Makes the pinned link exist and run `program`: switches it if it is there, else creates and pins it.
pub(super) fn put_link(
    pin: &Path,
    program: BorrowedFd<'_>,
    spec: &LinkSpec<'_>,
) -> Result<(), AttachError> {
    if let Ok(link) = sys::open_pinned(pin) {
        let same = sys::info(link.as_fd()).is_ok_and(|info| spec.matches(&info));
        if same {
            match sys::link_update(link.as_fd(), program) {
                Ok(()) => return Ok(()),
                // The device or cgroup went away, and another one took its number.
                Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
                Err(error) => return Err(AttachError::Update(error)),
            }
        }
    }
    let link = sys::link_create(program, spec.raw_target(), spec.attach_type)
        .map_err(AttachError::Create)?;
    // The new link works already; only now the old file may go.
    remove_file(pin).map_err(AttachError::Pin)?;
    sys::pin(link.as_fd(), pin).map_err(AttachError::Pin)
}

/// Switches a pinned link to `program`; removes the pin of a link whose device is gone.
pub(super) fn switch(pin: &Path, program: BorrowedFd<'_>) -> Result<(), AttachError> {
    let link = sys::open_pinned(pin).map_err(AttachError::Update)?;
    match sys::link_update(link.as_fd(), program) {
        Ok(()) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {
            remove_file(pin).map_err(AttachError::Pin)
        }
        Err(error) => Err(AttachError::Update(error)),
    }
}

/// Takes a pinned link's program off at once. One whose device is gone, or that is not there, is off already.
pub(super) fn detach(pin: &Path) -> io::Result<()> {
    let link = match sys::open_pinned(pin) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        link => link?,
    };
    match sys::link_detach(link.as_fd()) {
        Err(error) if error.raw_os_error() != Some(libc::ENOLINK) => Err(error),
        _ => Ok(()),
    }
}

/// Whether the pinned link is attached there.
pub(super) fn is_attached(pin: &Path, spec: &LinkSpec<'_>) -> bool {
    let info = sys::open_pinned(pin).and_then(|link| sys::info(link.as_fd()));
    info.is_ok_and(|info| spec.matches(&info))
}
