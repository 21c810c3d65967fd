//! The nodes' own keys, in the kernel's device.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::super::PATIENCE;
use super::super::lab::{Lab, soon, unharmed};
use super::super::machines::Machine;

/// Datagrams that the other side may drop until it has looked at its device, for each exchange: emulated, it looks seldom.
const LOST_IN_AN_EXCHANGE: u64 = 20;

/// Each node gets another key under a stream; then one does whose agent is killed in the middle.
pub(super) fn rotate_key(lab: &Lab) -> Result<()> {
    let pods = lab.pods()?;
    let (a, b) = (&pods[0], &pods[1]);
    let stream = a.load(&format!("stream://{}:9000", b.v4), Duration::from_secs(90))?;
    let datagrams = a.load(&format!("udp://{}:9001/x", b.v4), Duration::from_secs(90))?;
    for machine in lab.machines.all() {
        replaced(lab, machine)?;
    }
    unharmed("a stream meanwhile", stream)?;
    let report = datagrams.wait()?;
    println!("    datagrams meanwhile: {}", report.line());
    report.at_most_failed(LOST_IN_AN_EXCHANGE * 3).context("datagrams meanwhile")?;
    killed(lab, &b.machine)?;
    lab.all_is_well()
}

fn public_key(machine: &Machine) -> Result<String> {
    ensure!(machine.run("ip -details -json link show mesh-wg")?.contains("\"wireguard\""));
    Ok(machine.run("sudo wg show mesh-wg public-key")?.trim().to_owned())
}

/// The machine has another key, by which alone all others know it.
fn replaced(lab: &Lab, machine: &Machine) -> Result<()> {
    let before = public_key(machine)?;
    let keys = lab.meshctl(&format!("node rotate-key {} --wait 300", machine.name))?;
    ensure!(keys["replacing"] == false, "{keys}");
    new_key_everywhere(lab, machine, &before)
}

fn new_key_everywhere(lab: &Lab, machine: &Machine, before: &str) -> Result<()> {
    let what = format!("all know {} by its new key alone", machine.name);
    soon(&what, PATIENCE, || {
        let now = public_key(machine)?;
        ensure!(now != before, "{} has the same key", machine.name);
        for other in lab.machines.all().iter().filter(|other| other.name != machine.name) {
            // public key, pre-shared key, endpoint, allowed ips, handshake, ...
            let dump = other.run("sudo wg show mesh-wg dump | tail -n +2")?;
            ensure!(!dump.contains(before), "{} has the one before still", other.name);
            let line = dump.lines().find(|line| line.starts_with(&now));
            let fields: Vec<&str> = line.into_iter().flat_map(|l| l.split('\t')).collect();
            let [_, _, _, addresses, handshake, ..] = fields.as_slice() else {
                anyhow::bail!("{} does not have the new one: {dump}", other.name);
            };
            ensure!(*addresses != "(none)" && *handshake != "0", "{}: {fields:?}", other.name);
        }
        Ok(())
    })
}

/// The agent is killed as soon as the next key is on disk; the next agent ends the replacement.
fn killed(lab: &Lab, machine: &Machine) -> Result<()> {
    let before = public_key(machine)?;
    let config = "/var/lib/mesh-control/admin.kubeconfig";
    // The status says that it has not waited for the end.
    lab.machines.control().run(&format!(
        "sudo meshctl --kubeconfig {config} node rotate-key {} --wait 0 || test $? -eq 3",
        machine.name
    ))?;
    machine.run(
        "for i in $(seq 100); do sudo test -e /var/lib/mesh/overlay.key.next && break; sleep 0.05; done
         sudo systemctl kill --kill-who main --signal KILL mesh-agent",
    )?;
    new_key_everywhere(lab, machine, &before)
}
