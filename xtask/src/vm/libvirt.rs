//! libvirt, where Vagrant makes the machines: its packages, its daemons, and what Vagrant leaves in it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use mesh_tests::command::{run, succeeds, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::machines::vagrant;
use crate::{say, tools};

const PACKAGES: [&str; 11] = [
    "vagrant",
    "vagrant-libvirt",
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "libvirt-daemon-system",
    "libvirt-clients",
    "dnsmasq-base",
    "cpio",
    "debootstrap",
    "qemu-system-x86",
    "openssh-client",
];
/// Networks of the Vagrantfile.
const NETWORKS: [&str; 2] = ["mesh-management", "mesh-underlay"];
const QEMU_CONF: &str = "/etc/libvirt/qemu.conf";
const MARK: &str = "# Mesh: no service manager runs here";
/// In a container there are no users and control groups for machines to be put in.
const WITHOUT_SYSTEMD: &str = "
user = \"root\"
group = \"root\"
security_driver = \"none\"
cgroup_controllers = []
namespaces = []
";
/// libvirt turns forwarding on for its networks, and never off again. What it was before is kept there.
const FORWARDING: [(&str, &str); 2] = [
    ("/proc/sys/net/ipv4/ip_forward", "/run/mesh-vm-ip-forward"),
    ("/proc/sys/net/ipv6/conf/all/forwarding", "/run/mesh-vm-ipv6-forwarding"),
];
/// The daemons that we start, and the files with their process numbers.
const DAEMONS: [(&str, &str); 2] =
    [("virtlogd", "/run/mesh-vm-virtlogd.pid"), ("libvirtd", "/run/mesh-vm-libvirtd.pid")];

/// Installs what is missing.
pub(super) fn ensure_packages() -> Result<()> {
    if succeeds("dpkg-query", &["-W", "qemu-utils"]) || !mesh_tests::command::exists("apt-get") {
        return tools::apt_install(&PACKAGES);
    }
    // It has to be of the version of qemu-system-x86, which another repository may not have.
    let version = |package| run("apt-cache", &["policy", package]);
    let candidate = version("qemu-system-x86")?;
    let wanted = candidate.lines().find_map(|l| l.trim().strip_prefix("Candidate: "));
    let utils = match wanted {
        Some(version) => format!("qemu-utils={version}"),
        None => "qemu-utils".to_owned(),
    };
    let mut all = PACKAGES.to_vec();
    all.push(&utils);
    tools::apt_install(&all)
}

/// Whether there is a libvirt to talk to.
pub(super) fn answers() -> bool {
    succeeds("virsh", &["-c", "qemu:///system", "list"])
}

/// Starts libvirt, unless it runs.
pub(super) fn start() -> Result<()> {
    note_forwarding()?;
    if answers() {
        return Ok(());
    }
    if Path::new("/run/systemd/system").exists() {
        run("systemctl", &["start", "libvirtd"])?;
    } else {
        say::step("start libvirt");
        let conf = fs::read_to_string(QEMU_CONF).with_context(|| format!("read {QEMU_CONF}"))?;
        if !conf.contains(MARK) {
            fs::write(QEMU_CONF, format!("{conf}{MARK}{WITHOUT_SYSTEMD}"))
                .with_context(|| format!("write {QEMU_CONF}"))?;
        }
        for (daemon, pid) in DAEMONS {
            run(daemon, &["--daemon", "--pid-file", pid])?;
        }
    }
    wait_until("libvirt answers", Duration::from_secs(30), || {
        if answers() { Ok(()) } else { bail!("`virsh list` fails") }
    })
}

/// Notes whether this host forwards, unless that was noted before the present machines.
fn note_forwarding() -> Result<()> {
    for (setting, note) in FORWARDING {
        if Path::new(note).exists() {
            continue;
        }
        // A kernel without IPv6 has no such setting.
        let Ok(value) = fs::read_to_string(setting) else { continue };
        fs::write(note, value).with_context(|| format!("write {note}"))?;
    }
    Ok(())
}

/// Forwarding is as it was before the machines.
pub(super) fn restore_forwarding() -> Result<()> {
    for (setting, note) in FORWARDING {
        let Ok(before) = fs::read_to_string(note) else { continue };
        // Writing the value that there is would reset settings of single links.
        if fs::read_to_string(setting).is_ok_and(|now| now != before) {
            fs::write(setting, &before).with_context(|| format!("write {setting}"))?;
        }
        fs::remove_file(note).with_context(|| format!("remove {note}"))?;
    }
    Ok(())
}

/// Ends the daemons that we started, with the configuration that they needed.
pub(super) fn stop() -> Result<()> {
    for (daemon, file) in DAEMONS.iter().rev() {
        let Ok(text) = fs::read_to_string(file) else { continue };
        let pid: i32 = text.trim().parse().with_context(|| format!("understand {file}"))?;
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if name.trim() == *daemon {
            kill(Pid::from_raw(pid), Signal::SIGTERM).with_context(|| format!("end {daemon}"))?;
        }
        let _ = fs::remove_file(file);
    }
    let conf = fs::read_to_string(QEMU_CONF).unwrap_or_default();
    if let Some((before, _)) = conf.split_once(MARK) {
        fs::write(QEMU_CONF, before).with_context(|| format!("write {QEMU_CONF}"))?;
    }
    Ok(())
}

/// Removes the networks that Vagrant leaves.
pub(super) fn remove_networks() -> Result<()> {
    for network in NETWORKS {
        if !virsh(&["net-info", network]) {
            continue;
        }
        // Fails when it is not active, which is fine.
        virsh(&["net-destroy", network]);
        run("virsh", &["-c", "qemu:///system", "net-undefine", network])?;
    }
    Ok(())
}

/// Removes what Vagrant and libvirt have of the box, so that the next start takes the present one.
pub(super) fn forget_box() -> Result<()> {
    let _ = mesh_tests::command::output(vagrant().args([
        "box",
        "remove",
        "--force",
        "--all",
        "mesh-debian12",
    ]));
    if !answers() {
        return Ok(());
    }
    let volumes = run("virsh", &["-c", "qemu:///system", "vol-list", "default"]);
    for line in volumes.unwrap_or_default().lines() {
        let Some(name) = line.split_whitespace().next() else { continue };
        if name.starts_with("mesh-debian12_vagrant_box_image") {
            run("virsh", &["-c", "qemu:///system", "vol-delete", "--pool", "default", name])?;
        }
    }
    Ok(())
}

fn virsh(words: &[&str]) -> bool {
    let mut all = vec!["-c", "qemu:///system"];
    all.extend(words);
    succeeds("virsh", &all)
}
