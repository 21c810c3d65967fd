//! What breaks, and what it costs.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::command::wait_until;

use super::super::PATIENCE;
use super::super::lab::{Lab, expect, soon, unharmed};
use super::super::machines::{BOOT, Machine};

/// How long pre-shared keys are used, if the control service is not told otherwise.
const EPOCH: Duration = Duration::from_secs(120);

/// The agent is killed: its workers stay the same processes, traffic goes on, and the service manager starts it again.
pub(super) fn agent_killed(lab: &Lab) -> Result<()> {
    let pods = lab.pods()?;
    let (a, b) = (&pods[0], &pods[1]);
    let workers = |machine: &Machine| {
        machine.run("pgrep --full '^/usr/bin/mesh-agent (dns|ingress) ' | sort | xargs")
    };
    let main =
        |machine: &Machine| machine.run("systemctl show mesh-agent --property MainPID --value");
    let (before, pid) = (workers(&b.machine)?, main(&b.machine)?);
    ensure!(before.split_whitespace().count() == 2, "workers of {}: {before}", b.machine.name);
    let stream = a.load(&format!("stream://{}:9000", b.v4), Duration::from_secs(25))?;
    let vip = a.load(&format!("http://{}/", lab.vips()?[0]), Duration::from_secs(25))?;
    thread::sleep(Duration::from_secs(3));
    b.machine.run("sudo systemctl kill --kill-who main --signal KILL mesh-agent")?;
    soon("the agent runs again", PATIENCE, || {
        let now = main(&b.machine)?;
        ensure!(now != pid && now.trim() != "0", "MainPID {now}");
        let socket =
            "sudo curl -fsS -m 5 --unix-socket /run/mesh/agent.sock http://agent/mesh/v1/peers";
        b.machine.run(socket).map(drop)
    })?;
    unharmed("a stream to a pod there", stream)?;
    unharmed("the service", vip)?;
    let after = workers(&b.machine)?;
    ensure!(before == after, "workers {before} were replaced by {after}");
    lab.all_is_well()
}

/// One node changes to the user-space engine and back, under load; in between the engines speak to each other.
pub(super) fn change_of_engine(lab: &Lab) -> Result<()> {
    with_ours(lab, || {
        let pods = lab.pods()?;
        let stream =
            pods[1].load(&format!("stream://{}:9000", pods[0].v4), Duration::from_secs(10))?;
        unharmed("a stream from engine to engine", stream).map(drop)
    })
}

/// The same for a node whose agent comes back with pre-shared keys that the others have replaced meanwhile.
pub(super) fn change_of_engine_with_old_keys(lab: &Lab) -> Result<()> {
    const KEYS: &str = "/var/lib/mesh/preshared.json";
    let machine = &lab.machines.all()[1];
    with_ours(lab, || {
        machine.run(&format!("sudo cp --preserve {KEYS} {KEYS}.old"))?;
        thread::sleep(EPOCH + Duration::from_secs(10));
        machine.run(&format!("sudo systemctl stop mesh-agent; sudo mv {KEYS}.old {KEYS}"))?;
        Ok(())
    })
}

/// Changes a node to the user-space engine, does that, and changes it back to the kernel's.
fn with_ours(lab: &Lab, between: impl Fn() -> Result<()>) -> Result<()> {
    let changed = change(lab, "user", "tun").and_then(|()| between());
    // Back also after a failure: other checks need the kernel's.
    let back = change(lab, "kernel", "wireguard");
    let auto = configure(&lab.machines.all()[1], "auto");
    changed.context("to the user-space engine").and(back.context("back to the kernel's")).and(auto)
}

fn configure(machine: &Machine, engine: &str) -> Result<()> {
    machine.run(&format!(
        "sudo sed -i '/^overlay:/d' /etc/mesh/agent.yaml
         echo 'overlay: {engine}' | sudo tee -a /etc/mesh/agent.yaml >/dev/null
         sudo systemctl restart mesh-agent"
    ))?;
    Ok(())
}

fn change(lab: &Lab, engine: &str, kind: &str) -> Result<()> {
    let pods = lab.pods()?;
    let (a, b) = (&pods[0], &pods[1]);
    let stream = a.load(&format!("stream://{}:9000", b.v4), Duration::from_secs(40))?;
    thread::sleep(Duration::from_secs(3));
    configure(&b.machine, engine)?;
    soon(&format!("{} uses {engine}", b.machine.name), PATIENCE, || {
        ensure!(lab.engine(&b.machine)? == engine, "the node says otherwise");
        let link = b.machine.run("ip -details -json link show mesh-wg")?;
        expect("kind of mesh-wg", &link, &format!("\"info_kind\":\"{kind}\""))
    })?;
    let report = stream.wait()?;
    println!("    a stream meanwhile: {}", report.line());
    report.none_failed().context("a stream meanwhile")?;
    lab.all_is_well()
}

/// Drops everything between a machine and another one until it is dropped itself.
struct Apart<'a>(&'a Machine);

