//! From an object that the API sends to what the kernel's maps hold, at the size of a large cluster: everything but the network
//! between. `cargo xtask bench scale` prints the figures.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Resource;
use kube::runtime::reflector::{self, store::Writer};
use kube::runtime::watcher::Event;
use mesh_kernel::services::{FakeServiceTable, ServiceTable};
use mesh_kernel::{LoadOptions, Programs};
use mesh_model::{Objects, compile};
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;

use super::{Cache, Changed, Desk, Stores, follow};
use crate::board::Board;
use crate::reconcile::drive;
use crate::reconcile::services::Services;
use crate::saved::Saved;

mod policies;
mod pushes;

const CONCERN: &str = "services";
/// Long enough that only a hang exceeds it.
const PATIENCE: Duration = Duration::from_secs(300);

/// What the API would send.
struct Cluster {
    services: u32,
    endpoints: u32,
    revision: u64,
}

fn bytes(value: &Value) -> Vec<u8> {
    serde_json::to_vec(value).unwrap()
}

impl Cluster {
    fn node(&self) -> Vec<u8> {
        bytes(&json!({"metadata": {"name": "n0"}, "spec": {"podCIDR": "10.0.0.0/24"},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}}))
    }

    fn service(&self, n: u32) -> Vec<u8> {
        let ip = std::net::Ipv4Addr::from_bits(0x0a60_0001 + n);
        bytes(
            &json!({"metadata": {"namespace": "default", "name": format!("s{n:05}"), "resourceVersion": "1"},
            "spec": {"clusterIP": ip, "clusterIPs": [ip], "selector": {"app": format!("s{n:05}")},
                     "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}]}}),
        )
    }

    /// The slice of a service; with each call it is newer, and another of its endpoints is replaced by the `other`th.
    fn slice(&mut self, n: u32, other: u32) -> (u64, Vec<u8>) {
        self.revision += 1;
        let endpoint = |i: u32| {
            let replaced =
                if other > 0 && i == other % self.endpoints { 1 << 23 | other } else { 0 };
            let ip = std::net::Ipv4Addr::from_bits(0x0a00_0100 + n * self.endpoints + i + replaced);
            json!({"addresses": [ip], "nodeName": format!("n{}", i % 500),
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "targetRef": {"kind": "Pod", "namespace": "default", "name": format!("s{n:05}-{i}"),
                              "uid": format!("00000000-0000-4000-8000-{:012}", n * self.endpoints + i)}})
        };
        let endpoints: Vec<Value> = (0..self.endpoints).map(endpoint).collect();
        let slice = json!({"metadata": {"namespace": "default", "name": format!("s{n:05}-a"),
                "resourceVersion": self.revision.to_string(), "labels": {"kubernetes.io/service-name": format!("s{n:05}")}},
            "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints});
        (self.revision, bytes(&slice))
    }
}

/// A cache that is written to by hand, as the watch would.
fn by_hand<K>(news: &Arc<Notify>) -> (Cache<K>, Hand<K>)
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    let (store, writer) = reflector::store();
    let cache = Cache { store, changed: Changed::new(news) };
    let changed = cache.changed.clone();
    (cache, Hand { writer, changed })
}

struct Hand<K: Resource<DynamicType = ()> + Clone + 'static> {
    writer: Writer<K>,
    changed: Changed,
}

impl<K: Resource<DynamicType = ()> + Clone + serde::de::DeserializeOwned + 'static> Hand<K> {
    fn list(&mut self, objects: Vec<Vec<u8>>) {
        self.writer.apply_watcher_event(&Event::Init);
        for object in objects {
            let object = serde_json::from_slice(&object).unwrap();
            self.writer.apply_watcher_event(&Event::InitApply(object));
        }
        self.writer.apply_watcher_event(&Event::InitDone);
        self.changed.tell();
    }

    fn update(&mut self, object: &[u8]) {
        let object = serde_json::from_slice(object).unwrap();
        self.writer.apply_watcher_event(&Event::Apply(object));
        self.changed.tell();
    }
}

/// A cache of a kind of which there is nothing.
fn empty<K>(news: &Arc<Notify>) -> Cache<K>
where
    K: Resource<DynamicType = ()> + Clone + serde::de::DeserializeOwned + 'static,
{
    let (cache, mut hand) = by_hand(news);
    hand.list(vec![]);
    cache
}

/// The agent from its caches to the service table, and the hands that feed it.
struct Rig {
    slices: Hand<EndpointSlice>,
    board: Board,
    tasks: Vec<AbortHandle>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

impl Rig {
    /// Lists everything. Returns how long decoding took.
    fn start<T: ServiceTable + 'static>(
        table: T,
        saved: &Path,
        cluster: &mut Cluster,
    ) -> (Self, Duration) {
        let news = Arc::new(Notify::new());
        let (nodes, mut node_hand) = by_hand::<Node>(&news);
        let (services, mut service_hand) = by_hand::<Service>(&news);
        let (endpoint_slices, mut slices) = by_hand::<EndpointSlice>(&news);
        let stores = Stores {
            nodes,
            namespaces: empty(&news),
            pods: empty(&news),
            services,
            endpoint_slices,
            config_maps: empty(&news),
            secrets: empty(&news),
            ingresses: empty(&news),
            network_policies: empty(&news),
            news,
        };
        let objects: Vec<_> = (0..cluster.services).map(|n| cluster.service(n)).collect();
        let all_slices: Vec<_> = (0..cluster.services).map(|n| cluster.slice(n, 0).1).collect();
        let begun = Instant::now();
        node_hand.list(vec![cluster.node()]);
        service_hand.list(objects);
        slices.list(all_slices);
        let decoded = begun.elapsed();
        let (desired, receiver) = watch::channel(None);
        let board = Board::default();
        // Nobody ends sockets here.
        let (gone, _departed) = mpsc::unbounded_channel();
        let driving =
            tokio::spawn(drive(Services::new(table, gone, board.clone()), receiver, board.clone()));
        let (_, saved) = Saved::load(saved.join("snapshot.json"));
        let desk = Desk::new("n0".parse().unwrap(), saved, desired);
        let following = tokio::spawn(async move {
            follow(stores, desk, &mesh_model::ClusterConfig::default(), |_| unreachable!()).await;
        });
        let tasks = vec![driving.abort_handle(), following.abort_handle()];
        (Self { slices, board, tasks }, decoded)
    }

    /// When the table followed from that revision.
    async fn programmed(&self, revision: u64) {
        let mut standings = self.board.subscribe();
        let there = standings.wait_for(|board| {
            board.get(CONCERN).is_some_and(|standing| standing.revision >= Some(revision))
        });
        drop(tokio::time::timeout(PATIENCE, there).await.expect("the table follows").unwrap());
    }
}

/// Changes one endpoint after the other, each when the one before is in the table.
async fn one_by_one(rig: &mut Rig, cluster: &mut Cluster, count: u32) -> Vec<Duration> {
    let mut took = vec![];
    for round in 1..=count {
        let (revision, slice) = cluster.slice(round * 37 % cluster.services, round);
        let begun = Instant::now();
        rig.slices.update(&slice);
        rig.programmed(revision).await;
        took.push(begun.elapsed());
    }
    took
}

/// Changes a hundred endpoints in each second, whatever becomes of them.
async fn in_a_row(rig: &mut Rig, cluster: &mut Cluster, secs: u32) -> Vec<Duration> {
    let sent: Arc<Mutex<BTreeMap<u64, Instant>>> = Arc::default();
    let (waiting, mut standings) = (Arc::clone(&sent), rig.board.subscribe());
    let count = (secs * 100) as usize;
    let watching = tokio::spawn(async move {
        let mut took = vec![];
        while took.len() < count {
            standings.changed().await.unwrap();
            let revision =
                standings.borrow_and_update().get(CONCERN).and_then(|s| s.revision).unwrap_or(0);
            let mut waiting = waiting.lock().unwrap();
            let later = waiting.split_off(&(revision + 1));
            took.extend(
                std::mem::replace(&mut *waiting, later).into_values().map(|at| at.elapsed()),
            );
        }
        took
    });
    let mut ticks = tokio::time::interval(Duration::from_millis(10));
    for round in 1..=secs * 100 {
        ticks.tick().await;
        let (revision, slice) = cluster.slice(round * 41 % cluster.services, round);
        sent.lock().unwrap().insert(revision, Instant::now());
        rig.slices.update(&slice);
    }
    tokio::time::timeout(PATIENCE, watching).await.expect("the table follows").unwrap()
}

fn percentiles(mut all: Vec<Duration>) -> String {
    all.sort();
    let at = |percent: usize| all[(all.len() * percent / 100).min(all.len() - 1)];
    format!("p50 {:.1?}, p99 {:.1?}, longest {:.1?}", at(50), at(99), all[all.len() - 1])
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_reaches_the_table() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster { services: 20, endpoints: 3, revision: 0 };
    let table = FakeServiceTable::new();
    let (mut rig, _) = Rig::start(table.clone(), dir.path(), &mut cluster);
    rig.programmed(cluster.revision).await;
    assert_eq!(table.observe().unwrap().slots.len(), 60);
    one_by_one(&mut rig, &mut cluster, 5).await;
    in_a_row(&mut rig, &mut cluster, 1).await;
    rig.programmed(cluster.revision).await;
    let observed = table.observe().unwrap();
    assert_eq!(
        (observed.entries.len(), observed.slots.len(), observed.members.len()),
        (20, 60, 60)
    );
    let (saved, _) = Saved::load(dir.path().join("snapshot.json"));
    assert_eq!(saved.unwrap().revision, cluster.revision);
}

/// A BPF file system and a cgroup that go away with it.
struct Lab {
    mount: tempfile::TempDir,
    cgroup: std::path::PathBuf,
}

impl Lab {
    fn new(name: &str) -> Self {
        let mount = tempfile::tempdir().unwrap();
        let root = mesh_kernel::bpf::cgroup2_mount().expect("a cgroup v2 hierarchy");
        let cgroup = root.join(format!("mesh-scale-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&cgroup).unwrap();
        mesh_kernel::bpf::ensure_mounted(mount.path()).unwrap();
        Self { mount, cgroup }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = mesh_kernel::bpf::detach_all(&self.mount.path().join("mesh"));
        let _ = nix::mount::umount2(self.mount.path(), nix::mount::MntFlags::MNT_DETACH);
        let _ = std::fs::remove_dir(&self.cgroup);
    }
}

/// What a change costs that has everything made and saved anew.
fn from_nothing(services: u32, endpoints: u32, dir: &Path) -> (Duration, Duration) {
    fn parse<K: serde::de::DeserializeOwned>(bytes: &[u8]) -> Arc<K> {
        Arc::new(serde_json::from_slice(bytes).unwrap())
    }
    let mut cluster = Cluster { services, endpoints, revision: 0 };
    let objects = Objects {
        nodes: vec![parse(&cluster.node())],
        services: (0..services).map(|n| parse(&cluster.service(n))).collect(),
        endpoint_slices: (0..services).map(|n| parse(&cluster.slice(n, 0).1)).collect(),
        ..Objects::default()
    };
    let begun = Instant::now();
    let snapshot = Arc::new(compile(&objects, &"n0".parse().unwrap()));
    let compiled = begun.elapsed();
    let (_, mut saved) = Saved::load(dir.join("whole.json"));
    saved.save(&snapshot).unwrap();
    (compiled, begun.elapsed() - compiled)
}

async fn measure(services: u32, endpoints: u32, secs: u32) {
    let (lab, dir) = (Lab::new("services"), tempfile::tempdir().unwrap());
    let mut options = LoadOptions::new(lab.mount.path().join("mesh"), &lab.cgroup);
    options.capacities = mesh_kernel::services::map_capacities(services * endpoints * 2);
    let programs = Programs::open_or_load(&options).unwrap();
    let (compiled, whole) = from_nothing(services, endpoints, dir.path());
    let mut cluster = Cluster { services, endpoints, revision: 0 };
    let begun = Instant::now();
    let (mut rig, decoded) = Rig::start(programs.services(), dir.path(), &mut cluster);
    let listed = begun.elapsed();
    rig.programmed(cluster.revision).await;
    println!(
        "{services} services x {endpoints} endpoints: {decoded:.2?} to decode the lists, {:.2?} from there to the maps",
        begun.elapsed() - listed,
    );
    println!("  of that {compiled:.2?} to compile and {whole:.2?} to save a whole snapshot");
    println!(
        "  one endpoint changes: {}",
        percentiles(one_by_one(&mut rig, &mut cluster, 200).await)
    );
    let cpu = || {
        let usage =
            nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF).unwrap();
        let secs =
            |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
        secs(usage.user_time()) + secs(usage.system_time())
    };
    let before = cpu();
    let took = percentiles(in_a_row(&mut rig, &mut cluster, secs).await);
    let used = (cpu() - before) / f64::from(secs);
    println!("  100 changes/s for {secs} s: {took}; {used:.2} of a CPU");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: cargo xtask bench scale"]
async fn figures() {
    let secs = std::env::var("MESH_SCALE_SECS").ok().and_then(|s| s.parse().ok()).unwrap_or(60);
    measure(5_000, 50, secs).await;
    measure(10_000, 10, secs).await;
}
