//! The real agent in a network namespace of its own, without a control service: it goes on from its saved snapshot.
//!
//! ```text
//!   namespace of the test            this process
//!     veth 192.0.2.1                   admin socket, signals
//!     mesh-wg 10.244.1.1               (mesh-agent run: overlay, dns, ingress workers)
//!     backend 10.244.1.1:8080  <-- VIP 10.96.0.77:80
//! ```
//!
//! Needs root, eBPF and `ip`, `nft`, `nsenter`, `bash`.
#![allow(clippy::unwrap_used, reason = "a failed test panics")]

#[path = "process/certificate.rs"]
mod certificate;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mesh_tests::cgroups;
use mesh_tests::folders::below;
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(30);
const VIP: &str = "10.96.0.77/80";
/// By these a node is the same one when it comes back. The log and empty folders are the test's own.
const KEPT: [&str; 6] = [
    "log",
    "net.d",
    "state/agent.lock",
    "state/overlay.key",
    "state/overlay.stamp",
    "state/join.json",
];

struct Node {
    name: String,
    dir: PathBuf,
    cgroup: PathBuf,
    bpf: PathBuf,
    /// What the agent is started with beside what all are.
    flags: Vec<String>,
    agent: Option<Child>,
}

fn run(words: &[&str]) -> String {
    let out = Command::new(words[0]).args(&words[1..]).output().unwrap();
    assert!(out.status.success(), "{words:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn wait<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Why this test cannot run here; a panic where everything has to run.
fn skip(why: &str) -> bool {
    assert!(std::env::var_os("CI").is_none(), "cannot run: {why}");
    eprintln!("skipped: {why}");
    true
}

fn cannot_run() -> bool {
    if !nix::unistd::geteuid().is_root() {
        return skip("not root");
    }
    if mesh_kernel::bpf::built_in_object().is_empty() {
        return skip("built without eBPF programs: run `cargo xtask build-ebpf`");
    }
    if mesh_kernel::bpf::cgroup2_mount().is_none() {
        return skip("no cgroup v2 hierarchy is mounted");
    }
    false
}

impl Node {
    /// A node of that mark: tests run side by side.
    fn new(mark: &str) -> Self {
        let name = format!("mat-{mark}-{}", std::process::id());
        let root = mesh_kernel::bpf::cgroup2_mount().unwrap();
        let node = Self {
            dir: std::env::temp_dir().join(&name),
            cgroup: root.join(&name),
            bpf: Path::new("/sys/fs/bpf").join(&name),
            name,
            flags: vec![],
            agent: None,
        };
        run(&["ip", "netns", "add", &node.name]);
        let inside = ["ip", "-n", &node.name];
        run(&[&inside[..], &["link", "set", "lo", "up"]].concat());
        run(&[&inside[..], &["link", "add", "up0", "type", "veth", "peer", "name", "up1"]].concat());
        run(&[&inside[..], &["addr", "add", "192.0.2.1/24", "dev", "up0"]].concat());
        for link in ["up0", "up1"] {
            run(&[&inside[..], &["link", "set", link, "up"]].concat());
        }
        // A host, and one whose administrator has changed something: a new namespace may be like this machine.
        let host = "cd /proc/sys/net && echo 0 > ipv4/ip_forward && echo 0 > ipv6/conf/all/forwarding && \
            echo 0 > ipv4/conf/all/accept_redirects && echo 1 > ipv4/conf/up1/forwarding && echo 1 > ipv6/conf/up0/accept_ra";
        run(&["ip", "netns", "exec", &node.name, "bash", "-c", host]);
        fs::create_dir_all(node.cgroup.join("daemons")).unwrap();
        fs::create_dir_all(node.dir.join("state")).unwrap();
        fs::write(node.dir.join("state/snapshot.json"), node.snapshot().to_string()).unwrap();
        node
    }

    fn snapshot(&self) -> Value {
        let key = "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=";
        json!({
            "cluster": {},
            "node": {
                "name": self.name,
                "blocks": ["10.244.1.0/24", "fd10:244:0:1::/64"],
                "addresses": ["192.0.2.1"],
            },
            "peers": [{
                "node": "other", "publicKey": key, "endpoints": ["192.0.2.2:51900"],
                "allowedIps": ["10.244.2.0/24", "fd10:244:0:2::/64"],
            }],
            "frontends": [{
                "vip": "10.96.0.77", "protocol": "TCP", "port": 80, "kind": "clusterIp", "service": "default/web",
                "portName": "", "affinitySecs": null,
                "backends": [{"address": "10.244.1.1", "port": 8080, "node": self.name}],
            }],
            "dns": {"domain": "cluster.local", "services": [], "namespaces": ["default"], "podCidrs": []},
            "l7": {"routes": [], "certificates": []},
            "pods": [],
        })
    }

    fn command(&self, words: &[&str]) -> Command {
        let procs = self.cgroup.join("daemons/cgroup.procs");
        let mut command = Command::new("bash");
        let script = r#"echo $$ > "$0" && exec nsenter --net=/run/netns/"$1" "${@:2}""#;
        command.args(["-c", script]).arg(procs).arg(&self.name).args(words);
        command
    }

    fn settings(&self) -> Vec<String> {
        let path = |path: PathBuf| path.display().to_string();
        let settings = [
            ("--node-name", self.name.clone()),
            ("--node-ip", "192.0.2.1".to_owned()),
            ("--server", "https://192.0.2.9:6443".to_owned()),
            ("--token", format!("mesh1.{}.{}", "ab".repeat(32), "0f".repeat(16))),
            ("--run-dir", path(self.dir.join("run"))),
            ("--state-dir", path(self.dir.join("state"))),
            ("--bpf-dir", path(self.bpf.clone())),
            ("--cgroup", path(self.cgroup.clone())),
            ("--cni-conf-dir", path(self.dir.join("net.d"))),
            ("--dns-upstream", "192.0.2.9".to_owned()),
            ("--overlay", "user".to_owned()),
        ];
        settings.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
    }

    fn agent(&self, command: &str) -> Command {
        let settings = self.settings();
        let mut words = vec![env!("CARGO_BIN_EXE_mesh-agent"), command];
        words.extend(settings.iter().chain(&self.flags).map(String::as_str));
        self.command(&words)
    }

    fn start(&mut self) {
        self.launch();
        self.until_in_place();
    }

    /// Starts the agent, and does not wait.
    fn launch(&mut self) {
        let log = fs::File::options().create(true).append(true).open(self.dir.join("log")).unwrap();
        let child = self.agent("run").stdin(Stdio::null()).stderr(log).spawn().unwrap();
        self.agent = Some(child);
    }

    fn until_in_place(&self) {
        wait("the node's network is in place", || {
            let pending = self.failures()?;
            let done = pending.is_empty() && self.announcement().exists();
            assert!(!self.log().contains("panicked"), "{}", self.log());
            done.then_some(())
        });
    }

    /// What the agent says is not as it should be, but that there is no control service.
    fn failures(&self) -> Option<Vec<String>> {
        let status = self.ask("/mesh/v1/status")?;
        let status: Value = serde_json::from_str(&status).ok()?;
        let failures = status["failures"].as_array()?.iter().filter_map(Value::as_str);
        Some(failures.filter(|f| !f.starts_with("join")).map(str::to_owned).collect())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// What tells runtimes that there is a network.
    fn announcement(&self) -> PathBuf {
        self.dir.join("net.d/10-mesh.conflist")
    }

    fn stop(&mut self, signal: Signal) {
        let mut child = self.agent.take().unwrap();
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        child.wait().unwrap();
    }

    /// The body of an answer on the admin socket.
    fn ask(&self, path: &str) -> Option<String> {
        let mut stream = UnixStream::connect(self.dir.join("run/agent.sock")).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer.split_once("\r\n\r\n")?.1.to_owned())
    }

    fn worker(&self, name: &str) -> i32 {
        let identity = fs::read(self.dir.join(format!("run/{name}.pid"))).unwrap();
        let identity: Value = serde_json::from_slice(&identity).unwrap();
        i32::try_from(identity["pid"].as_i64().unwrap()).unwrap()
    }

    /// The agent's process: what the shell that was started has become.
    fn pid(&self) -> i32 {
        self.agent.as_ref().unwrap().id().cast_signed()
    }

    /// Whether a TCP connection to the service address works for a process of the node.
    fn reaches_vip(&self) -> bool {
        let script = format!("exec 3<>/dev/tcp/{VIP}");
        let mut command = self.command(&["timeout", "2", "bash", "-c", &script]);
        command.stderr(Stdio::null()).status().unwrap().success()
    }

    fn inside(&self, words: &[&str]) -> String {
        let out = self.command(words).output().unwrap();
        String::from_utf8(out.stdout).unwrap()
    }
}

/// What a machine is like, as far as an agent could change it: each line is one thing.
fn inventory(node: &Node) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for words in [
        &["ip", "-o", "link"][..],
        &["ip", "-o", "addr"],
        &["ip", "-4", "route", "show", "table", "all"],
        &["ip", "-6", "route", "show", "table", "all"],
        &["ip", "-4", "rule"],
        &["ip", "-6", "rule"],
        &["nft", "list", "ruleset"],
        &["tc", "qdisc"],
        &["ip", "xfrm", "policy"],
    ] {
        let lines = node.inside(words);
        // Queues get their names at random, and an address is new for a moment.
        let plain = |line: &str| line.replace(" tentative", "").trim_end().to_owned();
        all.extend(lines.lines().map(|line| format!("{}: {}", words.join(" "), plain(line))));
    }
    let sysctls =
        "cd /proc/sys/net && grep -r . ipv4/ip_forward ipv4/conf ipv6/conf core 2>/dev/null";
    let settings = node.inside(&["bash", "-c", sysctls]);
    let secret = |line: &&str| !line.contains("stable_secret") && !line.contains("flow_limit");
    all.extend(settings.lines().filter(secret).map(|line| format!("sysctl {line}")));
    for root in [&node.cgroup, &node.bpf, &node.dir] {
        all.extend(below(root).into_iter().map(|path| format!("file {}", path.display())));
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let ours = mounts.lines().filter(|line| line.contains(&node.name) && !line.contains("netns"));
    all.extend(ours.map(|line| format!("mount {line}")));
    all
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        let _ = cgroups::kill_all(&self.name);
        if let Some(mut child) = self.agent.take() {
            let _ = child.wait();
        }
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
        let _ = fs::remove_dir_all(&self.bpf);
        let _ = fs::remove_dir_all(&self.dir);
        let _ = cgroups::remove(&self.name);
    }
}

fn capabilities(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(line.trim(), 16).unwrap()
}

/// The internet sockets that a process has open.
fn sockets(pid: i32) -> BTreeSet<PathBuf> {
    let internet: String = ["tcp", "tcp6", "udp", "udp6"]
        .map(|table| fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default())
        .concat();
    let inodes: BTreeSet<&str> =
        internet.lines().filter_map(|line| line.split_whitespace().nth(9)).collect();
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let targets = open.filter_map(|entry| fs::read_link(entry.path()).ok());
    let is_internet = |target: &PathBuf| {
        let name = target.to_string_lossy();
        name.strip_prefix("socket:[")
            .is_some_and(|rest| inodes.contains(rest.trim_end_matches(']')))
    };
    targets.filter(is_internet).collect()
}

/// Listens inside the namespace, for as long as the test process lives.
fn serve_backend(namespace: &str) {
    let path = format!("/run/netns/{namespace}");
    let listener = std::thread::spawn(move || {
        setns(fs::File::open(path).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
        wait("the backend's address", || TcpListener::bind("10.244.1.1:8080").ok())
    });
    let listener = listener.join().unwrap();
    std::thread::spawn(move || listener.incoming().for_each(drop));
}

#[test]
fn a_node_without_control_survives_its_agent_and_is_clean_after_a_reset() {
    if cannot_run() {
        return;
    }
    let mut node = Node::new("life");
    // Addresses of links come up a moment later.
    wait("the links' own addresses", || {
        let addresses = node.inside(&["ip", "-6", "-o", "addr"]);
        (addresses.lines().count() == 3 && !addresses.contains("tentative")).then_some(())
    });
    let untouched = inventory(&node);
    node.start();
    serve_backend(&node.name);
    assert!(node.reaches_vip(), "the service answers");
    let used = inventory(&node);
    let changed = |what: &str| used.difference(&untouched).any(|line| line.starts_with(what));
    for what in [
        "ip -o link",
        "ip -4 route",
        "ip -6 route",
        "nft",
        "sysctl ipv4/ip_forward",
        "sysctl ipv6/conf/up0",
        "file",
    ] {
        assert!(changed(what), "a look at the machine shows what the agent does: {what}");
    }
    let peers: Value = serde_json::from_str(&node.ask("/mesh/v1/peers").unwrap()).unwrap();
    assert_eq!(peers[0]["node"], "other");
    assert!(node.ask("/metrics").unwrap().contains("mesh_map_capacity"));
    assert!(node.inside(&["ip", "route"]).contains("10.244.2.0/24 dev mesh-wg"));

    // More often than anybody would find by looking from time to time.
    let mut changes = 0;
    wait("forwarding is turned on again, each of many times", || {
        let on = node.inside(&["cat", "/proc/sys/net/ipv4/ip_forward"]) == "1\n";
        if on && changes < 5 {
            node.inside(&["bash", "-c", "echo 0 > /proc/sys/net/ipv4/ip_forward"]);
            changes += 1;
            return None;
        }
        on.then_some(())
    });

    let workers = ["dns", "ingress", "overlay"].map(|name| (name, node.worker(name)));
    for (name, pid) in &workers[..2] {
        assert_eq!(capabilities(*pid), 0, "{name} may do nothing that others may not");
    }
    node.stop(Signal::SIGKILL);
    assert!(node.reaches_vip(), "without an agent");
    node.start();
    for (name, pid) in workers {
        assert_eq!(node.worker(name), pid, "the next agent adopts the {name} worker");
    }
    let (_, dns) = workers[0];
    let before = sockets(dns);
    wait("the new agent has them too", || sockets(node.pid()).is_superset(&before).then_some(()));
    kill(Pid::from_raw(dns), Signal::SIGKILL).unwrap();
    wait("a new DNS worker", || (node.worker("dns") != dns).then_some(()));
    assert_eq!(sockets(node.worker("dns")), before, "on the sockets that the first agent made");

    node.stop(Signal::SIGTERM);
    assert!(node.reaches_vip(), "a polite end changes nothing either");
    let out = node.agent("reset").output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(!node.reaches_vip());
    let links = node.inside(&["ip", "-o", "link"]);
    assert!(!links.contains("mesh-wg") && links.lines().count() == 3, "{links}");
    for family in ["-4", "-6"] {
        let routes = node.inside(&["ip", family, "route"]);
        assert!(!routes.contains("10.244") && !routes.contains("fd10"), "{routes}");
    }
    assert_eq!(node.inside(&["nft", "list", "ruleset"]), "");
    assert!(!node.inside(&["ip", "addr", "show", "lo"]).contains("169.254.20.10"));
    assert!(!node.bpf.exists() || fs::read_dir(&node.bpf).unwrap().next().is_none());
    let left = fs::read_to_string(node.cgroup.join("daemons/cgroup.procs")).unwrap();
    assert_eq!(left, "", "no process is left");
    assert!(node.dir.join("state/overlay.key").exists(), "the key stays");
    let now = inventory(&node);
    let kept = |line: &&String| {
        !KEPT.iter().any(|name| **line == format!("file {}", node.dir.join(name).display()))
    };
    let more: Vec<&String> = now.difference(&untouched).filter(kept).collect();
    // It was written before the first agent, and goes with what it says.
    let snapshot = format!("file {}", node.dir.join("state/snapshot.json").display());
    let less: Vec<&String> = untouched.difference(&now).filter(|line| **line != snapshot).collect();
    assert!(more.is_empty() && less.is_empty(), "more: {more:#?}\nless: {less:#?}");
}

#[test]
fn a_node_that_uses_the_clusters_ranges_itself_is_refused() {
    if cannot_run() {
        return;
    }
    let mut node = Node::new("lan");
    let own = ["10.244.7.1/24", "fd10:96::701/120"];
    let name = node.name.clone();
    let address = |words: &[&str]| {
        run(&[&["ip", "-n", &name, "addr"][..], words, &["dev", "up1"]].concat());
    };
    address(&["add", own[0]]);
    address(&["add", own[1], "nodad"]);
    node.launch();
    let clashes = [("10.244.0.0/16", "10.244.7.0/24"), ("fd10:96::/112", "fd10:96::700/120")];
    let names_all = |lines: &[String]| {
        clashes
            .iter()
            .all(|(range, own)| lines.iter().any(|line| line.contains(range) && line.contains(own)))
    };
    wait("both ranges of each clash are named", || {
        let failures = node.failures()?;
        names_all(&failures).then_some(())
    });
    wait("the log names them", || {
        let lines: Vec<String> = node.log().lines().map(str::to_owned).collect();
        names_all(&lines).then_some(())
    });
    assert!(!node.announcement().exists(), "no runtime is told of a network");
    for family in ["-4", "-6"] {
        let routes = node.inside(&["ip", family, "route"]);
        // The kernel gives every device a link-local address.
        let ours = |line: &&str| {
            line.starts_with("unreachable") || line.contains("mesh-wg") && !line.starts_with("fe80")
        };
        assert_eq!(routes.lines().filter(ours).count(), 0, "{routes}");
    }
    assert!(!node.inside(&["ip", "addr", "show", "lo"]).contains("169.254.20.10"));
    assert_eq!(node.inside(&["nft", "list", "ruleset"]), "");

    // It gives its own use of them up, and needs no other start.
    own.iter().for_each(|own| address(&["del", own]));
    node.until_in_place();
}
