//! Named descriptors that outlive the process that uses them.
//!
//! ```text
//!   agent ──── at its start, by inheritance ───> worker     (MESH_INHERITED names them)
//!   agent <─── while it runs, by SCM_RIGHTS ──── worker     (the control socket's `attach`)
//! ```
//!
//! So both have all of them, and either may be killed: in a listening socket connections wait, in a UDP socket
//! datagrams, until the next worker reads on.

use std::collections::BTreeMap;
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde::{Deserialize, Serialize};

use crate::sockets::SocketSpec;

/// Tells a worker what it was started with, as JSON.
const VARIABLE: &str = "MESH_INHERITED";

#[derive(Debug, Serialize, Deserialize)]
struct Inheritance {
    /// The pipe on which the agent says that the worker may start.
    permit: RawFd,
    descriptors: BTreeMap<String, RawFd>,
    /// Control socket of the worker that is to be replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    predecessor: Option<PathBuf>,
}

/// Descriptors by name. Sockets are named by [`SocketSpec::name`], others as their worker likes.
#[derive(Debug, Default)]
pub struct Descriptors(BTreeMap<String, OwnedFd>);

/// A worker cannot take over what it was started with.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// The variable was not written by an agent.
    #[error("understand {VARIABLE}")]
    Malformed(#[source] serde_json::Error),
    /// A descriptor is not there.
    #[error("inherit descriptor {0}")]
    Absent(RawFd, #[source] io::Error),
    /// The agent died before it wrote down who this process is: the next one would not find it.
    #[error("the agent ended before this worker could start")]
    Orphaned,
}

impl Descriptors {
    /// What this process was started with; nothing when no agent started it. Only the first call gets it.
    ///
    /// Waits until the agent has written down who we are: a worker that nobody knows would serve for ever.
    /// Call it first in `main`.
    pub fn inherited() -> Result<Self, InheritError> {
        static TAKEN: AtomicBool = AtomicBool::new(false);
        let Ok(text) = std::env::var(VARIABLE) else { return Ok(Self::default()) };
        if TAKEN.swap(true, Ordering::Relaxed) {
            return Ok(Self::default());
        }
        let all: Inheritance = serde_json::from_str(&text).map_err(InheritError::Malformed)?;
        let own = |fd: RawFd| -> Result<OwnedFd, InheritError> {
            if fd <= libc::STDERR_FILENO {
                return Err(InheritError::Absent(fd, io::ErrorKind::InvalidInput.into()));
            }
            // SAFETY: only asks whether the number is a descriptor, and keeps it from programs that we may start.
            if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
                return Err(InheritError::Absent(fd, io::Error::last_os_error()));
            }
            // SAFETY: it is open, and whoever started us left it to us; nothing else in this process knows it, and
            // this code runs once.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        };
        let mut permit = std::fs::File::from(own(all.permit)?);
        let descriptors = all.descriptors.into_iter().map(|(name, fd)| Ok((name, own(fd)?)));
        let descriptors = Self(descriptors.collect::<Result<_, InheritError>>()?);
        match permit.read_exact(&mut [0]) {
            Ok(()) => Ok(descriptors),
            Err(_) => Err(InheritError::Orphaned),
        }
    }

    /// The socket of this name in `inherited`, or else a new one. It is kept here; the caller gets a duplicate.
    pub fn socket(&mut self, spec: &SocketSpec, inherited: &mut Self) -> io::Result<OwnedFd> {
        let name = spec.name();
        let socket = match inherited.take(&name) {
            Some(socket) => socket,
            None => spec.open()?,
        };
        let duplicate = socket.try_clone()?;
        self.insert(name, socket);
        Ok(duplicate)
    }

    /// Adds one, in the place of another of that name.
    pub fn insert(&mut self, name: impl Into<String>, descriptor: OwnedFd) {
        self.0.insert(name.into(), descriptor);
    }

    /// Removes one.
    pub fn take(&mut self, name: &str) -> Option<OwnedFd> {
        self.0.remove(name)
    }

    /// Whether there is one of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, BorrowedFd<'_>)> {
        self.0.iter().map(|(name, descriptor)| (name.as_str(), descriptor.as_fd()))
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Makes `command` start its program with these. They have to stay open until then.
    ///
    /// The program waits for a byte from the pipe that is returned, and ends when there comes none.
    pub(crate) fn pass_to(
        &self,
        command: &mut Command,
        predecessor: Option<&Path>,
    ) -> io::Result<Permit> {
        let (permit, grant) = io::pipe()?;
        let number = |(name, fd): (&str, BorrowedFd<'_>)| (name.to_owned(), fd.as_raw_fd());
        let inheritance = Inheritance {
            permit: permit.as_raw_fd(),
            descriptors: self.iter().map(number).collect(),
            predecessor: predecessor.map(Path::to_owned),
        };
        command.env(VARIABLE, serde_json::to_string(&inheritance)?);
        let mut all: Vec<RawFd> = inheritance.descriptors.into_values().collect();
        all.push(inheritance.permit);
        // SAFETY: between fork and exec only fcntl(2) is called, which is async-signal-safe, on numbers in memory
        // that was made before.
        unsafe {
            command.pre_exec(move || all.iter().try_for_each(|fd| stay_open(*fd)));
        }
        Ok(Permit { _read: permit, grant })
    }
}

/// Control socket of the worker that this process was started to replace.
pub(crate) fn predecessor() -> Option<PathBuf> {
    let all: Inheritance = serde_json::from_str(&std::env::var(VARIABLE).ok()?).ok()?;
    all.predecessor
}

fn stay_open(fd: RawFd) -> io::Result<()> {
    // SAFETY: changes a flag of one descriptor number; the kernel refuses a number that is none.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
}

/// The agent's end of the pipe on which a worker waits. Dropped without a word, it makes the worker end.
pub(crate) struct Permit {
    /// Open until the program has been started.
    _read: io::PipeReader,
    grant: io::PipeWriter,
}

impl Permit {
    /// Lets the worker start. It may have ended, or not know of this: nothing to do about either.
    pub(crate) fn grant(mut self) {
        use std::io::Write as _;
        let _ = self.grant.write_all(&[1]);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::Stdio;

    use super::*;

    /// Starts a shell that writes what it inherited as `out` into its standard output.
    fn shell(descriptors: &Descriptors) -> (std::process::Child, Permit) {
        let mut command = Command::new("/bin/sh");
        let script = r#"
            permit=$(echo "$MESH_INHERITED" | sed 's/.*"permit":\([0-9]*\).*/\1/')
            from=$(echo "$MESH_INHERITED" | sed 's/.*"pipe\/0":\([0-9]*\).*/\1/')
            head -c 1 <&$permit | grep -q . || { echo orphaned; exit; }
            cat <&$from"#;
        command.args(["-c", script]).stdout(Stdio::piped());
        let permit = descriptors.pass_to(&mut command, None).unwrap();
        (command.spawn().unwrap(), permit)
    }

    #[test]
    fn a_program_gets_descriptors_by_name_once_it_may_start() {
        let (read, mut write) = io::pipe().unwrap();
        let mut descriptors = Descriptors::default();
        descriptors.insert("pipe/0", read.into());
        let (child, permit) = shell(&descriptors);
        write.write_all(b"inherited").unwrap();
        drop(write);
        permit.grant();
        assert_eq!(child.wait_with_output().unwrap().stdout, b"inherited");

        let (orphan, permit) = shell(&descriptors);
        drop(permit);
        assert_eq!(orphan.wait_with_output().unwrap().stdout, b"orphaned\n");
    }

    #[test]
    fn a_socket_is_taken_over_or_made() {
        let transport = crate::sockets::Transport::Tcp { backlog: 1 };
        let spec = SocketSpec { transport, address: ([127, 0, 0, 1], 0).into(), copy: 0 };
        let (mut inherited, mut kept) = (Descriptors::default(), Descriptors::default());
        let port = |fd: OwnedFd| std::net::TcpListener::from(fd).local_addr().unwrap().port();
        let made = port(kept.socket(&spec, &mut inherited).unwrap());
        let mut next = Descriptors::default();
        assert_eq!(port(next.socket(&spec, &mut kept).unwrap()), made, "the same one");
        assert!(kept.is_empty() && next.contains(&spec.name()));
        assert_ne!(port(Descriptors::default().socket(&spec, &mut kept).unwrap()), made);
        assert!(Descriptors::inherited().unwrap().is_empty(), "no agent started this process");
    }
}
