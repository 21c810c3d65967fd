//! The truth table of policies with nine real pods on three nodes: whom each reaches by address, by service, name, node port and
//! outside address, over both families, with policies drawn by seeds; and the same table while programs are killed and when they are back.

use std::cell::RefCell;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::IpAddr;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use mesh_tests::Node;
use mesh_tests::command::{at_once, output_with_input, wait_until};
use mesh_tests::kubectl::is_ready;
use mesh_tests::pod::Pod;
use mesh_tests::policy_table::{
    Member, NAMESPACES, PODS, SEEDS, Service, Table, Wrong, namespace_labels, policies::draw,
};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

use crate::faults::wait_agent;
use crate::tests;
use crate::world::{PATIENCE, World};

tests![policies_mean_what_they_say, policies_hold_while_programs_die,];

/// How long silence is waited for: much longer than an exchange takes, shorter than a SYN's second try.
const ROUND: Duration = Duration::from_millis(600);
/// Policies are programmed, and what a killed program leaves is taken up again, long before.
const SOON: Duration = Duration::from_secs(30);

fn policies_mean_what_they_say(world: &World) -> Result<()> {
    with_pods(world, |nine| {
        for (number, seed) in SEEDS.into_iter().enumerate() {
            let verb = if number == 0 { "create" } else { "replace" };
            let table = nine.put(verb, seed)?;
            let start = Instant::now();
            nine.wait_for(&table).with_context(|| format!("the policies of seed {seed}"))?;
            let settled = start.elapsed();
            nine.check(&table).with_context(|| format!("the policies of seed {seed}"))?;
            let (cells, allowed) = table.size();
            println!(
                "  seed {seed}: {allowed} of {cells} are allowed; right after {} ms",
                settled.as_millis()
            );
        }
        Ok(())
    })
}

fn policies_hold_while_programs_die(world: &World) -> Result<()> {
    with_pods(world, |nine| {
        let table = nine.put("create", SEEDS[0])?;
        nine.wait_for(&table)?;
        for fault in faults() {
            let start = Instant::now();
            fault.run(world, nine, &table).with_context(|| format!("{} was killed", fault.what))?;
            println!("  {}: {} ms", fault.what, start.elapsed().as_millis());
        }
        Ok(())
    })
}

/// A program that dies on all nodes, and how it comes back.
struct Fault {
    what: &'static str,
    kill: fn(&World) -> Result<()>,
    /// Not for what the agent starts again at once.
    restart: Option<fn(&World) -> Result<()>>,
}

fn faults() -> [Fault; 5] {
    [
        Fault {
            what: "agent",
            kill: |world| on_nodes(world, |node| node.agent().kill()),
            restart: Some(|world| {
                on_nodes(world, |node| {
                    world.cluster.restart_agent(node, &world.artifacts)?;
                    wait_agent(node)
                })
            }),
        },
        Fault { what: "overlay", kill: |world| kill_worker(world, "overlay"), restart: None },
        Fault { what: "dns", kill: |world| kill_worker(world, "dns"), restart: None },
        Fault {
            what: "control",
            kill: |world| world.cluster.control().kill(),
            restart: Some(|world| {
                world.cluster.restart_control(&world.artifacts)?;
                wait_until("the API answers", SOON, || world.kubectl.run(&["get", "nodes"]))
                    .map(drop)
            }),
        },
        Fault {
            what: "containerd",
            kill: |world| on_nodes(world, |node| node.containerd().kill()),
            restart: Some(|world| on_nodes(world, Node::start_containerd)),
        },
    ]
}

fn on_nodes(world: &World, work: impl Fn(&Node) -> Result<()> + Sync) -> Result<()> {
    at_once(world.cluster.nodes(), |node| work(&node))
}

/// Kills a worker on every node and waits until others have their places. Where the kernel has WireGuard there is no overlay worker.
fn kill_worker(world: &World, name: &str) -> Result<()> {
    on_nodes(world, |node| {
        let Some(old) = node.worker(name) else { return Ok(()) };
        kill(old, Signal::SIGKILL).context("kill -9")?;
        wait_until(&format!("another worker {name}"), SOON, || {
            let new = node.worker(name);
            ensure!(new.is_some() && new != Some(old), "there is none");
            Ok(())
        })
    })
}

impl Fault {
    fn run(&self, world: &World, nine: &Nine<'_>, table: &Table<'_>) -> Result<()> {
        nine.watch(table, || (self.kill)(world))?;
        if let Some(restart) = self.restart {
            nine.check(table).context("while it is away")?;
            nine.watch(table, || restart(world))?;
        }
        nine.check(table).context("when it is back")
    }
}

/// The pods and what asks in each of them.
struct Nine<'a> {
    world: &'a World,
    members: Vec<Member>,
    services: Vec<Service>,
    node: [String; 2],
    probes: RefCell<Vec<Probe>>,
}

