//! The backends are on another node.
//!
//! ```text
//!   client outside 192.0.2.2 -- up0 node 192.0.2.1 == our engine: 10.244.1.1, 10.244.2.1 == node -- pod 10.244.2.5
//!
//!   client 10.81.0.2 ---- node 10.83.0.1 ---- 10.83.0.2 node ---- backends 10.82.0.2      (they only route)
//! ```

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_kernel::edge::{self, Desired};
use mesh_kernel::node::{Desired as NodeDesired, LinuxNodeNetwork, NodeNetwork as _};
use mesh_kernel::pods::{LinuxPodNetwork, PodNetwork as _, PodPort};
use mesh_kernel::{IfName, LinuxEdge, LoadOptions, Programs};
use serde_json::json;

use crate::lab::{Lab, Net};
use crate::world::{Mesh, World, link};

/// Of the engines.
const PORT: u16 = 51_900;
const MTU: u32 = 1420;
/// An engine that takes longer to start does not work.
const PATIENCE: Duration = Duration::from_secs(10);

/// The node of the backends.
pub(crate) struct Far {
    /// Declared first: they end before the cgroups and namespaces that they are in.
    _engines: Vec<Engine>,
    pub(crate) lab: Lab,
    _net: Net,
    /// What the engines have on disk.
    _folder: Option<tempfile::TempDir>,
}

/// One end of the tunnel; ends when dropped.
struct Engine(Child);

impl Drop for Engine {
    fn drop(&mut self) {
        // Both fail when it has ended before, which is fine.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Both nodes route, and nothing else.
pub(crate) fn plain() -> Result<World> {
    let (lab, node, net) = (Lab::new(), Net::new(), Net::new());
    let pods =
        [(&node, "pcl", "10.81.0"), (&net, "pbe", "10.82.0")].map(|(node, device, network)| {
            let pod = Net::new();
            link(node, device, &format!("{network}.1/24"), &pod, &format!("{network}.2/24"));
            pod.ip(&format!("route add default via {network}.1"));
            pod
        });
    link(&node, "far", "10.83.0.1/24", &net, "10.83.0.2/24");
    node.ip("route add 10.82.0.0/24 via 10.83.0.2");
    net.ip("route add 10.81.0.0/24 via 10.83.0.1");
    for node in [&node, &net] {
        node.run(|| mesh_kernel::sysctl::write("net/ipv4/ip_forward", "1"))?;
    }
    let far = Far { _engines: vec![], lab: Lab::new(), _net: net, _folder: None };
    World::with(lab, node, pods, [10, 82, 0, 2].into(), None, Some(far))
}

fn overlay(number: u8) -> IpAddr {
    [10, 244, number, 1].into()
}

/// Both nodes have our programs, and `engine` between them: a build of the overlay worker.
pub(crate) fn mesh(engine: &Path, object: Option<&[u8]>) -> Result<World> {
    let (labs, [node, net]) = ([Lab::new(), Lab::new()], [Net::new(), Net::new()]);
    let pods = [Net::new(), Net::new()];
    link(&node, "ul0", "198.51.100.1/24", &net, "198.51.100.2/24");
    let folder = tempfile::tempdir().context("make a folder")?;
    let keys = [1, 2].map(|number| make_key(folder.path(), number));
    let [one, two] = keys;
    let keys = [one?, two?];
    let (mut engines, mut loaded) = (vec![], vec![]);
    for (number, lab, node) in [(1, &labs[0], &node), (2, &labs[1], &net)] {
        let place = Place { number, lab, node, folder: folder.path() };
        engines.push(place.engine(engine, &keys[usize::from(2 - number)])?);
        loaded.push(place.programs(object)?);
    }
    let [near, far] = <[_; 2]>::try_from(loaded).map_err(|_| anyhow::anyhow!("two nodes"))?;
    let ports = [attach(&node, &near, &pods[0], 1, 4)?, attach(&net, &far, &pods[1], 2, 5)?];
    settle(
        &net,
        &far,
        &Desired {
            nodes: [(overlay(1), MTU)].into(),
            own: [overlay(2)].into(),
            ..Desired::default()
        },
    )?;
    let [lab, far_lab] = labs;
    let far = Far { _engines: engines, lab: far_lab, _net: net, _folder: Some(folder) };
    let mesh = Mesh { programs: near, ports };
    let mut world = World::with(lab, node, pods, [10, 244, 2, 5].into(), Some(mesh), Some(far))?;
    world.add_outside()?;
    Ok(world)
}

/// Its private key is in a file; the public one is returned.
fn make_key(folder: &Path, number: u8) -> Result<String> {
    let wg = |word: &str, input: Stdio| {
        let output = Command::new("wg").arg(word).stdin(input).output();
        output.context("run wg (package wireguard-tools)")
    };
    let private = wg("genkey", Stdio::null())?.stdout;
    let path = folder.join(format!("{number}.key"));
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(&path)?;
    std::io::Write::write_all(&mut file, &private).context("store a private key")?;
    let public = wg("pubkey", fs::File::open(&path)?.into())?.stdout;
    Ok(String::from_utf8(public)?.trim().to_owned())
}

/// A node that is being made.
struct Place<'p> {
    number: u8,
    lab: &'p Lab,
    node: &'p Net,
    folder: &'p Path,
}

impl Place<'_> {
    fn device(&self) -> String {
        format!("mesh-wg{}", self.number)
    }

