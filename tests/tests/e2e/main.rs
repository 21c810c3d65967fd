//! End-to-end tests: the real programs on a cluster of namespaces, with real containerd, tunnels and clients.
//!
//! One cluster for all of them, made at the start and removed at the end; the tests run one after the other.
//! Run them by `cargo xtask test --e2e [FILTER]`, which builds what they need.
//!
//! | Variable | Meaning |
//! |---|---|
//! | `CI` | what cannot run is a failure |
//! | `MESH_E2E_CLUSTER=dev` | use the cluster of `cargo xtask up`; it is left running |
//! | `MESH_E2E_KEEP=1` | leave the cluster for a look at it |
#![forbid(unsafe_code)]

mod accounts;
mod edge;
mod faults;
mod flows;
mod kubectl;
mod machines;
mod nodes;
mod paths;
mod policy;
mod refusals;
mod rollout;
mod secrecy;
mod streams;
mod table;
mod trace;
mod traffic;
mod workloads;
mod world;

use std::env;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use mesh_tests::runner::{Selection, Tally, Test};
use mesh_tests::{Artifacts, cluster};
use world::World;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn tests() -> Vec<Test<World>> {
    let parts = [
        traffic::TESTS,
        edge::TESTS,
        kubectl::TESTS,
        workloads::TESTS,
        nodes::TESTS,
        streams::TESTS,
        accounts::TESTS,
        refusals::TESTS,
        rollout::TESTS,
        faults::TESTS,
        paths::TESTS,
        policy::TESTS,
        table::TESTS,
        secrecy::TESTS,
        flows::TESTS,
        trace::TESTS,
    ];
    parts.into_iter().flatten().map(|t| Test { name: t.name, run: t.run }).collect()
}

fn run() -> Result<()> {
    let start = Instant::now();
    let (selection, tests) = (Selection::from_args(env::args().skip(1)), tests());
    if selection.lists() {
        tests.iter().for_each(|t| println!("{}: test", t.name));
        return Ok(());
    }
    let mut tally = Tally::default();
    if let Err(why) = able() {
        if env::var_os("CI").is_some() {
            bail!("the end-to-end tests cannot run: {why:#}");
        }
        println!("skipped: {why:#}");
        return tally.close(start);
    }
    if tests.iter().any(|t| selection.takes(t.name)) {
        for orphan in cluster::orphans()? {
            println!("removing cluster {} of a run that was ended", orphan.spec().id);
            orphan.down()?;
        }
        match env::var("MESH_E2E_CLUSTER") {
            Ok(id) => tally.run(&tests, &selection, &World::open(&id)?),
            Err(_) => machines::with_cluster(&mut tally, &tests, &selection)?,
        }
    }
    tally.close(start)
}

/// Why the tests cannot run here.
fn able() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("not root: network namespaces cannot be made");
    }
    Artifacts::locate(false).check()
}
