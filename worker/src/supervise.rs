//! Keeping a worker process alive across its own death and the agent's.
//!
//! A worker is started in a session of its own, so that nothing that happens to the agent reaches it. Who it is
//! stands in an identity file (pid, start time, program, arguments); the next agent finds it there and goes on
//! watching it. A worker whose program or arguments have changed since is replaced.
//!
//! The sockets that a worker serves on are the agent's as well ([`Descriptors`]): the agent makes them, the worker
//! inherits them, and a later agent gets them back from the worker that lives. Only where both were killed at the
//! same time they are made anew.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::attach::{AttachError, Attachment, Said};
use crate::descriptors::Descriptors;
use crate::identity::{Identity, ProgramId};
use crate::pace::Pace;
use crate::process::ProcessId;
use crate::sockets::SocketSpec;

/// Time between the polite and the final signal, for a worker that nobody replaces.
const GRACE: Duration = Duration::from_secs(5);
/// A successor that is not ready by then never will be.
const HANDOVER_LIMIT: Duration = Duration::from_secs(10);
/// A worker that does not give its descriptors by then hangs.
const FETCH_LIMIT: Duration = Duration::from_secs(2);
/// A worker that does not answer by then is not only starting.
const STARTS_WITHIN: Duration = Duration::from_secs(10);
const FIRST_RETRY: Duration = Duration::from_millis(10);
const LAST_RETRY: Duration = Duration::from_secs(1);

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
    /// Where it listens for us.
    pub control_socket: PathBuf,
    /// What it serves on, and is started with.
    pub sockets: Vec<SocketSpec>,
    /// How another one takes its place.
    pub replacement: Replacement,
    /// Told whenever another process has become this worker: what it restored may be older than what it was sent last.
    pub started: Arc<Notify>,
}

/// How a worker gives way to a newer one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replacement {
    /// The new one serves before the old one is asked to end; both read from the same sockets.
    Overlapping {
        /// How long the old one may serve those that it has: more than the drain time that it was started with.
        grace: Duration,
    },
    /// The new one asks the old one for what it is busy with ([`Predecessor`]), which ends the old one: only one can work
    /// at a time. An old one that cannot hand over has to end first.
    ///
    /// [`Predecessor`]: crate::Predecessor
    Yielding,
    /// The old one has to end first.
    Exclusive,
}

/// A worker could not be started, watched or stopped.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    /// One of its sockets could not be made.
    #[error("open {socket}")]
    Socket {
        /// The socket's name.
        socket: String,
        /// Why.
        #[source]
        source: io::Error,
    },
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
    /// The process cannot be watched or ended.
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

/// Adopts the worker if it runs already, starts it otherwise, and starts it again whenever it dies. Never returns.
///
/// Cancel safe: dropping the future leaves the worker running, for the next agent.
pub async fn keep(spec: WorkerSpec) {
    let mut keeper = Keeper { spec, held: Descriptors::default(), known: None };
    let mut pace = Pace::default();
    loop {
        let since = Instant::now();
        let worker = keeper.spec.name;
        match keeper.run_once().await {
            Ok(()) => tracing::warn!(worker, "worker died, starting it again"),
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(worker, error, "worker not running");
            }
        }
        tokio::time::sleep(pace.pause(since.elapsed())).await;
    }
}

/// Stops the worker, if it runs: asks, waits five seconds, then insists.
pub async fn stop(spec: &WorkerSpec) -> Result<(), SuperviseError> {
    let keep = |source| SuperviseError::Identity { path: spec.identity_file.clone(), source };
    if let Some(identity) = Identity::read(&spec.identity_file).map_err(keep)? {
        for process in identity.processes() {
            end(process, GRACE).await?;
        }
    }
    match fs::remove_file(&spec.identity_file) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(keep(source)),
        _ => Ok(()),
    }
}

async fn end(process: ProcessId, grace: Duration) -> Result<(), SuperviseError> {
    let failed = |source| SuperviseError::Watch { pid: process.pid, source };
    process.end(grace).await.map_err(failed)
}

