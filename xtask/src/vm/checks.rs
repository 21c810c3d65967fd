//! `vm test`: what is proved on the machines, each under a name.

mod failures;
mod kernel;
mod keys;
mod narrow;
mod traffic;

use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use super::lab::Lab;
use crate::say;

/// A check: its name, and what it does.
type Check = (&'static str, fn(&Lab) -> Result<()>);

const CHECKS: [Check; 19] = [
    ("kernel-wireguard", kernel::wireguard),
    ("preshared-keys", kernel::preshared_keys),
    ("tc-without-tcx", kernel::tc_without_tcx),
    ("cgroup-v2-out-of-memory", kernel::out_of_memory),
    ("pods-across-machines", traffic::pods_across_machines),
    ("service-addresses", traffic::service_addresses),
    ("dns", traffic::dns),
    ("ingress", traffic::ingress),
    ("meshctl-check", traffic::meshctl_check),
    ("no-plaintext", traffic::no_plaintext),
    ("sessions-are-left-alone", traffic::sessions_are_left_alone),
    ("agent-killed", failures::agent_killed),
    ("change-of-engine", failures::change_of_engine),
    ("change-of-engine-with-old-keys", failures::change_of_engine_with_old_keys),
    ("rotate-key", keys::rotate_key),
    ("narrow-path", narrow::narrow_path),
    ("partition", failures::partition),
    ("reboot", failures::reboot),
    ("kernel-crate-tests", kernel::crate_tests),
];

/// Runs the checks whose names contain one of `filters`, or all; they run on after one has failed.
pub(super) fn run(filters: &[String]) -> Result<()> {
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|f| name.contains(f));
    let chosen: Vec<Check> = CHECKS.into_iter().filter(|(name, _)| wanted(name)).collect();
    if chosen.is_empty() {
        let names = CHECKS.map(|(name, _)| name).join(", ");
        bail!("no check is called like one of {filters:?}; there are {names}");
    }
    say::step("the workload, one pod on each machine");
    let lab = Lab::open()?;
    lab.all_is_well().context("before the first check")?;
    let mut failed = vec![];
    for (name, check) in chosen {
        say::step(name);
        let start = Instant::now();
        let result = check(&lab);
        let secs = start.elapsed().as_secs_f32();
        match result {
            Ok(()) => println!("ok      {name} ({secs:.1} s)"),
            Err(error) => {
                println!("FAILED  {name} ({secs:.1} s): {error:#}");
                failed.push(name);
            }
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    bail!("failed: {}", failed.join(", "))
}
