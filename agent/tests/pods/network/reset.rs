//! A node leaves the cluster with pods on it: the agent that runs them ends, and `mesh-agent reset` takes away what it made.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use mesh_tests::cgroups;
use mesh_tests::command::output;
use mesh_tests::folders::below;
use rcgen::{CertificateParams, KeyPair};
use serde_json::json;

use super::node::{FIRST_POD, LIMIT, NETWORKS, Node, PLUGINS, POD_PORT, ask, ip, until};
use crate::containerd::Containerd;
use crate::machine;

const STATE: &str = "/var/lib/mesh";
const STATIC_PODS: &str = "/etc/mesh/static-pods";
const HOST_PORT: u16 = 8099;
/// By these a node is the same one when it comes back.
const KEPT: [&str; 3] = ["agent.lock", "overlay.key", "overlay.stamp"];

/// With all that a pod may leave on a node: files, memory, a port of the node, limits, and processes that do not want to end.
const WEB: &str = "apiVersion: v1
kind: Pod
metadata:
  name: web
  namespace: default
  annotations: {kubernetes.io/ingress-bandwidth: 100M, kubernetes.io/egress-bandwidth: 100M}
spec:
  terminationGracePeriodSeconds: 1
  volumes:
  - {name: memory, emptyDir: {medium: Memory}}
  - {name: disk, emptyDir: {}}
  containers:
  - name: c
    image: mesh.test/busybox:1
    command: [sh, -c, 'echo served by web > /index.html; exec httpd -f -p 8080 -h /']
    ports: [{containerPort: 8080, hostPort: 8099}]
    resources: {limits: {memory: 64Mi, cpu: 500m}}
    volumeMounts:
    - {name: memory, mountPath: /memory}
    - {name: disk, mountPath: /part, subPath: a/part}
  - name: stubborn
    image: mesh.test/busybox:1
    command: [sh, -c, 'trap \"\" TERM; while true; do sleep 1; done']
";

/// The node has joined: an agent only runs pods as a member. Whom it would talk to is not there.
fn join() {
    let key = KeyPair::generate().unwrap();
    let names = vec!["node-1".to_owned()];
    let certificate = CertificateParams::new(names).unwrap().self_signed(&key).unwrap().pem();
    let joined = json!({"server": "https://192.0.2.9:6443", "cluster": {}}).to_string();
    let directory = Path::new(STATE).join("pki");
    fs::create_dir_all(&directory).unwrap();
    for (name, content) in [
        ("node.key", key.serialize_pem()),
        ("node.crt", certificate.clone()),
        ("ca.crt", certificate),
        ("joined.json", joined),
    ] {
        fs::write(directory.join(name), content).unwrap();
    }
}

/// What the machine is like, as far as an agent and its pods could change it: each line is one thing.
fn inventory(cgroup: &str, containerd: &Containerd) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for words in [
        "-o link",
        "-o addr",
        "-4 route show table all",
        "-6 route show table all",
        "-4 rule",
        "-6 rule",
        "-4 neigh show nud permanent",
        "-6 neigh show nud permanent",
        "netns",
    ] {
        // An address is new for a moment.
        let plain = |line: &str| line.replace(" tentative", "").trim_end().to_owned();
        all.extend(ip(words).lines().map(|line| format!("ip {words}: {}", plain(line))));
    }
    let sysctls = "cd /proc/sys/net && \
        grep -r . ipv4/ip_forward ipv4/conf ipv6/conf core 2>/dev/null | grep -v -e stable_secret -e flow_limit";
    for script in
        ["nft list ruleset", "tc qdisc; tc filter show dev up0", sysctls, "cat /proc/self/mounts"]
    {
        let said = output(Command::new("sh").args(["-c", script])).unwrap();
        all.extend(said.lines().map(|line| format!("{script}: {}", line.trim_end())));
    }
    for words in [["containers", "list"], ["tasks", "list"], ["snapshots", "list"]] {
        let mut command = containerd.ctr();
        if words[0] == "snapshots" {
            command.args(["snapshots", "--snapshotter", "native", "list"]);
        } else {
            command.args(words);
        }
        let said = output(&mut command).unwrap();
        all.extend(said.lines().map(|line| format!("{}: {}", words[0], line.trim_end())));
    }
    all.extend(processes().into_iter().map(|name| format!("process {name}")));
    let groups = cgroups::hierarchies().unwrap();
    let groups = groups.into_iter().map(|hierarchy| hierarchy.root.join(cgroup));
    let ours = [STATE, "/run/mesh", "/run/pod-logs", "/run/bpf", "/run/netns", "/etc", "/opt"];
    for root in groups.chain(ours.map(PathBuf::from)) {
        all.extend(below(&root).into_iter().map(|path| format!("file {}", path.display())));
    }
    all
}

