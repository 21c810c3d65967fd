//! Services side by side: our programs, rules of nftables and iptables in the shape that kube-proxy gives them, and a proxy, in one
//! run and in turns, with many services; clients outside; and what events and policies cost.
//!
//! ```text
//! cargo xtask bench lb          # installs the others, builds this, runs it
//! cargo run --release -p mesh-kernel --example service_bench -- [--parts PART,..] [--services N,..] [--rounds N]
//!     [--turn-ms N] [--loads LOAD,..] [--sync SERVICESxENDPOINTS] [--sync-others SERVICESxENDPOINTS] [--slow] [--object FILE] [--engine FILE]
//! ```
//!
//! Needs root, and touches only namespaces, a cgroup and a BPF file system that it makes. A turn is short, and contestants take
//! turns: what counts is the ratio to the reference in the same round. The client runs on the first processor, the backends on the
//! second. CPU is that of all processes of a contestant, with the kernel's work for them.
#![allow(
    clippy::unwrap_used,
    reason = "the laboratory, which the tests share, fails where it stands"
)]

mod across;
mod contestants;
mod costs;
mod east_west;
mod figures;
mod load;
mod reader;
mod role;
mod serve;
mod services;
mod sync;
mod world;

#[path = "../../tests/lab.rs"]
#[allow(dead_code, reason = "shared with the tests")]
mod lab;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

const PARTS: [&str; 5] = ["services", "sync", "outside", "flows", "policy"];

/// What to measure, and how long.
struct Settings {
    parts: Vec<String>,
    services: Vec<u32>,
    rounds: usize,
    turn: Duration,
    /// Loads of events, policies and clients outside; all when empty.
    loads: Vec<String>,
    sync: (u32, u32),
    sync_others: (u32, u32),
    slow: bool,
    /// The programs of another build instead of our own.
    object: Option<Vec<u8>>,
    /// The overlay's engine (`mesh-overlay`'s example of that name), for what goes from node to node.
    engine: Option<std::path::PathBuf>,
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [first, cpu] = &words[..]
        && first == role::ROLE
    {
        return role::run(cpu);
    }
    let settings = settings(&words)?;
    ensure!(lab::privileged(), "needs root, eBPF programs and cgroup v2");
    // A proxy has a descriptor for each service.
    let files = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_, most) = nix::sys::resource::getrlimit(files)?;
    nix::sys::resource::setrlimit(files, most, most).context("allow more descriptors")?;
    println!("load average {}", load_average()?);
    for part in &settings.parts {
        let start = Instant::now();
        match part.as_str() {
            "services" => east_west::run(&settings)?,
            "sync" => sync::run(&settings)?,
            "outside" => costs::outside(&settings)?,
            "flows" => costs::flows(&settings)?,
            _ => costs::policies(&settings)?,
        }
        println!("({part}: {:.0?}; load average {})", start.elapsed(), load_average()?);
    }
    Ok(())
}

fn load_average() -> Result<String> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    Ok(text.split(' ').next().unwrap_or_default().to_owned())
}

fn settings(words: &[String]) -> Result<Settings> {
    let mut settings = Settings {
        parts: PARTS.map(str::to_owned).to_vec(),
        services: vec![1, 1_000, 10_000],
        rounds: 7,
        turn: Duration::from_millis(200),
        loads: vec![],
        sync: (5_000, 50),
        sync_others: (500, 10),
        slow: false,
        object: None,
        engine: None,
    };
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if word == "--slow" {
            settings.slow = true;
            continue;
        }
        let value = words.next().with_context(|| format!("{word} needs a value"))?;
        let list = || value.split(',').map(str::to_owned);
        match word.as_str() {
            "--parts" => settings.parts = list().collect(),
            "--services" => {
                settings.services = list().map(|n| Ok(n.parse()?)).collect::<Result<_>>()?;
            }
            "--rounds" => settings.rounds = value.parse()?,
            "--turn-ms" => settings.turn = Duration::from_millis(value.parse()?),
            "--loads" => settings.loads = list().collect(),
            "--sync" => settings.sync = size(value)?,
            "--object" => settings.object = Some(std::fs::read(value).context("read programs")?),
            "--engine" => settings.engine = Some(value.into()),
            "--sync-others" => settings.sync_others = size(value)?,
            _ => bail!("what is {word}?"),
        }
    }
    for part in &settings.parts {
        ensure!(PARTS.contains(&part.as_str()), "no part {part}; there are {PARTS:?}");
    }
    let in_range = settings.services.iter().all(|count| (1..=30_000).contains(count));
    ensure!(in_range, "1 to 30,000 services");
    Ok(settings)
}

/// `5000x50`.
fn size(text: &str) -> Result<(u32, u32)> {
    let (services, endpoints) = text.split_once('x').context("a size is SERVICESxENDPOINTS")?;
    let size: (u32, u32) = (services.parse()?, endpoints.parse()?);
    ensure!((1..=30_000).contains(&size.0) && (1..=200).contains(&size.1), "too large");
    Ok(size)
}