const TABLE: &str = "inet mesh-vm-apart";

impl<'a> Apart<'a> {
    fn new(machine: &'a Machine, others: &[&Machine]) -> Result<Self> {
        let rules: Vec<String> = others
            .iter()
            .flat_map(|other| {
                let address = &other.address;
                [
                    format!("add rule {TABLE} in ip saddr {address} drop"),
                    format!("add rule {TABLE} out ip daddr {address} drop"),
                ]
            })
            .collect();
        machine.run(&format!(
            "sudo nft -f - <<'RULES'
add table {TABLE}
add chain {TABLE} in {{ type filter hook input priority -300; }}
add chain {TABLE} out {{ type filter hook output priority -300; }}
{}
RULES",
            rules.join("\n")
        ))?;
        Ok(Self(machine))
    }
}

impl Drop for Apart<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.run(&format!("sudo nft delete table {TABLE}")) {
            println!("    {} stays apart: {error:#}", self.0.name);
        }
    }
}

/// Two nodes lose each other, and speak through the third; one loses all others, and is out of their services. Both heal.
pub(super) fn partition(lab: &Lab) -> Result<()> {
    let [a, b, c] = lab.machines.all() else { anyhow::bail!("three machines are needed") };
    let pods = lab.pods()?;
    let state = |from: &Machine, to: &Machine| {
        let peers = lab.peers()?;
        let found = peers.into_iter().find(|(f, t, _)| (f, t) == (&from.name, &to.name));
        found.map(|(.., peer)| peer["path"].clone()).context("the peer is gone")
    };
    let stream = pods[1].load(&format!("stream://{}:9000", pods[2].v4), Duration::from_secs(60))?;
    let apart = Apart::new(b, &[c])?;
    soon("both speak through the third", PATIENCE, || {
        for (from, to) in [(b, c), (c, b)] {
            let path = state(from, to)?;
            ensure!(path["state"] == "relayed" && path["via"] == a.name.as_str(), "{path}");
        }
        Ok(())
    })?;
    drop(apart);
    soon("the path is direct again", PATIENCE, || {
        for (from, to) in [(b, c), (c, b)] {
            let path = state(from, to)?;
            ensure!(path["state"] == "direct", "{} to {}: {path}", from.name, to.name);
        }
        Ok(())
    })?;
    unharmed("a stream meanwhile", stream)?;
    lab.all_is_well()?;
    isolation(lab)
}

/// The last node loses all others: they take its pods out of the service, and put them back.
fn isolation(lab: &Lab) -> Result<()> {
    let [a, b, c] = lab.machines.all() else { anyhow::bail!("three machines are needed") };
    let apart = Apart::new(c, &[a, b])?;
    soon("its pods are out of the service", PATIENCE, || {
        for at in [a, b] {
            let left = lab.backends(at, c)?;
            ensure!(left == 0, "{} still has {left}", at.name);
        }
        Ok(())
    })?;
    let vip = &lab.vips()?[0];
    a.run(&format!("for i in $(seq 10); do curl -fsS -m 10 http://{vip}/ >/dev/null; done"))
        .context("the service without it")?;
    let own = lab.backends(c, c)?;
    ensure!(own > 0, "the isolated node has lost its own pods");
    drop(apart);
    soon("its pods are back", PATIENCE, || {
        for at in [a, b] {
            ensure!(lab.backends(at, c)? > 0, "{} lacks them", at.name);
        }
        Ok(())
    })?;
    lab.all_is_well()
}

/// A worker reboots: pods run on it again, its traffic comes back, and nobody else's pods are touched. An emulated machine is
/// away for so long that its pod may have been replaced on another one.
pub(super) fn reboot(lab: &Lab) -> Result<()> {
    let pods = lab.pods()?;
    let machine = &pods[2].machine;
    let before = machine.boot_id()?;
    // It ends the connection that it was sent over.
    let _ = machine.run("sudo systemd-run --quiet --on-active=1 systemctl reboot");
    thread::sleep(Duration::from_secs(3));
    machine.hang_up();
    soon("it has booted", BOOT, || {
        let now = machine.boot_id()?;
        ensure!(now != before, "it has not ended yet");
        Ok(())
    })?;
    wait_until("a pod runs on it again", BOOT, || {
        let after = lab.pods()?;
        let others = pods[..2].iter().map(|p| &p.name).collect::<Vec<_>>();
        let same = after[..2].iter().map(|p| &p.name).collect::<Vec<_>>();
        ensure!(same == others, "pods of other nodes were replaced: {others:?} by {same:?}");
        let unfinished = machine.run("sudo systemctl is-active containerd mesh-agent | xargs")?;
        ensure!(unfinished.trim() == "active active", "services: {unfinished}");
        Ok(())
    })?;
    lab.all_is_well()?;
    ensure!(lab.engine(machine)? == "kernel", "it uses another engine than before");
    ensure!(lab.ingress(machine)?.contains("\"host\":\"web-"), "its ingress");
    Ok(())
}