/// What runs on the machine. What has ended, and has lost its parent, nobody here waits for.
fn processes() -> Vec<String> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let stats = all.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
    // pid (name) state ...
    let running = stats.filter(|stat| !stat.contains(") Z "));
    running
        .filter_map(|stat| Some(stat.split_once('(')?.1.split_once(") ")?.0.to_owned()))
        .collect()
}

#[test]
fn a_node_that_leaves_with_pods_is_as_it_was() {
    let name = "network::reset::a_node_that_leaves_with_pods_is_as_it_was";
    machine::run_empty(name, async |cgroup| {
        let mut node = Node::prepare(cgroup.clone(), ["10.244.1.0/24", "fd10:244:0:1::/64"]);
        let rig = Path::new("/run/rig");
        fs::create_dir_all(rig).unwrap();
        let (plugins, networks) = (Path::new(PLUGINS), Path::new(NETWORKS));
        let containerd = Containerd::start(rig, plugins, networks).await;
        containerd.import_images();
        join();
        fs::write(Path::new(STATIC_PODS).join("web.yaml"), WEB).unwrap();
        until("the links' own addresses are there", || {
            let addresses = ip("-6 -o addr");
            addresses.lines().count() == 3 && !addresses.contains("tentative")
        });
        let before = inventory(&cgroup, &containerd);

        node.start_agent();
        let pod = format!("{FIRST_POD}:{POD_PORT}");
        until("the pod answers", || ask(&pod).is_ok_and(|said| said == "served by web"));
        let at_the_node = format!("192.0.2.1:{HOST_PORT}");
        until("so does the node's port", || {
            ask(&at_the_node).is_ok_and(|said| said == "served by web")
        });
        let with_pods = inventory(&cgroup, &containerd);
        let new = |what: &str| with_pods.difference(&before).any(|line| line.contains(what));
        for what in [
            "ip -o link: ",
            "ip -4 route show table all: 10.244.1.2",
            "mesh-ports",
            "qdisc tbf",
            "process sh",
            "process httpd",
            "cat /proc/self/mounts: tmpfs /var/lib/mesh/pods",
            "/volumes/disk",
            "/run/pod-logs/default_web",
            &format!("{cgroup}/pods/"),
            "containers: ",
            "tasks: ",
            "snapshots: ",
            "file /run/bpf/mesh",
            "ip_forward",
        ] {
            assert!(
                new(what),
                "a look at the machine shows what a pod has: {what}\n{with_pods:#?}"
            );
        }

        node.kill_agent();
        let said = node.command("reset").output().unwrap();
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
        let kept =
            |line: &&String| KEPT.iter().any(|name| **line == format!("file {STATE}/{name}"));
        // It was written before the first agent, and goes with what it says.
        let snapshot = format!("file {STATE}/snapshot.json");
        let begun = Instant::now();
        loop {
            let now = inventory(&cgroup, &containerd);
            let more: Vec<&String> = now.difference(&before).filter(|line| !kept(line)).collect();
            let less: Vec<&String> =
                before.difference(&now).filter(|line| **line != snapshot).collect();
            if more.is_empty() && less.is_empty() {
                break;
            }
            // What ended a moment ago takes the kernel another moment.
            assert!(begun.elapsed() < LIMIT, "more: {more:#?}\nless: {less:#?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    });
}
