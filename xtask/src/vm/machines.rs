//! The machines, as Vagrant makes them and ssh reaches them.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::artifacts;
use mesh_tests::command::{output, output_with_input};

use super::folder;

/// Sockets of connections that are kept: an emulated machine computes a second for each new one.
const CONNECTIONS: &str = "/run/mesh-vm";

/// All machines of the cluster.
pub(crate) struct Machines(Vec<Machine>);

/// One machine.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    /// Its name, which is also its node's.
    pub(crate) name: String,
    /// Its address on the underlay.
    pub(crate) address: String,
}

impl Machines {
    /// Starts and provisions the machines, or provisions those that run anew.
    pub(crate) fn up() -> Result<Self> {
        let mut up = vagrant();
        up.args(["up", "--provision", "--provider", "libvirt", "--no-color"]);
        logged(up).context("vagrant up")?;
        let config = output(vagrant().arg("ssh-config")).context("ask Vagrant for the machines")?;
        fs::write(ssh_config(), config).context("write the ssh configuration")?;
        Self::open()
    }

    /// The machines that run.
    pub(crate) fn open() -> Result<Self> {
        let config = fs::read_to_string(ssh_config())
            .context("there are no machines: start them with `cargo xtask vm up`")?;
        let names = config.lines().filter_map(|line| line.strip_prefix("Host "));
        let mut all: Vec<Machine> = names.filter_map(|name| Machine::new(name.trim())).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        ensure!(all.len() >= 3, "{} names fewer than three machines", ssh_config().display());
        Ok(Self(all))
    }

    /// Removes them.
    pub(crate) fn down() -> Result<()> {
        if folder().join("machines").exists() {
            let mut destroy = vagrant();
            destroy.args(["destroy", "--force", "--no-color"]);
            logged(destroy).context("vagrant destroy")?;
        }
        super::libvirt::remove_networks()?;
        super::libvirt::forget_box()?;
        for path in [folder().join("machines"), CONNECTIONS.into()] {
            let _ = fs::remove_dir_all(path);
        }
        for path in [ssh_config(), folder().join("kubeconfig")] {
            let _ = fs::remove_file(path);
        }
        Ok(())
    }

    /// All, by name.
    pub(crate) fn all(&self) -> &[Machine] {
        &self.0
    }

    /// The one with the control service.
    pub(crate) fn control(&self) -> &Machine {
        &self.0[0]
    }

    /// The administrator's credentials.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        folder().join("kubeconfig")
    }
}

impl Machine {
    /// `node-N` has the address that the Vagrantfile gives to N.
    fn new(name: &str) -> Option<Self> {
        let number: u8 = name.strip_prefix("node-")?.parse().ok()?;
        Some(Self { name: name.to_owned(), address: format!("10.214.0.{}", 10 + number) })
    }

    /// An ssh command to it, without the words to run yet.
    pub(crate) fn ssh(&self) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.arg("-F").arg(ssh_config());
        for option in [
            "ControlMaster=auto",
            &format!("ControlPath={CONNECTIONS}/%n"),
            "ControlPersist=600",
            "ConnectTimeout=20",
            "ServerAliveInterval=10",
            "ServerAliveCountMax=6",
            "LogLevel=ERROR",
        ] {
            ssh.args(["-o", option]);
        }
        ssh.arg(&self.name);
        ssh
    }

    /// Runs a script and returns what it prints; the first command that fails ends it.
    pub(crate) fn run(&self, script: &str) -> Result<String> {
        fs::create_dir_all(CONNECTIONS).context("make a folder for connections")?;
        let script = format!("set -euo pipefail\n{script}\n");
        output_with_input(self.ssh().args(["bash", "-s"]), script.as_bytes())
            .with_context(|| format!("on {}: {}", self.name, first_line(&script)))
    }

    /// Ends the connection that is kept, for one that will be dead.
    pub(crate) fn hang_up(&self) {
        // Nobody there is fine.
        let _ = output(self.ssh().args(["-O", "exit"]));
    }

    /// Tells one start of the machine from the next.
    pub(crate) fn boot_id(&self) -> Result<String> {
        let id = self.run("cat /proc/sys/kernel/random/boot_id")?;
        Ok(id.trim().to_owned())
    }
}

/// Runs Vagrant with its many words in a file, whose last ones are shown when it fails.
fn logged(mut command: Command) -> Result<()> {
    let path = folder().join("vagrant.log");
    let log = fs::File::create(&path).with_context(|| format!("make {}", path.display()))?;
    let errors = log.try_clone().context("share Vagrant's log")?;
    let status = command.stdin(Stdio::null()).stdout(log).stderr(errors).status();
    let status = status.context("run vagrant: is it installed?")?;
    if status.success() {
        return Ok(());
    }
    let said = fs::read_to_string(&path).unwrap_or_default();
    let lines: Vec<&str> = said.lines().filter(|line| !line.contains("Progress:")).collect();
    let last = &lines[lines.len().saturating_sub(15)..];
    bail!("{status}; the end of {}:\n{}", path.display(), last.join("\n"))
}

fn first_line(script: &str) -> &str {
    script.lines().nth(1).unwrap_or_default()
}

fn ssh_config() -> PathBuf {
    folder().join("ssh-config")
}

/// Vagrant with all its files in our folder.
pub(super) fn vagrant() -> Command {
    let mut vagrant = Command::new("vagrant");
    vagrant
        .current_dir(artifacts::repository().join("vagrant"))
        .env("MESH_VM_DIR", folder())
        .env("VAGRANT_HOME", folder().join("vagrant"))
        .env("VAGRANT_DOTFILE_PATH", folder().join("machines"))
        .env("VAGRANT_DEFAULT_PROVIDER", "libvirt")
        .env("VAGRANT_CHECKPOINT_DISABLE", "1");
    vagrant
}

/// How long a machine may take to boot.
pub(crate) const BOOT: Duration = Duration::from_secs(900);
