//! A worker process under test: the program of the test once more, kept alive as an agent keeps its workers.
//!
//! The test file has a test `worker_process`, marked `#[ignore]`, which runs the worker when [`worker_dir`] says so; the rig
//! starts that one alone. A keeper that is aborted is an agent that was killed: its descriptors close.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use mesh_worker::supervise::{self, Replacement, WorkerSpec};
use mesh_worker::{Client, SocketSpec};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// Nothing here takes this long unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(30);
const VARIABLE: &str = "MESH_RIG";

/// Where the worker's files are, in the process that is to be the worker.
pub fn worker_dir() -> Option<PathBuf> {
    std::env::var_os(VARIABLE).map(PathBuf::from)
}

/// One worker, its files and its keeper. Dropping it ends all of them.
pub struct Rig {
    /// The folder of its files.
    pub dir: PathBuf,
    sockets: Vec<SocketSpec>,
    variables: Vec<(&'static str, String)>,
    keeper: Option<JoinHandle<()>>,
}

impl Rig {
    /// A worker that is started with `sockets` and these variables. Does not start it yet.
    pub fn new(name: &str, sockets: Vec<SocketSpec>, variables: &[(&'static str, String)]) -> Self {
        let dir = std::env::temp_dir().join(format!("mesh-rig-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a temporary folder can be made");
        Self::in_folder(dir, sockets, variables)
    }

    /// The same with the files of another one, for an agent that is a process of its own.
    pub fn in_folder(
        dir: PathBuf,
        sockets: Vec<SocketSpec>,
        variables: &[(&'static str, String)],
    ) -> Self {
        Self { dir, sockets, variables: variables.to_vec(), keeper: None }
    }

    /// Starts an agent as a process: the program of the test once more, with its test `agent_process` alone.
    pub fn agent_process(&self, generation: usize) -> Child {
        let log = fs::File::options().create(true).append(true).open(self.dir.join("log"));
        let program = std::env::current_exe().expect("a test knows its program");
        Command::new(program)
            .args(["--exact", "--ignored", "agent_process"])
            .env(VARIABLE, &self.dir)
            .env("GENERATION", generation.to_string())
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .stdout(Stdio::null())
            .stderr(log.expect("a log can be written"))
            .spawn()
            .expect("a test can start itself")
    }

    /// How an agent starts the worker. Another generation is another command line: the worker is replaced.
    pub fn spec(&self, generation: usize) -> WorkerSpec {
        let program = std::env::current_exe().expect("a test knows its program");
        let set = |(name, value): &(&str, String)| format!("{name}={value}");
        let mut args = vec![format!("{VARIABLE}={}", self.dir.display())];
        args.extend(self.variables.iter().map(set));
        args.push(format!("GENERATION={generation}"));
        args.push(program.display().to_string());
        args.extend(["--exact", "--ignored", "worker_process"].map(str::to_owned));
        WorkerSpec {
            name: "rig",
            program: "/usr/bin/env".into(),
            args,
            identity_file: self.dir.join("w.pid"),
            log_file: Some(self.dir.join("log")),
            control_socket: self.control_socket(),
            sockets: self.sockets.clone(),
            replacement: Replacement::Overlapping { grace: Duration::from_secs(10) },
            started: Arc::default(),
        }
    }

    /// Where the worker listens for its agent.
    pub fn control_socket(&self) -> PathBuf {
        self.dir.join("w.sock")
    }

    /// An agent's client of the worker.
    pub fn client(&self) -> Client {
        Client::new(self.control_socket())
    }

    /// An agent comes: it adopts the worker, or starts it. Tells when it knows the worker.
    pub fn keep(&mut self, generation: usize) -> Known {
        self.keep_spec(self.spec(generation))
    }

    /// The same with another command line.
    pub fn keep_spec(&mut self, spec: WorkerSpec) -> Known {
        let known = Known(Arc::clone(&spec.started));
        self.keeper = Some(tokio::spawn(supervise::keep(spec)));
        known
    }

    /// Waits until the sockets are there: a worker has been started with them.
    pub async fn started(&self) {
        eventually("a worker", async || self.pid().is_some()).await;
    }

    /// The agent is killed. The worker lives on.
    pub async fn kill_agent(&mut self) {
        if let Some(keeper) = self.keeper.take() {
            keeper.abort();
            let _ = keeper.await;
        }
    }

    /// The worker's process.
    pub fn pid(&self) -> Option<i32> {
        let identity = fs::read(self.dir.join("w.pid")).ok()?;
        let identity: serde_json::Value = serde_json::from_slice(&identity).ok()?;
        i32::try_from(identity["pid"].as_i64()?).ok()
    }

    /// Sends the worker a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = self.pid().expect("the worker runs");
        let _ = kill(Pid::from_raw(pid), signal);
    }

    /// `kill -9`, and waits until another process is the worker.
    pub async fn kill_worker(&self) {
        let pid = self.pid();
        self.signal(Signal::SIGKILL);
        eventually("another worker", async || self.pid() != pid).await;
    }

    /// Sends the worker its configuration, as soon as it takes one.
    pub async fn configure<C: serde::Serialize + Sync>(&self, config: &C) {
        eventually("configured", async || self.client().set(config).await.is_ok()).await;
    }
}

/// What an agent knows of its worker.
pub struct Known(Arc<Notify>);

impl Known {
    /// Waits until the agent has spoken with another process than before.
    pub async fn changed(&self) {
        let changed = tokio::time::timeout(PATIENCE, self.0.notified()).await;
        changed.expect("the agent gets to know its worker");
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", fs::read_to_string(self.dir.join("log")).unwrap_or_default());
        }
        if let Some(keeper) = &self.keeper {
            keeper.abort();
        }
        if let Some(pid) = self.pid() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Waits until `holds`, for a bounded time.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Whether a process is there, also as a zombie that its parent has not collected.
pub fn exists(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}/exe")).exists()
}

/// A port of loopback that nobody uses, over TCP.
pub fn free_address() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
    listener.local_addr().expect("a bound socket has an address")
}
