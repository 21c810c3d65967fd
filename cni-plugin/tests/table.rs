//! Every row of the CNI's behaviour: the real plugin, run as a runtime runs it, against a real agent's socket whose
//! network is in memory.
//!
//! ```text
//!   test --exec--> mesh-cni --unix socket--> mesh_agent::cni --> FakePodNetwork
//!          env + stdin                        journal on disk
//! ```
#![allow(clippy::unwrap_used, reason = "a failed test panics")]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_agent::cni::journal::FileStorage;
use mesh_agent::cni::ledger::{Ledger, LedgerHandle};
use mesh_agent::cni::{Cni, Readiness, serve};
use mesh_kernel::IfName;
use mesh_kernel::pods::{FakePodNetwork, PodNetwork, PodPort};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Any namespace that is not the agent's own: the fake network never enters it.
const NETNS: &str = "/proc/self/ns/uts";
/// Upper bound of one execution; the table's own limits are smaller, but this machine may be busy.
const PATIENCE: Duration = Duration::from_secs(5);

struct Node {
    dir: tempfile::TempDir,
    network: Arc<FakePodNetwork>,
    readiness: watch::Sender<Readiness>,
    runtime: tokio::runtime::Runtime,
    agent: Option<JoinHandle<()>>,
}

impl Node {
    fn new(block: &str) -> Self {
        let readiness = Readiness {
            blocks: vec![block.parse().unwrap(), "fd00::/64".parse().unwrap()].into(),
            mtu: 1420,
            unavailable: None,
            limited: None,
        };
        let mut node = Self {
            dir: tempfile::tempdir().unwrap(),
            network: Arc::new(FakePodNetwork::new()),
            readiness: watch::Sender::new(readiness),
            runtime: tokio::runtime::Runtime::new().unwrap(),
            agent: None,
        };
        node.start();
        node
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("cni.sock")
    }

    fn start(&mut self) {
        let storage = FileStorage::new(self.dir.path().join("journal"));
        let (ledger, damaged) = Ledger::open(Box::new(storage), "boot").unwrap();
        assert_eq!(damaged, 0);
        let ledger = LedgerHandle::start(ledger).unwrap();
        let network: Arc<dyn PodNetwork> = Arc::clone(&self.network) as _;
        let cni = Cni::new(ledger, network, self.readiness.subscribe(), self.dir.path().to_owned());
        let socket = self.socket();
        self.runtime.block_on(cni.recover()).unwrap();
        self.agent = Some(self.runtime.spawn(async move {
            let Err(error) = serve(&socket, cni).await;
            panic!("{error}");
        }));
        let deadline = Instant::now() + PATIENCE;
        while !self.socket().exists() {
            assert!(Instant::now() < deadline, "the agent never listened");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// As after `kill -9`: the socket file stays, nobody listens.
    fn kill(&mut self) {
        let agent = self.agent.take().unwrap();
        agent.abort();
        let _ = self.runtime.block_on(agent);
    }

    fn config(&self) -> Value {
        json!({
            "cniVersion": "1.1.0", "name": "meshnet", "type": "mesh-cni",
            "socket": self.socket(), "stateDir": self.dir.path(),
        })
    }

    fn call(&self, command: &str) -> Call {
        let env = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", "abc123"),
            ("CNI_NETNS", NETNS),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/opt/cni/bin"),
        ];
        Call {
            env: env.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            config: self.config(),
            stdin: None,
        }
    }

    fn attached(&self) -> usize {
        self.network.ports().len()
    }

    /// All that a call could change: files with their content, and interfaces.
    fn state(&self) -> (BTreeMap<PathBuf, Vec<u8>>, Vec<PodPort>) {
        let (mut files, mut open) = (BTreeMap::new(), vec![self.dir.path().to_owned()]);
        while let Some(dir) = open.pop() {
            for entry in std::fs::read_dir(dir).unwrap().flatten() {
                match entry.file_type().unwrap() {
                    kind if kind.is_dir() => open.push(entry.path()),
                    kind if kind.is_file() => {
                        files.insert(entry.path(), std::fs::read(entry.path()).unwrap());
                    }
                    _ => {}
                }
            }
        }
        (files, self.network.ports())
    }
}

/// One execution of the plugin.
#[derive(Clone)]
struct Call {
    env: BTreeMap<String, String>,
    config: Value,
    stdin: Option<Vec<u8>>,
}

struct Seen {
    status: i32,
    stdout: String,
    stderr: String,
    took: Duration,
}

impl Call {
    fn id(self, id: &str) -> Self {
        self.env("CNI_CONTAINERID", id)
    }

