//! Building the binaries that a cluster runs.

use std::process::Command;

use anyhow::{Context as _, Result, bail};
use mesh_tests::artifacts;

use crate::{ebpf, say};

/// The programs of a cluster; workspace packages and binaries have the same names.
const PROGRAMS: [&str; 3] = ["mesh-control", "mesh-agent", "meshctl"];
/// What runs without any library: the plugin that containerd executes, and the images' content.
const STATIC: [&str; 2] = ["mesh-cni", "mesh-hello"];

/// Builds everything that a cluster runs, with the eBPF programs first: they become part of the agent.
pub(crate) fn build(release: bool) -> Result<()> {
    ebpf::build()?;
    say::step(&format!("build {}", PROGRAMS.join(", ")));
    let mut command = cargo();
    command.arg("build");
    if release {
        command.arg("--release").args(PROGRAMS.iter().flat_map(|p| ["--package", p]));
    } else {
        // With the features that the tests need, so that they compile nothing again: the workspace's, and those of an example.
        command.arg("--workspace").args(PROGRAMS.iter().flat_map(|p| ["--bin", p]));
        command.args(["--example", "engine"]);
    }
    call(command)?;
    say::step(&format!("build {}, static", STATIC.join(", ")));
    let mut command = cargo();
    // A target of its own: build scripts and procedural macros must stay dynamic.
    command.args(["build", "--profile", "tiny", "--target", &artifacts::host_triple()]);
    command.args(STATIC.iter().flat_map(|p| ["--package", p]));
    command.env("RUSTFLAGS", "-Ctarget-feature=+crt-static").env_remove("CARGO_ENCODED_RUSTFLAGS");
    call(command)
}

/// The cargo that runs us, in the source tree.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(artifacts::repository());
    command
}

/// Runs a command whose output people see; its failure is ours.
pub(crate) fn call(mut command: Command) -> Result<()> {
    let shown = mesh_tests::command::show(&command);
    let status = command.status().with_context(|| format!("run {shown}"))?;
    if !status.success() {
        bail!("{shown}: {status}");
    }
    Ok(())
}
