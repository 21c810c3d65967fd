//! Clients outside the cluster: node ports, load balancer addresses, and what happens when the node that has one dies.
//!
//! ```text
//!   client on the bridge 10.213.N.1 --- node-1 .11, node-2 .12, node-3 .13;  load balancer addresses from .240/28
//! ```

use std::io::ErrorKind;
use std::net::{IpAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::Node;
use mesh_tests::command::{output, run, wait_until};

use crate::paths::Unplugged;
use crate::tests;
use crate::world::{PATIENCE, World, expect};

tests![
    outside_node_ports_answer_on_every_node,
    outside_reaches_pods_in_a_nodes_network,
    outside_traffic_stays_where_asked,
    outside_addresses_outlive_the_agents,
    outside_addresses_move_when_a_node_dies,
    outside_ranges_without_room_are_told_on_the_service,
];

/// A Service like the workload's that clients outside reach; removed when dropped.
struct Published<'w>(&'w World, &'static str);

impl Drop for Published<'_> {
    fn drop(&mut self) {
        let _ = self.0.clean(&["service", self.1]);
    }
}

impl<'w> Published<'w> {
    fn new(world: &'w World, name: &'static str, more: &str) -> Result<Self> {
        Self::of(world, name, "web", more)
    }

    /// For the pods of an app.
    fn of(world: &'w World, name: &'static str, app: &str, more: &str) -> Result<Self> {
        let manifest = format!(
            "
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {{app: {app}}}
{more}
  ports:
  - {{name: http, port: 80, targetPort: http}}
  - {{name: tcp, port: 9000}}
  - {{name: udp, port: 9001, protocol: UDP}}
"
        );
        world.kubectl.apply(&manifest)?;
        Ok(Self(world, name))
    }

    fn node_port(&self, index: usize) -> Result<u16> {
        let service = self.0.kubectl.json(&["service", self.1])?;
        let port = service["spec"]["ports"][index]["nodePort"].as_u64().context("no node port")?;
        Ok(u16::try_from(port)?)
    }

    /// Its load balancer's addresses.
    fn addresses(&self) -> Result<Vec<IpAddr>> {
        wait_until("addresses are given", Duration::from_secs(20), || {
            let service = self.0.kubectl.json(&["service", self.1])?;
            let points = service["status"]["loadBalancer"]["ingress"].as_array().cloned();
            let ips = points.unwrap_or_default();
            let ips: Vec<IpAddr> =
                ips.iter().filter_map(|point| point["ip"].as_str()?.parse().ok()).collect();
            ensure!(ips.len() == 2, "{ips:?}");
            Ok(ips)
        })
    }
}

fn url(address: IpAddr, port: u16) -> String {
    format!("http://{}/", std::net::SocketAddr::new(address, port))
}

/// From outside, as soon as it works.
fn get(url: &str, secs: &str) -> Result<String> {
    output(Command::new("curl").args(["-fsSg", "-m", secs, url]))
}

fn own(world: &World, family_of: IpAddr) -> String {
    let (v4, v6) = world.cluster.subnet().control();
    if family_of.is_ipv4() { v4.to_string() } else { v6.to_string() }
}

fn both(node: &Node) -> [IpAddr; 2] {
    let (v4, v6) = node.addresses();
    [v4.into(), v6.into()]
}

