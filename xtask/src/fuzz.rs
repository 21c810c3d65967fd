//! The fuzz targets of the packet path.

use std::process::Command;

use anyhow::{Result, bail};
use mesh_tests::{artifacts, command};

use crate::{programs, say};

/// What is fed with rubbish; the targets lie in `overlay/fuzz/targets`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Target {
    /// Datagrams from anywhere, and altered messages of a peer
    Datagrams,
    /// What the device hands over: packets that are to be cut
    Frames,
    /// Packets that are joined and cut again
    Trains,
}

const ALL: [Target; 3] = [Target::Datagrams, Target::Frames, Target::Trains];

impl Target {
    fn name(self) -> &'static str {
        match self {
            Self::Datagrams => "datagrams",
            Self::Frames => "frames",
            Self::Trains => "trains",
        }
    }
}

/// Runs each target for so long; what was found interesting stays for the next time, what broke it is named.
pub(crate) fn run(targets: &[Target], secs: u64) -> Result<()> {
    ensure()?;
    for target in if targets.is_empty() { &ALL } else { targets } {
        say::step(&format!("fuzz {} for {secs} s, after a build of some minutes", target.name()));
        let mut fuzz = cargo_fuzz();
        fuzz.args(["fuzz", "run", target.name()]);
        // Lengths are free from the start: a datagram that is short is refused at once.
        fuzz.args(["--", &format!("-max_total_time={secs}"), "-max_len=4000", "-len_control=0"]);
        fuzz.arg("-print_final_stats=1");
        programs::call(fuzz)?;
    }
    Ok(())
}

/// Sanitizers need a nightly compiler, or a stable one that is told to be one.
fn cargo_fuzz() -> Command {
    let nightly = command::succeeds("rustup", &["run", "nightly", "rustc", "--version"]);
    let mut cargo = if nightly { Command::new("rustup") } else { programs::cargo() };
    if nightly {
        cargo.args(["run", "nightly", "cargo"]);
    } else {
        cargo.env("RUSTC_BOOTSTRAP", "1");
    }
    // The variables of the cargo that runs us name its own compiler.
    for name in ["CARGO", "RUSTC", "RUSTDOC", "RUSTUP_TOOLCHAIN", "RUSTFLAGS"] {
        cargo.env_remove(name);
    }
    cargo.current_dir(artifacts::repository().join("overlay"));
    cargo
}

fn ensure() -> Result<()> {
    if command::succeeds("cargo", &["fuzz", "--version"]) {
        return Ok(());
    }
    say::step("install cargo-fuzz (about a minute)");
    let mut install = programs::cargo();
    install.args(["install", "--quiet", "--locked", "cargo-fuzz"]).env_remove("CARGO_TARGET_DIR");
    programs::call(install)?;
    if !command::succeeds("cargo", &["fuzz", "--version"]) {
        bail!("cargo-fuzz is installed, but cargo does not find it: put ~/.cargo/bin into PATH");
    }
    Ok(())
}
