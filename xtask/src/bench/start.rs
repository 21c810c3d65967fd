//! How long a pod takes from its manifest to being ready, beside containers of the same image that `ctr run` starts on the same
//! node: one, and two, which is what a pod is made of (its sandbox is one).

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::command::{output, wait_until};
use mesh_tests::containerd::{ctr, snapshotter};
use mesh_tests::kubectl::Kubectl;
use mesh_tests::{Artifacts, Cluster, Node};

use super::cni::at;
use crate::say;

/// Nothing takes longer unless it hangs.
const LIMIT: Duration = Duration::from_secs(180);
const SELECTOR: &str = "mesh.dev/bench=start";
const IMAGE: &str = "mesh.local/hello:1";
const COUNTS: [usize; 3] = [1, 20, 100];
/// Processes of `ctr` at the same time.
const STARTERS: usize = 8;
/// A line for each change of a pod: its name, and the value of its Ready condition.
const LINE: &str =
    r#"jsonpath={.metadata.name} {.status.conditions[?(@.type=="Ready")].status}{"\n"}"#;

/// How long each took, and how long all took together.
#[derive(Default)]
struct Times {
    each: Vec<Duration>,
    all: Vec<Duration>,
}

/// Measures and prints a table.
pub(super) fn measure(cluster: &Cluster, rounds: usize) -> Result<()> {
    let kubectl = cluster.kubectl(&Artifacts::locate(false));
    let node = cluster.node(1);
    println!(
        "{:<34}{:>16}{:>16}{:>18}",
        "ms, p50 / p99", "pod ready", "ctr run", "ctr run, two each"
    );
    for count in COUNTS {
        let (mut pods, mut one, mut two) = (Times::default(), Times::default(), Times::default());
        for round in 1..=rounds {
            say::step(&format!("{count} pods, round {round}"));
            start_pods(&kubectl, &node, count, &mut pods)?;
            containers(&node, count, 1, &mut one)?;
            containers(&node, count, 2, &mut two)?;
        }
        let mut row = |name: &str, of: fn(&mut Times) -> &mut Vec<Duration>| {
            let pair =
                |times: &mut Times| format!("{:.0} / {:.0}", at(of(times), 50), at(of(times), 99));
            println!(
                "{name:<34}{:>16}{:>16}{:>18}",
                pair(&mut pods),
                pair(&mut one),
                pair(&mut two)
            );
        };
        row(&format!("{count} at once, each"), |times| &mut times.each);
        row(&format!("{count} at once, all of them"), |times| &mut times.all);
    }
    Ok(())
}

/// Ended by `Drop`.
struct Watch(Child);

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Follows the pods; each line with the time when it was read.
fn watch(kubectl: &Kubectl) -> Result<(Watch, Receiver<(Instant, String)>)> {
    let mut command = kubectl.command();
    command.args(["get", "pods", "-l", SELECTOR, "--watch", "-o", LINE]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let out = child.stdout.take().context("a piped standard output exists")?;
    let (sender, lines) = channel();
    thread::spawn(move || {
        let mut lines = BufReader::new(out).lines().map_while(Result::ok);
        lines.try_for_each(|line| sender.send((Instant::now(), line)).ok())
    });
    Ok((Watch(child), lines))
}

/// From the moment at which the API tells of a pod to that at which it says that it is ready.
fn start_pods(kubectl: &Kubectl, node: &Node, count: usize, times: &mut Times) -> Result<()> {
    let (_watch, lines) = watch(kubectl)?;
    // A watch that comes too late would take a pod that is half-way for a new one.
    thread::sleep(Duration::from_secs(1));
    kubectl.apply(&manifest(node, count))?;
    let mut begun: BTreeMap<String, Instant> = BTreeMap::new();
    let mut ready: BTreeMap<String, Instant> = BTreeMap::new();
    let deadline = Instant::now() + LIMIT;
    while ready.len() < count {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok((when, line)) = lines.recv_timeout(left) else {
            bail!("{} of {count} pods are ready after {LIMIT:?}", ready.len());
        };
        let (name, state) = line.split_once(' ').unwrap_or((line.as_str(), ""));
        begun.entry(name.to_owned()).or_insert(when);
        if state.trim() == "True" {
            ready.entry(name.to_owned()).or_insert(when);
        }
    }
    times
        .each
        .extend(ready.iter().filter_map(|(name, at)| Some(at.duration_since(*begun.get(name)?))));
    let (first, last) = (begun.values().min(), ready.values().max());
    times.all.extend(first.zip(last).map(|(first, last)| last.duration_since(*first)));
    kubectl.run(&["delete", "pods", "-l", SELECTOR, "--timeout=180s"])?;
    wait_until("the pods are gone", LIMIT, || {
        ensure!(kubectl.pods(SELECTOR)?.is_empty(), "some are left");
        Ok(())
    })
}

fn manifest(node: &Node, count: usize) -> String {
    let pods: Vec<serde_json::Value> = (0..count)
        .map(|number| {
            serde_json::json!({
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": format!("start-{number}"), "labels": {"mesh.dev/bench": "start"}},
                "spec": {
                    "nodeSelector": {"kubernetes.io/hostname": node.name()},
                    "terminationGracePeriodSeconds": 0,
                    "containers": [{
                        "name": "hello",
                        "image": IMAGE,
                        "readinessProbe": {"httpGet": {"port": 8080}, "periodSeconds": 1},
                    }],
                },
            })
        })
        .collect();
    serde_json::json!({"apiVersion": "v1", "kind": "List", "items": pods}).to_string()
}

/// Names of containers that were started; removed by `Drop`.
struct Started<'a>(&'a Node, Mutex<Vec<String>>);

impl Drop for Started<'_> {
    fn drop(&mut self) {
        for name in self.1.get_mut().unwrap_or_else(PoisonError::into_inner) {
            for words in [
                ["tasks", "kill", "--signal", "KILL", name].as_slice(),
                &["tasks", "delete", "--force", name],
                &["containers", "delete", name],
            ] {
                // The task may be gone before it is deleted.
                let _ = output(ctr(self.0.layout()).args(words));
            }
        }
    }
}

/// So many times `each` containers, one behind the other, `STARTERS` times side by side. All are wanted from the beginning, as pods of
/// one manifest are.
fn containers(node: &Node, count: usize, each: usize, times: &mut Times) -> Result<()> {
    let started = Arc::new(Started(node, Mutex::default()));
    let (left, took) = (Mutex::new(0..count), Mutex::new(vec![]));
    let begun = Instant::now();
    let work = || {
        loop {
            let next = left.lock().ok().and_then(|mut left| left.next());
            let Some(number) = next else { return Ok(()) };
            for part in 0..each {
                let name = format!("start-{number}-{part}");
                started.1.lock().map(|mut all| all.push(name.clone())).ok();
                output(&mut container(node, &name)).with_context(|| format!("start {name}"))?;
            }
            took.lock().map(|mut took| took.push(begun.elapsed())).ok();
        }
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..STARTERS.min(count)).map(|_| scope.spawn(work)).collect();
        let mut threads = threads.into_iter();
        threads.try_for_each(|t| t.join().unwrap_or_else(|_| bail!("a thread panicked")))
    })?;
    times.all.push(begun.elapsed());
    times.each.extend(took.into_inner().unwrap_or_default());
    Ok(())
}

fn container(node: &Node, name: &str) -> Command {
    let layout = node.layout();
    let mut command = ctr(layout);
    command.args(["run", "--detach", "--snapshotter", snapshotter(layout)]);
    command.args(["--cgroup", &format!("/{}/pods/{name}", layout.cgroup), IMAGE, name]);
    command
}
