//! Who carries connections to services, and how each of them is told about services.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_kernel::services::ServiceReconciler;

use crate::services::{self, Service};
use crate::world::{World, own_cpu};

/// Who carries the connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Contestant {
    /// Nobody: the client uses the backend's address, and the node routes.
    Direct,
    /// Nobody: the same between pods that our programs guard and connect.
    Pods,
    /// Our programs.
    Mesh,
    /// Rules of nftables.
    Nft,
    /// Rules of iptables.
    Iptables,
    /// A proxy.
    Haproxy,
}

/// The legacy tables: what they cost a packet is the same, and they take many rules sooner.
const IPTABLES: &str = "iptables-legacy-restore";
/// From so many services times endpoints on, nftables takes minutes to take them.
pub(crate) const SLOW: u32 = 15_000;

/// A proxy that ends when it is dropped.
pub(crate) struct Proxy(Child);

impl Drop for Proxy {
    fn drop(&mut self) {
        // Both fail when it has ended before, which is fine.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Contestant {
    pub(crate) const ALL: [Self; 6] =
        [Self::Direct, Self::Nft, Self::Iptables, Self::Haproxy, Self::Pods, Self::Mesh];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Pods => "pods, direct",
            Self::Mesh => "mesh",
            Self::Nft => "nftables",
            Self::Iptables => "iptables",
            Self::Haproxy => "haproxy",
        }
    }

    /// Why it cannot take part.
    pub(crate) fn is_missing(self) -> Option<String> {
        let program = match self {
            Self::Nft => "nft",
            Self::Iptables => IPTABLES,
            Self::Haproxy => "haproxy",
            _ => return None,
        };
        let there = ["/usr/sbin", "/sbin", "/usr/bin", "/usr/local/sbin"]
            .iter()
            .any(|folder| Path::new(folder).join(program).exists());
        (!there).then(|| format!("{program} is not installed"))
    }

    /// Tells it about all services. Returns the time that takes, and what has to live as long as it shall work.
    pub(crate) fn program(
        self,
        world: &World,
        all: &[Service],
        folder: &Path,
    ) -> Result<(Duration, Option<Proxy>)> {
        let begun = |text: String| (text, Instant::now());
        match self {
            Self::Direct | Self::Pods => Ok((Duration::ZERO, None)),
            Self::Mesh => {
                let start = Instant::now();
                world.publish(all)?;
                Ok((start.elapsed(), None))
            }
            Self::Nft => {
                let (text, start) = begun(services::nft(all));
                feed(world, &["nft", "-f", "-"], &text)?;
                Ok((start.elapsed(), None))
            }
            Self::Iptables => {
                feed(world, &[IPTABLES, "--noflush"], services::IPTABLES_HOOKS)?;
                let (text, start) = begun(services::iptables(all));
                feed(world, &[IPTABLES, "--noflush"], &text)?;
                Ok((start.elapsed(), None))
            }
            Self::Haproxy => {
                let (config, socket) = (folder.join("config"), folder.join("socket"));
                let text = services::haproxy(all, &socket.display().to_string());
                std::fs::write(&config, text).context("write a configuration")?;
                world.node.ip("route replace local 10.96.0.0/12 dev lo");
                let start = Instant::now();
                let proxy = proxy(world, &config)?;
                wait_for(&socket)?;
                Ok((start.elapsed(), Some(proxy)))
            }
        }
    }

    /// Tells it that one endpoint is another now.
    pub(crate) fn change(
        self,
        world: &World,
        all: &[Service],
        changed: (usize, usize),
        folder: &Path,
    ) -> Result<Duration> {
        let (service, place) = (&all[changed.0], changed.1);
        let text = match self {
            Self::Nft => services::nft_change(service, place),
            Self::Iptables => services::iptables_change(all, service),
            Self::Haproxy => services::haproxy_change(service, place),
            _ => bail!("{self:?} is changed by its own table"),
        };
        let start = Instant::now();
        match self {
            Self::Nft => feed(world, &["nft", "-f", "-"], &text)?,
            Self::Iptables => feed(world, &[IPTABLES, "--noflush"], &text)?,
            _ => {
                let mut socket = UnixStream::connect(folder.join("socket"))?;
                socket.write_all(text.as_bytes())?;
                let mut answer = String::new();
                socket.read_to_string(&mut answer)?;
                ensure!(answer.contains("changed from"), "haproxy says {answer:?}");
            }
        }
        Ok(start.elapsed())
    }
}

/// How long our own table takes: all at once, with the processor time of that, and one endpoint after the other.
pub(crate) fn mesh_sync(
    world: &World,
    all: &mut [Service],
    changes: u32,
) -> Result<([Duration; 2], Vec<Duration>)> {
    let mut table = ServiceReconciler::new(world.programs()?.services());
    let frontends = services::frontends(all);
    let (start, used) = (Instant::now(), own_cpu()?);
    let outcome = table.reconcile(&frontends)?;
    let full = [start.elapsed(), own_cpu()? - used];
    ensure!(outcome.failed.is_empty(), "{:?}", outcome.failed.first());
    let mut times = vec![];
    for number in 0..changes {
        let place = usize::try_from(number)? * 37 % all.len();
        all[place].endpoints[0] = services::another(number);
        let frontend = services::frontend(&all[place]);
        let start = Instant::now();
        let outcome = table.reconcile_changes(&[&frontend], &[]);
        times.push(start.elapsed());
        ensure!(outcome.failed.is_empty() && outcome.operations == 3, "{:?}", outcome.failed);
    }
    Ok((full, times))
}

/// Runs a program on the node with that input.
fn feed(world: &World, words: &[&str], text: &str) -> Result<()> {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = world.node.run(|| command.spawn()).with_context(|| words[0].to_owned())?;
    let mut input = child.stdin.take().context("no pipe")?;
    // It may end early, and then says why.
    let written = input.write_all(text.as_bytes());
    drop(input);
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}", words[0], said.lines().next().unwrap_or("failed"));
    written.context("write rules")
}

fn proxy(world: &World, config: &Path) -> Result<Proxy> {
    let mut command = Command::new("haproxy");
    command.arg("-db").arg("-f").arg(config);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let proxy = Proxy(world.node.run(|| command.spawn()).context("start haproxy")?);
    let procs = world.lab.cgroup.join("cgroup.procs");
    std::fs::write(procs, proxy.0.id().to_string()).context("move haproxy to its cgroup")?;
    Ok(proxy)
}

fn wait_for(socket: &Path) -> Result<()> {
    let start = Instant::now();
    while UnixStream::connect(socket).is_err() {
        ensure!(start.elapsed() < Duration::from_secs(60), "haproxy does not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
