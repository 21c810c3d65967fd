//! What is measured of a tunnel.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::command::{output, succeeds};
use serde_json::Value;

use super::contestant::Tunnel;
use super::world::{Side, World};

/// A figure: what, how much, in which unit.
pub(super) type Figure = (&'static str, f64, &'static str);

/// How long a tunnel may take to carry its first packet.
const PATIENCE: Duration = Duration::from_secs(20);

/// Everything, in about `5 * secs + 4` seconds.
pub(super) fn all(world: &World, tunnel: &Tunnel, secs: u64) -> Result<Vec<Figure>> {
    let pod = Side::B.pod();
    let server = world.command("pod", Side::B, &["iperf3", "-s", "-B", &pod]);
    let _server = Background::start(server)?;
    wait_for_echo(world)?;
    let mut figures =
        round_trips(world, 800, "0.002", ["idle round trip, p50", "idle round trip, p99"])?;
    for (streams, names) in [
        ("1", ["TCP, 1 stream", "CPU per GB, 1 stream, machine", "CPU per GB, 1 stream, tunnel"]),
        (
            "8",
            ["TCP, 8 streams", "CPU per GB, 8 streams, machine", "CPU per GB, 8 streams, tunnel"],
        ),
    ] {
        figures.extend(stream(world, tunnel, secs, streams, names)?);
    }
    figures.extend(under_load(world, secs)?);
    for (size, name) in [("64", "UDP, 64 bytes"), ("1200", "UDP, 1200 bytes")] {
        let arguments = ["-u", "-b", "0", "-l", size, "-t", &secs.to_string()];
        let sum = iperf(world, &arguments)?["end"]["sum"].take();
        let number = |name: &str| sum[name].as_f64().context("iperf3 counts packets");
        let delivered = number("packets")? - number("lost_packets")?;
        figures.push((name, delivered / number("seconds")? / 1e3, "kpps delivered"));
    }
    Ok(figures)
}

fn stream(
    world: &World,
    tunnel: &Tunnel,
    secs: u64,
    streams: &str,
    [rate, machine, own]: [&'static str; 3],
) -> Result<[Figure; 3]> {
    let before = (machine_seconds()?, tunnel.cpu_seconds());
    let report = iperf(world, &["-P", streams, "-t", &secs.to_string()])?;
    let after = (machine_seconds()?, tunnel.cpu_seconds());
    let received = &report["end"]["sum_received"];
    let number = |name: &str| received[name].as_f64().context("iperf3 reports a rate");
    let gigabytes = number("bytes")? / 1e9;
    Ok([
        (rate, number("bits_per_second")? / 1e9, "Gbit/s"),
        (machine, (after.0 - before.0) / gigabytes, "s"),
        (own, (after.1 - before.1) / gigabytes, "s"),
    ])
}

fn under_load(world: &World, secs: u64) -> Result<Vec<Figure>> {
    let pod = Side::B.pod();
    let time = (secs + 2).to_string();
    let load = world.command("pod", Side::A, &["iperf3", "-c", &pod, "-t", &time]);
    let _load = Background::start(load)?;
    thread::sleep(Duration::from_secs(1));
    let count = secs * 200;
    round_trips(world, count, "0.005", ["loaded round trip, p50", "loaded round trip, p99"])
}

fn iperf(world: &World, arguments: &[&str]) -> Result<Value> {
    let pod = Side::B.pod();
    let mut words = vec!["iperf3", "-c", &pod, "-J"];
    words.extend(arguments);
    let text = output(&mut world.command("pod", Side::A, &words))?;
    serde_json::from_str(&text).context("understand iperf3")
}

/// The two percentiles of ping(8), in microseconds.
fn round_trips(
    world: &World,
    count: u64,
    pause: &str,
    [p50, p99]: [&'static str; 2],
) -> Result<Vec<Figure>> {
    let (pod, count) = (Side::B.pod(), count.to_string());
    let words = ["ping", "-n", "-i", pause, "-c", &count, "-W", "1", &pod];
    let said = world.command("pod", Side::A, &words).output().context("run ping")?;
    let mut times = times(&String::from_utf8_lossy(&said.stdout));
    ensure!(!times.is_empty(), "no ping was answered");
    times.sort_by(f64::total_cmp);
    let at = |share: usize| times[(times.len() * share / 100).min(times.len() - 1)];
    Ok(vec![(p50, at(50), "us"), (p99, at(99), "us")])
}

fn times(ping: &str) -> Vec<f64> {
    let time = |line: &str| {
        let millis = line.split_once("time=")?.1.split_whitespace().next()?;
        Some(millis.parse::<f64>().ok()? * 1000.0)
    };
    ping.lines().filter_map(time).collect()
}

fn wait_for_echo(world: &World) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    let pod = Side::B.pod();
    let once = ["ping", "-n", "-c", "1", "-W", "1", &pod];
    while !world.command("pod", Side::A, &once).output().context("run ping")?.status.success() {
        ensure!(Instant::now() < end, "the tunnel carries nothing");
    }
    Ok(())
}

/// What all processors have been busy, in seconds since the start of the machine.
fn machine_seconds() -> Result<f64> {
    let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let line = stat.lines().next().context("/proc/stat is empty")?;
    let ticks: Vec<f64> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    // user, nice, system, irq, softirq; idle and waiting for disks are left out.
    let busy = [0, 1, 2, 5, 6].into_iter().filter_map(|place| ticks.get(place));
    Ok(busy.sum::<f64>() / 100.0)
}

/// A program that runs as long as this lives.
struct Background(Child);

impl Background {
    fn start(mut command: Command) -> Result<Self> {
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let child = child.context("start iperf3")?;
        // The control connection is refused until it listens; iperf3 itself does not try twice.
        thread::sleep(Duration::from_millis(300));
        Ok(Self(child))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let pid = self.0.id().to_string();
        // ip(8) has become iperf3 by then: the same process.
        let _ = succeeds("kill", &[&pid]);
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn ping_is_understood() {
        let said = "64 bytes from 10.72.0.2: icmp_seq=1 ttl=62 time=0.092 ms\nnothing\n\
                    64 bytes from 10.72.0.2: icmp_seq=2 ttl=62 time=1.50 ms\n";
        assert_eq!(super::times(said), [92.0, 1500.0]);
    }
}
