//! The cluster's own life: its machines, its start, and that nothing of it is left.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_tests::command::{output, wait_until};
use mesh_tests::containerd::ctr;
use mesh_tests::marks::Marks;
use mesh_tests::runner::{Selection, Tally, Test};
use mesh_tests::{Artifacts, Cluster, artifacts, teardown};

use crate::world::{self, World};

/// Removes the cluster also when something panics.
struct Removed(Cluster);

impl Drop for Removed {
    fn drop(&mut self) {
        if env::var_os("MESH_E2E_KEEP").is_none() {
            // A failure has been reported by the test of this, unless that did not run.
            let _ = teardown::remove(self.0.layout());
        }
    }
}

/// Makes a cluster, runs the tests on it, and removes it.
pub(crate) fn with_cluster(
    tally: &mut Tally,
    tests: &[Test<World>],
    selection: &Selection,
) -> Result<()> {
    let artifacts = Artifacts::locate(false);
    let cluster = Cluster::machines(world::spec()?, &artifacts, &|what| println!("  {what}"))?;
    let removed = Removed(cluster.clone());
    tally.one("a_machine_runs_a_container", || runs_a_container(&cluster));
    let started = tally.one("the_programs_start", || {
        cluster.start_programs(&artifacts, &|what| println!("  {what}"))
    });
    if started {
        let world = World::new(cluster.clone(), artifacts);
        if tally.one("the_workload_starts", || world.start_workload()) {
            tally.run(tests, selection, &world);
        }
    }
    tally.one("no_program_panicked", || nothing_panicked(&cluster));
    if tally.any_failed() {
        let folder = artifacts::target().join("e2e-logs");
        cluster.save_logs(&folder)?;
        println!("logs of all programs: {}", folder.display());
    }
    if env::var_os("MESH_E2E_KEEP").is_some() {
        println!("the cluster stays: MESH_E2E_CLUSTER={}", cluster.spec().id);
        return Ok(());
    }
    tally.one("down_leaves_nothing", || leaves_nothing(&cluster));
    drop(removed);
    Ok(())
}

/// Without our programs: the node's containerd runs an image, and the underlay reaches it.
fn runs_a_container(cluster: &Cluster) -> Result<()> {
    let node = cluster.node(1);
    let mut run = ctr(node.layout());
    let group = format!("/{}/pods/bare", node.layout().cgroup);
    run.args(["run", "--detach", "--net-host", "--cgroup", &group]);
    output(run.args(["mesh.local/hello:1", "bare", "/bin/mesh-hello", "serve"]))?;
    let (v4, v6) = node.addresses();
    for url in [format!("http://{v4}:8080/"), format!("http://[{v6}]:8080/")] {
        let answer = wait_until("the container answers", Duration::from_secs(30), || {
            output(Command::new("curl").args(["-fsS", "-m", "2", "-g", &url]))
        })?;
        ensure!(answer.contains("\"version\":\"1\""), "{answer}");
    }
    output(ctr(node.layout()).args(["tasks", "kill", "--signal", "SIGKILL", "bare"]))?;
    wait_until("the container is gone", Duration::from_secs(10), || {
        output(ctr(node.layout()).args(["tasks", "delete", "bare"]))
    })?;
    output(ctr(node.layout()).args(["containers", "delete", "bare"])).map(drop)
}

/// A panic of a task may go unnoticed, because the process lives on.
fn nothing_panicked(cluster: &Cluster) -> Result<()> {
    for entry in fs::read_dir(cluster.layout().logs())?.flatten() {
        let text = fs::read(entry.path())?;
        let text = String::from_utf8_lossy(&text);
        let panic = text.lines().find(|l| l.contains("panicked at"));
        ensure!(panic.is_none(), "{}: {panic:?}", entry.path().display());
    }
    Ok(())
}

fn leaves_nothing(cluster: &Cluster) -> Result<()> {
    let marks = Marks::of(cluster)?;
    // What the search does not find while it is there, it would not miss afterwards.
    let there: BTreeSet<&str> = marks.search()?.into_iter().map(|(kind, _)| kind).collect();
    for kind in
        ["control group", "device", "folder", "mount", "namespace", "process", "runtime file"]
    {
        ensure!(there.contains(kind), "the search finds no {kind} of a cluster that is there");
    }
    cluster.down()?;
    cluster.down()?;
    wait_until("nothing is left", Duration::from_secs(10), || {
        let left = marks.search()?;
        ensure!(left.is_empty(), "left behind: {left:#?}");
        Ok(())
    })
}
