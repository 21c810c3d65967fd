//! The first process of a sandbox: does nothing, until it is told to end.

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use crate::signals::EndSignals;

/// Waits for SIGTERM or SIGINT; meanwhile takes the exit codes of orphans.
pub(crate) fn run() -> Result<(), String> {
    let signals = EndSignals::hold()?;
    loop {
        match signals.next(None) {
            Some(Signal::SIGCHLD) => reap(),
            _ => return Ok(()),
        }
    }
}

fn reap() {
    // Ends at "no children" and at "none has ended yet".
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        if status == WaitStatus::StillAlive {
            return;
        }
    }
}