    fn env(mut self, name: &str, value: &str) -> Self {
        self.env.insert(name.to_owned(), value.to_owned());
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.env.remove(name);
        self
    }

    fn key(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    fn no_key(mut self, key: &str) -> Self {
        self.config.as_object_mut().unwrap().remove(key);
        self
    }

    fn stdin(mut self, bytes: &[u8]) -> Self {
        self.stdin = Some(bytes.to_vec());
        self
    }

    fn run(self) -> Seen {
        let started = Instant::now();
        let mut child = Command::new(env!("CARGO_BIN_EXE_mesh-cni"))
            .env_clear()
            .envs(&self.env)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let input = self.stdin.unwrap_or_else(|| self.config.to_string().into_bytes());
        // The plugin may end before it has read everything.
        let _ = child.stdin.take().unwrap().write_all(&input);
        let out = child.wait_with_output().unwrap();
        let took = started.elapsed();
        assert!(took < 2 * PATIENCE, "took {took:?}");
        Seen {
            status: out.status.code().expect("ended, not killed"),
            stdout: String::from_utf8(out.stdout).unwrap(),
            stderr: String::from_utf8(out.stderr).unwrap(),
            took,
        }
    }

    /// Runs, expects success, and returns what was printed.
    fn ok(self) -> String {
        let seen = self.run();
        assert_eq!(seen.status, 0, "{}", seen.stdout);
        seen.stdout
    }

    /// Runs, expects an error with this code, and returns its text.
    #[track_caller]
    fn fails(self, code: u32) -> String {
        let seen = self.run();
        assert_eq!(seen.status, 1, "{} {}", seen.stdout, seen.stderr);
        let error: Value = serde_json::from_str(&seen.stdout).unwrap();
        assert_eq!(error["code"], code, "{error}");
        assert!(error["cniVersion"].is_string() && error["msg"].is_string(), "{error}");
        seen.stdout
    }
}

#[test]
fn rows_1_2_3_command_and_variables() {
    let node = Node::new("10.0.0.0/24");
    let seen = node.call("ADD").without("CNI_COMMAND").run();
    assert_eq!((seen.status, seen.stdout.as_str()), (0, ""));
    assert!(seen.stderr.contains("mesh-cni"), "{}", seen.stderr);
    for command in ["FROB", "add"] {
        assert!(node.call(command).fails(4).contains(command));
    }
    let text = node.call("ADD").without("CNI_CONTAINERID").without("CNI_IFNAME").fails(4);
    assert!(text.contains("CNI_CONTAINERID") && text.contains("CNI_IFNAME"), "{text}");
}

#[test]
fn rows_4_5_names() {
    let node = Node::new("10.0.0.0/24");
    let files = |dir: &Path| std::fs::read_dir(dir).unwrap().count();
    let before = files(node.dir.path());
    for id in ["a/b", "a b", "", "-a", "../../x", &"a".repeat(300)] {
        node.call("ADD").id(id).fails(4);
        node.call("DEL").id(id).fails(4);
    }
    for name in ["sixteen-bytes-xx", ".", "..", "a/b", "a:b", "a b", ""] {
        node.call("ADD").env("CNI_IFNAME", name).fails(4);
    }
    assert_eq!((files(node.dir.path()), node.attached()), (before, 0));
}

#[test]
fn rows_6_to_9_configuration() {
    let node = Node::new("10.0.0.0/24");
    let whole = node.config().to_string().into_bytes();
    let deep = vec![b'['; 10 << 20];
    for stdin in [b"".as_slice(), &whole[..20], b"[]", b"{\"name\":\"\xff\xfe\"}", &deep] {
        node.call("ADD").stdin(stdin).fails(6);
    }
    node.call("ADD").no_key("name").fails(7);
    node.call("ADD").key("name", json!("a b")).fails(7);
    let text = node.call("ADD").key("cniVersion", json!("9.9.9")).fails(1);
    for version in ["1.1.0", "1.0.0", "0.4.0", "0.3.1"] {
        assert!(text.contains(version), "{text}");
    }
    assert!(node.call("ADD").no_key("cniVersion").fails(1).contains("0.1.0"));
}

#[test]
fn rows_10_11_version_and_unknown_keys() {
    let node = Node::new("10.0.0.0/24");
    for stdin in [b"".as_slice(), b"nonsense", b"{\"cniVersion\":\"7\"}"] {
        let text = node.call("VERSION").stdin(stdin).ok();
        let versions: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(versions["supportedVersions"], json!(["1.1.0", "1.0.0", "0.4.0", "0.3.1"]));
        assert_eq!(versions["cniVersion"], "1.1.0");
    }
    let older = node.call("VERSION").stdin(b"{\"cniVersion\":\"0.4.0\"}").ok();
    let older: Value = serde_json::from_str(&older).unwrap();
    assert_eq!(older["cniVersion"], "0.4.0", "it is told in the version that it speaks");
    let text = node.call("ADD").key("ipMasq", json!({"deep": 7})).fails(2);
    assert!(text.contains("ipMasq") && text.contains('7'), "{text}");
    node.call("ADD").key("cni.dev/anything", json!(1)).ok();
}

#[test]
fn rows_12_13_namespaces_and_duplicates() {
    let node = Node::new("10.0.0.0/24");
    for path in ["/nonexistent/ns", "/etc/hostname", "/proc/self/ns/net"] {
        // The plugin's own /proc/self is another process in the same namespace.
        assert!(node.call("ADD").env("CNI_NETNS", path).fails(8).contains(path));
    }
    assert_eq!(node.attached(), 0);
    let first: Value = serde_json::from_str(&node.call("ADD").ok()).unwrap();
    assert_eq!(first["ips"][0]["address"], "10.0.0.2/32", "the refused ones took no address");
    node.call("ADD").fails(101);
    node.call("CHECK").key("prevResult", first).ok();
    let second: Value = serde_json::from_str(&node.call("ADD").id("other").ok()).unwrap();
    assert_eq!(second["ips"][0]["address"], "10.0.0.3/32");
}

#[test]
fn row_14_del_always_succeeds() {
    let node = Node::new("10.0.0.0/24");
    node.call("ADD").ok();
    let calls = [
        node.call("DEL"),
        node.call("DEL"),
        node.call("DEL").id("never"),
        node.call("DEL").without("CNI_NETNS"),
        node.call("DEL").env("CNI_NETNS", "/gone"),
        node.call("DEL").key("unknown", json!(1)),
    ];
    for call in calls {
        assert_eq!(call.ok(), "");
    }
    assert_eq!(node.attached(), 0);
}

#[test]
fn rows_15_16_22_without_an_agent() {
    let mut node = Node::new("10.0.0.0/24");
    node.call("ADD").ok();
    node.kill();
    node.call("ADD").id("b").fails(11);
    node.call("STATUS").fails(50);
    node.call("DEL").key("stateDir", json!("/nonexistent")).fails(11);
    assert_eq!(node.call("DEL").ok(), "", "queued");
    assert_eq!(node.attached(), 1);
    node.start();
    assert_eq!(node.attached(), 0, "released as soon as there is an agent");
    node.call("ADD").ok();
}

#[test]
fn rows_17_18_19_check() {
    let node = Node::new("10.0.0.0/24");
    let result: Value = serde_json::from_str(&node.call("ADD").ok()).unwrap();
    node.call("CHECK").fails(7);
    let check = || node.call("CHECK").key("prevResult", result.clone());
    check().ok();
    check().key("cniVersion", json!("0.4.0")).ok();
    check().key("cniVersion", json!("0.3.1")).fails(1);
    for command in ["GC", "STATUS"] {
        node.call(command).key("cniVersion", json!("1.0.0")).fails(1);
    }
    let mut foreign = result.clone();
    foreign["ips"][0]["address"] = json!("10.0.0.99/32");
    assert!(node.call("CHECK").key("prevResult", foreign).fails(102).contains("10.0.0.99"));
    let host = IfName::for_pod("abc123", "eth0");
    node.network.vanish(&host);
    assert!(check().fails(102).contains(host.as_str()));
    node.call("DEL").ok();
    assert!(check().fails(102).contains("no address is reserved"));
}

#[test]
fn rows_20_21_garbage_collection() {
    let node = Node::new("10.0.0.0/24");
    let entry = |id: &str| json!({"containerID": id, "ifname": "eth0"});
    for id in ["a", "b", "c"] {
        node.call("ADD").id(id).ok();
    }
    let gc = |list: Value| node.call("GC").key("cni.dev/valid-attachments", list);
    assert_eq!(gc(json!([entry("a"), entry("c")])).ok(), "");
    assert_eq!(node.attached(), 2);
    let text = gc(json!([entry("a"), entry("../b"), 7])).fails(7);
    assert!(text.contains("../b") && text.contains('7'), "{text}");
    assert_eq!(node.attached(), 1);
    node.call("GC").fails(7);
    assert_eq!(node.attached(), 1, "without a list nothing is garbage");
}

#[test]
fn rows_22_24_status_and_a_full_pool() {
    let node = Node::new("10.0.0.0/29");
    node.call("STATUS").ok();
    for n in 0..5 {
        node.call("ADD").id(&format!("c{n}")).ok();
    }
    assert!(node.call("ADD").id("c5").fails(11).contains("no IP addresses available"));
    node.call("STATUS").fails(50);
    node.call("DEL").id("c0").ok();
    node.readiness.send_modify(|readiness| readiness.limited = Some("no peers".to_owned()));
    assert!(node.call("STATUS").fails(51).contains("no peers"));
    node.readiness.send_modify(|readiness| readiness.unavailable = Some("starting".to_owned()));
    node.call("STATUS").fails(50);
    node.call("ADD").id("c6").fails(11);
}

#[test]
fn row_23_arguments() {
    let node = Node::new("10.0.0.0/24");
    for args in ["K8S_POD_NAME", "X=y", "IgnoreUnknown=0;X=y", ";"] {
        node.call("ADD").env("CNI_ARGS", args).fails(4);
    }
    let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;X=y";
    node.call("ADD").env("CNI_ARGS", args).ok();
    assert!(node.network.ports()[0].owner.ends_with(" default/web"));
}

/// Every command with every kind of rubbish: a complete error, or what the table says, and nothing has changed.
#[test]
fn malformed_input_changes_nothing_whatever_the_command() {
    let node = Node::new("10.0.0.0/24");
    let result: Value = serde_json::from_str(&node.call("ADD").ok()).unwrap();
    let (long_id, long_stdin) = ("a".repeat(300), vec![b' '; 9 << 20]);
    let before = node.state();
    let refused = |call: Call, code: u32, what: &str| {
        let text = call.fails(code);
        let error: Value = serde_json::from_str(&text).unwrap();
        assert!(!error["msg"].as_str().unwrap().is_empty(), "{what}: {error}");
        assert!(!error["details"].as_str().unwrap_or_default().is_empty(), "{what}: {error}");
        assert_eq!(node.state(), before, "{what}");
    };
    for command in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
        let call = || {
            let empty_list = json!([]);
            node.call(command)
                .key("prevResult", result.clone())
                .key("cni.dev/valid-attachments", empty_list)
        };
        for bad in [b"".as_slice(), b"{", b"[]", b"7", b"\"\xff\"", &long_stdin] {
            refused(call().stdin(bad), 6, command);
        }
        refused(call().key("cniVersion", json!("2.0.0")), 1, command);
        refused(call().key("cniVersion", json!(7)), 7, command);
        refused(call().no_key("name"), 7, command);
        refused(call().key("name", json!("../x")), 7, command);
        refused(call().key("socket", json!("x.sock")), 7, command);
        refused(call().env("CNI_COMMAND", &command.to_lowercase()), 4, command);
    }
    for command in ["ADD", "DEL", "CHECK"] {
        let call = || node.call(command).key("prevResult", result.clone());
        for name in ["CNI_CONTAINERID", "CNI_IFNAME"] {
            refused(call().without(name), 4, name);
        }
        for id in ["../../etc/x", "a/../b", "/abs", ".", "", "a\nb", &long_id] {
            refused(call().id(id), 4, id);
        }
        for interface in ["sixteen-bytes-xx", "../eth0", "a/b", "..", "", "et\th0"] {
            refused(call().env("CNI_IFNAME", interface), 4, interface);
        }
    }
    for command in ["ADD", "CHECK"] {
        refused(node.call(command).without("CNI_NETNS"), 4, command);
    }
    refused(node.call("GC").key("cni.dev/valid-attachments", json!({"a": 1})), 7, "no list");
    for version in [json!("0.3.1"), json!("0.4.0"), json!("1.0.0")] {
        for command in ["GC", "STATUS"] {
            refused(node.call(command).key("cniVersion", version.clone()), 1, command);
        }
    }
    // VERSION is asked before anything else is known.
    for call in [
        node.call("VERSION").stdin(&long_stdin),
        node.call("VERSION").without("CNI_CONTAINERID").without("CNI_PATH").stdin(b"{"),
        node.call("VERSION").id("../x").env("CNI_IFNAME", "..").key("cniVersion", json!("9")),
    ] {
        let versions: Value = serde_json::from_str(&call.ok()).unwrap();
        assert_eq!(versions["supportedVersions"].as_array().unwrap().len(), 4);
    }
    assert_eq!(node.state(), before);
    node.call("CHECK").key("prevResult", result).ok();
}

/// `runtimeConfig` and `CNI_ARGS`: what a runtime may ask for beyond an interface.
#[test]
fn capabilities_and_arguments_reach_the_interface() {
    let node = Node::new("10.0.0.0/24");
    let runtime = json!({
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "192.0.2.1"}],
        "bandwidth": {"ingressRate": 1_000_000, "ingressBurst": 4_294_967_295_u64},
        "ips": ["10.0.0.77/24"],
        "mac": "02:00:00:00:00:07",
        "dns": {"servers": ["10.96.0.10"], "searches": ["default.svc"], "options": []},
    });
    let text = node.call("ADD").key("runtimeConfig", runtime.clone()).ok();
    let result: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(result["ips"][0]["address"], "10.0.0.77/32");
    assert_eq!(result["interfaces"][1]["mac"], "02:00:00:00:00:07");
    assert_eq!(result["dns"], json!({"nameservers": ["10.96.0.10"], "search": ["default.svc"]}));
    let port = node.network.ports().remove(0);
    assert_eq!((port.ports[0].port, port.ports[0].pod_port), (8080, 80));
    assert_eq!(port.bandwidth.to_pod.unwrap().bits_per_sec, 1_000_000);
    assert_eq!(port.bandwidth.from_pod, None);
    node.call("CHECK").key("runtimeConfig", runtime.clone()).key("prevResult", result).ok();
    let same = node.call("ADD").id("other").key("runtimeConfig", runtime);
    assert!(same.fails(11).contains("10.0.0.77"));
    let elsewhere = node.call("ADD").id("other").env("CNI_ARGS", "IP=192.0.2.7");
    assert!(elsewhere.fails(7).contains("192.0.2.7"));
    let text =
        node.call("ADD").id("other").env("CNI_ARGS", "IP=10.0.0.78;MAC=02:00:00:00:00:08").ok();
    assert!(text.contains("10.0.0.78") && text.contains("02:00:00:00:00:08"));
    node.call("ADD")
        .id("bad")
        .key("runtimeConfig", json!({"portMappings": [{"hostPort": 1}]}))
        .fails(7);
    assert_eq!(node.attached(), 2);
}

