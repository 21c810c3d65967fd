use std::path::PathBuf;

use mesh_kernel::IfName;
use mesh_kernel::pods::FakePodNetwork;

use super::journal::FileStorage;
use super::ledger::{Change, Ledger};
use super::*;

/// A namespace that is not the node's: the fake network never enters it.
const NETNS: &str = "/proc/self/ns/uts";

mod kills;
mod succession;

struct Node {
    dir: tempfile::TempDir,
    network: Arc<FakePodNetwork>,
    readiness: watch::Sender<Readiness>,
}

impl Node {
    fn new(block: &str) -> Self {
        let readiness = Readiness {
            blocks: vec![block.parse().unwrap(), "fd00::/64".parse().unwrap()].into(),
            mtu: 1420,
            unavailable: None,
            limited: None,
        };
        Self {
            dir: tempfile::tempdir().unwrap(),
            network: Arc::new(FakePodNetwork::new()),
            readiness: watch::Sender::new(readiness),
        }
    }

    /// A new agent on what the last one left.
    fn agent(&self) -> Cni {
        let storage = FileStorage::new(self.dir.path().join("journal"));
        let (ledger, damaged) = Ledger::open(Box::new(storage), "boot").unwrap();
        assert_eq!(damaged, 0);
        let ledger = LedgerHandle::start(ledger).unwrap();
        let network: Arc<dyn PodNetwork> = Arc::clone(&self.network) as _;
        Cni::new(ledger, network, self.readiness.subscribe(), self.dir.path().to_owned())
    }
}

fn owner(id: &str) -> Owner {
    Owner::new(id, "eth0").unwrap()
}

fn add(id: &str) -> Request {
    Request::Add {
        owner: owner(id),
        netns: PathBuf::from(NETNS),
        pod: None,
        wishes: Wishes { network: "mesh".to_owned(), ..Wishes::default() },
    }
}

fn del(id: &str) -> Request {
    Request::Del { owner: owner(id) }
}

fn check(id: &str, addresses: Vec<std::net::IpAddr>) -> Request {
    Request::Check { owner: owner(id), netns: PathBuf::from(NETNS), addresses }
}

fn code(reply: &Reply) -> u32 {
    match reply {
        Reply::Failed(failure) => failure.code,
        Reply::Done | Reply::Attached(_) => 0,
    }
}

async fn leases(cni: &Cni) -> usize {
    cni.0.ledger.ask(|pool| pool.leases().len()).await.unwrap()
}

#[tokio::test]
async fn add_check_del() {
    let node = Node::new("10.0.0.0/24");
    let cni = node.agent();
    let Reply::Attached(first) = cni.handle(add("a")).await else { panic!("not attached") };
    assert_eq!(first.addresses.len(), 2);
    assert_eq!(first.addresses[0].address.to_string(), "10.0.0.2");
    let addresses = first.addresses.iter().map(|a| a.address).collect::<Vec<_>>();
    assert_eq!(code(&cni.handle(check("a", addresses.clone())).await), 0);

    let again = cni.handle(add("a")).await;
    assert_eq!(code(&again), 101, "a second ADD changes nothing");
    assert_eq!(code(&cni.handle(check("a", addresses.clone())).await), 0);
    assert_eq!(leases(&cni).await, 1);

    node.network.vanish(&IfName::for_pod("a", "eth0"));
    let Reply::Failed(missing) = cni.handle(check("a", addresses)).await else {
        panic!("complete")
    };
    assert_eq!(missing.code, 102);
    assert!(missing.details.contains("does not exist"), "{missing:?}");

    for _ in 0..2 {
        assert_eq!(code(&cni.handle(del("a")).await), 0);
    }
    assert_eq!(code(&cni.handle(check("a", vec![])).await), 102);
    assert_eq!(leases(&cni).await, 0);
}

#[tokio::test]
async fn a_failed_add_gives_its_address_back() {
    let node = Node::new("10.0.0.0/29");
    let cni = node.agent();
    node.network.refuse(true);
    for n in 0..20 {
        assert_eq!(code(&cni.handle(add(&format!("c{n}"))).await), 101);
    }
    node.network.refuse(false);
    for n in 0..5 {
        assert_eq!(code(&cni.handle(add(&format!("c{n}"))).await), 0);
    }
    let Reply::Failed(full) = cni.handle(add("c5")).await else { panic!("six of five") };
    assert_eq!(full.code, 11);
    assert!(full.msg.contains("no IP addresses available"), "{full:?}");
    assert_eq!(code(&cni.handle(Request::Status).await), 50);
    let elsewhere = Request::Add {
        owner: owner("x"),
        netns: "/proc/self/ns/net".into(),
        pod: None,
        wishes: Wishes::default(),
    };
    assert_eq!(code(&cni.handle(elsewhere).await), 8);
}

