//! The same for policies: from a changed NetworkPolicy, pod or Namespace to the maps that the programs ask, with a thousand
//! policies and ten thousand identities in the cluster.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use mesh_kernel::bpf::MapError;
use mesh_kernel::pods::{FakePodNetwork, PodPort};
use mesh_kernel::policy::{FakePolicyTable, PolicyTable, Step, Tables};
use mesh_kernel::{IfName, LoadOptions, PodNetwork as _, Programs};
use mesh_model::{ClusterConfig, Objects, compile};
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

use super::super::{ClusterPods, Desk, Stores, follow};
use super::{Hand, Lab, PATIENCE, by_hand, bytes, empty, percentiles};
use crate::board::Board;
use crate::reconcile::drive;
use crate::reconcile::policy::{Policies, Policy};
use crate::saved::Saved;

/// A cluster where each pod has a label of its own that policies speak of.
#[derive(Clone, Copy)]
struct Size {
    namespaces: u32,
    /// In each namespace.
    pods: u32,
    policies: u32,
    /// Pods of each namespace that are on the node.
    own: u32,
}

/// 10,000 pods, each somebody else; 1,000 policies; 100 pods on the node.
const LARGE: Size = Size { namespaces: 20, pods: 500, policies: 50, own: 5 };
const SMALL: Size = Size { namespaces: 3, pods: 8, policies: 4, own: 2 };

impl Size {
    fn address(self, namespace: u32, pod: u32) -> Ipv4Addr {
        let (node, place) = match pod.checked_sub(self.pods) {
            None if pod < self.own => (0, namespace * self.own + pod),
            None => {
                let n = namespace * self.pods + pod;
                // A hundred pods to a node.
                (1 + n / 100, n % 100)
            }
            Some(new) => (200 + namespace, new),
        };
        Ipv4Addr::from_bits(0x0af4_0000 + (node << 8) + 2 + place)
    }

    /// Half of the tiers have pods here, and the policies of half of the tiers apply here.
    fn tiers(self) -> u32 {
        2 * self.own
    }

    fn teams(self) -> u32 {
        self.own.min(4)
    }

    fn pod(self, namespace: u32, pod: u32, group: u32) -> Value {
        let node = if pod < self.own { "n0".to_owned() } else { format!("n{}", 1 + pod / 100) };
        json!({
            "metadata": {"namespace": format!("ns{namespace}"), "name": format!("p{pod}"),
                "labels": {"app": format!("a{pod}"), "tier": format!("t{}", pod % self.tiers()), "group": format!("g{group}")}},
            "spec": {"nodeName": node, "containers": [{"name": "c"}]},
            "status": {"phase": "Running", "podIP": self.address(namespace, pod)},
        })
    }

    /// A tier may hear a group of the namespace, a pod of each namespace of a team, and addresses. `variant` says which group.
    fn policy(self, namespace: u32, policy: u32, variant: u32) -> Value {
        let from = json!([
            {"podSelector": {"matchLabels": {"group": format!("g{}", (policy + variant) % 50)}}},
            {"namespaceSelector": {"matchLabels": {"team": format!("team{}", policy % self.teams())}},
             "podSelector": {"matchLabels": {"app": format!("a{policy}")}}},
            {"ipBlock": {"cidr": format!("198.51.{}.0/24", policy % 20)}},
        ]);
        json!({
            "metadata": {"namespace": format!("ns{namespace}"), "name": format!("l{policy}")},
            "spec": {"podSelector": {"matchLabels": {"tier": format!("t{}", policy % self.tiers())}},
                     "ingress": [{"from": from, "ports": [{"port": 8000 + policy}]}]},
        })
    }

    fn namespace(namespace: u32, team: u32) -> Value {
        json!({"metadata": {"name": format!("ns{namespace}"), "labels": {"team": format!("team{team}")}}})
    }

    fn each(self, count: u32) -> impl Iterator<Item = (u32, u32)> {
        (0..self.namespaces).flat_map(move |namespace| (0..count).map(move |n| (namespace, n)))
    }
}

/// A table that tells when a round has written something.
struct Told<T> {
    table: Arc<T>,
    written: watch::Sender<u64>,
    unsaid: AtomicU64,
}

impl<T> Told<T> {
    fn new(table: Arc<T>) -> (Self, watch::Receiver<u64>) {
        let (written, receiver) = watch::channel(0);
        (Self { table, written, unsaid: Default::default() }, receiver)
    }
}

impl<T: PolicyTable> PolicyTable for Told<T> {
    fn observe(&self) -> Result<Tables, MapError> {
        self.table.observe()
    }