#[test]
fn a_chain_keeps_what_came_before_and_checks_its_own() {
    let node = Node::new("10.0.0.0/24");
    for version in ["1.1.0", "1.0.0", "0.4.0", "0.3.1"] {
        let before = json!({
            "cniVersion": version,
            "interfaces": [{"name": "net1", "sandbox": NETNS}],
            "ips": [{"version": "4", "address": "192.0.2.5/24", "interface": 0}],
        });
        let call = |command| {
            node.call(command).id(&version.replace('.', "-")).key("cniVersion", json!(version))
        };
        let text = call("ADD").key("prevResult", before).ok();
        let result: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(result["cniVersion"], version);
        assert_eq!(result["ips"].as_array().unwrap().len(), 3);
        assert_eq!(result["interfaces"][0]["name"], "net1");
        assert_eq!(result["interfaces"][2]["name"], "eth0");
        assert_eq!(result["ips"][1]["interface"], 2);
        if version != "0.3.1" {
            call("CHECK").key("prevResult", result.clone()).ok();
        }
        call("DEL").key("prevResult", result).ok();
    }
    node.call("ADD").key("prevResult", json!(7)).fails(7);
    assert_eq!(node.attached(), 0);
}

#[test]
fn a_garbage_collection_is_about_one_network() {
    let node = Node::new("10.0.0.0/24");
    node.call("ADD").id("a").ok();
    node.call("ADD").id("b").key("name", json!("second")).ok();
    let none = json!([]);
    node.call("GC").key("cni.dev/valid-attachments", none.clone()).ok();
    assert_eq!(node.attached(), 1);
    node.call("GC").key("name", json!("second")).key("cni.dev/valid-attachments", none).ok();
    assert_eq!(node.attached(), 0);
}

