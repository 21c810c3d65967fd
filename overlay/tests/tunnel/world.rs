//! Two nodes with a pod each, in network namespaces of the test's own; gone when dropped.
//!
//! ```text
//!   pod a          node a                        node b          pod b
//!   eth0 -- pod0 [ forwards ] ul0 ======= ul0 [ forwards ] pod0 -- eth0
//!   10.71.0.2      mesh-wg   192.0.2.1   192.0.2.2  mesh-wg    10.72.0.2
//!   fd71::2                  fd00:a::1   fd00:a::2             fd72::2
//! ```

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use mesh_overlay::{NodeKey, Overlay, OverlayConfig, PeerConfig, Status};
use mesh_worker::supervise::{self, Replacement, WorkerSpec};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{getsockopt, sockopt};

/// One of the two sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    A,
    B,
}

impl Side {
    pub(crate) fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    fn letter(self) -> char {
        match self {
            Self::A => 'a',
            Self::B => 'b',
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::A => 1,
            Self::B => 2,
        }
    }

    /// Address of the node on the underlay.
    pub(crate) fn underlay(self, v6: bool) -> IpAddr {
        let n = self.number();
        if v6 { format!("fd00:a::{n}") } else { format!("192.0.2.{n}") }.parse().unwrap()
    }

    /// Address of the pod.
    pub(crate) fn pod(self, v6: bool) -> IpAddr {
        let n = self.number();
        if v6 { format!("fd7{n}::2") } else { format!("10.7{n}.0.2") }.parse().unwrap()
    }
}

pub(crate) struct World {
    prefix: String,
    pub(crate) files: tempfile::TempDir,
    workers: [Option<Child>; 2],
    agents: [Option<Agent>; 2],
    runtime: tokio::runtime::Runtime,
}

/// Whether the test can run. Without root it is skipped, but not in CI.
pub(crate) fn privileged() -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "CI runs as root: this test may not be skipped");
    println!("skipped: network namespaces need root");
    false
}

