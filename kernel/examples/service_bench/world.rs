//! Where the load runs.
//!
//! ```text
//!   client 10.81.0.2 ---- node (routes; rules or a proxy of a contestant) ---- backends 10.82.0.2:8080-8082
//!
//!   client pod 10.244.1.4 ---- node (our programs) ---- backend pod 10.244.1.5:8080-8082
//!                              |
//!   client outside 192.0.2.2 --+ up0 192.0.2.1
//! ```
//!
//! Namespaces are held by descriptors and mounts by this process: nothing outlives it but a cgroup, and that only when it is killed.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_kernel::flows::{FlowReader, Settings};
use mesh_kernel::pods::{LinuxPodNetwork, PodNetwork, PodPort};
use mesh_kernel::services::ServiceReconciler;
use mesh_kernel::{IfName, LoadOptions, Programs};

use crate::across::Far;
use crate::figures::Turn;
use crate::lab::{Lab, Net};
use crate::role::Role;
use crate::serve::PORTS;
use crate::services::{self, Service};

/// First port of the backends.
pub(crate) const PORT: u16 = 8080;
/// Where datagrams go.
const DATAGRAMS: u16 = 9;

/// A client, backends, and what lies between them.
pub(crate) struct World {
    /// Declared first, so that they end before what they are in.
    client: Role,
    backend: Role,
    outside: Option<Outside>,
    pub(crate) node: Net,
    pub(crate) lab: Lab,
    pub(crate) backend_address: IpAddr,
    /// Ours only.
    pub(crate) mesh: Option<Mesh>,
    /// The node of the backends, where that is another one.
    far: Option<Far>,
    _pods: [Net; 2],
}

/// A client that is on no node.
struct Outside {
    role: Role,
    lab: Lab,
    _net: Net,
}

/// Our programs on the node.
pub(crate) struct Mesh {
    pub(crate) programs: Arc<Programs>,
    /// The host-side veths of client and backend.
    pub(crate) ports: [(u32, PodPort); 2],
}

impl World {
    /// The node only routes.
    pub(crate) fn plain() -> Result<Self> {
        let (lab, node) = (Lab::new(), Net::new());
        let pods = [("pcl", "10.81.0"), ("pbe", "10.82.0")].map(|(device, network)| {
            let pod = Net::new();
            link(&node, device, &format!("{network}.1/24"), &pod, &format!("{network}.2/24"));
            pod.ip(&format!("route add default via {network}.1"));
            pod
        });
        node.run(|| mesh_kernel::sysctl::write("net/ipv4/ip_forward", "1"))?;
        Self::with(lab, node, pods, [10, 82, 0, 2].into(), None, None)
    }

