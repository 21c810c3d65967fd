//! `vm`: a cluster of virtual machines, for what this machine's kernel cannot show: another kernel with its own WireGuard,
//! systemd, a reboot. `vagrant/README.md` tells what the machines are.

mod checks;
mod lab;
mod libvirt;
mod machines;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Subcommand;
use mesh_tests::command::wait_until;
use mesh_tests::{Artifacts, Kubectl, artifacts, image, kubectl};
use sha2::{Digest as _, Sha256};

use self::machines::{Machine, Machines};
use crate::{Profile, package, programs, say, tools};

/// Emulated machines take their time.
const PATIENCE: Duration = Duration::from_secs(300);

#[derive(Subcommand)]
pub(crate) enum VmCommand {
    /// Make the box, start three machines, install the packages on them and let them join
    Up(UpArgs),
    /// Prove on the machines what needs them; they stay as they are
    Test {
        /// Only checks whose names contain one of these
        filters: Vec<String>,
    },
    /// Show the machines, and what the API says about nodes and pods
    Status,
    /// Remove the machines, their disks and networks; the box stays
    Down,
}

#[derive(clap::Args)]
pub(crate) struct UpArgs {
    /// Take the programs as they are, without building
    #[arg(long)]
    no_build: bool,
    #[command(flatten)]
    profile: Profile,
}

/// Runs one of the commands.
pub(crate) fn run(command: &VmCommand) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "`vm` makes a disk image and uses libvirt: sudo -E cargo xtask vm"
    );
    match command {
        VmCommand::Up(args) => up(args),
        VmCommand::Test { filters } => checks::run(filters),
        VmCommand::Status => status(),
        VmCommand::Down => down(),
    }
}

/// Folder of everything that is made for the machines.
fn folder() -> PathBuf {
    artifacts::target().join("vm")
}

fn up(args: &UpArgs) -> Result<()> {
    tools::ensure()?;
    libvirt::ensure_packages()?;
    if !args.no_build {
        programs::build(args.profile.release)?;
    }
    let built = Artifacts::locate(args.profile.release);
    built.check()?;
    libvirt::start()?;
    make_box()?;
    make_packages(&built)?;
    say::step("vagrant up (emulated machines take minutes)");
    let machines = Machines::up()?;
    join(&machines)?;
    wait_nodes_ready(&machines)?;
    say::step("the cluster runs");
    println!(
        "Try:\n  export KUBECONFIG={}\n  {} get nodes -o wide\n  cargo xtask vm test\n  cargo xtask vm down",
        machines.kubeconfig().display(),
        built.kubectl.display()
    );
    Ok(())
}

fn status() -> Result<()> {
    let machines = Machines::open()?;
    for machine in machines.all() {
        let state = machine.run(
            "uname -r; systemctl is-active containerd mesh-agent; systemd-detect-virt || true",
        );
        let state = state.unwrap_or_else(|e| format!("{e:#}"));
        println!("{:<8} {}", machine.name, state.split_whitespace().collect::<Vec<_>>().join(" "));
    }
    for what in [["nodes", "-A"], ["pods", "-A"]] {
        let words = ["get", what[0], what[1], "-o", "wide"];
        println!("{}", kubectl(&machines).run(&words).unwrap_or_else(|e| format!("{e:#}\n")));
    }
    Ok(())
}

fn down() -> Result<()> {
    if libvirt::answers() || libvirt::start().is_ok() {
        Machines::down()?;
    }
    libvirt::stop()?;
    libvirt::restore_forwarding()?;
    say::step("nothing of the machines is left");
    Ok(())
}

/// Makes the box, unless the one that is there was made by the present script.
fn make_box() -> Result<()> {
    let script = artifacts::repository().join("vagrant/make-box");
    let text = fs::read(&script).with_context(|| format!("read {}", script.display()))?;
    let wanted = hex::encode(Sha256::digest(text));
    let stamp = folder().join("box.stamp");
    if fs::read_to_string(&stamp).is_ok_and(|present| present == wanted) {
        return Ok(());
    }
    say::step("make the box (some minutes)");
    let mut make = Command::new(script);
    make.arg(folder());
    programs::call(make)?;
    libvirt::forget_box()?;
    fs::write(&stamp, wanted).context("note which script made the box")
}

/// What is copied to each machine: packages and images.
fn make_packages(built: &Artifacts) -> Result<()> {
    let packages = folder().join("packages");
    package::write(built, &packages)?;
    image::write_archive(built, &packages.join("images.tar")).map(drop)
}

/// Gives the nodes the join token, and the host the administrator's credentials.
fn join(machines: &Machines) -> Result<()> {
    say::step("let the nodes join");
    let control = machines.control();
    let state = "/var/lib/mesh-control";
    let token = wait_until("mesh-control has made a join token", PATIENCE, || {
        control.run(&format!("sudo cat {state}/join-token"))
    })?;
    let kubeconfig = control.run(&format!("sudo cat {state}/admin.kubeconfig"))?;
    write_secret(&machines.kubeconfig(), &kubeconfig)?;
    for machine in machines.all() {
        machine.run(&format!(
            "sudo install -m 0600 /dev/stdin /etc/mesh/join-token <<'TOKEN'\n{}\nTOKEN",
            token.trim()
        ))?;
    }
    Ok(())
}

fn write_secret(path: &Path, content: &str) -> Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    let mut file = file.with_context(|| format!("open {}", path.display()))?;
    file.write_all(content.as_bytes()).with_context(|| format!("write {}", path.display()))
}

fn kubectl(machines: &Machines) -> Kubectl {
    Kubectl::new(artifacts::kubectl(), machines.kubeconfig())
}

fn wait_nodes_ready(machines: &Machines) -> Result<()> {
    say::step("wait until all nodes are ready");
    let kubectl = kubectl(machines);
    let wanted = machines.all().len();
    wait_until("all nodes are ready", PATIENCE, || {
        let list = kubectl.json(&["nodes"])?;
        let items = list["items"].as_array().cloned().unwrap_or_default();
        let ready = items.iter().filter(|n| kubectl::is_ready(n)).count();
        if ready == wanted {
            return Ok(());
        }
        let last = |m: &Machine| {
            let log = m.run("sudo journalctl -u mesh-agent -n 3 --no-pager -o cat");
            format!("{}: {}", m.name, log.unwrap_or_else(|e| format!("{e:#}")))
        };
        let logs = machines.all().iter().map(last).collect::<Vec<_>>().join("\n");
        bail!("{ready} of {wanted} are ready; the agents' last words:\n{logs}")
    })
}