fn outside_node_ports_answer_on_every_node(world: &World) -> Result<()> {
    let published = Published::new(world, "outside", "  type: NodePort")?;
    let [http, tcp, udp] = [0, 1, 2].map(|index| published.node_port(index));
    let (http, tcp, udp) = (http?, tcp?, udp?);
    for node in world.cluster.nodes() {
        for loopback in ["127.0.0.1", "::1"] {
            let there = std::net::SocketAddr::new(loopback.parse()?, http);
            let tries = || node.exec(&["curl", "-fsSg", "-m", "2", &format!("http://{there}/")]);
            wait_until("it answers the node itself", Duration::from_secs(20), tries)?;
        }
        for address in both(&node) {
            let url = url(address, http);
            wait_until("it answers", Duration::from_secs(20), || get(&url, "2"))?;
            let mut hosts = std::collections::BTreeSet::new();
            for _ in 0..20 {
                let answer = get(&url, "5")?;
                // The pod sees who asks, wherever it is.
                expect(&url, &answer, &own(world, address))?;
                let body: serde_json::Value = serde_json::from_str(&answer)?;
                hosts.insert(body["host"].as_str().context("no host")?.to_owned());
            }
            ensure!(hosts.len() >= 2, "{url} is always answered by {hosts:?}");
            for (scheme, port) in [("tcp", tcp), ("udp", udp)] {
                let there = std::net::SocketAddr::new(address, port);
                let long = "z".repeat(1300);
                for text in ["hello", &long] {
                    let url = format!("{scheme}://{there}/{text}");
                    let mut client = Command::new(&world.artifacts.hello);
                    expect(&url, &output(client.args(["get", &url]))?, text)?;
                }
            }
        }
    }
    Ok(())
}

/// A pod of the workload's image in the network of a node; removed when dropped.
struct HostPod<'w>(&'w World);

impl Drop for HostPod<'_> {
    fn drop(&mut self) {
        let _ = self.0.clean(&["pod/in-host"]);
    }
}

/// By every node, also through the tunnel; and a trace as if from the client tells the way.
fn outside_reaches_pods_in_a_nodes_network(world: &World) -> Result<()> {
    let [near, far] = [1, 2].map(|number| world.cluster.node(number));
    let manifest = format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: in-host, labels: {{app: in-host}}}}
spec:
  nodeName: {}
  hostNetwork: true
  terminationGracePeriodSeconds: 1
  containers:
  - name: it
    image: mesh.local/hello:1
    ports: [{{name: http, containerPort: 8080}}]
",
        far.name()
    );
    let _pod = HostPod(world);
    world.kubectl.apply(&manifest)?;
    world.kubectl.wait_ready("app=in-host", 1, PATIENCE)?;
    let published = Published::of(world, "outside", "in-host", "  type: NodePort")?;
    let [http, tcp, udp] = [0, 1, 2].map(|index| published.node_port(index));
    let (http, tcp, udp) = (http?, tcp?, udp?);
    for node in world.cluster.nodes() {
        let address: IpAddr = node.addresses().0.into();
        let url = url(address, http);
        let answer = wait_until("it answers", Duration::from_secs(20), || get(&url, "2"))?;
        expect(&url, &answer, &own(world, address))?;
        for (scheme, port) in [("tcp", tcp), ("udp", udp)] {
            let url = format!("{scheme}://{}/hello", std::net::SocketAddr::new(address, port));
            let mut client = Command::new(&world.artifacts.hello);
            expect(&url, &output(client.args(["get", &url]))?, "hello")?;
        }
    }
    let client = own(world, near.addresses().0.into());
    let mut meshctl = Command::new(&world.artifacts.meshctl);
    meshctl.args(["trace", &client, "outside:80", "--via", near.name(), "-o", "json"]);
    let told = output(meshctl.env("KUBECONFIG", world.cluster.kubeconfig()))?;
    let trace: serde_json::Value = serde_json::from_str(&told)?;
    let made = |node: &Node, decision: &str| {
        let steps = trace["timeline"].as_array().into_iter().flatten();
        let is_it =
            |step: &&serde_json::Value| step["node"] == node.name() && step["decision"] == decision;
        steps.filter(is_it).count() > 0
    };
    for (node, decision) in [
        (&near, "edge_client_to_node"),
        (&far, "edge_node_to_host"),
        (&far, "edge_host_to_node"),
        (&near, "edge_node_to_client"),
    ] {
        ensure!(made(node, decision), "no {decision} on {}: {trace:#}", node.name());
    }
    ensure!(trace["verdict"]["ok"] == true, "{trace:#}");
    Ok(())
}

