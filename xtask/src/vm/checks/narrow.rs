//! A path that carries less than its first link, under the kernel's device.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::super::lab::{Lab, Pod, soon};
use super::super::machines::Machine;

/// What the path carries from then on, nobody says so.
const PATH: u64 = 1400;
/// The same inside the tunnel, and how near the search comes to it.
const FITS: u64 = PATH - 60;
const NEAR: u64 = 16;
/// Lost probes are waited for, and emulated machines are slow. A machine that pauses in the middle of a search loses probes that fit,
/// and finds too little; it looks again a minute later.
const FOUND_WITHIN: Duration = Duration::from_secs(200);
const WIDER_WITHIN: Duration = Duration::from_secs(240);

/// One machine drops what is large from another one without a word: packets are made small enough, and none is cut up.
pub(super) fn narrow_path(lab: &Lab) -> Result<()> {
    // The check before may have restarted an agent.
    lab.all_is_well()?;
    let pods = lab.pods()?;
    let (a, b) = (&pods[0], &pods[1]);
    let wide = mtu(lab, &a.machine, &b.machine)?;
    ensure!(wide > FITS, "{wide} bytes before");
    b.machine.run(&format!(
        "sudo nft -f - <<'END'
         table ip narrow {{
           chain in {{
             type filter hook prerouting priority -450;
             ip saddr {0} ip protocol {{ udp, icmp }} ip length > {PATH} counter drop
             ip saddr {0} ip frag-off & 0x3fff != 0 counter
           }}
         }}
END",
        a.machine.address
    ))?;
    // On failure: whether large packets came this way at all, and what became of the others.
    let seen = || counted(&b.machine).map_or_else(|e| format!("{e:#}"), |n| format!("{n:?}"));
    let found = is_found(lab, a, b)
        .with_context(|| format!("packets dropped, and pieces of packets: {}", seen()));
    b.machine.run("sudo nft delete table ip narrow")?;
    found?;
    soon("the path is as wide as before", WIDER_WITHIN, || {
        send(a, b)?;
        let now = mtu(lab, &a.machine, &b.machine)?;
        ensure!(now == wide, "{now} bytes, {wide} before");
        Ok(())
    })?;
    lab.all_is_well()
}

fn is_found(lab: &Lab, a: &Pod, b: &Pod) -> Result<()> {
    soon("the largest packet is found", FOUND_WITHIN, || {
        send(a, b)?;
        let now = mtu(lab, &a.machine, &b.machine)?;
        ensure!(now <= FITS && FITS - now <= NEAR, "{now} bytes, {FITS} fit");
        Ok(())
    })?;
    soon("the route says so", FOUND_WITHIN, || {
        let route = a.machine.run(&format!("ip -4 route get {}", b.v4))?;
        match number_behind(&route, "mtu ") {
            Some(mtu) if mtu <= FITS => Ok(()),
            _ => bail!("{route}"),
        }
    })?;
    send(a, b)?;
    let [dropped, pieces] = counted(&b.machine)?;
    ensure!(dropped > 0, "nothing large was ever sent");
    ensure!(pieces == 0, "{pieces} pieces of packets");
    Ok(())
}

/// Some datagrams from a machine to a pod on the other, as large as the path was wide.
fn send(a: &Pod, b: &Pod) -> Result<()> {
    a.machine.run(&format!(
        "for i in $(seq 20); do head -c 1380 /dev/zero >/dev/udp/{}/9 || true; sleep 0.05; done",
        b.v4
    ))?;
    Ok(())
}

/// What a machine takes the path to another one to carry.
fn mtu(lab: &Lab, from: &Machine, to: &Machine) -> Result<u64> {
    let peers = lab.peers()?;
    let found = peers.iter().find(|(a, b, _)| (a, b) == (&from.name, &to.name));
    let (.., peer) = found.context("the pair is there")?;
    peer["path"]["mtu"].as_u64().with_context(|| format!("the largest packet of {peer}"))
}

/// Packets that were dropped because they were too large, and pieces of packets.
fn counted(machine: &Machine) -> Result<[u64; 2]> {
    let rules = machine.run("sudo nft list table ip narrow")?;
    let mut counters = rules.lines().filter_map(|line| number_behind(line, "packets "));
    let (Some(dropped), Some(pieces)) = (counters.next(), counters.next()) else {
        bail!("no counters in {rules}");
    };
    Ok([dropped, pieces])
}

fn number_behind(text: &str, word: &str) -> Option<u64> {
    let (_, rest) = text.split_once(word)?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}
