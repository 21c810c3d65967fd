//! The test suites.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use mesh_tests::{artifacts, command};

use crate::{programs, say, tools};

/// Which suites run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parts {
    /// Unit, property and program tests: everything beside the code.
    pub(crate) unit: bool,
    /// The end-to-end tests on a cluster of their own.
    pub(crate) e2e: bool,
}

/// How long a suite may run once it is built, three times what two cores need: a test that waits for ever shows by name, long before
/// whoever runs us loses patience.
const LIMIT: Duration = Duration::from_secs(30 * 60);

/// Builds what the tests need and runs them; both suites run even when the first fails.
pub(crate) fn run(parts: Parts, filter: Option<&str>) -> Result<()> {
    tools::ensure()?;
    if parts.e2e {
        programs::build(false)?
    } else {
        crate::ebpf::build()?
    }
    let unit = if parts.unit { unit(filter) } else { Ok(()) };
    let e2e = if parts.e2e { end_to_end(filter) } else { Ok(()) };
    unit.and(e2e)
}

fn unit(filter: Option<&str>) -> Result<()> {
    say::step("unit, property and program tests");
    // Tests of the overlay run its worker as a process; `--tests` alone leaves examples out.
    let mut engine = programs::cargo();
    engine.args(["build", "--workspace", "--example", "engine"]);
    programs::call(engine)?;
    test(&["--tests", "--no-fail-fast"], filter)
}

fn end_to_end(filter: Option<&str>) -> Result<()> {
    say::step("end-to-end tests, on a cluster of their own");
    test(&["--test", "e2e"], filter)
}

fn test(which: &[&str], filter: Option<&str>) -> Result<()> {
    // The whole workspace is named, so that features are the same in each build.
    let cargo = || {
        let mut cargo = programs::cargo();
        cargo.args(["test", "--workspace"]).args(which);
        cargo
    };
    let mut build = cargo();
    build.arg("--no-run");
    programs::call(build)?;
    command::run_within(cargo().args(filter), LIMIT)
}

/// Runs what CI runs.
pub(crate) fn ci() -> Result<()> {
    let mut command = Command::new("bash");
    command.arg(".ci/run").current_dir(artifacts::repository());
    programs::call(command)
}
