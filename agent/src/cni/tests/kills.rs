//! `kill -9` at every step of ADD, DEL and of the start after it: nothing leaks, and no address is two pods'.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use mesh_kernel::pods::{AttachError, DetachError, HostPort, ListError, Missing, ObservedPort};

use super::super::journal::Storage;
use super::*;

/// How many more steps the agent lives. A step that it does not live to see has no effect, and neither has anything later.
#[derive(Clone, Default)]
struct Life(Arc<AtomicUsize>);

impl Life {
    fn set(&self, steps: usize) {
        self.0.store(steps, Ordering::SeqCst);
    }

    fn step(&self) -> io::Result<()> {
        let one_less = |left: usize| left.checked_sub(1);
        match self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less) {
            Ok(_) => Ok(()),
            Err(_) => Err(io::Error::other("killed")),
        }
    }
}

/// What is on the disk; killed in the middle of a write, half of it is there.
#[derive(Clone, Default)]
struct Disk(Arc<Mutex<Vec<u8>>>, Life);

impl Storage for Disk {
    fn read(&mut self) -> io::Result<Vec<u8>> {
        Ok(self.0.lock().unwrap().clone())
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.1.step()?;
        let half = bytes.len() / 2;
        self.0.lock().unwrap().extend_from_slice(&bytes[..half]);
        self.1.step()?;
        self.0.lock().unwrap().extend_from_slice(&bytes[half..]);
        self.1.step()
    }

    fn replace(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.1.step()?;
        *self.0.lock().unwrap() = bytes.to_vec();
        self.1.step()
    }
}

/// A kernel that the agent speaks to while it lives.
struct Kernel(Arc<FakePodNetwork>, Life);

impl PodNetwork for Kernel {
    fn attach(&self, port: &PodPort) -> Result<Attached, AttachError> {
        self.1.step().map_err(AttachError::NodeNamespace)?;
        let attached = self.0.attach(port)?;
        self.1.step().map_err(AttachError::NodeNamespace)?;
        Ok(attached)
    }

    fn take_over(&self, port: &PodPort) -> Result<bool, AttachError> {
        self.1.step().map_err(AttachError::NodeNamespace)?;
        let taken = self.0.take_over(port)?;
        self.1.step().map_err(AttachError::NodeNamespace)?;
        Ok(taken)
    }

    fn detach(&self, host: &IfName, addresses: &[IpAddr]) -> Result<(), DetachError> {
        self.1.step().map_err(DetachError::NodeNamespace)?;
        self.0.detach(host, addresses)?;
        self.1.step().map_err(DetachError::NodeNamespace)
    }

    fn publish(&self, ports: &[(Vec<HostPort>, Vec<IpAddr>)]) -> io::Result<()> {
        self.1.step()?;
        self.0.publish(ports)
    }

    fn bury(&self) -> Result<usize, ListError> {
        self.1.step().map_err(ListError::NodeNamespace)?;
        self.0.bury()
    }

    fn check(&self, port: &PodPort) -> Result<Vec<Missing>, ListError> {
        self.0.check(port)
    }

    fn list(&self) -> Result<Vec<ObservedPort>, ListError> {
        self.1.step().map_err(ListError::NodeNamespace)?;
        self.0.list()
    }

    fn collect_garbage(&self) -> Result<usize, ListError> {
        self.1.step().map_err(ListError::NodeNamespace)?;
        self.0.collect_garbage()
    }
}

const IMMORTAL: usize = usize::MAX;

struct World {
    node: Node,
    disk: Disk,
    life: Life,
}

impl World {
    fn new() -> Self {
        let life = Life::default();
        life.set(IMMORTAL);
        let disk = Disk(Arc::default(), life.clone());
        Self { node: Node::new("10.0.0.0/28"), disk, life }
    }

    /// An agent that lives so many steps. Nothing when it dies before it has read its journal.
    fn agent(&self, steps: usize) -> Option<Cni> {
        self.life.set(steps);
        let (ledger, _) = Ledger::open(Box::new(self.disk.clone()), "boot").ok()?;
        let ledger = LedgerHandle::start(ledger).unwrap();
        let network = Arc::new(Kernel(Arc::clone(&self.node.network), self.life.clone()));
        let state = self.node.dir.path().to_owned();
        Some(Cni::new(ledger, network, self.node.readiness.subscribe(), state))
    }

