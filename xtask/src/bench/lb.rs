//! Services side by side. The work is done by an example of `mesh-kernel` (`service_bench`), which can load the real programs; here
//! the others are installed and it is built.

use std::process::Command;

use anyhow::Result;
use clap::Args;
use mesh_tests::artifacts;

use crate::{ebpf, programs, say, tools};

/// Debian packages of those that are compared, ip(8), and wg(8), which makes keys.
const PACKAGES: [&str; 5] = ["nftables", "iptables", "haproxy", "iproute2", "wireguard-tools"];

/// Settings of `lb`.
#[derive(Args)]
#[command(next_help_heading = "Options of lb")]
pub(crate) struct LbArgs {
    /// What to measure: services, sync, outside, flows, policy; all when absent
    #[arg(long = "lb-parts", value_name = "PART,..")]
    parts: Option<String>,
    /// How many services, one after the other [default: 1,1000,10000]
    #[arg(long, value_name = "N,..")]
    services: Option<String>,
    /// Length of one turn; each round has many [default: 200]
    #[arg(long, value_name = "N")]
    turn_ms: Option<u64>,
    /// How many services with how many endpoints our tables take at once [default: 5000x50]
    #[arg(long, value_name = "NxN")]
    sync: Option<String>,
    /// The same for the others, who need minutes for that many [default: 500x10]
    #[arg(long, value_name = "NxN")]
    sync_others: Option<String>,
    /// Wait for nftables, which needs minutes for 10,000 services
    #[arg(long)]
    slow: bool,
}

/// Builds and runs it.
pub(super) fn run(rounds: Option<usize>, args: &LbArgs) -> Result<()> {
    // What cannot be had is left out of the comparison, and said by the program that makes it.
    for package in PACKAGES {
        if let Err(error) = tools::apt_install(&[package]) {
            say::step(&format!("{package} is not installed: {error:#}"));
        }
    }
    tools::ensure_ebpf()?;
    ebpf::build()?;
    let mut build = programs::cargo();
    build.args(["build", "--release", "--package", "mesh-kernel", "--example", "service_bench"]);
    programs::call(build)?;
    let mut build = programs::cargo();
    build.args(["build", "--release", "--package", "mesh-overlay", "--example", "engine"]);
    programs::call(build)?;
    let mut bench = Command::new(artifacts::target().join("release/examples/service_bench"));
    let flags = [
        ("--parts", args.parts.clone()),
        ("--services", args.services.clone()),
        ("--rounds", rounds.map(|n| n.to_string())),
        ("--turn-ms", args.turn_ms.map(|n| n.to_string())),
        ("--sync", args.sync.clone()),
        ("--sync-others", args.sync_others.clone()),
    ];
    for (flag, value) in flags {
        bench.args(value.map(|value| [flag.to_owned(), value]).into_iter().flatten());
    }
    bench.arg("--engine").arg(artifacts::target().join("release/examples/engine"));
    if args.slow {
        bench.arg("--slow");
    }
    programs::call(bench)
}