    /// The end of a round.
    fn holds(&self, tables: &Tables) {
        self.table.holds(tables);
        let count = self.unsaid.swap(0, Ordering::Relaxed);
        if count > 0 {
            self.written.send_modify(|all| *all += count);
        }
    }

    fn apply(&self, step: &Step) -> Result<(), MapError> {
        self.unsaid.fetch_add(1, Ordering::Relaxed);
        self.table.apply(step)
    }
}

/// The agent from its caches to the policy tables, and the hands that feed it.
struct Rig {
    size: Size,
    own: Hand<Pod>,
    pods: Hand<Pod>,
    namespaces: Hand<Namespace>,
    policies: Hand<NetworkPolicy>,
    written: watch::Receiver<u64>,
    tasks: Vec<AbortHandle>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

fn node() -> Vec<u8> {
    bytes(&json!({"metadata": {"name": "n0"}, "spec": {"podCIDR": "10.244.0.0/24"},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}}))
}

fn port(name: &str, address: Ipv4Addr) -> PodPort {
    let container = name.replace('/', "-");
    PodPort {
        netns: "/proc/self/ns/net".into(),
        interface: "eth0".parse().unwrap(),
        host_interface: IfName::for_pod(&container, "eth0"),
        owner: format!("{container}/eth0 {address} - {name}"),
        v4: Some(address),
        v6: None,
        mtu: 1420,
        mac: None,
        ports: vec![],
        bandwidth: Default::default(),
    }
}

impl Rig {
    fn start<T: PolicyTable + 'static>(table: Arc<T>, saved: &Path, size: Size) -> Self {
        let news = Arc::new(Notify::new());
        let (nodes, mut node_hand) = by_hand::<Node>(&news);
        let (namespaces, mut namespace_hand) = by_hand::<Namespace>(&news);
        let (own, mut own_hand) = by_hand::<Pod>(&news);
        let (everybody, mut pod_hand) = by_hand::<Pod>(&news);
        let (network_policies, mut policy_hand) = by_hand::<NetworkPolicy>(&news);
        let stores = Stores {
            nodes,
            namespaces,
            pods: own,
            services: empty(&news),
            endpoint_slices: empty(&news),
            config_maps: empty(&news),
            secrets: empty(&news),
            ingresses: empty(&news),
            network_policies,
            news,
        };
        let pods = |count| size.each(count).map(move |(ns, n)| bytes(&size.pod(ns, n, n % 50)));
        node_hand.list(vec![node()]);
        let teams = (0..size.namespaces).map(|n| bytes(&Size::namespace(n, n % size.teams())));
        namespace_hand.list(teams.collect());
        own_hand.list(pods(size.own).collect());
        pod_hand.list(pods(size.pods).collect());
        let policies = size.each(size.policies).map(|(ns, n)| bytes(&size.policy(ns, n, 0)));
        policy_hand.list(policies.collect());
        let network = FakePodNetwork::new();
        for (ns, n) in size.each(size.own) {
            network.attach(&port(&format!("ns{ns}/p{n}"), size.address(ns, n))).unwrap();
        }
        let (desired, receiver) = watch::channel(None);
        let (table, written) = Told::new(table);
        let policies = Policies::new(table, receiver.clone(), Board::default());
        let concern = Policy { policies, pods: Arc::new(network) };
        let driving = tokio::spawn(drive(concern, receiver, Board::default()));
        let (_, saved) = Saved::load(saved.join("snapshot.json"));
        let desk = Desk::new("n0".parse().unwrap(), saved, desired);
        let everybody = Mutex::new(Some(everybody));
        let watching = tokio::spawn(std::future::pending::<()>()).abort_handle();
        let tasks = vec![driving.abort_handle(), watching.clone()];
        let following = tokio::spawn(async move {
            let everybody = |_: &Arc<Notify>| {
                let cache = everybody.lock().unwrap().take().expect("asked for once");
                ClusterPods(cache, watching.clone())
            };
            follow(stores, desk, &ClusterConfig::default(), everybody).await;
        });
        let tasks = tasks.into_iter().chain([following.abort_handle()]).collect();
        Self {
            size,
            own: own_hand,
            pods: pod_hand,
            namespaces: namespace_hand,
            policies: policy_hand,
            written,
            tasks,
        }
    }

    /// Waits until the tables follow from the lists. Returns the number of entries.
    async fn listed(&mut self) -> u64 {
        let written = self.written.wait_for(|count| *count > 0);
        *tokio::time::timeout(PATIENCE, written).await.expect("the table follows").unwrap()
    }

    /// Carries out a change, and returns how long it took until the tables followed, and what that wrote.
    async fn follows(&mut self, change: impl FnOnce(&mut Self)) -> (Duration, u64) {
        let before = *self.written.borrow_and_update();
        let begun = Instant::now();
        change(self);
        let written = tokio::time::timeout(PATIENCE, self.written.changed()).await;
        written.expect("the table follows").unwrap();
        (begun.elapsed(), *self.written.borrow() - before)
    }

    /// The `n`th change of its sort, each time of another object.
    fn change(&mut self, sort: Sort, n: u32) {
        let size = self.size;
        let (namespace, turn) = (n % size.namespaces, n / size.namespaces);
        // Those of other nodes come after the node's own.
        let other = |n: u32| size.own + n % (size.pods - size.own);
        match sort {
            Sort::Policy => {
                // One that applies here.
                let policy = turn / size.own * size.tiers() + turn % size.own;
                let (policy, variant) = (policy % size.policies, 1 + turn);
                self.policies.update(&bytes(&size.policy(namespace, policy, variant)));
            }
            Sort::Labels => {
                let pod = other(turn);
                let group = (pod + 1 + turn / size.pods) % 50;
                self.pods.update(&bytes(&size.pod(namespace, pod, group)));
            }
            Sort::Pod => self.pods.update(&bytes(&size.pod(namespace, size.pods + turn, HEARD))),
            Sort::Namespace => {
                let team = (namespace + 1 + turn) % size.teams();
                self.namespaces.update(&bytes(&Size::namespace(namespace, team)));
            }
        }
    }
}

