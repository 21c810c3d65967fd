//! The local cluster's life.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use mesh_tests::{Artifacts, Cluster, Layout, Spec, artifacts, teardown};

use crate::{UpArgs, programs, prove, say, tools};

/// Id of the cluster that `up` makes.
const ID: &str = "dev";

/// Builds and starts the local cluster, or changes the one that runs; then proves that it works.
pub(crate) fn up(args: &UpArgs) -> Result<()> {
    let start = Instant::now();
    need_root("up")?;
    say::step("tools");
    tools::ensure()?;
    let release = args.profile.release;
    if !args.no_build {
        programs::build(release)?;
    }
    let built = Artifacts::locate(release);
    let spec = Spec {
        id: ID.to_owned(),
        nodes: args.nodes,
        subnet: args.subnet,
        owner: None,
        preshared_key_rotation_secs: None,
    };
    let serial = Mutex::new(());
    let progress = |what: &str| {
        let _one_at_a_time = serial.lock();
        say::step(what);
    };
    let cluster = Cluster::up(spec, &built, &progress)?;
    let kubeconfig = write_kubeconfig(&cluster)?;
    prove::example(&cluster, &built)?;
    say::step("it works");
    prove::print_next_steps(&cluster, &built, &kubeconfig, start.elapsed());
    Ok(())
}

/// Removes the local cluster.
pub(crate) fn down() -> Result<()> {
    need_root("down")?;
    let layout = Layout::new(ID)?;
    if !teardown::traces(&layout) {
        say::step("there is no cluster");
    }
    // Also without a trace of it: a control group may be all that is left.
    teardown::remove(&layout)?;
    let _ = fs::remove_dir_all(artifacts::target().join("dev"));
    say::step("nothing of the cluster is left");
    Ok(())
}

/// Runs a command on a node; its exit code is ours.
pub(crate) fn exec(node: &str, words: &[String]) -> Result<ExitCode> {
    need_root("exec")?;
    let cluster = running()?;
    pass(find(&cluster, node)?.command(words.iter().cloned()))
}

/// Shows a log.
pub(crate) fn logs(node: &str, of: &str, follow: bool) -> Result<ExitCode> {
    let cluster = running()?;
    let daemon = match (node, of) {
        ("control", _) => cluster.control(),
        (_, "containerd") => find(&cluster, node)?.containerd(),
        _ => find(&cluster, node)?.agent(),
    };
    let mut command = Command::new("tail");
    command.args(["-n", "200"]);
    if follow {
        command.arg("-F");
    }
    command.arg(daemon.log());
    pass(command)
}

/// The local cluster, which must have been started.
pub(crate) fn running() -> Result<Cluster> {
    Cluster::open(ID)?.context("there is no local cluster: start one with `cargo xtask up`")
}

fn find(cluster: &Cluster, name: &str) -> Result<mesh_tests::Node> {
    let nodes = cluster.nodes();
    let names: Vec<String> = nodes.iter().map(|n| n.name().to_owned()).collect();
    let found = nodes.into_iter().find(|n| n.name() == name);
    found.with_context(|| format!("no node {name:?}: there are {}", names.join(", ")))
}

fn pass(mut command: Command) -> Result<ExitCode> {
    let shown = mesh_tests::command::show(&command);
    let status = command.status().with_context(|| format!("run {shown}"))?;
    let code = status.code().and_then(|c| u8::try_from(c).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

fn need_root(what: &str) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("`{what}` makes network namespaces and needs root: sudo -E cargo xtask {what}");
    }
    Ok(())
}

fn write_kubeconfig(cluster: &Cluster) -> Result<PathBuf> {
    let path = artifacts::target().join("dev/kubeconfig");
    let folder = path.parent().context("a file has a folder")?;
    fs::create_dir_all(folder).context("make target/dev")?;
    fs::copy(cluster.kubeconfig(), &path).context("copy the kubeconfig to target/dev")?;
    Ok(path)
}