/// As libcni writes it, and as runtimes do that follow the text of the specification before its issue 1101.
#[test]
fn the_list_of_valid_attachments_comes_in_several_forms() {
    let node = Node::new("10.0.0.0/24");
    for id in ["a", "b", "c"] {
        node.call("ADD").id(id).ok();
    }
    let list = |ids: &[&str]| -> Value {
        ids.iter().map(|id| json!({"containerID": id, "ifname": "eth0"})).collect()
    };
    let (new, old) = ("cni.dev/valid-attachments", "cni.dev/attachments");
    assert_eq!(node.call("GC").key(old, list(&["a", "b"])).ok(), "");
    assert_eq!(node.attached(), 2);
    node.call("GC").key(new, list(&["a"])).key(old, list(&["a", "b"])).ok();
    assert_eq!(node.attached(), 1);
    node.call("GC").fails(7);
    node.call("GC").key(new, json!(null)).ok();
    assert_eq!(node.attached(), 0);
}

#[test]
fn row_25_a_hundred_at_once() {
    let node = Node::new("10.0.0.0/24");
    let run = |command: &str| {
        let calls: Vec<Call> = (0..100).map(|n| node.call(command).id(&format!("c{n}"))).collect();
        let started = Instant::now();
        let mut took: Vec<(Duration, String)> = std::thread::scope(|scope| {
            let threads: Vec<_> = calls
                .into_iter()
                .map(|call| {
                    scope.spawn(|| {
                        let seen = call.run();
                        assert_eq!(seen.status, 0, "{}", seen.stdout);
                        (seen.took, seen.stdout)
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        took.sort();
        println!(
            "100 {command}: {:?}, p50 {:?}, p99 {:?}",
            started.elapsed(),
            took[50].0,
            took[98].0
        );
        took.into_iter().map(|(_, stdout)| stdout).collect::<Vec<_>>()
    };
    let mut addresses: Vec<String> = run("ADD")
        .iter()
        .map(|text| {
            let result: Value = serde_json::from_str(text).unwrap();
            result["ips"][0]["address"].as_str().unwrap().to_owned()
        })
        .collect();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), 100);
    run("DEL");
    assert_eq!(node.attached(), 0);
}
