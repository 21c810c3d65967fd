//! A node of the cluster, on the test's machine: the agent, with the plugin where runtimes look for it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mesh_tests::cgroups;
use mesh_tests::command::{output, run};
use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};

use super::runtime::{Attachment, Network};

/// Nothing takes longer, unless it fails.
pub(super) const LIMIT: Duration = Duration::from_secs(60);
/// Where runtimes look for plugins and networks unless they are told otherwise.
pub(super) const PLUGINS: &str = "/opt/cni/bin";
pub(super) const NETWORKS: &str = "/etc/cni/net.d";
const STOCK: &str = "/usr/lib/cni";
const STATE: &str = "/var/lib/mesh";
const LOG: &str = "/run/agent.log";
const BPF: &str = "/run/bpf/mesh";
/// A service of the cluster, and its backend: the first pod of the node.
pub(super) const SERVICE: &str = "10.96.0.77:80";
pub(super) const FIRST_POD: &str = "10.244.1.2";
pub(super) const POD_PORT: u16 = 8080;

pub(super) struct Node {
    cgroup: String,
    blocks: [&'static str; 2],
    agent: Option<Child>,
}

impl Node {
    /// The node, with an agent that takes pods.
    pub(super) fn start(cgroup: String) -> Self {
        Self::with_blocks(cgroup, ["10.244.1.0/24", "fd10:244:0:1::/64"])
    }

