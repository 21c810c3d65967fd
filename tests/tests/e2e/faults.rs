//! Each program is killed while traffic flows; what must not notice does not notice, and it comes back.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::command::{output, wait_until};
use mesh_tests::load::{Load, Report};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::tests;
use crate::world::{HOST, PATIENCE, REPLICAS, WEB, World};

tests![
    agent_killed,
    dns_worker_killed,
    ingress_worker_killed,
    agent_and_workers_upgraded,
    overlay_worker_killed,
    control_killed,
    containerd_killed,
    agent_starts_without_control,
];

/// What is sent while a program is away.
struct Traffic {
    loads: Vec<(&'static str, Load)>,
}

/// The reports, by what was sent.
struct Reports(Vec<(&'static str, Report)>);

impl Traffic {
    /// From a pod: to the service, over TCP and UDP, one long stream to a pod of another node, names; and
    /// requests to node 2's ingress from outside.
    fn start(world: &World) -> Result<Self> {
        let (a, b) = world.two_pods()?;
        let (vip, _) = world.vips()?;
        let steady = ["--secs", "120", "--rate", "100", "--workers", "4"];
        let one = ["--secs", "120", "--rate", "20", "--workers", "1"];
        let loads = vec![
            ("service", world.pod_load(&a, &format!("http://{vip}/"), &steady)?),
            ("udp", world.pod_load(&a, &format!("udp://{vip}:9001"), &steady)?),
            ("stream", world.pod_load(&a, &format!("stream://{}:9000", b.v4()?), &one)?),
            ("dns", world.pod_load(&a, "dns://10.96.0.10/web.default.svc.cluster.local", &steady)?),
            ("ingress", world.ingress_load(&a.node, &steady)?),
        ];
        thread::sleep(Duration::from_millis(500));
        Ok(Self { loads })
    }

    /// Ends it, a moment after everything is back.
    fn finish(self) -> Result<Reports> {
        thread::sleep(Duration::from_millis(700));
        let mut reports = Vec::new();
        for (what, load) in self.loads {
            let report = load.stop()?;
            println!("  {what:<8} {}", report.line());
            reports.push((what, report));
        }
        Ok(Reports(reports))
    }
}

impl Reports {
    fn of(&self, what: &str) -> Result<&Report> {
        let found = self.0.iter().find(|(name, _)| *name == what);
        found.map(|(_, report)| report).with_context(|| format!("no load {what}"))
    }

    /// Fails when a request failed, but for the kinds named.
    fn none_failed_but(&self, but: &[&str]) -> Result<()> {
        let rest = self.0.iter().filter(|(name, _)| !but.contains(name));
        rest.into_iter()
            .try_for_each(|(name, r)| r.none_failed().with_context(|| (*name).to_owned()))
    }

    fn gap_at_most(&self, what: &str, limit: Duration) -> Result<()> {
        let gap = self.of(what)?.max_gap_ms;
        ensure!(u128::from(gap) <= limit.as_millis(), "{what} was away for {gap} ms");
        Ok(())
    }
}

/// The node whose pod sends, and whose ingress is asked.
fn victim(world: &World) -> Result<mesh_tests::Node> {
    Ok(world.two_pods()?.0.node)
}

fn kill_now(pid: Option<Pid>) -> Result<()> {
    kill(pid.context("it does not run")?, Signal::SIGKILL).context("kill -9")
}

fn agent_killed(world: &World) -> Result<()> {
    let node = victim(world)?;
    let traffic = Traffic::start(world)?;
    for _ in 0..3 {
        node.agent().kill()?;
        thread::sleep(Duration::from_millis(500));
        let start = Instant::now();
        world.cluster.restart_agent(&node, &world.artifacts)?;
        wait_agent(&node)?;
        println!("  the agent is back after {} ms", start.elapsed().as_millis());
    }
    traffic.finish()?.none_failed_but(&[])?;
    // It has taken up its work: a pod can start on its node, and the old ones were not restarted.
    for pod in world.kubectl.pods(WEB)? {
        let restarts = &pod["status"]["containerStatuses"][0]["restartCount"];
        ensure!(restarts.as_u64() == Some(0), "{} was restarted", pod["metadata"]["name"]);
    }
    replace_pods(world)
}

pub(crate) fn wait_agent(node: &mesh_tests::Node) -> Result<()> {
    let socket = node.layout().agent_run().join("agent.sock").display().to_string();
    wait_until("the agent answers", Duration::from_secs(20), || {
        let url = "http://agent/healthz";
        mesh_tests::command::run("curl", &["-fsS", "-m", "2", "--unix-socket", &socket, url])
            .map(drop)
    })
}

/// All pods of the workload anew, which takes every part of every node.
fn replace_pods(world: &World) -> Result<()> {
    world.kubectl.run(&["rollout", "restart", "deployment/web"])?;
    world.kubectl.run(&["rollout", "status", "deployment/web", "--timeout=90s"])?;
    world.kubectl.wait_ready(WEB, REPLICAS, PATIENCE).map(drop)
}

/// Kills a worker so often, and waits each time until another process has its place.
fn worker_killed(world: &World, worker: &str, times: u64) -> Result<Reports> {
    let node = victim(world)?;
    let traffic = Traffic::start(world)?;
    for _ in 0..times {
        let old = node.worker(worker);
        kill_now(old).with_context(|| format!("worker {worker}"))?;
        wait_replaced(&node, worker, old)?;
        thread::sleep(Duration::from_millis(700));
    }
    thread::sleep(Duration::from_secs(1));
    traffic.finish()
}

fn wait_replaced(node: &mesh_tests::Node, worker: &str, old: Option<Pid>) -> Result<()> {
    wait_until(&format!("another worker {worker}"), Duration::from_secs(20), || {
        let new = node.worker(worker);
        ensure!(new.is_some() && new != old, "there is none");
        Ok(())
    })
}

/// Waits until a worker runs the program that lies there now. A relay that began after the upgrade did so all along.
fn wait_current(node: &mesh_tests::Node, worker: &str) -> Result<()> {
    wait_until(&format!("worker {worker} of the new program"), Duration::from_secs(20), || {
        let pid = node.worker(worker).context("there is none")?;
        let program = std::fs::read_link(format!("/proc/{pid}/exe"))?;
        ensure!(program.is_file(), "{} runs", program.display());
        Ok(())
    })
}

const KILLS: u64 = 3;
/// Of each load, as many requests are under way at a time.
const CLIENTS: u64 = 4;

/// Fails when more was lost than what the killed process was busy with, or in another way: refused, answered wrongly.
fn only_in_flight(report: &Report, ways: &[&str]) -> Result<()> {
    report.at_most_failed(KILLS * CLIENTS)?;
    let other = report.errors.keys().find(|kind| !ways.contains(&kind.as_str()));
    ensure!(other.is_none(), "{}; first: {:?}", report.line(), report.first_errors);
    Ok(())
}

fn dns_worker_killed(world: &World) -> Result<()> {
    let reports = worker_killed(world, "dns", KILLS)?;
    reports.none_failed_but(&["dns"])?;
    // A question that the killed one had read: the client asks again.
    only_in_flight(reports.of("dns")?, &["timeout"])?;
    reports.gap_at_most("dns", Duration::from_secs(1))
}

fn ingress_worker_killed(world: &World) -> Result<()> {
    let reports = worker_killed(world, "ingress", KILLS)?;
    reports.none_failed_but(&["ingress"])?;
    only_in_flight(reports.of("ingress")?, &["closed", "reset", "broken pipe"])?;
    reports.gap_at_most("ingress", Duration::from_secs(1))
}

/// The agent's program is replaced by another file, five times: it and its workers are started anew.
fn agent_and_workers_upgraded(world: &World) -> Result<()> {
    let node = victim(world)?;
    let (vip, _) = world.vips()?;
    let (a, b) = world.two_pods()?;
    let steady = ["--secs", "240", "--rate", "200", "--workers", "4"];
    let one = ["--secs", "240", "--rate", "20", "--workers", "1"];
    let kept = [&steady[..], &["--keep"]].concat();
    let traffic = Traffic {
        loads: vec![
            ("service", world.pod_load(&a, &format!("http://{vip}/"), &steady)?),
            ("udp", world.pod_load(&a, &format!("udp://{}:9001", b.v4()?), &steady)?),
            ("stream", world.pod_load(&a, &format!("stream://{}:9000", b.v4()?), &one)?),
            ("dns", world.pod_load(&a, "dns://10.96.0.10/web.default.svc.cluster.local", &steady)?),
            ("ingress", world.ingress_load(&node, &steady)?),
            ("kept", world.ingress_load(&node, &kept)?),
        ],
    };
    thread::sleep(Duration::from_millis(500));
    for _ in 0..5 {
        let before = ["dns", "ingress", "overlay"].map(|worker| (worker, node.worker(worker)));
        // Where the kernel has WireGuard there is no overlay worker.
        let before: Vec<_> = before.into_iter().filter(|(_, old)| old.is_some()).collect();
        let mut socket = WebSocket::open(&node)?;
        world.cluster.upgrade_agent(&node, &world.artifacts)?;
        for (worker, old) in before {
            wait_replaced(&node, worker, old)?;
        }
        wait_agent(&node)?;
        thread::sleep(Duration::from_secs(1));
        socket.echo().context("a WebSocket through the replaced ingress worker")?;
    }
    traffic.finish()?.none_failed_but(&[])?;
    // The other nodes too: a test that restarts an agent later is not to find that it replaces its workers.
    for other in world.cluster.nodes().iter().filter(|other| other.name() != node.name()) {
        let before = other.workers();
        other.agent().kill()?;
        world.cluster.restart_agent(other, &world.artifacts)?;
        for (worker, _) in before {
            wait_current(other, &worker)?;
        }
        wait_agent(other)?;
    }
    replace_pods(world)
}

/// A WebSocket through a node's ingress to the workload, which echoes its frames.
struct WebSocket(TcpStream);

impl WebSocket {
    fn open(node: &mesh_tests::Node) -> Result<Self> {
        let mut stream = TcpStream::connect_timeout(&(node.addresses().0, 80).into(), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let request = format!(
            "GET /ws HTTP/1.1\r\nHost: {HOST}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        stream.write_all(request.as_bytes())?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            head.extend(byte);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        crate::world::expect("upgrade", &head, "HTTP/1.1 101 ")?;
        let mut socket = Self(stream);
        socket.echo()?;
        Ok(socket)
    }

    /// One text frame there, masked with zeros (RFC 6455, section 5.2), and back.
    fn echo(&mut self) -> Result<()> {
        self.0.write_all(&[0x81, 0x84, 0, 0, 0, 0, b'm', b'e', b's', b'h'])?;
        let mut back = [0; 6];
        self.0.read_exact(&mut back)?;
        ensure!(&back == b"\x81\x04mesh", "another frame came back: {back:?}");
        Ok(())
    }
}

fn overlay_worker_killed(world: &World) -> Result<()> {
    if victim(world)?.worker("overlay").is_none() {
        println!("  the kernel has WireGuard: there is no overlay worker");
        return Ok(());
    }
    let reports = worker_killed(world, "overlay", 1)?;
    reports.none_failed_but(&["service", "udp", "stream", "ingress"])?;
    // Streams live on, as TCP does when packets are lost for a moment.
    reports.of("stream")?.none_failed()?;
    reports.gap_at_most("stream", Duration::from_secs(4))
}

fn control_killed(world: &World) -> Result<()> {
    let names = || world.kubectl.run(&["get", "pods,services,deployments", "-A", "-o", "name"]);
    let before = names()?;
    let traffic = Traffic::start(world)?;
    world.cluster.control().kill()?;
    thread::sleep(Duration::from_secs(2));
    let start = Instant::now();
    world.cluster.restart_control(&world.artifacts)?;
    let after = wait_until("the API answers", Duration::from_secs(20), names)?;
    println!("  the API is back after {} ms", start.elapsed().as_millis());
    ensure!(before == after, "before: {before}\nafter: {after}");
    traffic.finish()?.none_failed_but(&[])?;
    replace_pods(world)
}

fn containerd_killed(world: &World) -> Result<()> {
    let node = victim(world)?;
    let ids = || -> Result<Vec<String>> {
        let pods = world.kubectl.pods(WEB)?;
        let id =
            |p: &serde_json::Value| p["status"]["containerStatuses"][0]["containerID"].to_string();
        Ok(pods.iter().map(id).collect())
    };
    let before = ids()?;
    // Not from inside pods: `ctr`, which carries those loads, ends with its containerd.
    let steady = ["--secs", "60", "--rate", "100", "--workers", "4"];
    let ingress = world.ingress_load(&node, &steady)?;
    node.containerd().kill()?;
    thread::sleep(Duration::from_secs(1));
    node.start_containerd()?;
    thread::sleep(Duration::from_secs(2));
    let report = ingress.stop()?;
    println!("  ingress  {}", report.line());
    report.none_failed()?;
    let after = ids()?;
    ensure!(before == after, "containers of the pods: {before:?} before, {after:?} after");
    replace_pods(world)
}

fn agent_starts_without_control(world: &World) -> Result<()> {
    let node = victim(world)?;
    let (a, _) = world.two_pods()?;
    let traffic = Traffic::start(world)?;
    world.cluster.control().kill()?;
    node.agent().kill()?;
    thread::sleep(Duration::from_millis(500));
    world.cluster.restart_agent(&node, &world.artifacts)?;
    wait_agent(&node)?;
    // Its own work goes on: names are answered, and a container that dies is started again.
    a.get("http://web.default.svc.cluster.local/")?;
    thread::sleep(Duration::from_secs(2));
    let reports = traffic.finish();
    world.cluster.restart_control(&world.artifacts)?;
    reports?.none_failed_but(&[])?;
    wait_until("the node is ready", PATIENCE, || {
        output(world.kubectl.command().args(["wait", "--for=condition=Ready", "node", node.name()]))
    })?;
    replace_pods(world)
}
