//! Keeping a worker process alive across its own death and the agent's.
//!
//! A worker is started in a session of its own, so that nothing that happens to the agent reaches it. Who it is
//! stands in an identity file (pid, start time, program, arguments); the next agent finds it there and goes on
//! watching it. A worker whose program or arguments have changed since is replaced.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

/// Time between the polite and the final signal.
const GRACE: Duration = Duration::from_secs(5);
/// The same for a worker whose successor serves already: its clients may finish.
const HANDOVER_GRACE: Duration = Duration::from_secs(30);
/// A successor that is not ready by then never will be.
const HANDOVER_LIMIT: Duration = Duration::from_secs(10);
/// A worker that lived so long is restarted at once when it dies.
const HEALTHY: Duration = Duration::from_secs(10);
const FIRST_DELAY: Duration = Duration::from_millis(50);
const LONGEST_DELAY: Duration = Duration::from_secs(5);

/// What to keep running.
#[derive(Debug, Clone)]
pub struct WorkerSpec {
    /// Its name, for people.
    pub name: &'static str,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Where its identity is kept.
    pub identity_file: PathBuf,
    /// Where its standard error goes; this process's own when absent.
    pub log_file: Option<PathBuf>,
    /// Its control socket, when a new one may start while the old one still serves: both share their ports, and the
    /// new one takes over the socket when it is ready. Absent: the old one has to end first.
    pub handover: Option<PathBuf>,
}

/// A worker could not be started, watched or stopped.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    /// The program could not be executed.
    #[error("start {program}")]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The identity file could not be read or written.
    #[error("keep the worker's identity in {path}")]
    Identity {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The process cannot be watched.
    #[error("watch process {pid}")]
    Watch {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The successor did not take over. The old one serves on.
    #[error("the new worker did not take over {socket}")]
    Handover {
        /// The control socket.
        socket: PathBuf,
    },
}

/// Which process a worker is, and what it was started from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    #[serde(flatten)]
    process: ProcessId,
    program: ProgramId,
    args: Vec<String>,
    /// The one before it, which may still be serving its last clients.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    predecessor: Option<ProcessId>,
}

/// A process, and no other one that gets its number later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct ProcessId {
    pid: i32,
    /// Clock ticks since boot, field 22 of proc_pid_stat(5): a pid alone may be somebody else's by now.
    start_ticks: u64,
}

/// Changes when the file is replaced or rewritten.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct ProgramId {
    path: PathBuf,
    device: u64,
    inode: u64,
    modified_nanos: i128,
}

/// Adopts the worker if it runs already, starts it otherwise, and starts it again whenever it dies. Never returns.
///
/// Cancel safe: dropping the future leaves the worker running, for the next agent.
pub async fn keep(spec: WorkerSpec) {
    let mut delay = Duration::ZERO;
    loop {
        tokio::time::sleep(delay).await;
        let since = Instant::now();
        match run_once(&spec).await {
            Ok(()) => tracing::warn!(worker = spec.name, "worker died, starting it again"),
            Err(error) => {
                tracing::error!(
                    worker = spec.name,
                    error = &error as &dyn std::error::Error,
                    "worker not running"
                );
            }
        }
        delay = if since.elapsed() >= HEALTHY {
            Duration::ZERO
        } else {
            (delay * 2).clamp(FIRST_DELAY, LONGEST_DELAY)
        };
    }
}

async fn run_once(spec: &WorkerSpec) -> Result<(), SuperviseError> {
    let running = match adopt(spec).await? {
        Some(running) => running,
        None => start(spec, None)?.process,
    };
    watch(running.pid).await
}

/// Stops the worker, if it runs: asks, waits five seconds, then insists.
pub async fn stop(spec: &WorkerSpec) -> Result<(), SuperviseError> {
    if let Some(identity) = read(&spec.identity_file)? {
        for process in identity.predecessor.into_iter().chain([identity.process]) {
            if is_alive(&process) {
                end(process.pid, GRACE).await?;
            }
        }
    }
    match fs::remove_file(&spec.identity_file) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(SuperviseError::Identity { path: spec.identity_file.clone(), source })
        }
        _ => Ok(()),
    }
}

/// The process that runs already, or its successor; nothing when none runs.
async fn adopt(spec: &WorkerSpec) -> Result<Option<ProcessId>, SuperviseError> {
    let Some(identity) = read(&spec.identity_file)? else { return Ok(None) };
    if let Some(old) = identity.predecessor.filter(is_alive) {
        if !is_alive(&identity.process) {
            // The agent died during a handover, and then the successor: the old one is still the best there is.
            return replace(spec, old).await.map(Some);
        }
        retire(old);
    }
    if !is_alive(&identity.process) {
        return Ok(None);
    }
    if identity.args == spec.args && program_id(&spec.program).is_ok_and(|p| p == identity.program)
    {
        tracing::debug!(worker = spec.name, pid = identity.process.pid, "adopted");
        return Ok(Some(identity.process));
    }
    replace(spec, identity.process).await.map(Some)
}