    pub(super) fn with_blocks(cgroup: String, blocks: [&'static str; 2]) -> Self {
        let mut node = Self::prepare(cgroup, blocks);
        node.start_agent();
        node
    }

    /// The node, with all that an agent needs, and without one.
    pub(super) fn prepare(cgroup: String, blocks: [&'static str; 2]) -> Self {
        let node = Self { cgroup, blocks, agent: None };
        own_directories();
        for words in [
            "link add up0 type veth peer name up1",
            "addr add 192.0.2.1/24 dev up0",
            "link set up0 up",
            "link set up1 up",
        ] {
            ip(words);
        }
        cgroups::make(&format!("{}/system", node.cgroup)).unwrap();
        fs::create_dir_all(STATE).unwrap();
        fs::write(Path::new(STATE).join("snapshot.json"), node.snapshot().to_string()).unwrap();
        node
    }

    /// Starts the agent and waits until the network that it announces works. Returns how long that took.
    pub(super) fn start_agent(&mut self) -> Duration {
        let begun = Instant::now();
        let log = fs::File::options().create(true).append(true).open(LOG).unwrap();
        let mut command = self.command("run");
        self.agent = Some(command.stdin(Stdio::null()).stderr(log).spawn().unwrap());
        let network = loop {
            if let Some(network) = Network::read(&Path::new(NETWORKS).join("10-mesh.conflist")) {
                break network.version("1.1.0");
            }
            assert!(begun.elapsed() < LIMIT, "the network is not announced");
            std::thread::sleep(Duration::from_millis(5));
        };
        until("the network works", || network.status().is_ok());
        begun.elapsed()
    }

    /// Has the next agent go on from a snapshot with these policies.
    pub(super) fn save_policy(&self, policy: Value) {
        let mut snapshot = self.snapshot();
        snapshot["policy"] = policy;
        fs::write(Path::new(STATE).join("snapshot.json"), snapshot.to_string()).unwrap();
    }

    /// Makes what the agent has pinned that of an agent with another ABI. Returns where it is now.
    pub(super) fn change_version(&self) -> PathBuf {
        let versions: Vec<_> = fs::read_dir(BPF).unwrap().flatten().collect();
        let [own] = &versions[..] else { panic!("{versions:?}") };
        let other = Path::new(BPF).join("v999");
        fs::rename(own.path(), &other).unwrap();
        other
    }

    /// A command of the agent's program, for this node.
    pub(super) fn command(&self, name: &str) -> Command {
        let hooks = cgroups::unified_root().unwrap().join(&self.cgroup);
        let mut command = Command::new("sh");
        command
            .args(["-c", r#"echo $$ > "$0" && exec "$@""#])
            .arg(hooks.join("system/cgroup.procs"));
        command.args([env!("CARGO_BIN_EXE_mesh-agent"), name, "--node-name", "node-1"]);
        command.args(["--node-ip", "192.0.2.1", "--server", "https://192.0.2.9:6443"]);
        command.args(["--token", &format!("mesh1.{}.{}", "ab".repeat(32), "0f".repeat(16))]);
        command.args(["--bpf-dir", BPF, "--dns-upstream", "192.0.2.9"]);
        command.args(["--cgroup-parent", &format!("/{}/pods", self.cgroup)]);
        command.args(["--overlay", "user", "--eviction-hard", "", "--cgroup"]).arg(hooks);
        command.args(["--containerd", "/run/rig/containerd.sock"]);
        command.args(["--pod-logs-dir", "/run/pod-logs"]);
        command
    }

    /// As a crash does.
    pub(super) fn kill_agent(&mut self) {
        let mut agent = self.agent.take().unwrap();
        // It may have been killed already.
        let _ = agent.kill();
        agent.wait().unwrap();
    }

    pub(super) fn agent_pid(&self) -> u32 {
        self.agent.as_ref().unwrap().id()
    }

    /// Whether the agent's process has ended, or does so in the time that the kernel needs for it.
    pub(super) fn ends_soon(&mut self) -> bool {
        let agent = self.agent.as_mut().unwrap();
        (0..50).any(|_| {
            let ended = agent.try_wait().unwrap().is_some();
            if !ended {
                std::thread::sleep(Duration::from_millis(2));
            }
            ended
        })
    }

    /// The network as the agent has announced it.
    pub(super) fn network() -> Network {
        Network::read(&Path::new(NETWORKS).join("10-mesh.conflist")).unwrap()
    }

    /// The plugin's entry of a list, under another file name of the plugin.
    pub(super) fn entry() -> Value {
        json!({"type": "mesh"})
    }

    /// What there is of pods on the node.
    pub(super) fn left() -> Left {
        let links = ip("-o link");
        let names = links.lines().filter_map(|line| line.split(": ").nth(1));
        // Devices that are out of service go a moment later.
        let links = names.filter(|name| !name.starts_with("mx")).map(str::to_owned).collect();
        let mut routes = BTreeSet::new();
        for family in ["-4", "-6"] {
            for query in ["route show proto 78", "neigh show nud permanent"] {
                let all = ip(&format!("{family} {query}"));
                routes.extend(all.lines().map(|line| line.trim().to_owned()));
            }
        }
        let queue = fs::read_dir(Path::new(STATE).join("cni/queue")).map_or(0, Iterator::count);
        let namespaces = fs::read_dir("/run/netns").map_or(0, Iterator::count);
        Left { links, routes, queue, namespaces }
    }

    /// The containers that have addresses, by the journal.
    pub(super) fn leased() -> BTreeSet<String> {
        let text = fs::read_to_string(Path::new(STATE).join("cni/journal")).unwrap_or_default();
        let mut leased = BTreeSet::new();
        for line in text.lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            let owner = |kind: &str| line[kind]["owner"]["container"].as_str().map(str::to_owned);
            leased.extend(owner("reserve"));
            if let Some(gone) = owner("release") {
                leased.remove(&gone);
            }
        }
        leased
    }

    fn snapshot(&self) -> Value {
        let (address, port) = SERVICE.split_once(':').unwrap();
        json!({
            "cluster": {},
            "node": {"name": "node-1", "blocks": self.blocks, "addresses": ["192.0.2.1"]},
            "peers": [],
            "frontends": [{
                "vip": address, "protocol": "TCP", "port": port.parse::<u16>().unwrap(), "kind": "clusterIp",
                "service": "default/web", "portName": "", "affinitySecs": null,
                "backends": [{"address": FIRST_POD, "port": POD_PORT, "node": "node-1"}],
            }],
            "dns": {"domain": "cluster.local", "services": [], "namespaces": ["default"], "podCidrs": []},
            "l7": {"routes": [], "certificates": []},
            "pods": [],
        })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.agent.is_some() {
            self.kill_agent();
        }
        if std::thread::panicking() {
            let log = fs::read_to_string(LOG).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("agent:\n{}", lines[lines.len().saturating_sub(30)..].join("\n"));
        }
    }
}

/// What pods have on a node.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Left {
    pub(super) links: BTreeSet<String>,
    routes: BTreeSet<String>,
    queue: usize,
    namespaces: usize,
}

/// A namespace that stands for a container; removed by `Drop`.
pub(super) struct Container(String);

impl Container {
    pub(super) fn new(name: &str) -> Self {
        ip(&format!("netns add {name}"));
        Self(name.to_owned())
    }

    /// Its attachment as `eth0`.
    pub(super) fn eth0(&self) -> Attachment {
        Attachment::new(&self.0, &self.path(), "eth0")
    }

    pub(super) fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0)
    }