fn outside_traffic_stays_where_asked(world: &World) -> Result<()> {
    let more = "  type: LoadBalancer\n  externalTrafficPolicy: Local";
    let published = Published::new(world, "outside", more)?;
    let http = published.node_port(0)?;
    let service = world.kubectl.json(&["service", "outside"])?;
    let health = service["spec"]["healthCheckNodePort"].as_u64().context("no health port")?;
    for pod in world.pods()? {
        for address in both(&pod.node) {
            let url = url(address, http);
            wait_until("it answers", Duration::from_secs(20), || get(&url, "2"))?;
            for _ in 0..5 {
                let answer = get(&url, "5")?;
                let body: serde_json::Value = serde_json::from_str(&answer)?;
                let host = body["host"].as_str().context("no host")?.to_owned();
                let pods = world.pods()?;
                let here = pods.iter().any(|p| p.name == host && p.node.name() == pod.node.name());
                ensure!(here, "{url} was answered by {host}, which is elsewhere");
            }
            let check =
                get(&format!("{}healthz", self::url(address, u16::try_from(health)?)), "5")?;
            expect("health check", &check, "\"localEndpoints\":1")?;
        }
    }
    Ok(())
}

/// The MAC address by which the client reaches an address, once it has spoken to it.
fn neighbour(world: &World, address: IpAddr) -> Result<String> {
    let bridge = world.cluster.layout().bridge();
    let text = run("ip", &["neigh", "show", &address.to_string(), "dev", &bridge])?;
    let mut words = text.split_whitespace().skip_while(|word| *word != "lladdr");
    words.nth(1).map(str::to_owned).with_context(|| format!("no neighbour {address}: {text:?}"))
}

fn owner(world: &World, address: IpAddr) -> Result<Node> {
    let mac = neighbour(world, address)?;
    let holds = |node: &Node| node.exec(&["ip", "link"]).is_ok_and(|text| text.contains(&mac));
    let found = world.cluster.nodes().into_iter().find(holds);
    found.with_context(|| format!("no node has {mac}"))
}

/// The owner once all agree: a node that has just come back takes its addresses back in its own time.
fn settled_owner(world: &World, address: IpAddr, url: &str) -> Result<Node> {
    let bridge = world.cluster.layout().bridge();
    let ask = || {
        run("ip", &["neigh", "flush", "to", &address.to_string(), "dev", &bridge])?;
        get(url, "2")?;
        owner(world, address)
    };
    wait_until("the owner stays the same for two seconds", PATIENCE, || {
        let first = ask()?.name().to_owned();
        std::thread::sleep(Duration::from_secs(2));
        let now = ask()?;
        ensure!(first == now.name(), "{first}, then {}", now.name());
        Ok(now)
    })
}

fn outside_addresses_outlive_the_agents(world: &World) -> Result<()> {
    let published = Published::new(world, "outside", "  type: LoadBalancer")?;
    for address in published.addresses()? {
        let url = url(address, 80);
        let answer = wait_until("it answers", Duration::from_secs(20), || get(&url, "2"))?;
        expect(&url, &answer, &own(world, address))?;
        let node = owner(world, address)?;
        let agent = node.agent().pid().context("no agent")?;
        run("kill", &["-9", &agent.to_string()])?;
        let bridge = world.cluster.layout().bridge();
        run("ip", &["neigh", "flush", "to", &address.to_string(), "dev", &bridge])?;
        let answer = get(&url, "5");
        let echo = run("ping", &["-n", "-c", "1", "-W", "2", &address.to_string()]);
        let other = TcpStream::connect_timeout(&(address, 81).into(), Duration::from_secs(5));
        world.cluster.restart_agent(&node, &world.artifacts)?;
        expect("without its agent", &answer?, &own(world, address))?;
        echo?;
        let refused = other.map(drop).map_err(|error| error.kind());
        ensure!(refused == Err(ErrorKind::ConnectionRefused), "port 81: {refused:?}");
    }
    world.cluster.wait_ready(&world.artifacts)
}

