//! The test suites.

use std::process::Command;

use anyhow::Result;
use mesh_tests::artifacts;

use crate::{programs, say, tools};

/// Which suites run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parts {
    /// Unit, property and program tests: everything beside the code.
    pub(crate) unit: bool,
    /// The end-to-end tests on a cluster of their own.
    pub(crate) e2e: bool,
}

/// Builds what the tests need and runs them; both suites run even when the first fails.
pub(crate) fn run(parts: Parts, filter: Option<&str>) -> Result<()> {
    if parts.e2e {
        tools::ensure()?;
        programs::build(false)?;
    } else {
        tools::ensure_ebpf().and_then(|()| crate::ebpf::build())?;
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
    let mut command = programs::cargo();
    command.args(["test", "--workspace", "--tests", "--no-fail-fast"]).args(filter);
    programs::call(command)
}

fn end_to_end(filter: Option<&str>) -> Result<()> {
    say::step("end-to-end tests, on a cluster of their own");
    let mut command = programs::cargo();
    // The whole workspace is named, so that features are those of the build of the other tests.
    command.args(["test", "--workspace", "--test", "e2e"]).args(filter);
    programs::call(command)
}

/// Runs what CI runs.
pub(crate) fn ci() -> Result<()> {
    let mut command = Command::new("bash");
    command.arg(".ci/run").current_dir(artifacts::repository());
    programs::call(command)
}