    /// Starts with the configuration that it would have saved, as after a restart.
    fn engine(&self, program: &Path, peer: &str) -> Result<Engine> {
        let other = 3 - self.number;
        let config = json!({
            "listenPort": PORT,
            "mtu": MTU,
            "peers": [{
                "publicKey": peer,
                "endpoints": [format!("198.51.100.{other}:{PORT}")],
                "allowedIps": [format!("10.244.{other}.0/24")],
            }],
        });
        let file = |kind: &str| self.folder.join(format!("{}.{kind}", self.number));
        fs::write(file("json"), config.to_string()).context("write a configuration")?;
        let mut command = Command::new(program);
        command.args([file("sock"), file("json")]).arg(self.device()).arg(file("key"));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(fs::File::create(file("log")).context("make a log")?);
        let engine = Engine(self.node.run(|| command.spawn()).context("start the engine")?);
        let procs = self.lab.cgroup.join("cgroup.procs");
        fs::write(procs, engine.0.id().to_string()).context("move the engine to its cgroup")?;
        let start = Instant::now();
        while !file("sock").exists() {
            let said = || fs::read_to_string(file("log")).unwrap_or_default();
            ensure!(start.elapsed() < PATIENCE, "the engine does not start: {}", said());
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(engine)
    }

    /// Our programs, also on the engine's device.
    fn programs(&self, object: Option<&[u8]>) -> Result<Arc<Programs>> {
        let options = LoadOptions { object: object.map(<[u8]>::to_vec), ..self.lab.options() };
        let programs = Arc::new(Programs::open_or_load(&options)?);
        let name: IfName = self.device().parse()?;
        let block = format!("10.244.{}.0/24", 3 - self.number).parse()?;
        let desired = NodeDesired {
            local_addresses: [].into(),
            overlay: name.clone(),
            overlay_mtu: MTU,
            overlay_addresses: [overlay(self.number)].into(),
            remote_blocks: [block].into(),
            block_mtus: [].into(),
            refused: [].into(),
            masquerade: None,
        };
        let network = LinuxNodeNetwork::new(self.node.handle(), programs.clone(), name);
        let (_, applied) = network.reconcile(&desired)?;
        ensure!(applied.failed.is_empty(), "{:?}", applied.failed.first());
        Ok(programs)
    }
}

fn attach(
    node: &Net,
    programs: &Arc<Programs>,
    pod: &Net,
    number: u8,
    host: u8,
) -> Result<(u32, PodPort)> {
    let name = format!("pod-{number}");
    let port = PodPort {
        netns: pod.path(),
        interface: "eth0".parse()?,
        host_interface: IfName::for_pod(&name, "eth0"),
        owner: format!("default/{name}"),
        v4: Some(Ipv4Addr::new(10, 244, number, host)),
        v6: None,
        mtu: MTU,
        mac: None,
        ports: vec![],
        bandwidth: Default::default(),
    };
    let network = LinuxPodNetwork::new(node.handle(), programs.clone());
    Ok((network.attach(&port)?.host_ifindex, port))
}

/// Makes the edge of a node so.
pub(crate) fn settle(node: &Net, programs: &Arc<Programs>, desired: &Desired) -> Result<()> {
    let edge = LinuxEdge::new(node.handle(), programs.clone());
    let mut observed = edge.observe(desired)?;
    let applied = edge.apply(&edge::plan(desired, &observed), &mut observed);
    ensure!(applied.failed.is_empty(), "{:?}", applied.failed.first());
    Ok(())
}

/// Behind which node the backends are, and how large packets to it may be.
pub(crate) fn way(world: &World) -> Option<(IpAddr, u32)> {
    let SocketAddr::V4(backend) = world.backend() else { return None };
    let [.., number, _] = backend.ip().octets();
    (number == 2).then(|| (overlay(number), MTU))
}