    /// Runs a command in it.
    pub(super) fn run(&self, words: &[&str]) -> anyhow::Result<String> {
        let netns = format!("--net={}", self.path().display());
        output(Command::new("nsenter").arg(netns).args(words))
    }

    /// Serves its name over HTTP until that is dropped.
    pub(super) fn serve(&self) -> Server {
        let folder = Path::new("/run/www").join(&self.0);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("index.html"), &self.0).unwrap();
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).args(["busybox", "httpd", "-f"]);
        command.args(["-p", &POD_PORT.to_string(), "-h"]).arg(folder);
        Server(command.spawn().unwrap())
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = run("ip", &["netns", "del", &self.0]);
    }
}

/// Ended by `Drop`.
pub(super) struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until it holds.
pub(super) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < LIMIT, "not seen: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until pods have on the node what they had then.
pub(super) fn until_left(before: &Left) {
    let begun = Instant::now();
    loop {
        let now = Node::left();
        if now == *before {
            return;
        }
        assert!(begun.elapsed() < LIMIT, "before: {before:?}\nnow: {now:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What a server of the node's network says to one HTTP request from the node.
pub(super) fn ask(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address.parse().unwrap(), Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.split_once("\r\n\r\n").map(|(_, body)| body.trim().to_owned()).unwrap_or_default())
}

pub(super) fn ip(words: &str) -> String {
    run("ip", &words.split(' ').collect::<Vec<_>>()).unwrap()
}

/// Directories of the machine that the node changes: the changes are in memory, and seen by this machine alone.
fn own_directories() {
    let none = None::<&str>;
    for directory in ["/opt", "/var/lib"] {
        mount(Some("tmpfs"), directory, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    }
    for directory in ["/run/etc/upper", "/run/etc/work", "/run/bpf", "/run/netns"] {
        fs::create_dir_all(directory).unwrap();
    }
    let layers = "lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work";
    mount(Some("overlay"), "/etc", Some("overlay"), MsFlags::empty(), Some(layers)).unwrap();
    mount(Some("bpf"), "/run/bpf", Some("bpf"), MsFlags::empty(), none).unwrap();
    for directory in [PLUGINS, NETWORKS, "/etc/mesh/static-pods"] {
        fs::create_dir_all(directory).unwrap();
    }
    for plugin in ["bandwidth", "bridge", "firewall", "host-local", "loopback", "portmap", "tuning"]
    {
        let from = Path::new(STOCK).join(plugin);
        assert!(from.exists(), "{} is missing: run `cargo xtask tools`", from.display());
        symlink(from, Path::new(PLUGINS).join(plugin)).unwrap();
    }
    let plugin = Path::new(env!("CARGO_BIN_EXE_mesh-agent")).with_file_name("mesh-cni");
    assert!(plugin.exists(), "{} is missing: run `cargo build -p mesh-cni`", plugin.display());
    // Its name is the type in a network's configuration; any will do.
    for name in ["mesh-cni", "mesh"] {
        symlink(&plugin, Path::new(PLUGINS).join(name)).unwrap();
    }
}