#[tokio::test]
async fn readiness_decides_about_add_and_status() {
    let node = Node::new("10.0.0.0/24");
    let cni = node.agent();
    assert_eq!(code(&cni.handle(Request::Status).await), 0);
    node.readiness.send_modify(|r| r.limited = Some("no peers".to_owned()));
    assert_eq!(code(&cni.handle(Request::Status).await), 51);
    assert_eq!(code(&cni.handle(add("a")).await), 0);
    node.readiness.send_modify(|r| r.unavailable = Some("starting".to_owned()));
    assert_eq!(code(&cni.handle(Request::Status).await), 50);
    assert_eq!(code(&cni.handle(add("b")).await), 11);
    assert_eq!(code(&cni.handle(del("a")).await), 0, "a release is always possible");
}

#[tokio::test]
async fn the_next_agent_takes_back_what_was_not_finished() {
    let node = Node::new("10.0.0.0/24");
    let cni = node.agent();
    assert_eq!(code(&cni.handle(add("whole")).await), 0);
    let blocks = Arc::clone(&node.readiness.borrow().blocks);
    // Killed between reserve and attach, and between attach and commit.
    for id in ["reserved", "attached"] {
        let change = Change::Reserve(owner(id), Arc::clone(&blocks), Wishes::default());
        let lease = cni.0.ledger.change(change).await.unwrap().unwrap();
        if id == "attached" {
            let text = owner::describe(&owner(id), &lease.addresses, None);
            let port = owner::port(&owner(id), &lease, NETNS.into(), 1420, text).unwrap();
            node.network.attach(&port).unwrap();
        }
    }
    mesh_cni::queue::push(node.dir.path(), &owner("whole")).unwrap();
    drop(cni);

    let cni = node.agent();
    assert_eq!(leases(&cni).await, 3);
    cni.recover().await.unwrap();
    assert_eq!(leases(&cni).await, 0, "two unfinished, one whose release was queued");
    assert!(node.network.ports().is_empty());
    assert!(mesh_cni::queue::list(node.dir.path()).unwrap().is_empty());
}

#[tokio::test]
async fn interfaces_rebuild_a_lost_journal() {
    let node = Node::new("10.0.0.0/29");
    let cni = node.agent();
    for id in ["a", "b"] {
        assert_eq!(code(&cni.handle(add(id)).await), 0);
    }
    drop(cni);
    std::fs::remove_file(node.dir.path().join("journal")).unwrap();
    let cni = node.agent();
    cni.recover().await.unwrap();
    assert_eq!(leases(&cni).await, 2);
    for id in ["c", "d", "e"] {
        assert_eq!(code(&cni.handle(add(id)).await), 0);
    }
    assert_eq!(code(&cni.handle(add("f")).await), 11);
    let mut addresses: Vec<_> = node.network.ports().iter().map(|port| port.v4).collect();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), 5, "no address twice");
}

#[tokio::test]
async fn what_could_not_go_is_tried_again_and_a_new_one_is_left_alone() {
    let node = Node::new("10.0.0.0/24");
    let cni = node.agent();
    for id in ["a", "b"] {
        assert_eq!(code(&cni.handle(add(id)).await), 0);
    }
    node.network.linger(true);
    for id in ["a", "b"] {
        assert_ne!(code(&cni.handle(del(id)).await), 0, "the interface is still there");
        assert_eq!(code(&cni.handle(check(id, vec![])).await), 102, "and is not in use");
    }
    cni.sweep().await.unwrap();
    assert_eq!(leases(&cni).await, 2, "its address stays with it");
    assert_ne!(code(&cni.handle(add("b")).await), 0, "what is left would be taken for the new one");
    node.network.linger(false);
    assert_eq!(code(&cni.handle(add("b")).await), 0);
    cni.sweep().await.unwrap();
    assert_eq!(leases(&cni).await, 1);
    assert_eq!(code(&cni.handle(check("b", vec![])).await), 0);
}

#[tokio::test]
async fn a_retired_lease_is_released_by_the_next_agent() {
    let node = Node::new("10.0.0.0/24");
    let cni = node.agent();
    assert_eq!(code(&cni.handle(add("a")).await), 0);
    // Killed after the answer.
    cni.0.ledger.change(Change::Retire(owner("a"))).await.unwrap().unwrap();
    drop(cni);
    let cni = node.agent();
    assert_eq!(leases(&cni).await, 1);
    cni.recover().await.unwrap();
    assert_eq!(leases(&cni).await, 0);
    assert!(node.network.ports().is_empty());
}

#[tokio::test]
async fn devices_are_deleted_together_and_by_every_agent() {
    let node = Node::new("10.0.0.0/24");
    let cni = node.agent();
    for id in ["a", "b"] {
        assert_eq!(code(&cni.handle(add(id)).await), 0);
        assert_eq!(code(&cni.handle(del(id)).await), 0);
    }
    assert_eq!((leases(&cni).await, node.network.gone()), (0, 2), "out of service, not deleted");
    // Killed before it deletes them: the next one does.
    drop(cni);
    let cni = node.agent();
    cni.recover().await.unwrap();
    let burying = tokio::spawn({
        let cni = cni.clone();
        async move { cni.bury().await }
    });
    buried(&node).await;
    assert_eq!(code(&cni.handle(add("c")).await), 0);
    assert_eq!(code(&cni.handle(del("c")).await), 0);
    buried(&node).await;
    burying.abort();
}

