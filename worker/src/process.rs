//! A process that need not be our child: known for sure, watched, ended.

use std::fs;
use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A killed process is gone by then, unless the kernel holds it.
const LAST_GRACE: Duration = Duration::from_secs(5);

/// A process, and no other one that gets its number later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    pub(crate) pid: i32,
    /// Clock ticks since boot, field 22 of proc_pid_stat(5): a pid alone may be somebody else's by now.
    start_ticks: u64,
}

impl ProcessId {
    /// The process that has this number now; one that has ended already is never alive.
    pub(crate) fn of(pid: i32) -> Self {
        Self { pid, start_ticks: start_ticks(pid).unwrap_or(0) }
    }

    pub(crate) fn is_alive(&self) -> bool {
        start_ticks(self.pid) == Some(self.start_ticks)
    }

    /// Waits until it is gone; collects it when it is a child of this process.
    pub(crate) async fn ended(&self) -> io::Result<()> {
        if self.is_alive() {
            let handle = match pidfd(self.pid) {
                Ok(handle) => handle,
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
                Err(error) => return Err(error),
            };
            // SAFETY: an `OwnedFd` is one open descriptor for as long as it lives.
            let handle = unsafe { AsyncFd::register_with_interest(handle, Interest::READABLE)? };
            // Readable when it has ended (pidfd_open(2)).
            handle.readable().await?.retain_ready();
        }
        let _ = waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::WNOHANG));
        Ok(())
    }

    /// Asks it to end, waits, and insists.
    pub(crate) async fn end(&self, grace: Duration) -> io::Result<()> {
        self.signal(Signal::SIGTERM);
        if let Ok(ended) = tokio::time::timeout(grace, self.ended()).await {
            return ended;
        }
        self.signal(Signal::SIGKILL);
        tokio::time::timeout(LAST_GRACE, self.ended())
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    fn signal(&self, signal: Signal) {
        if self.is_alive() {
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }
}

/// A handle that stays with the process (pidfd_open(2), Linux 5.3).
fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers; a result of 0 or more is a new descriptor that nobody else owns.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: as above, the descriptor is new and owned here only.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Start time of a process that is not a zombie.
fn start_ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name, in parentheses, may hold anything: count fields after the last one.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}