/// Asks a worker to end when its clients have finished; insists in the end. Does not wait for it.
fn retire(old: ProcessId, grace: Duration) {
    tokio::spawn(async move {
        if let Err(error) = end(old, grace).await {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(pid = old.pid, error, "replaced worker not ended");
        }
    });
}

struct Keeper {
    spec: WorkerSpec,
    /// What the worker serves on, as it said last; what the next one is started with.
    held: Descriptors,
    /// The process that said so.
    known: Option<ProcessId>,
}

impl Keeper {
    async fn run_once(&mut self) -> Result<(), SuperviseError> {
        let process = match self.adopt().await? {
            Some(process) => process,
            None => self.start(None)?.process,
        };
        let failed = |source| SuperviseError::Watch { pid: process.pid, source };
        tokio::select! {
            ended = process.ended() => ended.map_err(failed),
            never = self.hold(process) => match never {},
        }
    }

    /// The process that runs already, or its successor; nothing when none runs.
    async fn adopt(&mut self) -> Result<Option<ProcessId>, SuperviseError> {
        let Some(identity) = self.read_identity()? else { return Ok(None) };
        let process = identity.process;
        if let Some(old) = identity.predecessor.filter(ProcessId::is_alive) {
            if !process.is_alive() {
                // The last agent died while it replaced the old one, and then the new one died too.
                self.give_back_socket();
                return self.replace(old).await.map(Some);
            }
            // Perhaps the last agent died between starting the new one and retiring the old one.
            self.hand_over(old, identity.clone(), false).await?;
        }
        if !process.is_alive() {
            return Ok(None);
        }
        let program = ProgramId::of(&self.spec.program);
        if identity.args == self.spec.args && program.is_ok_and(|p| p == identity.program) {
            tracing::debug!(worker = self.spec.name, pid = process.pid, "adopted");
            return Ok(Some(process));
        }
        self.replace(process).await.map(Some)
    }

    /// Puts a new worker in the place of one that was started from another program or with other arguments.
    async fn replace(&mut self, old: ProcessId) -> Result<ProcessId, SuperviseError> {
        let (worker, pid) = (self.spec.name, old.pid);
        tracing::info!(worker, pid, "replacing: program or arguments changed");
        let (configured, yields) = match tokio::time::timeout(FETCH_LIMIT, self.fetch(old)).await {
            Ok(Ok(said)) => said,
            failed => {
                tracing::warn!(worker, pid, ?failed, "sockets not handed over, making new ones");
                (false, false)
            }
        };
        let side_by_side = match self.spec.replacement {
            Replacement::Overlapping { .. } => true,
            Replacement::Yielding => yields,
            Replacement::Exclusive => false,
        };
        if !side_by_side {
            end(old, GRACE).await?;
            return Ok(self.start(None)?.process);
        }
        self.put_socket_aside();
        let fresh = self.start(Some(old))?;
        self.hand_over(old, fresh, configured).await
    }

    /// Retires `old` once `fresh` is ready; if that never happens, `old` stays.
    async fn hand_over(
        &mut self,
        old: ProcessId,
        fresh: Identity,
        configured: bool,
    ) -> Result<ProcessId, SuperviseError> {
        let process = fresh.process;
        let ready = tokio::select! {
            () = self.ready(process, configured) => true,
            _ = process.ended() => false,
            () = tokio::time::sleep(HANDOVER_LIMIT) => false,
        };
        if ready {
            let _ = fs::remove_file(self.aside());
            let grace = match self.spec.replacement {
                Replacement::Overlapping { grace } => grace,
                Replacement::Yielding | Replacement::Exclusive => GRACE,
            };
            retire(old, grace);
            return Ok(process);
        }
        end(process, GRACE).await?;
        self.give_back_socket();
        self.write_identity(&Identity { process: old, predecessor: None, ..fresh })?;
        Err(SuperviseError::Handover { socket: self.spec.control_socket.clone() })
    }

    /// Where the old worker's control socket stays reachable while a new one tries to take its place.
    fn aside(&self) -> PathBuf {
        self.spec.control_socket.with_extension("old")
    }

