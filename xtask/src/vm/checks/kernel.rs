//! What the machines' kernel has, and this host's may not: WireGuard; clsact where tcx is missing; cgroup v2 alone.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::command::{output, wait_until};
use serde_json::Value;

use super::super::PATIENCE;
use super::super::lab::{Lab, expect, soon};
use super::super::machines::Machine;
use crate::programs;

/// First version with tcx.
const TCX: (u32, u32) = (6, 6);
/// How long a machine may take for its share of the tests.
const TESTS_LIMIT: Duration = Duration::from_secs(2 * 60 * 60);

fn version(machine: &Machine) -> Result<(u32, u32)> {
    let text = machine.run("uname -r")?;
    let mut numbers = text.split('.').map(|n| n.parse().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) => Ok((major, minor)),
        _ => bail!("{}: what version is {text:?}?", machine.name),
    }
}

/// Every node uses the kernel's device, by choice of its own, and has shaken hands with every other one.
pub(super) fn wireguard(lab: &Lab) -> Result<()> {
    for machine in lab.machines.all() {
        ensure!(lab.engine(machine)? == "kernel", "{} says that it uses the other", machine.name);
        let link = machine.run("ip -details -json link show mesh-wg")?;
        expect("kind of mesh-wg", &link, "\"info_kind\":\"wireguard\"")?;
        let none = machine.run("test ! -e /run/mesh/overlay.pid && echo none")?;
        expect("process of the user-space engine", &none, "none")?;
        // public key, preshared key, endpoint, allowed ips, handshake, received, sent, keepalive
        let dump = machine.run("sudo wg show mesh-wg dump | tail -n +2")?;
        let peers: Vec<Vec<&str>> = dump.lines().map(|l| l.split('\t').collect()).collect();
        ensure!(peers.len() + 1 == lab.machines.all().len(), "peers of {}: {dump}", machine.name);
        for peer in peers {
            let [key, preshared, endpoint, _, handshake, received, ..] = peer.as_slice() else {
                bail!("what wg says of a peer: {peer:?}");
            };
            ensure!(*preshared != "(none)", "{}: {key} has no pre-shared key", machine.name);
            let number = |text: &str| text.parse::<u64>().unwrap_or(0);
            let spoken = number(handshake) > 0 && number(received) > 0;
            ensure!(spoken, "{}: nothing was heard of {key} at {endpoint}", machine.name);
        }
    }
    Ok(())
}

/// The keys that pairs share are replaced, and each pair shakes hands with a newer one: within two minutes (WG section 6.1,
/// Rekey-After-Time).
pub(super) fn preshared_keys(lab: &Lab) -> Result<()> {
    let machines = lab.machines.all();
    let keys = |machine: &Machine| by_peer(machine, "preshared-keys");
    let before = machines.iter().map(keys).collect::<Result<Vec<_>>>()?;
    soon("new keys are in all devices", Duration::from_secs(150), || {
        for (machine, before) in machines.iter().zip(&before) {
            for (peer, key) in keys(machine)? {
                ensure!(before.get(&peer) != Some(&key), "{}: {peer} has the same", machine.name);
            }
        }
        Ok(())
    })?;
    let clock = |machine: &Machine| Ok(machine.run("date +%s")?.trim().parse::<u64>()?);
    let since = machines.iter().map(clock).collect::<Result<Vec<_>>>()?;
    // No pair has an old key on either side, so a handshake that succeeds is one with a newer key.
    wait_until("each pair has shaken hands since", PATIENCE, || {
        for (machine, since) in machines.iter().zip(&since) {
            let handshakes = by_peer(machine, "latest-handshakes")?;
            ensure!(handshakes.len() + 1 == machines.len(), "{}: {handshakes:?}", machine.name);
            for (peer, at) in handshakes {
                ensure!(at.parse::<u64>()? > *since, "{}: {peer} has not", machine.name);
            }
        }
        Ok(())
    })?;
    lab.all_is_well()
}

/// What wg(8) shows of each peer.
fn by_peer(machine: &Machine, what: &str) -> Result<BTreeMap<String, String>> {
    let said = machine.run(&format!("sudo wg show mesh-wg {what}"))?;
    let pairs = said.lines().filter_map(|line| line.split_once('\t'));
    Ok(pairs.map(|(peer, value)| (peer.to_owned(), value.to_owned())).collect())
}

/// The programs run on clsact, at the overlay device and at the pods' interfaces, on a kernel that has nothing newer.
pub(super) fn tc_without_tcx(lab: &Lab) -> Result<()> {
    for pod in lab.pods()? {
        let machine = &pod.machine;
        let version = version(machine)?;
        ensure!(version < TCX, "{}: kernel {version:?} has tcx: this proves nothing", machine.name);
        let overlay = machine.run("sudo tc filter show dev mesh-wg ingress")?;
        expect("filter of mesh-wg", &overlay, "from_overlay direct-action")?;
        let device = machine.run(&format!("ip -o route get {} | sed 's/.* dev //'", pod.v4))?;
        let device = device.split_whitespace().next().context("the pod has no route")?;
        let filter = machine.run(&format!("sudo tc filter show dev {device} ingress"))?;
        expect(&format!("filter of {device}"), &filter, "direct-action")?;
    }
    Ok(())
}

