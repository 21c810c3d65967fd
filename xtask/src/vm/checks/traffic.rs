//! Traffic between machines when all is well.

use std::collections::BTreeSet;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::capture::contains;
use mesh_tests::command::{output, wait_until};

use super::super::PATIENCE;
use super::super::lab::{Lab, everybody_reaches_everybody, unharmed};
use super::super::machines::Machine;

/// Each pod reaches each pod of the other machines, over both families.
pub(super) fn pods_across_machines(lab: &Lab) -> Result<()> {
    let pods = lab.pods()?;
    everybody_reaches_everybody(&pods)?;
    // More than fits into one packet.
    let (a, b) = (&pods[0], &pods[1]);
    let stream = a.load(&format!("stream://{}:9000", b.v4), Duration::from_secs(5))?;
    unharmed("a stream", stream).map(drop)
}

/// From each pod and each machine, the service's addresses lead to all pods.
pub(super) fn service_addresses(lab: &Lab) -> Result<()> {
    let (pods, [v4, v6]) = (lab.pods()?, lab.vips()?);
    for pod in &pods {
        for url in [format!("http://{v4}/"), format!("http://[{v6}]/")] {
            let answers = pod.get(&vec![url.clone(); 12])?;
            let heard: BTreeSet<&str> = pods
                .iter()
                .map(|p| p.name.as_str())
                .filter(|name| answers.contains(*name))
                .collect();
            // 12 requests miss one of three backends once in 40 times, two of them practically never.
            ensure!(heard.len() >= 2, "{url} in {} leads to {heard:?} only", pod.name);
        }
        pod.machine.run(&format!("curl -fsS -m 10 http://{v4}/ >/dev/null"))?;
    }
    Ok(())
}

/// Each pod finds the service by its short name and its whole name.
pub(super) fn dns(lab: &Lab) -> Result<()> {
    for pod in lab.pods()? {
        let names = ["web", "web.default.svc.cluster.local"].map(|name| format!("http://{name}/"));
        let answers = pod.get(&names)?;
        let heard = answers.matches("\"host\":\"web-").count();
        ensure!(heard == 2, "{} heard {heard} answers of 2: {answers}", pod.name);
    }
    Ok(())
}

/// Each machine takes requests from this host.
pub(super) fn ingress(lab: &Lab) -> Result<()> {
    for machine in lab.machines.all() {
        let answer = wait_until("an answer of the ingress", PATIENCE, || lab.ingress(machine))?;
        ensure!(answer.contains("\"host\":\"web-"), "{}: {answer}", machine.name);
    }
    Ok(())
}

/// The operator's own probes all succeed.
pub(super) fn meshctl_check(lab: &Lab) -> Result<()> {
    let probe = "sudo meshctl --kubeconfig /var/lib/mesh-control/admin.kubeconfig check";
    wait_until("meshctl check succeeds", PATIENCE, || lab.machines.control().run(probe)).map(drop)
}

/// A capture on a machine's underlay.
struct Capture<'a>(&'a Machine);

impl<'a> Capture<'a> {
    fn start(machine: &'a Machine) -> Result<Self> {
        machine.run(
            "sudo rm -f /tmp/underlay.pcap
             dev=$(ip -o -4 address show to 10.214.0.0/24 | awk '{print $2}')
             sudo systemd-run --quiet --unit mesh-capture tcpdump -i $dev -s 0 -U -Z root -w /tmp/underlay.pcap
             for i in $(seq 100); do sudo test -s /tmp/underlay.pcap && exit 0; sleep 0.2; done
             sudo systemctl status mesh-capture --no-pager; exit 1",
        )?;
        Ok(Self(machine))
    }

    fn finish(self) -> Result<String> {
        self.0.run("sleep 1; sudo systemctl stop mesh-capture")?;
        // Payloads are text, or they are not there.
        self.0.run("sudo grep --text --only-matching 'canary-[a-z]*-51c09be7' /tmp/underlay.pcap | sort | uniq -c || true")
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        let _ = self
            .0
            .run("sudo systemctl stop mesh-capture 2>/dev/null; sudo rm -f /tmp/underlay.pcap");
    }
}

/// What pods of two machines say to each other is on no wire; what goes past the overlay is, or the captures prove nothing.
pub(super) fn no_plaintext(lab: &Lab) -> Result<()> {
    let pods = lab.pods()?;
    let (a, b) = (&pods[0], &pods[1]);
    let captures = [Capture::start(&a.machine)?, Capture::start(&b.machine)?];
    let secret = [
        format!("http://{}:8080/canary-secret-51c09be7", b.v4),
        format!("http://[{}]:8080/canary-secret-51c09be7", b.v6),
    ];
    let answers = a.get(&secret)?;
    ensure!(contains(answers.as_bytes(), b"\"host\":\"web-"), "nothing was sent: {answers}");
    let plain = format!("http://{}/canary-plain-51c09be7", b.machine.address);
    let _ = a.machine.run(&format!("curl -sS -m 10 {plain}"));
    for capture in captures {
        let machine = capture.0.name.clone();
        let seen = capture.finish()?;
        ensure!(
            seen.contains("canary-plain"),
            "the capture of {machine} does not see the underlay"
        );
        if seen.contains("canary-secret") {
            bail!("{machine}: what pods say is readable on the underlay: {seen}");
        }
    }
    Ok(())
}

/// Looking after the device ends no session: handshakes come every two minutes, not at each look.
pub(super) fn sessions_are_left_alone(lab: &Lab) -> Result<()> {
    let shaken = |machine: &Machine| machine.run("sudo wg show mesh-wg latest-handshakes");
    let mut changes = 0;
    let machine = lab.machines.control();
    let mut last = shaken(machine)?;
    for _ in 0..20 {
        thread::sleep(Duration::from_secs(2));
        let now = shaken(machine)?;
        changes += u32::from(now != last);
        last = now;
    }
    let peers = u32::try_from(lab.machines.all().len()).context("few machines")? - 1;
    ensure!(changes <= peers, "{changes} handshakes in 40 s with {peers} peers");
    let mut log = machine.ssh();
    log.arg("sudo journalctl -u mesh-agent --no-pager -o cat --since -60s");
    let log = output(&mut log)?;
    ensure!(!log.contains("repairing"), "somebody undoes what the agent does: {log}");
    Ok(())
}