    fn put_socket_aside(&self) {
        let _ = fs::remove_file(self.aside());
        // Fails when it does not listen yet: then there is nothing to give back.
        let _ = fs::hard_link(&self.spec.control_socket, self.aside());
    }

    fn give_back_socket(&self) {
        let _ = fs::rename(self.aside(), &self.spec.control_socket);
    }

    fn start(&mut self, predecessor: Option<ProcessId>) -> Result<Identity, SuperviseError> {
        let spec = &self.spec;
        for socket in &spec.sockets {
            let name = socket.name();
            if !self.held.contains(&name) {
                let opened = socket.open();
                let opened = opened
                    .map_err(|source| SuperviseError::Socket { socket: name.clone(), source });
                self.held.insert(name, opened?);
            }
        }
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
        let aside = self.aside();
        let asked = matches!(spec.replacement, Replacement::Yielding) && predecessor.is_some();
        let permit = self.held.pass_to(&mut command, asked.then_some(aside.as_path()));
        let permit = permit.map_err(failed)?;
        let program = ProgramId::of(&spec.program).map_err(failed)?;
        let mut child = command.spawn().map_err(failed)?;
        let process = ProcessId::of(child.id().cast_signed());
        let identity = Identity { process, program, args: spec.args.clone(), predecessor };
        if let Err(error) = self.write_identity(&identity) {
            // Nobody could find it again: better none than one that is lost.
            let _ = child.kill().and_then(|()| child.wait());
            return Err(error);
        }
        permit.grant();
        tracing::info!(worker = self.spec.name, pid = process.pid, "started");
        Ok(identity)
    }

    /// Keeps what the worker says that it serves on, for as long as it lives.
    async fn hold(&mut self, process: ProcessId) -> std::convert::Infallible {
        let (mut retry, begun) = (FIRST_RETRY, Instant::now());
        loop {
            if let Ok(mut attached) = Attachment::new(&self.spec.control_socket, process).await {
                while let Ok(said) = attached.next().await {
                    self.keep(process, said);
                    retry = FIRST_RETRY;
                }
            }
            tokio::time::sleep(retry).await;
            // One that is only starting is told what to do at once.
            if begun.elapsed() > STARTS_WITHIN {
                retry = (retry * 2).min(LAST_RETRY);
            }
        }
    }

    /// Gets the descriptors of a worker; returns whether it has a configuration, and whether it can hand over.
    async fn fetch(&mut self, process: ProcessId) -> Result<(bool, bool), AttachError> {
        let said = Attachment::new(&self.spec.control_socket, process).await?.next().await?;
        let known = (said.configured, said.yields);
        self.keep(process, said);
        Ok(known)
    }

    /// Waits until a new worker answers, and has a configuration when it needs one.
    async fn ready(&mut self, process: ProcessId, configured: bool) {
        loop {
            if let Ok(mut attached) = Attachment::new(&self.spec.control_socket, process).await {
                while let Ok(said) = attached.next().await {
                    let is_ready = said.configured || !configured;
                    self.keep(process, said);
                    if is_ready {
                        return;
                    }
                }
            }
            tokio::time::sleep(FIRST_RETRY).await;
        }
    }

    fn keep(&mut self, process: ProcessId, said: Said) {
        if self.known.replace(process) != Some(process) {
            self.spec.started.notify_one();
        }
        // One that ends has let go of them: they are what the next one needs.
        if let Some(descriptors) = said.descriptors {
            self.held = descriptors;
        }
    }

    fn read_identity(&self) -> Result<Option<Identity>, SuperviseError> {
        let path = &self.spec.identity_file;
        Identity::read(path)
            .map_err(|source| SuperviseError::Identity { path: path.clone(), source })
    }

    fn write_identity(&self, identity: &Identity) -> Result<(), SuperviseError> {
        let path = &self.spec.identity_file;
        identity
            .write(path)
            .map_err(|source| SuperviseError::Identity { path: path.clone(), source })
    }
}

#[cfg(test)]
mod tests;