fn outside_addresses_move_when_a_node_dies(world: &World) -> Result<()> {
    let published = Published::new(world, "outside", "  type: LoadBalancer")?;
    for address in published.addresses()? {
        let url = url(address, 80);
        wait_until("it answers", Duration::from_secs(20), || get(&url, "2"))?;
        let node = settled_owner(world, address, &url)?;
        let cut = Unplugged::new(&node)?;
        let start = Instant::now();
        // What the client did when the node died, it has done to a node that cannot hear: only new tries count.
        let moved = wait_until("another node has it", Duration::from_secs(15), || {
            get(&url, "0.3").map(|_| start.elapsed())
        });
        // Read while the node is away: it says that the address is its own as soon as it is heard again.
        let now = owner(world, address);
        drop(cut);
        let (moved, now) = (moved?, now?);
        println!("{address} answered {} ms after the death of {}", moved.as_millis(), node.name());
        ensure!(moved < Duration::from_secs(5), "it took {moved:?}");
        ensure!(now.name() != node.name(), "the neighbour is still {}", node.name());
        world.cluster.wait_ready(&world.artifacts)?;
        wait_until("the node is back", PATIENCE, || {
            get(&self::url(both(&node)[0], published.node_port(0)?), "1")
        })?;
    }
    Ok(())
}

/// The nodes' maps hold 64 ranges of clients, over all Services and ports.
fn outside_ranges_without_room_are_told_on_the_service(world: &World) -> Result<()> {
    let ranges = |count: u8| {
        let ranges: Vec<String> = (0..count).map(|n| format!("198.51.{n}.0/24")).collect();
        let own = own(world, IpAddr::from([0, 0, 0, 0]));
        let ranges = ranges.join(", ");
        format!("  type: LoadBalancer\n  loadBalancerSourceRanges: [{own}/32, {ranges}]")
    };
    let wide = Published::new(world, "wide", &ranges(70))?;
    let condition = |kind: &str, name: &str, type_: &str| -> Result<serde_json::Value> {
        let object = world.kubectl.json(&[kind, name])?;
        let all = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        Ok(all.into_iter().find(|one| one["type"] == type_).unwrap_or_default())
    };
    let nodes = world.cluster.nodes();
    wait_until("the Service names all nodes", PATIENCE, || {
        let told = condition("service", "wide", "mesh.dev/MapFull")?;
        let message = told["message"].as_str().context("no condition")?;
        let of_all = nodes.iter().all(|node| message.contains(&format!("node {}", node.name())));
        ensure!(told["status"] == "True" && of_all, "{told}");
        expect("the condition", message, "EDGE_SOURCES")?;
        expect("the condition", message, "--map-capacity EDGE_SOURCES=ENTRIES")
    })?;
    let node = nodes[0].name();
    let full = condition("node", node, "MeshMapsFull")?;
    ensure!(full["status"] == "True", "{full}");
    expect("describe", &world.kubectl.run(&["describe", "service", "wide"])?, "MapFull")?;
    // Whom there is no room for is refused; by the node port, which the ranges are not about, all are let in.
    let answer = get(&url(both(&nodes[0])[0], wide.node_port(0)?), "5")?;
    expect("the node port", &answer, &own(world, IpAddr::from([0, 0, 0, 0])))?;
    let address = wide.addresses()?.into_iter().find(IpAddr::is_ipv4).context("no IPv4")?;
    ensure!(get(&url(address, 80), "2").is_err(), "a client without room for its range came in");
    drop(wide);
    let wide = Published::new(world, "wide", &ranges(5))?;
    let address = wide.addresses()?.into_iter().find(IpAddr::is_ipv4).context("no IPv4")?;
    wait_until("all fit", PATIENCE, || {
        let told = condition("service", "wide", "mesh.dev/MapFull")?;
        let full = condition("node", node, "MeshMapsFull")?;
        ensure!(told.is_null() && full["status"] == "False", "{told} {full}");
        get(&url(address, 80), "2").map(drop)
    })
}
