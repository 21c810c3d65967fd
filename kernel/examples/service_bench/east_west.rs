//! Connections from pods to services, by everybody who can carry them.

use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::Settings;
use crate::contestants::{Contestant, Proxy, SLOW};
use crate::figures::Figures;
use crate::reader::while_reading;
use crate::services::{self, Service};
use crate::world::World;

/// Of each service. The one that is measured has its own.
const ENDPOINTS: u32 = 3;
const LOADS: [&str; 3] = ["close", "connect", "keep"];

/// Somebody who is ready.
struct Ready {
    who: Contestant,
    /// Ends before the cgroup that it is in is removed.
    _proxy: Option<Proxy>,
    world: World,
    service: Service,
    _folder: tempfile::TempDir,
}

/// Measures all of them in turns, with each number of services.
pub(crate) fn run(settings: &Settings) -> Result<()> {
    for &count in &settings.services {
        let mut all = ready(settings, count)?;
        let mut figures = Figures::default();
        for round in 0..settings.rounds {
            // Whoever comes first finds a colder machine: that shall not always be the same one.
            let first = round % all.len();
            all.rotate_left(first);
            for load in LOADS {
                for ready in &mut all {
                    let turn = turn(ready, load, settings.turn);
                    let turn = turn.with_context(|| format!("{}, {load}", ready.who.name()))?;
                    figures.add(ready.who.name(), turn);
                }
            }
        }
        let direct = Contestant::Direct.name();
        let pods = Contestant::Pods.name();
        let mut comparisons: Vec<(&str, &str)> = Contestant::ALL
            .iter()
            .filter(|who| **who != Contestant::Direct)
            .map(|who| (who.name(), direct))
            .collect();
        comparisons.insert(0, (Contestant::Mesh.name(), pods));
        figures.show(&format!("services: {count}"), &comparisons);
    }
    Ok(())
}

fn ready(settings: &Settings, count: u32) -> Result<Vec<Ready>> {
    let mut all = vec![];
    for who in Contestant::ALL {
        let too_slow = who == Contestant::Nft && count * ENDPOINTS >= SLOW && !settings.slow;
        let why = who.is_missing().or_else(|| {
            too_slow.then(|| "takes minutes to take so many rules; --slow waits".to_owned())
        });
        if let Some(why) = why {
            println!("services: {count}: {} is left out: {why}", who.name());
            continue;
        }
        all.push(one(settings, who, count).with_context(|| format!("prepare {}", who.name()))?);
    }
    Ok(all)
}

fn one(settings: &Settings, who: Contestant, count: u32) -> Result<Ready> {
    let folder = tempfile::tempdir().context("make a folder")?;
    let world = match who {
        Contestant::Pods | Contestant::Mesh => World::mesh(&[], settings.object.as_deref())?,
        _ => World::plain()?,
    };
    let list = services::list(count, ENDPOINTS, &world.endpoints());
    let (took, proxy) = who.program(&world, &list, folder.path())?;
    if !took.is_zero() {
        let name = who.name();
        println!("services: {count}, {ENDPOINTS} endpoints each: {name} takes them in {took:.2?}");
    }
    let service = list[usize::try_from(count / 2)?].clone();
    Ok(Ready { who, world, service, _proxy: proxy, _folder: folder })
}

fn turn(ready: &mut Ready, load: &'static str, time: Duration) -> Result<crate::figures::Turn> {
    let to = match ready.who {
        Contestant::Direct | Contestant::Pods => ready.world.backend(),
        _ => ready.service.frontend(),
    };
    // Where an agent is, somebody reads events.
    let reader = ready.world.mesh.is_some().then(|| ready.world.reader()).transpose()?;
    while_reading(reader, || ready.world.measure(false, load, to, time)).map(|(turn, _)| turn)
}