/// Puts a new worker in the place of one that was started from another program or with other arguments.
async fn replace(spec: &WorkerSpec, old: ProcessId) -> Result<ProcessId, SuperviseError> {
    tracing::info!(worker = spec.name, pid = old.pid, "replacing: program or arguments changed");
    let Some(socket) = &spec.handover else {
        end(old.pid, GRACE).await?;
        return Ok(start(spec, None)?.process);
    };
    let before = socket_id(socket);
    let fresh = start(spec, Some(old))?;
    let deadline = Instant::now() + HANDOVER_LIMIT;
    while socket_id(socket) == before {
        if Instant::now() > deadline || !is_alive(&fresh.process) {
            end(fresh.process.pid, GRACE).await?;
            let restored = Identity { process: old, predecessor: None, ..fresh };
            write(&spec.identity_file, &restored)?;
            return Err(SuperviseError::Handover { socket: socket.clone() });
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    retire(old);
    Ok(fresh.process)
}

/// Changes when another process binds the socket.
fn socket_id(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Asks a worker to end when its clients have finished; insists in the end. Does not wait for it.
fn retire(old: ProcessId) {
    tokio::spawn(async move {
        if let Err(error) = end(old.pid, HANDOVER_GRACE).await {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(pid = old.pid, error, "replaced worker not ended");
        }
    });
}

fn start(spec: &WorkerSpec, predecessor: Option<ProcessId>) -> Result<Identity, SuperviseError> {
    let failed = |source| SuperviseError::Start { program: spec.program.clone(), source };
    let mut command = Command::new(&spec.program);
    command.args(&spec.args).stdin(Stdio::null()).stdout(Stdio::null());
    if let Some(path) = &spec.log_file {
        let log = File::options().create(true).append(true).open(path).map_err(failed)?;
        command.stderr(log);
    }
    // SAFETY: between fork and exec only setsid(2) is called, which is async-signal-safe and touches no memory
    // of ours.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(io::Error::from));
    }
    let program = program_id(&spec.program).map_err(failed)?;
    let pid = command.spawn().map_err(failed)?.id().cast_signed();
    let process = ProcessId { pid, start_ticks: start_ticks(pid).unwrap_or(0) };
    let identity = Identity { process, program, args: spec.args.clone(), predecessor };
    if let Err(error) = write(&spec.identity_file, &identity) {
        // Nobody could find it again: better none than one that is lost.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        let _ = waitpid(Pid::from_raw(pid), None);
        return Err(error);
    }
    tracing::info!(worker = spec.name, pid, "started");
    Ok(identity)
}

/// Waits until the process is gone; collects it when it is a child of this process.
async fn watch(pid: i32) -> Result<(), SuperviseError> {
    let failed = |source| SuperviseError::Watch { pid, source };
    let handle = match pidfd(pid) {
        Ok(handle) => handle,
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    let (gone, wait) = oneshot::channel();
    // A thread of its own: a blocking task of the runtime would hold up the agent's own end.
    std::thread::Builder::new()
        .name("watch-worker".to_owned())
        .spawn(move || {
            let _ = gone.send(wait_for(&handle, None));
        })
        .map_err(failed)?;
    let outcome = wait.await.unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()));
    let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
    outcome.map(drop).map_err(failed)
}

async fn end(pid: i32, grace: Duration) -> Result<(), SuperviseError> {
    let failed = |source| SuperviseError::Watch { pid, source };
    let Ok(handle) = pidfd(pid) else { return Ok(()) };
    let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    let ended = tokio::task::spawn_blocking(move || {
        if wait_for(&handle, Some(grace))? {
            return Ok(());
        }
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        wait_for(&handle, Some(GRACE)).map(drop)
    });
    ended.await.unwrap_or_else(|e| Err(io::Error::other(e))).map_err(failed)?;
    let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
    Ok(())
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

/// Whether the process ended within the limit.
fn wait_for(handle: &OwnedFd, limit: Option<Duration>) -> io::Result<bool> {
    let timeout = match limit {
        Some(limit) => PollTimeout::try_from(limit).map_err(io::Error::other)?,
        None => PollTimeout::NONE,
    };
    loop {
        let mut fds = [PollFd::new(handle.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(ready) => return Ok(ready > 0),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn is_alive(process: &ProcessId) -> bool {
    start_ticks(process.pid) == Some(process.start_ticks)
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

fn program_id(path: &Path) -> io::Result<ProgramId> {
    let metadata = fs::metadata(path)?;
    Ok(ProgramId {
        path: path.to_owned(),
        device: metadata.dev(),
        inode: metadata.ino(),
        modified_nanos: i128::from(metadata.mtime()) * 1_000_000_000
            + i128::from(metadata.mtime_nsec()),
    })
}

fn read(path: &Path) -> Result<Option<Identity>, SuperviseError> {
    match fs::read(path) {
        // A torn file is a worker that nobody can name: it will be found by its sockets being busy.
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SuperviseError::Identity { path: path.to_owned(), source }),
    }
}

fn write(path: &Path, identity: &Identity) -> Result<(), SuperviseError> {
    let failed = |source| SuperviseError::Identity { path: path.to_owned(), source };
    let fresh = path.with_extension("new");
    let bytes = serde_json::to_vec(identity).map_err(|e| failed(e.into()))?;
    fs::write(&fresh, bytes).and_then(|()| fs::rename(&fresh, path)).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("mesh-keep-{name}-{}", std::process::id()));
            fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }

        fn spec(&self, seconds: &str) -> WorkerSpec {
            WorkerSpec {
                name: "test",
                program: "/bin/sleep".into(),
                args: vec![seconds.to_owned()],
                identity_file: self.0.join("pid"),
                log_file: Some(self.0.join("log")),
                handover: None,
            }
        }

        async fn running(&self) -> ProcessId {
            for _ in 0..500 {
                let known = read(&self.0.join("pid")).unwrap().map(|identity| identity.process);
                if let Some(process) = known.filter(is_alive) {
                    return process;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            panic!("no worker came up");
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            if let Ok(Some(identity)) = read(&self.0.join("pid")) {
                for process in identity.predecessor.into_iter().chain([identity.process]) {
                    if is_alive(&process) {
                        let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
                    }
                }
            }
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[tokio::test]
    async fn a_worker_that_is_killed_comes_back() {
        let dir = Dir::new("killed");
        let keeper = tokio::spawn(keep(dir.spec("60")));
        let first = dir.running().await;
        kill(Pid::from_raw(first.pid), Signal::SIGKILL).unwrap();
        let mut second = dir.running().await;
        for _ in 0..500 {
            if second.pid != first.pid {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
            second = dir.running().await;
        }
        assert_ne!(second.pid, first.pid);
        keeper.abort();
        stop(&dir.spec("60")).await.unwrap();
        assert!(!is_alive(&second));
    }

    #[tokio::test]
    async fn the_next_agent_adopts_a_worker_or_replaces_an_outdated_one() {
        let dir = Dir::new("adopted");
        let keeper = tokio::spawn(keep(dir.spec("60")));
        let first = dir.running().await;
        keeper.abort();
        let _ = keeper.await;
        assert!(is_alive(&first), "it outlives its keeper");

        assert_eq!(adopt(&dir.spec("60")).await.unwrap(), Some(first));
        let second = adopt(&dir.spec("61")).await.unwrap().unwrap();
        assert_ne!(second, first, "other arguments");
        assert!(!is_alive(&first), "the outdated one was stopped");
        stop(&dir.spec("61")).await.unwrap();
        assert!(!is_alive(&second));
        stop(&dir.spec("61")).await.unwrap();
    }

    /// A stand-in for a worker: takes the socket's place after a moment, as the real ones do when they are ready.
    fn shell(dir: &Dir, script: &str) -> WorkerSpec {
        let socket = dir.0.join("socket");
        let script = script.replace("SOCKET", socket.to_str().unwrap());
        WorkerSpec {
            program: "/bin/sh".into(),
            args: vec!["-c".to_owned(), script],
            handover: Some(socket),
            ..dir.spec("")
        }
    }

    #[tokio::test]
    async fn a_successor_serves_before_the_old_one_ends() {
        let dir = Dir::new("handover");
        let ready = "touch SOCKET.new; mv SOCKET.new SOCKET; exec sleep 6";
        let old = start(&shell(&dir, &format!("{ready}0")), None).unwrap().process;
        while socket_id(&dir.0.join("socket")).is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let hopeless = shell(&dir, "exit 1");
        let refused = adopt(&hopeless).await;
        assert!(matches!(refused, Err(SuperviseError::Handover { .. })), "{refused:?}");
        assert!(is_alive(&old), "nobody took over, so the old one stays");

        let slow = shell(&dir, &format!("sleep 0.2; {ready}1"));
        let successor = tokio::spawn(async move { adopt(&slow).await });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(is_alive(&old), "the new one is not ready yet");
        let new = successor.await.unwrap().unwrap().unwrap();
        assert!(new != old && is_alive(&new));
        for _ in 0..500 {
            if !is_alive(&old) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the old one was not told to end");
    }
}