/// With cgroup v2 alone, a container that the kernel ends for its memory is told from one that fails.
pub(super) fn out_of_memory(lab: &Lab) -> Result<()> {
    const NAME: &str = "eater";
    let machine = lab.machines.control();
    let v2 = machine.run("stat --file-system --format=%T /sys/fs/cgroup")?;
    expect("file system of /sys/fs/cgroup", &v2, "cgroup2fs")?;
    lab.kubectl.apply(EATERS)?;
    let reason = |pod: &Value, n: usize| {
        let state = &pod["status"]["containerStatuses"][n]["state"]["terminated"];
        state["reason"].as_str().unwrap_or("none yet").to_owned()
    };
    let ended = wait_until("the containers have ended for different reasons", PATIENCE, || {
        let pod = lab.kubectl.json(&["pod", NAME])?;
        let reasons = [reason(&pod, 0), reason(&pod, 1), reason(&pod, 2)];
        ensure!(reasons == ["OOMKilled", "Error", "OOMKilled"], "{reasons:?}");
        Ok(())
    });
    let limit = limits(lab);
    lab.kubectl.run(&["delete", "pod", NAME, "--ignore-not-found", "--timeout=120s"])?;
    ended.and(limit)
}

/// systemd takes no controller away from the pods when it is told to look at its units again.
fn limits(lab: &Lab) -> Result<()> {
    for machine in lab.machines.all() {
        machine.run("sudo systemctl daemon-reload")?;
        let controllers = machine.run("cat /sys/fs/cgroup/mesh/pods/cgroup.subtree_control")?;
        for controller in ["cpu", "memory", "pids"] {
            let there = controllers.split_whitespace().any(|c| c == controller);
            ensure!(there, "{}: pods have no {controller}: {controllers}", machine.name);
        }
    }
    Ok(())
}

/// The same code from the first two; only the kernel knows the difference. The third loses a child, and ends as a whole.
const EATERS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: eater}
spec:
  restartPolicy: Never
  containers:
  - name: eater
    image: mesh.local/busybox:1
    command: [sh, -c, exec dd if=/dev/zero of=/dev/null bs=200M]
    resources: {limits: {memory: 24Mi}}
  - name: liar
    image: mesh.local/busybox:1
    command: [sh, -c, exit 137]
  - name: parent
    image: mesh.local/busybox:1
    command: [sh, -c, dd if=/dev/zero of=/dev/null bs=200M & exec sleep 100000]
    resources: {limits: {memory: 24Mi}}
";

/// The tests of mesh-kernel that need a kernel, on this one: programs through its verifier, netlink, the WireGuard device. Emulated,
/// each takes half a minute and more, so all machines but the control service's, which has least memory left, take a share.
pub(super) fn crate_tests(lab: &Lab) -> Result<()> {
    let program = test_program()?;
    let bytes = std::fs::read(&program).with_context(|| format!("read {}", program.display()))?;
    let said = output(Command::new(&program).args(["--list", "--format", "terse"]))?;
    let names: Vec<&str> = said.lines().filter_map(|line| line.strip_suffix(": test")).collect();
    let machines = &lab.machines.all()[1..];
    let results = std::thread::scope(|scope| {
        let share = |(number, machine)| {
            let share = names.iter().skip(number).step_by(machines.len()).copied().collect();
            let bytes = &bytes;
            scope.spawn(move || run_tests(machine, bytes, share))
        };
        let running: Vec<_> = machines.iter().enumerate().map(share).collect();
        running.into_iter().map(|one| one.join().expect("it does not panic")).collect::<Vec<_>>()
    });
    results.into_iter().collect()
}

/// Runs tests of the program one after the other.
fn run_tests(machine: &Machine, program: &[u8], names: Vec<&str>) -> Result<()> {
    let mut copy = machine.ssh();
    copy.arg("cat > /tmp/mesh-kernel-tests && chmod 755 /tmp/mesh-kernel-tests");
    mesh_tests::command::output_with_input(&mut copy, program).context("copy the tests")?;
    let run = format!(
        "sudo env CI=1 timeout {} /tmp/mesh-kernel-tests --test-threads 1 --exact {} 2>&1 || true",
        TESTS_LIMIT.as_secs(),
        names.join(" ")
    );
    let said = machine.run(&run)?;
    machine.run("rm /tmp/mesh-kernel-tests")?;
    let result = said.lines().rev().find(|line| line.starts_with("test result:"));
    let result = result.with_context(|| format!("the tests did not end: {said}"))?;
    println!("    {}: {result}", machine.name);
    ensure!(result.contains("result: ok"), "{}: {said}", machine.name);
    Ok(())
}

/// Builds the crate's tests, and strips them: they are copied to an emulated machine.
fn test_program() -> Result<PathBuf> {
    let mut build = programs::cargo();
    build.args(["test", "--package", "mesh-kernel", "--test", "linux", "--no-run"]);
    build.args(["--message-format", "json"]);
    let said = output(&mut build)?;
    let built = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let program = built.filter_map(|m| m["executable"].as_str().map(PathBuf::from)).next_back();
    let program = program.context("cargo names no test program")?;
    let stripped = super::super::folder().join("mesh-kernel-tests");
    let mut strip = Command::new("strip");
    strip.args(["--strip-debug", "-o"]).arg(&stripped).arg(&program);
    output(&mut strip)?;
    Ok(stripped)
}
