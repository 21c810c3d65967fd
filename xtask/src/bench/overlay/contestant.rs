//! What can be measured, and how each of them is started.

use std::fs;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::artifacts;
use mesh_tests::command::{self, output, output_with_input};
use serde_json::json;

use super::peers;
use super::world::{MTU, Side, World};
use crate::programs;

/// How long a program may take to start.
const PATIENCE: Duration = Duration::from_secs(10);

/// Port of all tunnels.
const PORT: u16 = 51900;

/// One way from pod to pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Contestant {
    /// Routing without encryption: the limit.
    Plain,
    /// Our engine.
    Mesh,
    /// The kernel's WireGuard.
    Kernel,
    /// Another program: its name, and the arguments before the device's.
    Other(&'static str, &'static [&'static str]),
}

/// Programs that are measured where they are to be had.
const OTHERS: [Contestant; 4] = [
    Contestant::Other("wireguard-go", &["-f"]),
    Contestant::Other(peers::NEWEST_WIREGUARD_GO, &["-f"]),
    Contestant::Other("boringtun-cli", &["-f", "--disable-drop-privileges"]),
    Contestant::Other("gotatun", &["-f", "--disable-drop-privileges"]),
];

/// A tunnel under way; ends when dropped.
pub(super) struct Tunnel {
    programs: Vec<Child>,
}

impl Contestant {
    /// All that can run here; ours is built first.
    pub(super) fn here() -> Result<Vec<Self>> {
        let mut build = programs::cargo();
        build.args(["build", "--release", "--package", "mesh-overlay", "--example", "engine"]);
        programs::call(build)?;
        let mut here = vec![Self::Plain, Self::Mesh];
        if kernel_has_wireguard() {
            here.push(Self::Kernel);
        }
        peers::ensure();
        here.extend(OTHERS.into_iter().filter(|c| peers::program(&c.to_string()).is_some()));
        Ok(here)
    }

    /// Starts it on both nodes, with routes for the pods.
    pub(super) fn start(self, world: &World) -> Result<Tunnel> {
        let mut tunnel = Tunnel { programs: Vec::new() };
        for side in Side::BOTH {
            make_key(world, side)?;
        }
        for side in Side::BOTH {
            tunnel.programs.extend(self.start_on(world, side)?);
            world.route(side, (self != Self::Plain).then_some(side.device()))?;
        }
        Ok(tunnel)
    }

    fn start_on(self, world: &World, side: Side) -> Result<Option<Child>> {
        match self {
            Self::Plain => Ok(None),
            Self::Mesh => start_engine(world, side).map(Some),
            Self::Kernel => {
                world.ip(side, &format!("link add {} type wireguard", side.device()))?;
                configure(world, side).map(|()| None)
            }
            Self::Other(name, arguments) => {
                let socket = control_socket(side);
                let _ = fs::remove_file(&socket);
                let program = peers::program(name).with_context(|| format!("{name} is gone"))?;
                let program = program.display().to_string();
                let mut words = vec![program.as_str()];
                words.extend(arguments);
                words.push(side.device());
                let program = spawn(world, side, &words)?;
                wait_for(world, side, &socket)?;
                configure(world, side)?;
                Ok(Some(program))
            }
        }
    }
}

impl std::fmt::Display for Contestant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Plain => "plain",
            Self::Mesh => "mesh",
            Self::Kernel => "kernel",
            Self::Other(name, _) => name,
        })
    }
}

impl Tunnel {
    /// Processor time of its programs so far, in seconds; what the kernel does for them in interrupts is not in it.
    pub(super) fn cpu_seconds(&self) -> f64 {
        self.programs.iter().filter_map(|child| cpu_seconds(child.id())).sum()
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        for program in &mut self.programs {
            // Both fail when it has ended before, which is fine.
            let _ = program.kill();
            let _ = program.wait();
        }
        for side in Side::BOTH {
            let _ = fs::remove_file(control_socket(side));
        }
    }
}

/// Where wg(8) looks for a program that is no kernel; the same folder in all namespaces.
fn control_socket(side: Side) -> PathBuf {
    PathBuf::from(format!("/var/run/wireguard/{}.sock", side.device()))
}

fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name, may contain anything but ends at the last bracket.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |place: usize| fields.get(place)?.parse::<f64>().ok();
    let per_second = 100.0; // USER_HZ, the same on all architectures that Linux has
    Some((ticks(11)? + ticks(12)?) / per_second)
}

fn kernel_has_wireguard() -> bool {
    let name = format!("bench{}", std::process::id());
    let made = command::succeeds("ip", &["link", "add", &name, "type", "wireguard"]);
    made && command::succeeds("ip", &["link", "del", &name])
}

fn make_key(world: &World, side: Side) -> Result<()> {
    let private = command::run("wg", &["genkey"])?;
    let public =
        output_with_input(std::process::Command::new("wg").arg("pubkey"), private.as_bytes())?;
    let mut options = fs::OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = file.open(world.file(side, "key")).context("store a private key")?;
    std::io::Write::write_all(&mut file, private.as_bytes())?;
    fs::write(world.file(side, "pub"), public.trim()).context("store a public key")
}

fn public_key(world: &World, side: Side) -> Result<String> {
    fs::read_to_string(world.file(side, "pub")).context("read a public key")
}

/// With the configuration that it would have saved, as after a restart.
fn start_engine(world: &World, side: Side) -> Result<Child> {
    let engine = artifacts::target().join("release/examples/engine");
    ensure!(engine.exists(), "{} is missing", engine.display());
    let other = side.other();
    let config = json!({
        "listenPort": PORT,
        "mtu": MTU,
        "peers": [{
            "publicKey": public_key(world, other)?,
            "endpoints": [format!("{}:{PORT}", other.node())],
            "allowedIps": [other.pods()],
        }],
    });
    let file = |kind: &str| world.file(side, kind).display().to_string();
    fs::write(file("json"), config.to_string()).context("write a configuration")?;
    let engine = engine.display().to_string();
    let words = [&engine, &file("sock"), &file("json"), side.device(), &file("key")];
    let program = spawn(world, side, &words)?;
    wait_for(world, side, &world.file(side, "sock"))?;
    Ok(program)
}

/// Configures a device with wg(8), and brings it up.
fn configure(world: &World, side: Side) -> Result<()> {
    let other = side.other();
    let key = world.file(side, "key").display().to_string();
    let (public, endpoint) = (public_key(world, other)?, format!("{}:{PORT}", other.node()));
    let port = PORT.to_string();
    let pods = other.pods();
    output(&mut world.command(
        "node",
        side,
        &[
            "wg",
            "set",
            side.device(),
            "private-key",
            &key,
            "listen-port",
            &port,
            "peer",
            &public,
            "endpoint",
            &endpoint,
            "allowed-ips",
            &pods,
        ],
    ))?;
    world.ip(side, &format!("link set {} mtu {MTU} up", side.device()))
}

fn spawn(world: &World, side: Side, words: &[&str]) -> Result<Child> {
    let log = fs::File::create(world.file(side, "log")).context("make a log")?;
    let mut command = world.command("node", side, words);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    command.spawn().with_context(|| format!("run {}", words[0]))
}

fn wait_for(world: &World, side: Side, socket: &Path) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !socket.exists() {
        let said = || fs::read_to_string(world.file(side, "log")).unwrap_or_default();
        ensure!(Instant::now() < end, "{} did not appear: {}", socket.display(), said());
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