/// Makes the pods, and removes them afterwards.
fn with_pods(world: &World, work: impl FnOnce(&Nine<'_>) -> Result<()>) -> Result<()> {
    clean(world)?;
    world.kubectl.apply(&manifest(world).to_string())?;
    let result = Nine::start(world).and_then(|nine| work(&nine));
    clean(world)?;
    result
}

fn clean(world: &World) -> Result<()> {
    world.clean(
        &NAMESPACES
            .map(|namespace| format!("namespace/{namespace}"))
            .each_ref()
            .map(String::as_str),
    )
}

fn manifest(world: &World) -> Value {
    let nodes = world.cluster.nodes();
    let mut items = Vec::new();
    for namespace in NAMESPACES {
        let labels = serde_json::Map::from_iter(
            namespace_labels(namespace).map(|(key, value)| (key.to_owned(), json!(value))),
        );
        items.push(json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels},
        }));
    }
    let nowhere: Result<_> = Member::all(|_, _| Ok([IpAddr::from([0; 4]), IpAddr::from([0; 16])]));
    for (number, member) in nowhere.into_iter().flatten().enumerate() {
        // One of each name and of each namespace on every node.
        let node = &nodes[(number + number / 3) % nodes.len()];
        items.extend(pod_and_service(&member, node.name()));
    }
    json!({"apiVersion": "v1", "kind": "List", "items": items})
}

fn pod_and_service(member: &Member, node: &str) -> [Value; 2] {
    let metadata = |labels: Value| json!({"name": member.name, "namespace": member.namespace, "labels": labels});
    let labels = serde_json::Map::from_iter(
        member.labels().map(|(key, value)| (key.to_owned(), json!(value))),
    );
    let ports = [80, 81].map(|port| {
        ["TCP", "UDP"].map(|protocol| {
            let name = format!("{}-{port}", protocol.to_lowercase());
            json!({"name": name, "port": port, "protocol": protocol})
        })
    });
    [
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": metadata(json!(labels)),
            "spec": {
                "nodeName": node,
                "hostname": member.host(),
                "terminationGracePeriodSeconds": 0,
                "containers": [{
                    "name": "hello",
                    "image": "mesh.local/hello:1",
                    "args": ["serve", "--tcp", "80,81", "--udp", "80,81", "--sctp", "80,81"],
                    "ports": [{"name": "serve", "containerPort": member.named_port()}],
                    // The table's own load must not make a pod unready: with its agent dead, or the control service, it would stay so.
                    "readinessProbe": {
                        "httpGet": {"path": "/ready", "port": 8080}, "periodSeconds": 1, "failureThreshold": 600,
                    },
                }],
            },
        }),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": metadata(json!({})),
            "spec": {
                "type": "LoadBalancer",
                "ipFamilyPolicy": "RequireDualStack",
                "selector": {"pod": member.name},
                "ports": ports.concat(),
            },
        }),
    ]
}

impl<'a> Nine<'a> {
    fn start(world: &'a World) -> Result<Self> {
        let pods = wait_until("nine ready pods", PATIENCE, || ready_pods(world))?;
        let services = wait_until("services with addresses", PATIENCE, || services(world))?;
        let find = |namespace: &str, name: &str| {
            let found = pods.iter().find(|(ns, pod)| ns == namespace && pod.name == name);
            found.map(|(_, pod)| pod).context("a pod is missing")
        };
        let members = Member::all(|namespace, name| -> Result<_> {
            let pod = find(namespace, name)?;
            Ok([pod.v4()?.parse()?, pod.v6()?.parse()?])
        })?;
        let probes = members.iter().map(|one| Probe::start(find(one.namespace, one.name)?));
        let probes = RefCell::new(probes.collect::<Result<_>>()?);
        let (v4, v6) = world.cluster.node(1).addresses();
        let node = [v4.to_string(), v6.to_string()];
        Ok(Self { world, members, services, node, probes })
    }

