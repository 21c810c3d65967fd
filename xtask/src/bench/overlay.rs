//! Tunnels side by side: ours, the kernel's, and other programs, between the same two nodes with a pod each.
//!
//! A round measures each of them once, then all again. Rates swing with whatever else the machine does; the ratio to
//! another contestant in the same run is what counts.

mod contestant;
mod figures;
mod measure;
mod peers;
mod world;

use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use self::contestant::Contestant;
use self::figures::Figures;
pub(super) use self::world::Link;
use self::world::World;
use crate::{say, tools};

/// Measures every contestant that is here, prints a table, and writes all single figures to a file when asked to.
pub(super) fn run(link: Link, rounds: usize, secs: u64, out: Option<&Path>) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "network namespaces need root: sudo cargo xtask bench overlay"
    );
    tools::apt_install(&["iperf3", "wireguard-tools", "iputils-ping", "ethtool"])?;
    let contestants = Contestant::here()?;
    let mut figures = Figures::default();
    for round in 1..=rounds {
        for contestant in &contestants {
            say::step(&format!("{contestant}, round {round} of {rounds}"));
            let world = World::new(link)?;
            let tunnel = contestant.start(&world).with_context(|| format!("start {contestant}"))?;
            match measure::all(&world, &tunnel, secs) {
                Ok(measured) => figures.add(*contestant, measured),
                Err(error) if *contestant == Contestant::Mesh => {
                    return Err(error.context("measure ours"));
                }
                // What another one does not bear is no reason to lose the figures of all.
                Err(error) => println!("{contestant} is left out of this round: {error:#}"),
            }
        }
    }
    figures.print();
    match out {
        Some(path) => figures.write(path),
        None => Ok(()),
    }
}
