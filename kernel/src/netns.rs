//! Doing things inside a network namespace.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::ifaddrs::getifaddrs;
use nix::sched::{CloneFlags, setns};

use crate::ifname::MacAddress;

/// linux/asm-generic/socket.h; the libc crate does not have it.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// A network namespace: that of this process, or one that is named by a path such as `/run/netns/x` or `/proc/N/ns/net`.
///
/// Cheap to clone. Holding it keeps the namespace alive.
#[derive(Debug, Clone)]
pub struct NetNs(Option<Arc<Named>>);

#[derive(Debug)]
struct Named {
    path: PathBuf,
    file: File,
}

impl NetNs {
    /// The namespace that the calling thread is in whenever [`run`](Self::run) is called.
    pub fn current() -> Self {
        Self(None)
    }

    /// The namespace at `path`.
    ///
    /// # Errors
    /// When the path cannot be opened. That it is no namespace shows at the first [`run`](Self::run).
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        Ok(Self(Some(Arc::new(Named { path: path.to_owned(), file }))))
    }

    /// The namespace of some process that has a device with this address; nothing when there is none.
    ///
    /// Looks into the namespace of every process: milliseconds, so not for what is done often.
    ///
    /// # Errors
    /// When processes cannot be listed.
    pub fn with_device(mac: MacAddress) -> io::Result<Option<Self>> {
        let mut with = Self::with_devices(&BTreeSet::from([mac]))?;
        Ok(with.pop())
    }

    /// The namespaces that have a device with one of these addresses, each once.
    ///
    /// # Errors
    /// As above.
    pub fn with_devices(macs: &BTreeSet<MacAddress>) -> io::Result<Vec<Self>> {
        let mut seen: BTreeSet<PathBuf> = BTreeSet::new();
        let mut found = vec![];
        for process in fs::read_dir("/proc")?.flatten() {
            if found.len() == macs.len() {
                break;
            }
            let path = process.path().join("ns/net");
            // Not a process, or one that has just ended.
            let Ok(identity) = fs::read_link(&path) else { continue };
            if !seen.insert(identity) {
                continue;
            }
            let Ok(namespace) = Self::open(&path) else { continue };
            if namespace.run(|| holds(macs)).unwrap_or(false) {
                found.push(namespace);
            }
        }
        Ok(found)
    }

    /// The kernel's number for the namespace: never used again, also not after its end.
    ///
    /// # Errors
    /// When it cannot be entered, or the kernel is older than 5.14.
    pub fn cookie(&self) -> io::Result<u64> {
        cookie_of(&self.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))??)
    }

    /// Where it was opened; nothing for the current one.
    pub fn path(&self) -> Option<&Path> {
        self.0.as_ref().map(|named| named.path.as_path())
    }

    /// Descriptor of the namespace; nothing for the current one.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(|named| named.file.as_fd())
    }

    /// Runs `work` inside the namespace: on a thread of its own, or directly when it is the current one.
    ///
    /// Sockets keep the namespace in which they were made, so they may leave the closure.
    ///
    /// # Errors
    /// When the thread cannot start or enter (no CAP_SYS_ADMIN, not a network namespace).
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let Some(named) = &self.0 else { return Ok(work()) };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("netns".to_owned());
            let handle = thread.spawn_scoped(scope, || {
                setns(&named.file, CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            })?;
            handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// The kernel's number for the namespace that a socket belongs to.
pub(crate) fn cookie_of(socket: &impl AsRawFd) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).expect("a small size");
    // SAFETY: the value is as long as said and outlives the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

/// Whether a device of the calling thread's namespace has one of these addresses.
fn holds(macs: &BTreeSet<MacAddress>) -> bool {
    let Ok(all) = getifaddrs() else { return false };
    let addresses = all.filter_map(|entry| entry.address?.as_link_addr()?.addr());
    addresses.into_iter().any(|address| macs.contains(&MacAddress(address)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_current_namespace_needs_no_privilege() {
        assert_eq!(NetNs::current().run(|| 7).unwrap(), 7);
    }

    #[test]
    fn a_missing_path_is_an_error() {
        assert!(NetNs::open(Path::new("/nonexistent/netns")).is_err());
    }
}
