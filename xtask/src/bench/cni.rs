//! Plugins as a runtime sees them: a process started with a request, until it has ended with the answer. Ours, with an agent of its
//! own, beside the reference plugins (package containernetworking-plugins), in turns.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use mesh_tests::Artifacts;
use mesh_tests::command::run;

use crate::alone::{self, Alone};
use crate::{say, tools};

const REFERENCE: &str = "/usr/lib/cni";
/// In a round one after the other, and then so many at once.
const SERIAL: usize = 50;
const AT_ONCE: usize = 100;
/// Threads that start processes: a runtime has many, a machine has few cores.
const STARTERS: usize = 16;

/// Somebody who makes interfaces.
struct Contestant<'a> {
    name: &'static str,
    node: &'a Alone,
    plugin: PathBuf,
    config: String,
    figures: Figures,
}

#[derive(Default)]
struct Figures {
    add: Vec<Duration>,
    del: Vec<Duration>,
    together: Vec<Duration>,
    wall: Vec<Duration>,
}

/// Measures all of them and prints a table; also the agent and plugin of another target folder, to see what a change is worth.
pub(super) fn measure(rounds: usize, against: Option<&Path>) -> Result<()> {
    tools::apt_install(&["containernetworking-plugins"])?;
    let (artifacts, optimised) = alone::newest();
    if !optimised {
        say::step("the newest build of the agent is a debug build, and its figures are too high");
    }
    let node = Alone::start(artifacts, "a")?;
    let other = against.map(|target| Alone::start(Artifacts::below(target, true), "b"));
    let other = other.transpose()?;
    let mut contestants = contestants(&node)?;
    if let Some(other) = &other {
        contestants.insert(1, ours("mesh, the other build", other)?);
    }
    for round in 1..=rounds {
        for contestant in &mut contestants {
            say::step(&format!("{}, round {round}", contestant.name));
            serial(contestant)?;
            together(contestant)?;
        }
    }
    let start = process_start(&node)?;
    println!(
        "{:<26}{:>14}{:>14}{:>16}{:>14}",
        "ms", "ADD p50/p99", "DEL p50/p99", "100 ADDs p99", "wall per pod"
    );
    for Contestant { name, figures, .. } in &mut contestants {
        let pair =
            |times: &mut Vec<Duration>| format!("{:.1} / {:.1}", at(times, 50), at(times, 99));
        println!(
            "{name:<26}{:>14}{:>14}{:>16.1}{:>14.2}",
            pair(&mut figures.add),
            pair(&mut figures.del),
            at(&mut figures.together, 99),
            at(&mut figures.wall, 50) / 100.0,
        );
    }
    println!("our plugin alone, p50: {start:.1} ms (VERSION)");
    Ok(())
}

fn ours<'a>(name: &'static str, node: &'a Alone) -> Result<Contestant<'a>> {
    let (plugin, config) = (node.plugin().to_owned(), node.config()?);
    Ok(Contestant { name, node, plugin, config, figures: Figures::default() })
}

fn contestants(node: &Alone) -> Result<Vec<Contestant<'_>>> {
    let ipam = |name: &str| {
        let data = node.state().join(format!("reference-{name}"));
        format!(
            r#""ipam":{{"type":"host-local","dataDir":"{}","ranges":[[{{"subnet":"10.91.0.0/16"}}]],"routes":[{{"dst":"0.0.0.0/0"}}]}}"#,
            data.display()
        )
    };
    let reference = |kind: &'static str, keys: &str| Contestant {
        name: kind,
        node,
        plugin: Path::new(REFERENCE).join(kind),
        config: format!(
            r#"{{"cniVersion":"1.0.0","name":"ref-{kind}","type":"{kind}",{keys}{}}}"#,
            ipam(kind)
        ),
        figures: Figures::default(),
    };
    Ok(vec![
        ours("mesh", node)?,
        reference("ptp", r#""ipMasq":false,"#),
        reference("bridge", r#""bridge":"cni0","isGateway":true,"ipMasq":false,"#),
    ])
}

/// Namespaces of pods, removed by `Drop`.
struct Namespaces(Vec<String>);

impl Namespaces {
    fn new(node: &Alone, count: usize) -> Result<Self> {
        let mut made = Self(vec![]);
        for number in 0..count {
            let name = format!("{}-{number}", node.namespace());
            run("ip", &["netns", "add", &name])?;
            made.0.push(name);
        }
        Ok(made)
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.0 {
            let _ = run("ip", &["netns", "del", name]);
        }
        // The kernel takes them apart on its own time; that is no part of what comes next.
        thread::sleep(Duration::from_secs(1));
    }
}

fn timed(contestant: &Contestant<'_>, verb: &str, name: &str) -> Result<Duration> {
    let netns = format!("/run/netns/{name}");
    let start = Instant::now();
    alone::call(&contestant.plugin, &contestant.config, verb, name, &netns)
        .with_context(|| format!("{} {verb}", contestant.name))?;
    Ok(start.elapsed())
}

fn serial(contestant: &mut Contestant<'_>) -> Result<()> {
    let node = contestant.node;
    let namespaces = Namespaces::new(node, SERIAL)?;
    for name in &namespaces.0 {
        let (add, del) =
            node.inside(|| Ok((timed(contestant, "ADD", name)?, timed(contestant, "DEL", name)?)))?;
        contestant.figures.add.push(add);
        contestant.figures.del.push(del);
    }
    Ok(())
}

fn together(contestant: &mut Contestant<'_>) -> Result<()> {
    let node = contestant.node;
    let namespaces = Namespaces::new(node, AT_ONCE)?;
    let all = |verb: &str| {
        let (left, times) = (Mutex::new(namespaces.0.iter()), Mutex::new(vec![]));
        let start = Instant::now();
        thread::scope(|scope| {
            let work = || {
                node.inside(|| {
                    loop {
                        let next = left.lock().ok().and_then(|mut names| names.next());
                        let Some(name) = next else { return Ok(()) };
                        let took = timed(contestant, verb, name)?;
                        times.lock().map(|mut times| times.push(took)).ok();
                    }
                })
            };
            let threads: Vec<_> = (0..STARTERS).map(|_| scope.spawn(work)).collect();
            threads
                .into_iter()
                .try_for_each(|t| t.join().unwrap_or_else(|_| anyhow::bail!("a thread panicked")))
        })?;
        anyhow::Ok((start.elapsed(), times.into_inner().unwrap_or_default()))
    };
    let (wall, times) = all("ADD")?;
    all("DEL")?;
    contestant.figures.wall.push(wall);
    contestant.figures.together.extend(times);
    Ok(())
}

/// What starting the plugin costs, whatever it does.
fn process_start(node: &Alone) -> Result<f64> {
    let mut times = vec![];
    for _ in 0..SERIAL {
        let start = Instant::now();
        node.cni("VERSION", "", "")?;
        times.push(start.elapsed());
    }
    Ok(at(&mut times, 50))
}

/// A percentile, in milliseconds.
pub(super) fn at(times: &mut [Duration], percent: usize) -> f64 {
    times.sort();
    let index = (times.len() * percent / 100).min(times.len().saturating_sub(1));
    times.get(index).map_or(f64::NAN, |time| time.as_secs_f64() * 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        let mut times: Vec<Duration> = (1..=100).rev().map(Duration::from_millis).collect();
        assert!((at(&mut times, 50) - 51.0).abs() < 1e-9);
        assert!((at(&mut times, 99) - 100.0).abs() < 1e-9);
        assert!(at(&mut [], 50).is_nan());
    }
}
