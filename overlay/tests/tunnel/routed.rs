//! Three nodes with a pod each, every one behind a router of its own; gone when dropped.
//!
//! ```text
//!   pod n          node n                     router n                      net
//!   eth0 -- pod0 [ forwards ] ul0 -------- in0 [ routes, or NAT ] up0 ---- bridge
//!   10.7n.0.2      mesh-wg    10.1.n.2   10.1.n.1                 198.51.100.n
//!   fd7n::2                   fd01:n::2  fd01:n::1                fd00:b::n
//! ```

use std::fs::File;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use mesh_overlay::{NodeKey, Overlay, OverlayConfig, PeerConfig, PeerStatus, Status};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::traffic::{LIMIT, Stream};
use crate::world::{engine, inside};

pub(crate) const NODES: [u8; 3] = [1, 2, 3];
/// What all cables carry at first.
const CABLE: u16 = 9000;

/// What a router does to what its node sends.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Nat {
    /// A node's port is the same for everybody.
    Plain,
    /// It is another one for each destination.
    Symmetric,
}

pub(crate) struct Routed {
    prefix: String,
    files: tempfile::TempDir,
    workers: Vec<Child>,
    runtime: tokio::runtime::Runtime,
}

impl Routed {
    pub(crate) fn new(device_mtu: u16) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("mro{}-{count}-", std::process::id());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let files = tempfile::tempdir().unwrap();
        let mut world = Self { prefix, files, workers: vec![], runtime };
        for name in world.namespaces() {
            let output = Command::new("ip").args(["netns", "add", &name]).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        world.ip("net", "link set lo up\nlink add br0 type bridge\nlink set br0 mtu 9000 up");
        // A bridge that filters cuts up what is too large for a port, and even IPv6.
        for family in ["ip", "ip6"] {
            let setting = format!("net/bridge/bridge-nf-call-{family}tables");
            if Path::new("/proc/sys").join(&setting).exists() {
                world.sysctl("net", &[&setting], "0");
            }
        }
        for n in NODES {
            world.build(n, device_mtu);
        }
        for n in NODES {
            world.launch(n);
        }
        for n in NODES {
            let begun = Instant::now();
            while world.try_status(n).is_none() {
                assert!(begun.elapsed() < LIMIT, "the worker of node {n} never answered");
                std::thread::sleep(Duration::from_millis(10));
            }
            for other in NODES.into_iter().filter(|other| *other != n) {
                let route = |block: String| format!("route add {block} dev mesh-wg\n");
                let routes = [format!("10.7{other}.0.0/24"), format!("fd7{other}::/64")];
                let lines = format!("link set mesh-wg up\n{}", routes.map(route).concat());
                world.ip(&node(n), &lines);
            }
        }
        world
    }

    fn build(&self, n: u8, device_mtu: u16) {
        let (node, router) = (node(n), router(n));
        let (in_node, in_router) = (self.name(&node), self.name(&router));
        self.ip(
            "net",
            &format!(
                "link add p{n} mtu {CABLE} type veth peer name up0 mtu {CABLE} netns {in_router}\n\
             link set p{n} master br0 up"
            ),
        );
        let routes: String = NODES.into_iter().filter(|m| *m != n).map(|m| format!(
            "route add 10.1.{m}.0/24 via 198.51.100.{m}\nroute add fd01:{m}::/64 via fd00:b::{m}\n"
        )).collect();
        self.sysctl(&router, &["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"], "1");
        self.ip(&router, &format!(
            "link set lo up\naddr add 198.51.100.{n}/24 dev up0\naddr add fd00:b::{n}/64 dev up0 nodad\n\
             link set up0 up\n\
             link add in0 mtu {CABLE} type veth peer name ul0 mtu {CABLE} netns {in_node}\n\
             addr add 10.1.{n}.1/24 dev in0\naddr add fd01:{n}::1/64 dev in0 nodad\nlink set in0 up\n{routes}"
        ));
        let pod = format!("pod{n}");
        let in_pod = self.name(&pod);
        self.sysctl(&node, &["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"], "1");
        self.ip(&node, &format!(
            "link set lo up\naddr add 10.1.{n}.2/24 dev ul0\naddr add fd01:{n}::2/64 dev ul0 nodad\n\
             link set ul0 up\nroute add default via 10.1.{n}.1\nroute add default via fd01:{n}::1\n\
             link add pod0 mtu {device_mtu} type veth peer name eth0 mtu {device_mtu} netns {in_pod}\n\
             addr add 10.7{n}.0.1/24 dev pod0\naddr add fd7{n}::1/64 dev pod0 nodad\nlink set pod0 up"
        ));
        self.ip(&pod, &format!(
            "link set lo up\naddr add 10.7{n}.0.2/24 dev eth0\naddr add fd7{n}::2/64 dev eth0 nodad\n\
             link set eth0 up\nroute add default via 10.7{n}.0.1\nroute add default via fd7{n}::1"
        ));
    }

