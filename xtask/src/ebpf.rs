//! The eBPF programs' build: another compiler, another target, and only when something changed.

mod stack;

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use mesh_tests::{artifacts, command};
use sha2::{Digest as _, Sha256};

use crate::{programs, say};

const TARGET: &str = "bpfel-unknown-none";
/// What our own cargo or the caller sets for another compiler.
const INHERITED: [&str; 6] = [
    "RUSTFLAGS",
    "CARGO_ENCODED_RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
    "CARGO",
    "RUSTC_WRAPPER",
    "CARGO_TARGET_DIR",
];
/// Part of what a build stands for: an object that an older check let through is checked again.
const CHECK: &str = include_str!("ebpf/stack.rs");

/// A compiler that can build `core` for the eBPF target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Compiler {
    /// rustup's nightly with the component rust-src.
    Nightly,
    /// The distribution's newer one, with its library's source.
    System,
}

impl Compiler {
    /// The one that is installed; rustup's first.
    pub(crate) fn find() -> Option<Self> {
        [Self::Nightly, Self::System]
            .into_iter()
            .find(|c| c.sysroot().is_ok_and(|s| has_source(&s)))
    }

    fn sysroot(&self) -> Result<PathBuf> {
        let text = match self {
            Self::Nightly => {
                // Asking rustup for a toolchain that is not there could install it.
                let installed = command::run("rustup", &["toolchain", "list"])?;
                let there = installed.lines().any(|l| l.starts_with("nightly"));
                anyhow::ensure!(there, "no nightly toolchain");
                command::run("rustup", &["run", "nightly", "rustc", "--print", "sysroot"])?
            }
            Self::System => command::run("/usr/bin/rustc", &["--print", "sysroot"])?,
        };
        Ok(PathBuf::from(text.trim()))
    }

    fn version(&self) -> Result<String> {
        match self {
            Self::Nightly => command::run("rustup", &["run", "nightly", "rustc", "--version"]),
            Self::System => command::run("/usr/bin/rustc", &["--version"]),
        }
    }

    fn cargo(&self) -> Command {
        match self {
            Self::Nightly => {
                let mut command = Command::new("rustup");
                command.args(["run", "nightly", "cargo"]);
                command
            }
            Self::System => {
                let mut command = Command::new("/usr/bin/cargo");
                command.env("RUSTC", "/usr/bin/rustc").env("RUSTC_BOOTSTRAP", "1");
                command
            }
        }
    }
}

fn has_source(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml").is_file()
}

/// `PATH` with the folder where `cargo install` puts bpf-linker.
pub(crate) fn search_path() -> OsString {
    let old = env::var_os("PATH").unwrap_or_default();
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = env::var_os("HOME").map(|h| PathBuf::from(h).join(".cargo"));
    let installed = cargo_home.or(home).map(|h| h.join("bin"));
    let all = env::split_paths(&old).chain(installed);
    env::join_paths(all).unwrap_or(old)
}

/// Builds `target/bpf/mesh.bpf.o`, and refuses one that older kernels would; returns at once when sources, flags, compiler
/// and check are those of the last build.
pub(crate) fn build() -> Result<()> {
    let compiler = Compiler::find().context("no eBPF compiler: run `cargo xtask tools`")?;
    let folder = artifacts::target().join("bpf");
    let (object, stamp) = (folder.join("mesh.bpf.o"), folder.join("stamp"));
    let wanted = fingerprint(&compiler)?;
    if object.is_file() && fs::read_to_string(&stamp).is_ok_and(|s| s == wanted) {
        return Ok(());
    }
    say::step("build the eBPF programs");
    fs::create_dir_all(&folder).context("make target/bpf")?;
    let built = artifacts::target().join("bpf-build");
    let mut command = compiler.cargo();
    command
        .current_dir(artifacts::repository().join("ebpf/programs"))
        // Target and flags are in that folder's .cargo/config.toml.
        .args(["build", "--release", "--locked", "--target-dir"])
        .arg(&built)
        .env("PATH", search_path());
    for inherited in INHERITED {
        command.env_remove(inherited);
    }
    programs::call(command)?;
    let new = built.join(TARGET).join("release/mesh");
    let bytes = fs::read(&new).with_context(|| format!("read {}", new.display()))?;
    let chain = stack::check(&bytes)?;
    say::step(&format!("the deepest chain of calls takes {} bytes of stack", chain.bytes));
    replace_if_other(&bytes, &object)?;
    fs::write(&stamp, wanted).context("write the stamp of the eBPF build")
}

/// An unchanged object keeps its time, so that nothing that embeds it is built again.
fn replace_if_other(bytes: &[u8], object: &Path) -> Result<()> {
    if fs::read(object).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    fs::write(object, bytes).with_context(|| format!("write {}", object.display()))
}

fn fingerprint(compiler: &Compiler) -> Result<String> {
    let mut hasher = Sha256::new();
    hasher.update(compiler.version()?);
    hasher.update(CHECK);
    let mut files = Vec::new();
    for part in ["ebpf/abi", "ebpf/programs"] {
        sources(&artifacts::repository().join(part), &mut files)?;
    }
    files.sort();
    for file in files {
        hasher.update(file.display().to_string());
        hasher.update(fs::read(&file).with_context(|| format!("read {}", file.display()))?);
    }
    Ok(hex::encode(hasher.finalize()))
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))?;
    for entry in entries {
        let path = entry.context("list sources")?.path();
        if path.is_dir() {
            if path.file_name().is_none_or(|n| n != "target") {
                sources(&path, found)?;
            }
        } else {
            found.push(path);
        }
    }
    Ok(())
}
