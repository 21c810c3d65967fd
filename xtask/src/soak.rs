//! Many pods made and deleted on the local cluster: the agents must not grow, and nothing may be left.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::command::wait_until;
use mesh_tests::kubectl::Kubectl;
use mesh_tests::{Artifacts, Cluster, Node, containers, process};

use crate::{SoakArgs, local, say};

/// Nothing takes longer unless it hangs.
const LIMIT: Duration = Duration::from_secs(180);
/// An agent may be this much larger in the end, in percent.
const GROWTH: u64 = 5;
const SELECTOR: &str = "mesh.dev/soak=yes";

/// Makes and deletes pods in batches. What the agents have by the end of the first fifth is what they may have.
pub(crate) fn run(args: &SoakArgs) -> Result<()> {
    let cluster = local::running()?;
    let artifacts = Artifacts::locate(args.release);
    let kubectl = cluster.kubectl(&artifacts);
    let warm = args.cycles.div_ceil(5);
    let before = inventory(&cluster)?;
    let begun = Instant::now();
    let mut sizes = BTreeMap::new();
    let mut done = 0;
    while done < args.cycles {
        let batch = args.batch.min(args.cycles - done);
        cycle(&kubectl, done, batch)?;
        done += batch;
        if sizes.is_empty() && done >= warm {
            sizes = residents(&cluster)?;
        }
        if done % (args.batch * 5) == 0 || done == args.cycles {
            say::step(&format!("{done} pods: {}", shown(&residents(&cluster)?)));
        }
    }
    println!("{done} pods made and deleted in {:.0} s", begun.elapsed().as_secs_f64());
    wait_until("nothing is left", LIMIT, || {
        let now = inventory(&cluster)?;
        ensure!(now == before, "left: {now:?}, before: {before:?}");
        Ok(())
    })?;
    println!("nothing is left: {before:?}");
    let after = residents(&cluster)?;
    println!("agents: {} KiB after {warm} pods, {} KiB in the end", shown(&sizes), shown(&after));
    let grown = |(node, size): (&String, &u64)| {
        let first = sizes.get(node).copied().unwrap_or(0);
        (*size > first + first * GROWTH / 100).then(|| format!("{node}: {first} -> {size} KiB"))
    };
    let grown: Vec<String> = after.iter().filter_map(grown).collect();
    if !grown.is_empty() {
        bail!("agents have grown by more than {GROWTH} %: {}", grown.join(", "));
    }
    Ok(())
}

fn cycle(kubectl: &Kubectl, first: usize, count: usize) -> Result<()> {
    let pods: Vec<serde_json::Value> = (first..first + count)
        .map(|number| {
            serde_json::json!({
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": format!("soak-{number}"), "labels": {"mesh.dev/soak": "yes"}},
                "spec": {
                    "terminationGracePeriodSeconds": 1,
                    "volumes": [{"name": "scratch", "emptyDir": {"medium": "Memory"}}],
                    "containers": [{
                        "name": "hello",
                        "image": "mesh.local/hello:1",
                        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
                        "readinessProbe": {"httpGet": {"port": 8080}, "periodSeconds": 1},
                    }],
                },
            })
        })
        .collect();
    let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": pods});
    kubectl.apply(&list.to_string())?;
    kubectl.wait_ready(SELECTOR, count, LIMIT)?;
    kubectl.run(&["delete", "pods", "-l", SELECTOR, "--timeout=180s"]).map(drop)
}

/// Resident memory of each node's agent.
fn residents(cluster: &Cluster) -> Result<BTreeMap<String, u64>> {
    let one = |node: Node| {
        let pid = node.agent().pid().with_context(|| format!("{} has no agent", node.name()))?;
        let size = process::resident_kib(pid).context("read an agent's size")?;
        Ok((node.name().to_owned(), size))
    };
    cluster.nodes().into_iter().map(one).collect()
}

fn shown(sizes: &BTreeMap<String, u64>) -> String {
    let all: Vec<String> = sizes.iter().map(|(node, kib)| format!("{node} {kib}")).collect();
    all.join(", ")
}

/// What pods leave on a node when something goes wrong, counted.
fn inventory(cluster: &Cluster) -> Result<BTreeMap<String, usize>> {
    let mut counts = BTreeMap::new();
    for node in cluster.nodes() {
        let layout = node.layout();
        let mut note = |what: &str, count| counts.insert(format!("{} {what}", node.name()), count);
        note("containers", containers::bundles(layout).len());
        note("interfaces", node.exec(&["ip", "-o", "link"])?.lines().count());
        for (what, folder) in [
            ("logs", layout.state.join("pod-logs")),
            ("folders", layout.agent_state().join("pods")),
            ("secrets", layout.agent_run().join("pods")),
        ] {
            note(what, std::fs::read_dir(folder).map_or(0, Iterator::count));
        }
    }
    Ok(counts)
}