/// The group that the first policy lets in once it has changed.
const HEARD: u32 = 1;

#[derive(Debug, Clone, Copy)]
enum Sort {
    Policy,
    Labels,
    Pod,
    Namespace,
}

const SORTS: [(Sort, &str); 4] = [
    (Sort::Policy, "a policy changes"),
    (Sort::Labels, "a pod's labels change"),
    (Sort::Pod, "a pod appears"),
    (Sort::Namespace, "a namespace's labels change"),
];

/// Carries out some changes of each sort, one by one, and hands on what each took and wrote.
async fn one_by_one(rig: &mut Rig, count: u32, mut told: impl FnMut(&str, Vec<(Duration, u64)>)) {
    for (sort, name) in SORTS {
        let mut took = vec![];
        for n in 0..count {
            took.push(rig.follows(|rig| rig.change(sort, n)).await);
        }
        told(name, took);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_reaches_the_policy_table() {
    let dir = tempfile::tempdir().unwrap();
    let table = Arc::new(FakePolicyTable::new());
    let mut rig = Rig::start(Arc::clone(&table), dir.path(), SMALL);
    rig.listed().await;
    one_by_one(&mut rig, 12, |_, _| {}).await;
    let objects = Objects {
        nodes: vec![Arc::new(serde_json::from_slice(&node()).unwrap())],
        namespaces: rig.namespaces.writer.as_reader().state(),
        pods: rig.own.writer.as_reader().state(),
        cluster_pods: rig.pods.writer.as_reader().state(),
        network_policies: rig.policies.writer.as_reader().state(),
        ..Objects::default()
    };
    let anew = compile(&objects, &"n0".parse().unwrap()).policy;
    let (found, wanted) = (table.tables(), Tables::wanted(&anew, &BTreeMap::new(), &[]));
    assert!(found.rules == wanted.rules && found.blocks == wanted.blocks);
    assert_eq!(found.identities, wanted.identities);
    assert_eq!(found.pods.len(), 6);
    let (saved, _) = Saved::load(dir.path().join("snapshot.json"));
    assert_eq!(saved.unwrap().policy, anew);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: cargo xtask bench scale"]
async fn figures() {
    let (lab, dir) = (Lab::new("policies"), tempfile::tempdir().unwrap());
    let options = LoadOptions::new(lab.mount.path().join("mesh"), &lab.cgroup);
    let programs = Programs::open_or_load(&options).unwrap();
    let begun = Instant::now();
    let mut rig = Rig::start(Arc::new(programs.policy()), dir.path(), LARGE);
    let decoded = begun.elapsed();
    let entries = rig.listed().await;
    let all = begun.elapsed() - decoded;
    println!(
        "{} policies, {} pods that differ, {} of them here: {decoded:.2?} to decode the lists, {all:.2?} from there to the maps ({entries} entries)",
        LARGE.namespaces * LARGE.policies,
        LARGE.namespaces * LARGE.pods,
        LARGE.namespaces * LARGE.own,
    );
    one_by_one(&mut rig, 300, |name, took| {
        let (took, written): (Vec<Duration>, Vec<u64>) = took.into_iter().unzip();
        let mean = written.iter().sum::<u64>() as f64 / written.len() as f64;
        println!("  {name}: {}; {mean:.0} map operations", percentiles(took));
    })
    .await;
}