async fn buried(node: &Node) {
    let all = async {
        while node.network.gone() > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), all).await.expect("deleted some time");
}

#[tokio::test]
async fn a_lease_without_interface_ends_when_the_agent_starts() {
    let node = Node::new("10.0.0.0/24");
    let cni = node.agent();
    for id in ["a", "b"] {
        assert_eq!(code(&cni.handle(add(id)).await), 0);
    }
    // Killed in a DEL, between kernel and journal.
    node.network.detach(&IfName::for_pod("a", "eth0"), &[]).unwrap();
    drop(cni);
    let cni = node.agent();
    cni.recover().await.unwrap();
    assert_eq!(leases(&cni).await, 1);
    assert_eq!(code(&cni.handle(check("b", vec![])).await), 0);
}

#[tokio::test]
async fn garbage_is_collected_by_list_and_by_absence() {
    let node = Node::new("10.0.0.0/24");
    let cni = node.agent();
    for id in ["a", "b", "c"] {
        assert_eq!(code(&cni.handle(add(id)).await), 0);
    }
    let gc = Request::Gc {
        network: "mesh".to_owned(),
        keep: vec![owner("a"), owner("c"), owner("unknown")],
    };
    assert_eq!(code(&cni.handle(gc).await), 0);
    assert_eq!(leases(&cni).await, 2);
    assert_eq!(node.network.ports().len(), 2);
    let other = Request::Gc { network: "other".to_owned(), keep: vec![] };
    assert_eq!(code(&cni.handle(other).await), 0);
    assert_eq!(leases(&cni).await, 2, "of another network");

    node.network.vanish(&IfName::for_pod("a", "eth0"));
    cni.sweep().await.unwrap();
    assert_eq!(leases(&cni).await, 2, "once may be a moment");
    cni.sweep().await.unwrap();
    assert_eq!(leases(&cni).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_hundred_at_once() {
    let node = Node::new("10.0.0.0/24");
    let cni = node.agent();
    let run = |make: fn(&str) -> Request| {
        let calls = (0..100).map(|n| {
            let (cni, request) = (cni.clone(), make(&format!("c{n}")));
            tokio::spawn(async move { cni.handle(request).await })
        });
        futures_util::future::join_all(calls.collect::<Vec<_>>())
    };
    for reply in run(add).await {
        assert_eq!(code(&reply.unwrap()), 0);
    }
    let mut addresses: Vec<_> = node.network.ports().iter().map(|port| port.v4).collect();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), 100);
    for reply in run(del).await {
        assert_eq!(code(&reply.unwrap()), 0);
    }
    assert_eq!((leases(&cni).await, node.network.ports().len()), (0, 0));
    assert!(cni.0.owners.lock().unwrap().is_empty(), "nobody is remembered");
}

#[tokio::test]
async fn a_node_that_runs_out_of_addresses_asks_for_a_block_and_uses_it() {
    let node = Node::new("10.0.0.0/29");
    let cni = node.agent();
    let (asking, wanted) = (cni.clone(), watch::Sender::new(None));
    let mut asked = wanted.subscribe();
    let watching = tokio::spawn(async move { asking.watch_room(wanted).await });
    for n in 0..5 {
        assert_eq!(code(&cni.handle(add(&format!("c{n}"))).await), 0);
    }
    assert_eq!(code(&cni.handle(add("more")).await), 11);
    let seen = tokio::time::timeout(std::time::Duration::from_secs(10), asked.changed()).await;
    seen.expect("it asks at once").unwrap();
    assert_eq!(*asked.borrow(), Some(2));
    node.readiness.send_modify(|readiness| {
        let more = ["10.0.1.0/29".parse().unwrap(), "fd00:0:0:1::/64".parse().unwrap()];
        readiness.blocks = readiness.blocks.iter().copied().chain(more).collect();
    });
    let Reply::Attached(more) = cni.handle(add("more")).await else { panic!("no address") };
    assert_eq!(more.addresses[0].address.to_string(), "10.0.1.2");
    watching.abort();
}

#[tokio::test]
async fn a_sandbox_that_the_runtime_lost_is_released_and_others_are_not() {
    let node = Node::new("10.0.0.0/24");
    let cni = node.agent();
    for (id, pod) in [("lost", true), ("known", true), ("by-hand", false)] {
        let Request::Add { owner, netns, wishes, .. } = add(id) else { unreachable!() };
        let name = PodName { namespace: "default".to_owned(), name: id.to_owned() };
        let request = Request::Add { owner, netns, wishes, pod: pod.then_some(name) };
        assert_eq!(code(&cni.handle(request).await), 0);
    }
    let known = BTreeSet::from(["known".to_owned()]);
    cni.compare_sandboxes(&known).await.unwrap();
    assert_eq!(leases(&cni).await, 3, "it may be about to be written down");
    cni.compare_sandboxes(&known).await.unwrap();
    assert_eq!(leases(&cni).await, 2);
    assert_eq!(code(&cni.handle(check("known", vec![])).await), 0);
    assert_eq!(code(&cni.handle(check("by-hand", vec![])).await), 0);
    assert_eq!(code(&cni.handle(check("lost", vec![])).await), 102);
}
