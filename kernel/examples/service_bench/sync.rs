//! How long it takes until everybody knows all services, and that one endpoint is another.

use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::Settings;
use crate::contestants::{Contestant, mesh_sync};
use crate::figures::quantile;
use crate::services;
use crate::world::World;

/// Changes of one endpoint that are timed: of ours, which take microseconds, and of the others'.
const OUR_CHANGES: u32 = 500;
const THEIR_CHANGES: usize = 3;

/// Prints a line for each.
pub(crate) fn run(settings: &Settings) -> Result<()> {
    println!("\nfull sync, and one endpoint changed");
    let mut sizes = vec![settings.sync];
    if settings.sync_others != settings.sync {
        sizes.insert(0, settings.sync_others);
    }
    for (services, endpoints) in sizes {
        ours(services, endpoints)?;
    }
    let (services, endpoints) = settings.sync_others;
    for who in [Contestant::Haproxy, Contestant::Iptables, Contestant::Nft] {
        match who.is_missing() {
            Some(why) => println!("  {} is left out: {why}", who.name()),
            None => theirs(who, services, endpoints).with_context(|| who.name())?,
        }
    }
    Ok(())
}

fn ours(services: u32, endpoints: u32) -> Result<()> {
    let places = services * endpoints + 4096;
    let capacities = [("SERVICES", services + 4096), ("SLOTS", places), ("MEMBERS", places)];
    let world = World::mesh(&capacities, None)?;
    let mut all = services::list(services, endpoints, &[]);
    let ([full, cpu], changes) = mesh_sync(&world, &mut all, OUR_CHANGES)?;
    let micros: Vec<f64> = changes.iter().map(|time| time.as_secs_f64() * 1e6).collect();
    let [middle, high] = [0.5, 0.99].map(|share| quantile(&micros, share));
    line(Contestant::Mesh, services, endpoints, full);
    let cpu = cpu.as_secs_f64();
    println!("{cpu:.3} s of a processor; one endpoint {middle:.1} us (p99 {high:.1} us)");
    Ok(())
}

fn theirs(who: Contestant, services: u32, endpoints: u32) -> Result<()> {
    let (world, folder) = (World::plain()?, tempfile::tempdir()?);
    let mut all = services::list(services, endpoints, &[]);
    let (full, _proxy) = who.program(&world, &all, folder.path())?;
    let mut times = vec![];
    for change in 0..THEIR_CHANGES {
        let place = change * 37 % all.len();
        all[place].endpoints[0] = services::another(u32::try_from(change)?);
        times.push(who.change(&world, &all, (place, 0), folder.path())?.as_secs_f64() * 1e3);
    }
    line(who, services, endpoints, full);
    println!("one endpoint {:.1} ms", quantile(&times, 0.5));
    Ok(())
}

fn line(who: Contestant, services: u32, endpoints: u32, full: Duration) {
    let name = who.name();
    print!("  {name:<10} {services} x {endpoints}: full {:.3} s, ", full.as_secs_f64());
}