    fn launch(&mut self, n: u8) {
        let file = |kind: &str| self.files.path().join(format!("{n}.{kind}"));
        let log = File::options().create(true).append(true).open(file("log")).unwrap();
        let child = Command::new("ip")
            .args(["netns", "exec", &self.name(&node(n))])
            .arg(engine())
            .args([file("sock"), file("json"), "mesh-wg".into(), file("key")])
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.workers.push(child);
    }

    /// The worker of node `n` stands still meanwhile.
    pub(crate) fn while_stopped<T>(&self, n: u8, body: impl FnOnce() -> T) -> T {
        let worker = Pid::from_raw(self.workers[usize::from(n) - 1].id().cast_signed());
        kill(worker, Signal::SIGSTOP).unwrap();
        let result = body();
        kill(worker, Signal::SIGCONT).unwrap();
        result
    }

    /// Translates all that node `n` sends, and lets nothing in that it has not asked for.
    pub(crate) fn put_behind(&self, n: u8, nat: Nat) {
        let random = match nat {
            Nat::Plain => "",
            Nat::Symmetric => "random,fully-random",
        };
        self.nft(&router(n), &format!(
            "table ip nat {{ \
               chain out {{ type nat hook postrouting priority 100; oifname up0 masquerade {random}; }}; \
               chain through {{ type filter hook forward priority 0; iifname up0 ct state new drop; }}; \
             }}"
        ));
    }

    /// How long the router of a node remembers what it translates.
    pub(crate) fn forgets_after(&self, n: u8, secs: u32) {
        let settings = ["nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"];
        let settings = settings.map(|name| format!("net/netfilter/{name}"));
        self.sysctl(&router(n), &settings.each_ref().map(String::as_str), &secs.to_string());
    }

    /// The router gets another address and forgets all that it has translated.
    pub(crate) fn renumber(&self, n: u8, from: u8, to: u8) {
        let routes = NODES
            .into_iter()
            .filter(|m| *m != n)
            .map(|m| format!("route replace 10.1.{m}.0/24 via 198.51.100.{m}\n"));
        self.ip(
            &router(n),
            &format!(
                "addr del 198.51.100.{from}/24 dev up0\naddr add 198.51.100.{to}/24 dev up0\n{}",
                routes.collect::<String>()
            ),
        );
    }