    /// The node has our programs, or those of another build; the client outside is for services on its node ports.
    pub(crate) fn mesh(capacities: &[(&'static str, u32)], object: Option<&[u8]>) -> Result<Self> {
        let (lab, node, pods) = (Lab::new(), Net::new(), [Net::new(), Net::new()]);
        let options = LoadOptions {
            capacities: capacities.iter().copied().collect(),
            object: object.map(<[u8]>::to_vec),
            ..lab.options()
        };
        let programs = Arc::new(Programs::open_or_load(&options)?);
        let network = LinuxPodNetwork::new(node.handle(), programs.clone());
        let attach = |pod: usize| -> Result<(u32, PodPort)> {
            let name = format!("pod-{pod}");
            let number = u8::try_from(pod).unwrap_or_default() + 4;
            let port = PodPort {
                netns: pods[pod].path(),
                interface: "eth0".parse()?,
                host_interface: IfName::for_pod(&name, "eth0"),
                owner: format!("default/{name}"),
                v4: Some(Ipv4Addr::new(10, 244, 1, number)),
                v6: None,
                mtu: 1500,
                mac: None,
                ports: vec![],
                bandwidth: Default::default(),
            };
            Ok((network.attach(&port)?.host_ifindex, port))
        };
        let mesh = Mesh { ports: [attach(0)?, attach(1)?], programs };
        let mut world = Self::with(lab, node, pods, [10, 244, 1, 5].into(), Some(mesh), None)?;
        world.node.run(|| mesh_kernel::sysctl::write("net/ipv4/ip_forward", "1"))?;
        world.add_outside()?;
        Ok(world)
    }

    /// Another machine: our hooks do not see its sockets.
    pub(crate) fn add_outside(&mut self) -> Result<()> {
        let (net, lab) = (Net::new(), Lab::new());
        link(&self.node, "up0", "192.0.2.1/24", &net, "192.0.2.2/24");
        tune(&net)?;
        let role = Role::start(&lab, &net, 0)?;
        self.outside = Some(Outside { role, lab, _net: net });
        Ok(())
    }

    pub(crate) fn with(
        lab: Lab,
        node: Net,
        pods: [Net; 2],
        backend_address: IpAddr,
        mesh: Option<Mesh>,
        far: Option<Far>,
    ) -> Result<Self> {
        pods.iter().try_for_each(tune)?;
        tune(&node)?;
        let client = Role::start(&lab, &pods[0], 0)?;
        let mut backend = Role::start(far.as_ref().map_or(&lab, |far| &far.lab), &pods[1], 1)?;
        backend.ask(&format!("serve {}", SocketAddr::new(backend_address, PORT)))?;
        backend.ask(&format!("sink {}", SocketAddr::new(backend_address, DATAGRAMS)))?;
        let (outside, _pods) = (None, pods);
        Ok(Self { client, backend, outside, node, lab, backend_address, mesh, far, _pods })
    }

    /// The first backend, by its own address.
    pub(crate) fn backend(&self) -> SocketAddr {
        SocketAddr::new(self.backend_address, PORT)
    }

    /// Where datagrams go, by the backend's own address.
    pub(crate) fn datagram_backend(&self) -> SocketAddr {
        SocketAddr::new(self.backend_address, DATAGRAMS)
    }

    /// Endpoints of the service that is measured.
    pub(crate) fn endpoints(&self) -> Vec<SocketAddr> {
        (PORT..PORT + PORTS).map(|port| SocketAddr::new(self.backend_address, port)).collect()
    }

    /// Makes these our services.
    pub(crate) fn publish(&self, services: &[Service]) -> Result<()> {
        let mut table = ServiceReconciler::new(self.programs()?.services());
        let outcome = table.reconcile(&services::frontends(services))?;
        ensure!(outcome.failed.is_empty(), "{:?}", outcome.failed.first());
        Ok(())
    }

    pub(crate) fn programs(&self) -> Result<&Arc<Programs>> {
        self.mesh.as_ref().map(|mesh| &mesh.programs).context("a node without our programs")
    }

    /// Events of connections, as an agent reads them, for as long as this lives.
    pub(crate) fn reader(&self) -> Result<FlowReader> {
        Ok(FlowReader::open(self.programs()?, &self.node.handle(), Settings::default())?)
    }

    /// Load from the client, or from the one outside: see `load.rs`. Names what is measured of it.
    pub(crate) fn measure(
        &mut self,
        outside: bool,
        what: &'static str,
        to: SocketAddr,
        time: Duration,
    ) -> Result<Turn> {
        let before = (self.cpu_micros()?, self.arrived(what)?);
        let role = match (outside, &mut self.outside) {
            (false, _) => Some(&mut self.client),
            (true, elsewhere) => elsewhere.as_mut().map(|outside| &mut outside.role),
        };
        let role = role.context("a world without a client outside")?;
        let numbers = role.ask(&format!("{what} {to} {}", time.as_millis()))?;
        let after = (self.cpu_micros()?, self.arrived(what)?);
        let done = if what == "datagrams" { after.1 - before.1 } else { numbers[0] };
        let (rate, cpu) = (done / numbers[1], (after.0 - before.0) / done);
        Ok(match what {
            "close" => vec![("new connections/s", rate), ("CPU us per new connection", cpu)],
            "keep" => {
                vec![("requests/s on kept connections", rate), ("CPU us per request", cpu)]
            }
            "connect" => vec![("connect, p50, us", numbers[2]), ("connect, p99, us", numbers[3])],
            "stream" => vec![("one stream, MB/s", rate / 1e3), ("CPU us per MB", cpu * 1e3)],
            _ => vec![("datagrams/s that arrive", rate), ("CPU us per datagram", cpu)],
        })
    }

    fn arrived(&mut self, what: &str) -> Result<f64> {
        if what != "datagrams" {
            return Ok(0.0);
        }
        self.backend.ask("arrived").map(|numbers| numbers[0])
    }

    /// What this world's processes have used, with the kernel's work for them, and what this process has: it reads events.
    fn cpu_micros(&self) -> Result<f64> {
        let mut sum = own_cpu()?.as_secs_f64() * 1e6;
        let (outside, far) = (self.outside.as_ref(), self.far.as_ref());
        for lab in [Some(&self.lab), outside.map(|outside| &outside.lab), far.map(|far| &far.lab)] {
            sum += lab.map(cgroup_micros).transpose()?.unwrap_or_default();
        }
        Ok(sum)
    }
}

/// Processor time of this process.
pub(crate) fn own_cpu() -> Result<Duration> {
    let own = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF)?;
    let time = |time: nix::sys::time::TimeVal| {
        Duration::from_secs(time.tv_sec().unsigned_abs())
            + Duration::from_micros(time.tv_usec().unsigned_abs())
    };
    Ok(time(own.user_time()) + time(own.system_time()))
}

fn cgroup_micros(lab: &Lab) -> Result<f64> {
    let text = std::fs::read_to_string(lab.cgroup.join("cpu.stat"));
    let text = text.context("read the cgroup's processor time")?;
    let used = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
    Ok(used.context("no processor time")?.parse()?)
}

/// A cable between two namespaces.
pub(crate) fn link(node: &Net, device: &str, address: &str, other: &Net, other_address: &str) {
    node.ip(&format!(
        "link add {device} type veth peer name eth0 netns {}",
        other.path().display()
    ));
    for (net, device, address) in [(node, device, address), (other, "eth0", other_address)] {
        net.ip(&format!("addr add {address} dev {device}"));
        net.ip(&format!("link set {device} up"));
    }
}

/// Ports do not run out, and queues are long.
fn tune(net: &Net) -> Result<()> {
    net.run(|| {
        [
            ("net/ipv4/ip_local_port_range", "1024 65535"),
            ("net/ipv4/tcp_tw_reuse", "1"),
            ("net/core/somaxconn", "4096"),
            ("net/ipv4/tcp_max_syn_backlog", "4096"),
        ]
        .into_iter()
        .try_for_each(|(name, value)| mesh_kernel::sysctl::write(name, value))
    })?;
    Ok(())
}