    /// The next agent, after one that died while it started; both find what is there.
    async fn restart(&self, steps: usize) -> Cni {
        if let Some(doomed) = self.agent(steps) {
            let _ = doomed.recover().await;
        }
        let cni = self.agent(IMMORTAL).unwrap();
        cni.recover().await.unwrap();
        self.assert_consistent(&cni).await;
        cni
    }

    async fn assert_consistent(&self, cni: &Cni) {
        let leases = cni.0.ledger.ask(|pool| pool.leases().clone()).await.unwrap();
        let leased: BTreeSet<IpAddr> = leases.values().flat_map(|l| l.addresses.clone()).collect();
        assert_eq!(leased.len(), 2 * leases.len(), "an address is leased twice: {leases:?}");
        let ports = self.node.network.ports();
        let used: BTreeSet<IpAddr> = ports.iter().flat_map(PodPort::addresses).collect();
        assert_eq!(used, leased, "interfaces and leases differ");
        assert_eq!(ports.len(), leases.len());
    }
}

/// A hundred take half a minute on a busy machine: `MESH_KILL_ROUNDS=100`.
fn rounds() -> usize {
    std::env::var("MESH_KILL_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(12)
}

#[tokio::test]
async fn nothing_leaks_wherever_the_agent_is_killed() {
    for round in 0..rounds() {
        for steps in 0..16 {
            let world = World::new();
            let cni = world.agent(IMMORTAL).unwrap();
            assert_eq!(code(&cni.handle(add("stays")).await), 0);
            world.life.set(steps);
            let (a, b) = tokio::join!(cni.handle(add("a")), cni.handle(add("b")));
            drop(cni);
            let cni = world.restart(round % 12).await;
            for (id, reply) in [("a", a), ("b", b)] {
                match reply {
                    Reply::Attached(attached) => {
                        let addresses = attached.addresses.iter().map(|a| a.address).collect();
                        assert_eq!(code(&cni.handle(check(id, addresses)).await), 0, "promised");
                    }
                    // As a runtime does with a pod that it could not start.
                    _ => assert_eq!(code(&cni.handle(del(id)).await), 0),
                }
                assert!([0, 101].contains(&code(&cni.handle(add(id)).await)));
            }
            world.assert_consistent(&cni).await;
            world.life.set((steps + round) % 16);
            let (a, b) = tokio::join!(cni.handle(del("a")), cni.handle(del("b")));
            drop(cni);
            let cni = world.restart(round % 12).await;
            for (id, reply) in [("a", a), ("b", b)] {
                if code(&reply) == 0 {
                    assert_eq!(code(&cni.handle(check(id, vec![])).await), 102, "gone for good");
                }
                assert_eq!(code(&cni.handle(del(id)).await), 0);
            }
            assert_eq!(leases(&cni).await, 1);
            assert_eq!(world.node.network.ports().len(), 1);
            world.assert_consistent(&cni).await;
        }
    }
}

#[tokio::test]
async fn killed_while_pods_are_taken_over() {
    // Three pods, of which each takes two steps; one to list them.
    for steps in 0..8 {
        let world = World::new();
        let cni = world.restart(IMMORTAL).await;
        for id in ["a", "b", "c"] {
            assert_eq!(code(&cni.handle(add(id)).await), 0);
        }
        drop(cni);
        world.node.network.change_version();
        let doomed = world.agent(IMMORTAL).unwrap();
        world.life.set(steps);
        let seen = doomed.take_over().await;
        assert_eq!(seen.is_ok_and(|seen| seen.failures.is_empty()), steps == 7);
        drop(doomed);
        let left = world.node.network.others().len();
        let cni = world.restart(IMMORTAL).await;
        assert_eq!(cni.take_over().await.unwrap(), Succession { taken: left, failures: vec![] });
        assert!(world.node.network.others().is_empty());
    }
}