impl World {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("mov{}-{count}-", std::process::id());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let files = tempfile::tempdir().unwrap();
        let world = Self { prefix, files, workers: [None, None], agents: [None, None], runtime };
        for side in [Side::A, Side::B] {
            for kind in ["node", "pod"] {
                ip(&format!("netns add {}", world.name(kind, side)));
                world.ip(kind, side, "link set lo up");
            }
        }
        let (a, b) = (world.name("node", Side::A), world.name("node", Side::B));
        ip(&format!("-n {a} link add ul0 type veth peer name ul0 netns {b}"));
        for side in [Side::A, Side::B] {
            world.build(side);
        }
        world
    }

    fn build(&self, side: Side) {
        let (n, pod) = (side.number(), self.name("pod", side));
        let node = |command: &str| self.ip("node", side, command);
        node(&format!("addr add 192.0.2.{n}/24 dev ul0"));
        node(&format!("addr add fd00:a::{n}/64 dev ul0 nodad"));
        node("link set ul0 up");
        node(&format!("link add pod0 type veth peer name eth0 netns {pod}"));
        node(&format!("addr add 10.7{n}.0.1/24 dev pod0"));
        node(&format!("addr add fd7{n}::1/64 dev pod0 nodad"));
        node("link set pod0 up");
        let pod = |command: &str| self.ip("pod", side, command);
        pod(&format!("addr add 10.7{n}.0.2/24 dev eth0"));
        pod(&format!("addr add fd7{n}::2/64 dev eth0 nodad"));
        pod("link set eth0 up mtu 1420");
        pod(&format!("route add default via 10.7{n}.0.1"));
        pod(&format!("route add default via fd7{n}::1"));
        self.inside("node", side, || {
            for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                std::fs::write(format!("/proc/sys/net/{setting}"), "1").unwrap();
            }
        });
    }

    /// Runs a closure on a thread in the namespace.
    pub(crate) fn inside<T: Send>(
        &self,
        kind: &str,
        side: Side,
        body: impl FnOnce() -> T + Send,
    ) -> T {
        inside(&self.name(kind, side), body)
    }

    /// Starts a thread in the namespace that may outlive the call.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        kind: &str,
        side: Side,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> thread::JoinHandle<T> {
        let name = self.name(kind, side);
        thread::spawn(move || {
            enter(&name);
            body()
        })
    }

    /// An agent comes: it adopts the worker of a node, starts one, or replaces one of another generation.
    pub(crate) fn keep(&mut self, side: Side, generation: u32) {
        self.kill_agent(side);
        let spec = self.spec(side, generation);
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let thread = self.spawn("node", side, move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                tokio::select! {
                    () = supervise::keep(spec) => {}
                    _ = stopped => {}
                }
            });
        });
        self.agents[side as usize] = Some(Agent { stop: Some(stop), thread: Some(thread) });
    }

    /// The agent of a node dies; the worker lives on.
    pub(crate) fn kill_agent(&mut self, side: Side) {
        self.agents[side as usize] = None;
    }

    /// The worker's process, as its agent has written it down.
    pub(crate) fn pid(&self, side: Side) -> Option<i32> {
        let text = std::fs::read(self.spec(side, 0).identity_file).ok()?;
        let identity: serde_json::Value = serde_json::from_slice(&text).ok()?;
        i32::try_from(identity["pid"].as_i64()?).ok()
    }

    fn spec(&self, side: Side, generation: u32) -> WorkerSpec {
        let file = |kind: &str| self.files.path().join(format!("{}.{kind}", side.letter()));
        let path = |kind: &str| file(kind).display().to_string();
        WorkerSpec {
            name: "overlay",
            program: engine(),
            args: vec![
                path("sock"),
                path("json"),
                "mesh-wg".to_owned(),
                path("key"),
                generation.to_string(),
            ],
            identity_file: file("pid"),
            log_file: Some(file("log")),
            control_socket: file("sock"),
            sockets: vec![],
            replacement: Replacement::Yielding,
            started: Arc::default(),
        }
    }

    /// Waits until the worker of a node answers, and is another process than `old`.
    pub(crate) fn wait_for_another(&self, side: Side, old: Option<i32>) {
        for _ in 0..3000 {
            let new = self.pid(side);
            if new.is_some() && new != old && self.answerer(side) == new {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("no other worker: {}", self.log(side));
    }

    /// The process that answers as the worker of a node.
    fn answerer(&self, side: Side) -> Option<i32> {
        let stream = UnixStream::connect(self.spec(side, 0).control_socket).ok()?;
        let credentials = getsockopt(&stream, sockopt::PeerCredentials).ok()?;
        self.try_status(side)?;
        Some(credentials.pid())
    }

    /// Starts the worker of a node and waits until it answers.
    pub(crate) fn start(&mut self, side: Side) {
        self.launch(side);
        for _ in 0..500 {
            if self.try_status(side).is_some() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("the worker never answered: {}", self.log(side));
    }

    /// Starts a worker that cannot run; returns its log.
    pub(crate) fn start_and_wait_for_end(&mut self, side: Side) -> String {
        self.launch(side);
        self.wait_for_end(side)
    }

    /// Waits until a worker has ended by itself, with a failure; returns its log.
    pub(crate) fn wait_for_end(&mut self, side: Side) -> String {
        let child = self.workers[side as usize].as_mut().expect("a running worker");
        for _ in 0..2000 {
            if let Some(status) = child.try_wait().unwrap() {
                assert!(!status.success());
                self.workers[side as usize] = None;
                return self.log(side);
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("the worker goes on: {}", self.log(side));
    }

    pub(crate) fn log(&self, side: Side) -> String {
        let path = self.files.path().join(format!("{}.log", side.letter()));
        std::fs::read_to_string(path).unwrap()
    }

    fn launch(&mut self, side: Side) {
        let file = |kind: &str| self.files.path().join(format!("{}.{kind}", side.letter()));
        let log = File::options().create(true).append(true).open(file("log")).unwrap();
        let name = self.name("node", side);
        let child = Command::new("ip")
            .args(["netns", "exec", &name])
            .arg(engine())
            .args([file("sock"), file("json"), "mesh-wg".into(), file("key")])
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.workers[side as usize] = Some(child);
    }

    /// kill -9, and gone when this returns.
    pub(crate) fn kill(&mut self, side: Side) {
        let mut child = self.workers[side as usize].take().expect("a running worker");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub(crate) fn key(&self, side: Side) -> NodeKey {
        NodeKey::load_or_create(&self.files.path().join(format!("{}.key", side.letter()))).unwrap()
    }

    pub(crate) fn config(&self, side: Side, v6: bool) -> OverlayConfig {
        let other = side.other();
        let n = other.number();
        let prefixes = [format!("10.7{n}.0.0/24"), format!("fd7{n}::/64")];
        let peer = PeerConfig {
            public_key: self.key(other).public(),
            endpoints: vec![SocketAddr::new(other.underlay(v6), 51900)],
            relay: None,
            allowed_ips: prefixes.iter().map(|p| p.parse().unwrap()).collect(),
            persistent_keepalive_secs: None,
            preshared_key: None,
            former_preshared_key: None,
            keys: vec![],
        };
        OverlayConfig { listen_port: 51900, mtu: 1420, peers: vec![peer], own_keys: vec![] }
    }

    pub(crate) fn configure(&self, side: Side, config: &OverlayConfig) {
        self.runtime.block_on(self.overlay(side).configure(config)).unwrap();
    }

    /// Both workers, configured, and the nodes' routes to the pods.
    pub(crate) fn connect(&mut self, v6: bool) {
        let configs = [Side::A, Side::B].map(|side| self.config(side, v6));
        self.connect_with(&configs);
    }

    /// The same with workers that an agent keeps.
    pub(crate) fn connect_kept(&mut self) {
        for side in [Side::A, Side::B] {
            self.keep(side, 0);
            self.wait_for_another(side, None);
            self.configure(side, &self.config(side, false));
        }
        self.route();
    }

    /// The same with other configurations.
    pub(crate) fn connect_with(&mut self, configs: &[OverlayConfig; 2]) {
        for (side, config) in [Side::A, Side::B].into_iter().zip(configs) {
            self.start(side);
            self.configure(side, config);
        }
        self.route();
    }

    fn route(&self) {
        for side in [Side::A, Side::B] {
            let n = side.other().number();
            self.ip("node", side, &format!("route add 10.7{n}.0.0/24 dev mesh-wg"));
            self.ip("node", side, &format!("route add fd7{n}::/64 dev mesh-wg"));
        }
    }

    pub(crate) fn status(&self, side: Side) -> Status {
        self.try_status(side).expect("the worker answers")
    }

    pub(crate) fn try_status(&self, side: Side) -> Option<Status> {
        self.runtime.block_on(self.overlay(side).status()).ok()
    }

    fn overlay(&self, side: Side) -> Overlay {
        Overlay::user(self.files.path().join(format!("{}.sock", side.letter())))
    }

    pub(crate) fn name(&self, kind: &str, side: Side) -> String {
        format!("{}{kind}-{}", self.prefix, side.letter())
    }

    /// ip(8) in a namespace.
    pub(crate) fn ip(&self, kind: &str, side: Side, command: &str) -> String {
        ip(&format!("-n {} {command}", self.name(kind, side)))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for side in [Side::A, Side::B] {
            if self.agents[side as usize].take().is_some() {
                let _ = self.runtime.block_on(supervise::stop(&self.spec(side, 0)));
            }
        }
        for child in self.workers.iter_mut().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
        for side in [Side::A, Side::B] {
            for kind in ["node", "pod"] {
                let name = self.name(kind, side);
                let _ = Command::new("ip").args(["netns", "del", &name]).status();
            }
            if thread::panicking() {
                let log = self.files.path().join(format!("{}.log", side.letter()));
                eprintln!("{}", std::fs::read_to_string(log).unwrap_or_default());
            }
        }
    }
}

/// The part of an agent that keeps a worker. Dropped, it is an agent that was killed: its descriptors are closed.
struct Agent {
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

/// The worker's binary: `cargo test` builds examples beside the tests.
pub(crate) fn engine() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.ancestors().nth(2).unwrap().join("examples/engine");
    assert!(path.exists(), "build it first: cargo build -p mesh-overlay --example engine");
    path
}

/// Runs a closure on a thread in the namespace.
pub(crate) fn inside<T: Send>(name: &str, body: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let body = move || {
            enter(name);
            body()
        };
        scope.spawn(body).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

pub(crate) fn enter(name: &str) {
    let namespace = File::open(Path::new("/run/netns").join(name)).unwrap();
    setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
}

pub(crate) fn ip(command: &str) -> String {
    let output = Command::new("ip").args(command.split_whitespace()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {command}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}
