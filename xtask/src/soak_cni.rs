//! Pods come and go, and the agent is killed at any moment of it: nothing may be left, and no address be two pods'.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::command::{run as command, wait_until};
use serde_json::Value;

use crate::alone::{self, Alone};
use crate::say;

/// Pods that come and go at the same time.
const PODS: usize = 8;
/// The kernel takes namespaces apart on its own time.
const SETTLED: Duration = Duration::from_secs(60);

/// What there is of pods on the node.
#[derive(Debug, Default, PartialEq, Eq)]
struct Left {
    links: BTreeSet<String>,
    routes: Vec<String>,
    neighbours: usize,
    pins: usize,
    queue: usize,
}

/// Runs so many cycles, prints what it saw, and fails when anything is left.
pub(crate) fn run(cycles: usize, kill_every: usize) -> Result<()> {
    let (artifacts, _) = alone::newest();
    let mut node = Alone::start(artifacts, "a")?;
    let before = left(&node)?;
    let (mut kills, mut failed, mut memory) = (0, 0, vec![]);
    let started = Instant::now();
    let rounds = cycles.div_ceil(PODS);
    let kill_rounds = if kill_every == 0 { 0 } else { kill_every.div_ceil(PODS) };
    // The last quarter belongs to one agent, whose memory is looked at.
    let calm = rounds - rounds / 4;
    for round in 0..rounds {
        let dies = kill_rounds > 0 && round < calm && round % kill_rounds == kill_rounds - 1;
        // A moment that moves through all of ADD and DEL, 0.7 ms further every time.
        let moment = dies.then(|| Duration::from_micros(700 * (kills as u64 % 60)));
        failed += cycle(&mut node, round, moment)?;
        kills += usize::from(dies);
        if round == calm || (round > calm && round % 10 == 0) {
            memory.extend(node.agent_kib());
        }
        if round % 25 == 24 {
            say::step(&format!(
                "{} cycles, {kills} kills, {failed} requests failed",
                (round + 1) * PODS
            ));
        }
    }
    let took = started.elapsed();
    let after = wait_until("nothing is left", SETTLED, || {
        let now = left(&node)?;
        ensure!(now == before, "before: {before:?}, now: {now:?}");
        Ok(now)
    })?;
    println!(
        "{} cycles in {took:.1?}, {kills} kills, {failed} requests failed and were repeated",
        rounds * PODS
    );
    println!("links, routes, neighbours, pins, queue: as before ({after:?})");
    let journal = journal(&mut node)?;
    println!("journal after a restart: {journal} bytes");
    ensure!(journal == 0, "leases are left in the journal");
    if let (Some(first), Some(last)) = (memory.first(), memory.last()) {
        println!("agent's memory over the last quarter: {first} KiB, then {last} KiB");
        ensure!(last.saturating_sub(*first) <= 2048, "the agent grows");
    }
    Ok(())
}

/// Pods come and go side by side; meanwhile the agent may die. Returns how many requests failed.
fn cycle(node: &mut Alone, round: usize, moment: Option<Duration>) -> Result<usize> {
    let names: Vec<String> =
        (0..PODS).map(|n| format!("{}-{round}-{n}", node.namespace())).collect();
    for name in &names {
        command("ip", &["netns", "add", name])?;
    }
    let (held, failed) = (Mutex::new(BTreeMap::new()), Mutex::new(0));
    let shared: &Alone = node;
    thread::scope(|scope| {
        let threads: Vec<_> = names
            .iter()
            .map(|name| scope.spawn(|| come_and_go(shared, name, &held, &failed)))
            .collect();
        if let Some(moment) = moment {
            thread::sleep(moment);
            shared.kill_now()?;
        }
        threads
            .into_iter()
            .try_for_each(|t| t.join().unwrap_or_else(|_| anyhow::bail!("a thread panicked")))
    })?;
    if moment.is_some() {
        node.kill_agent()?;
        node.start_agent()?;
    }
    // What a runtime does with a pod whose DEL failed or was never answered.
    for name in &names {
        node.cni("DEL", name, &path(name)).with_context(|| format!("DEL of {name}"))?;
    }
    for name in &names {
        command("ip", &["netns", "del", name])?;
    }
    Ok(failed.into_inner().unwrap_or_default())
}

fn path(name: &str) -> String {
    format!("/run/netns/{name}")
}

fn come_and_go(
    node: &Alone,
    name: &str,
    held: &Mutex<BTreeMap<String, String>>,
    failed: &Mutex<usize>,
) -> Result<()> {
    let count = || failed.lock().map(|mut count| *count += 1).ok();
    let Ok(answer) = node.cni("ADD", name, &path(name)) else {
        count();
        return Ok(());
    };
    let result: Value = serde_json::from_str(&answer)?;
    for ip in result["ips"].as_array().into_iter().flatten() {
        let address = ip["address"].to_string();
        let other =
            held.lock().ok().and_then(|mut held| held.insert(address.clone(), name.to_owned()));
        ensure!(other.is_none(), "{address} is {name}'s and {other:?}'s");
    }
    // As soon as the agent has the DEL it may give them to others.
    held.lock().map(|mut held| held.retain(|_, owner| owner != name)).ok();
    if node.cni("DEL", name, &path(name)).is_err() {
        count();
    }
    Ok(())
}

fn left(node: &Alone) -> Result<Left> {
    let ip = |words: &[&str]| {
        let all: Vec<&str> = ["-n", node.namespace()].iter().chain(words).copied().collect();
        command("ip", &all)
    };
    let links = ip(&["-o", "link"])?;
    let links = links.lines().filter_map(|line| line.split(": ").nth(1)).map(str::to_owned);
    let mut routes = vec![];
    let mut neighbours = 0;
    for family in ["-4", "-6"] {
        let all = ip(&[family, "route", "show", "proto", "78"])?;
        routes.extend(all.lines().map(str::to_owned));
        neighbours += ip(&[family, "neigh", "show", "nud", "permanent"])?.lines().count();
    }
    let queue = fs::read_dir(node.state().join("cni/queue")).map_or(0, Iterator::count);
    Ok(Left { links: links.collect(), routes, neighbours, pins: files(node.bpf()), queue })
}

fn files(directory: &Path) -> usize {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|e| if e.path().is_dir() { files(&e.path()) } else { 1 }).sum()
}

/// Its size after an agent has started, which rewrites it.
fn journal(node: &mut Alone) -> Result<u64> {
    node.kill_agent()?;
    node.start_agent()?;
    let file = node.state().join("cni/journal");
    Ok(fs::metadata(&file).with_context(|| format!("look at {}", file.display()))?.len())
}