    pub(crate) fn nft(&self, namespace: &str, rules: &str) {
        let output = Command::new("ip")
            .args(["netns", "exec", &self.name(namespace), "nft", rules])
            .output()
            .unwrap();
        assert!(output.status.success(), "{rules}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn sysctl(&self, namespace: &str, names: &[&str], value: &str) {
        inside(&self.name(namespace), || {
            for name in names {
                std::fs::write(format!("/proc/sys/{name}"), value).unwrap();
            }
        });
    }

    pub(crate) fn key(&self, n: u8) -> NodeKey {
        NodeKey::load_or_create(&self.files.path().join(format!("{n}.key"))).unwrap()
    }

    /// Where a node's own address is.
    pub(crate) fn endpoint(n: u8, v6: bool) -> SocketAddr {
        let ip = if v6 { format!("fd01:{n}::2") } else { format!("10.1.{n}.2") };
        SocketAddr::new(ip.parse().unwrap(), 51900)
    }

    /// The other two nodes, the lower number first.
    pub(crate) fn config(&self, n: u8, mtu: u16, v6: bool) -> OverlayConfig {
        let peer = |m: u8| PeerConfig {
            public_key: self.key(m).public(),
            endpoints: vec![Self::endpoint(m, v6)],
            relay: None,
            allowed_ips: vec![
                format!("10.7{m}.0.0/24").parse().unwrap(),
                format!("fd7{m}::/64").parse().unwrap(),
            ],
            persistent_keepalive_secs: None,
            preshared_key: None,
            former_preshared_key: None,
            keys: vec![],
        };
        let others = NODES.into_iter().filter(|m| *m != n);
        OverlayConfig {
            listen_port: 51900,
            mtu,
            peers: others.map(peer).collect(),
            own_keys: vec![],
        }
    }

    pub(crate) fn configure(&self, n: u8, config: &OverlayConfig) {
        self.runtime.block_on(self.overlay(n).configure(config)).unwrap();
    }

    pub(crate) fn status(&self, n: u8) -> Status {
        self.try_status(n).expect("the worker answers")
    }

    /// What node `n` knows about node `m`.
    pub(crate) fn peer(&self, n: u8, m: u8) -> PeerStatus {
        let key = self.key(m).public();
        let mut peers = self.status(n).peers.into_iter();
        peers.find(|peer| peer.public_key == key).expect("a configured peer")
    }

    fn try_status(&self, n: u8) -> Option<Status> {
        self.runtime.block_on(self.overlay(n).status()).ok()
    }

    fn overlay(&self, n: u8) -> Overlay {
        Overlay::user(self.files.path().join(format!("{n}.sock")))
    }

    pub(crate) fn pod(n: u8, v6: bool) -> IpAddr {
        if v6 { format!("fd7{n}::2") } else { format!("10.7{n}.0.2") }.parse().unwrap()
    }

    /// A stream from the pod of one node to that of another.
    pub(crate) fn stream(&self, from: u8, to: u8, v6: bool, port: u16) -> Stream {
        let at = SocketAddr::new(Self::pod(to, v6), port);
        Stream::between(self.name(&format!("pod{from}")), &self.name(&format!("pod{to}")), at)
    }

    pub(crate) fn name(&self, namespace: &str) -> String {
        format!("{}{namespace}", self.prefix)
    }

    /// Lines for ip(8) in a namespace.
    pub(crate) fn ip(&self, namespace: &str, lines: &str) {
        let mut child = Command::new("ip")
            .args(["-n", &self.name(namespace), "-batch", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "in {namespace}: {lines}\n{errors}");
    }

    fn namespaces(&self) -> Vec<String> {
        let of = |n: u8| [format!("pod{n}"), node(n), router(n)];
        let names = NODES.into_iter().flat_map(of).chain(["net".to_owned()]);
        names.map(|name| self.name(&name)).collect()
    }
}

impl Drop for Routed {
    fn drop(&mut self) {
        for child in &mut self.workers {
            let _ = child.kill();
            let _ = child.wait();
        }
        for name in self.namespaces() {
            let _ = Command::new("ip").args(["netns", "del", &name]).status();
        }
        if std::thread::panicking() {
            for n in NODES {
                let log = self.files.path().join(format!("{n}.log"));
                eprintln!("node {n}:\n{}", std::fs::read_to_string(log).unwrap_or_default());
            }
        }
    }
}

pub(crate) fn node(n: u8) -> String {
    format!("node{n}")
}

pub(crate) fn router(n: u8) -> String {
    format!("router{n}")
}

/// Waits until something is so.
pub(crate) fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < LIMIT, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(10));
    }
}
