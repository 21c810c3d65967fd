//! The programs that ours is measured against, in `target/tools/peers`; got once, each left out where it cannot be had.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use mesh_tests::{artifacts, command};

use crate::{programs, say};

/// Programs from crates: name and version.
const CRATES: [(&str, &str); 2] = [("boringtun-cli", "0.7.1"), ("gotatun-cli", "0.10.2")];
/// Where Debian keeps the keys of its archive.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What the newest wireguard-go is called here; the one of the machine's own release has no addition.
pub(super) const NEWEST_WIREGUARD_GO: &str = "wireguard-go-newest";

/// Where a peer's program is, if it is anywhere.
pub(super) fn program(name: &str) -> Option<PathBuf> {
    let own = folder().join("bin").join(name);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let known = std::env::split_paths(&path).map(|folder| folder.join(name));
    std::iter::once(own).chain(known).find(|program| program.is_file())
}

/// Gets those that are missing.
pub(super) fn ensure() {
    if program("wireguard-go").is_none() {
        told("wireguard-go", crate::tools::apt_install(&["wireguard-go"]));
    }
    if program(NEWEST_WIREGUARD_GO).is_none() {
        say::step("get the newest wireguard-go");
        told(NEWEST_WIREGUARD_GO, newest_wireguard_go());
    }
    for (name, version) in CRATES {
        if program(binary(name)).is_none() {
            say::step(&format!("build {name} {version} (some minutes)"));
            told(name, install(name, version));
        }
    }
}

fn told(name: &str, got: Result<()>) {
    if let Err(error) = got {
        println!("{name} is left out: {error:#}");
    }
}

/// What a crate's program is called.
fn binary(name: &str) -> &str {
    if name == "gotatun-cli" { "gotatun" } else { name }
}

fn folder() -> PathBuf {
    artifacts::target().join("tools/peers")
}

fn install(name: &str, version: &str) -> Result<()> {
    let mut install = programs::cargo();
    install.args(["install", "--quiet", "--locked", name, "--version", version, "--root"]);
    install.arg(folder()).env_remove("RUSTFLAGS").env_remove("CARGO_TARGET_DIR");
    programs::call(install)
}

/// The program out of the package in Debian's unstable release; nothing of the machine's own packages changes.
fn newest_wireguard_go() -> Result<()> {
    let folder = folder().join("unstable");
    for part in ["lists/partial", "cache/archives/partial", "files"] {
        fs::create_dir_all(folder.join(part)).context("make a folder for packages")?;
    }
    let source = folder.join("sources.list");
    let line = format!("deb [signed-by={KEYRING}] {} unstable main\n", archive()?);
    fs::write(&source, line).context("name Debian's unstable release")?;
    apt(&folder, &["update", "-qq"])?;
    apt(&folder, &["download", "-qq", "wireguard-go"])?;
    let package = fs::read_dir(&folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|kind| kind == "deb"))
        .context("no package came")?;
    let files = folder.join("files");
    command::output(Command::new("dpkg-deb").arg("-x").args([&package, &files]))?;
    let programs = self::folder().join("bin");
    fs::create_dir_all(&programs).context("make a folder for programs")?;
    fs::copy(files.join("usr/bin/wireguard-go"), programs.join(NEWEST_WIREGUARD_GO))
        .context("take the program out of the package")?;
    fs::remove_dir_all(&folder).context("remove the package")
}

/// Where this machine gets Debian's packages from.
fn archive() -> Result<String> {
    let known = command::run("apt-get", &["indextargets", "--format", "$(REPO_URI)"])?;
    match known.lines().find(|uri| uri.trim_end_matches('/').ends_with("/debian")) {
        Some(uri) => Ok(uri.to_owned()),
        None => bail!("this machine has no archive of Debian's"),
    }
}

/// apt with lists and a cache of its own, in `folder`.
fn apt(folder: &Path, words: &[&str]) -> Result<()> {
    let at = folder.display();
    let options = [
        format!("Dir::Etc::sourcelist={at}/sources.list"),
        "Dir::Etc::sourceparts=/dev/null".to_owned(),
        format!("Dir::State::lists={at}/lists"),
        format!("Dir::Cache={at}/cache"),
        "APT::Sandbox::User=root".to_owned(),
    ];
    let mut apt = Command::new("apt-get");
    apt.args(options.iter().flat_map(|option| ["-o", option])).args(words).current_dir(folder);
    command::output(&mut apt).map(drop)
}