    /// Puts the policies of a seed there: `create`, or `replace` in the place of those before.
    fn put(&self, verb: &str, seed: u64) -> Result<Table<'_>> {
        let policies = draw(seed, &self.members);
        let list = json!({"apiVersion": "v1", "kind": "List", "items": policies}).to_string();
        output_with_input(self.world.kubectl.command().args([verb, "-f", "-"]), list.as_bytes())?;
        Ok(Table::new(&self.members, &self.services, &self.node, &policies))
    }

    /// Everybody asks everybody, all at the same time; returns the letters.
    fn round(&self, table: &Table<'_>, limit: Duration) -> Result<String> {
        let mut probes = self.probes.borrow_mut();
        for (from, probe) in probes.iter_mut().enumerate() {
            probe.ask(limit, &table.targets(from))?;
        }
        probes.iter_mut().map(Probe::answer).collect()
    }

    /// Waits until everything is as the policies say.
    fn wait_for(&self, table: &Table<'_>) -> Result<()> {
        wait_until("the table is right", SOON, || {
            let seen = self.round(table, ROUND)?;
            let wrong = table.wrong(&seen);
            ensure!(wrong.is_empty(), "{}", table.show(&wrong));
            Ok(())
        })
    }

    /// Everything is as the policies say. A machine may be slow to answer, but nothing ever passes that must not.
    fn check(&self, table: &Table<'_>) -> Result<()> {
        let (start, mut limit) = (Instant::now(), ROUND);
        loop {
            let seen = self.round(table, limit)?;
            let wrong = table.wrong(&seen);
            no_leaks(table, &wrong)?;
            if wrong.is_empty() {
                return Ok(());
            }
            ensure!(start.elapsed() < SOON, "{}", table.show(&wrong));
            limit = (limit * 2).min(Duration::from_secs(3));
        }
    }

    /// Asks on and on until `work` is done, and once more: nothing passes that must not.
    fn watch(&self, table: &Table<'_>, work: impl FnOnce() -> Result<()> + Send) -> Result<()> {
        thread::scope(|scope| {
            let worker = scope.spawn(work);
            let mut over = false;
            while !over {
                over = worker.is_finished();
                let seen = self.round(table, ROUND)?;
                no_leaks(table, &table.wrong(&seen))?;
            }
            worker.join().map_err(|_| anyhow!("it panicked"))?
        })
    }
}

fn no_leaks(table: &Table<'_>, wrong: &[Wrong<'_>]) -> Result<()> {
    let leaks: Vec<Wrong<'_>> = wrong.iter().filter(|wrong| wrong.is_leak()).copied().collect();
    ensure!(leaks.is_empty(), "what is denied passed: {}", table.show(&leaks));
    Ok(())
}

/// Pods of the nine, with their namespaces.
fn ready_pods(world: &World) -> Result<Vec<(String, Pod)>> {
    let list = world.kubectl.json(&["pods", "-A"])?;
    let mut pods = Vec::new();
    for pod in list["items"].as_array().into_iter().flatten() {
        let namespace = pod["metadata"]["namespace"].as_str().unwrap_or_default();
        if NAMESPACES.contains(&namespace) && is_ready(pod) {
            pods.push((namespace.to_owned(), Pod::from_json(&world.cluster, pod)?));
        }
    }
    ensure!(pods.len() == NAMESPACES.len() * PODS.len(), "{} are ready", pods.len());
    Ok(pods)
}

/// The services of the nine, in their order.
fn services(world: &World) -> Result<Vec<Service>> {
    let list = world.kubectl.json(&["services", "-A"])?;
    let all = list["items"].as_array().context("no list of services")?;
    let nowhere = Member::all(|_, _| anyhow::Ok([IpAddr::from([0; 4]), IpAddr::from([0; 16])]))?;
    let service = |member: &Member| {
        let is_its = |s: &&Value| {
            s["metadata"]["namespace"] == member.namespace && s["metadata"]["name"] == member.name
        };
        let one = all.iter().find(is_its).context("a service is missing")?;
        let ports = [0, 1].map(|index| one["spec"]["ports"][index]["nodePort"].as_u64());
        let [Some(tcp), Some(udp)] = ports else { bail!("a service has no node ports") };
        let points = &one["status"]["loadBalancer"]["ingress"];
        let outside = points.as_array().into_iter().flatten().map(|point| &point["ip"]);
        Ok(Service {
            vips: of_each_family(one["spec"]["clusterIPs"].as_array().into_iter().flatten())?,
            external: of_each_family(outside)?,
            node_ports: [u16::try_from(tcp)?, u16::try_from(udp)?],
        })
    };
    nowhere.iter().map(service).collect()
}

fn of_each_family<'v>(addresses: impl Iterator<Item = &'v Value>) -> Result<[String; 2]> {
    let all: Vec<&str> = addresses.filter_map(Value::as_str).collect();
    let of = |mark: char| {
        let found = all.iter().find(|address| address.contains(mark));
        found.map(|address| (*address).to_owned()).context("a service lacks a family")
    };
    Ok([of('.')?, of(':')?])
}

/// `mesh-hello probe` in a pod. It ends with its input.
struct Probe {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Probe {
    fn start(pod: &Pod) -> Result<Self> {
        let mut command = pod.command(&["/bin/mesh-hello", "probe"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("start a probe")?;
        let output = child.stdout.take().context("a piped output exists")?;
        Ok(Self { input: child.stdin.take(), child, output: BufReader::new(output) })
    }

    fn ask(&mut self, limit: Duration, targets: &str) -> Result<()> {
        let input = self.input.as_mut().context("its input is open")?;
        writeln!(input, "{}{targets}", limit.as_millis()).context("ask a probe")
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line).context("hear a probe")?;
        ensure!(line.ends_with('\n'), "a probe ended");
        Ok(line.trim_end_matches('\n').to_owned())
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        drop(self.input.take());
        // It has ended, or will.
        let _ = self.child.wait();
    }
}
