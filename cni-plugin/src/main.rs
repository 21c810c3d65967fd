//! The program: environment and standard input in, result or error out.
#![forbid(unsafe_code)]

use std::io::Write as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    let outcome = mesh_cni::run(&|name| std::env::var_os(name));
    // Nobody is left to tell when these writes fail.
    let _ = std::io::stderr().write_all(outcome.stderr.as_bytes());
    let _ = std::io::stdout().write_all(outcome.stdout.as_bytes());
    if outcome.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
