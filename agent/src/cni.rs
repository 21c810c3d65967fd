//! The agent's side of the CNI: an address from the node's block, an interface, and both again away.
//!
//! ADD is reserve (journal) -> attach (kernel) -> commit (journal) -> answer; DEL is detach (kernel) -> release (journal) ->
//! answer, and the device is deleted later. An agent that is killed anywhere in between removes, when it starts again, what is
//! reserved and not committed, and releases what has no interface.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use ipnet::IpNet;
use mesh_cni::wire::{Address, Attachment, Code, Failure, Owner, PodName, Reply, Request, Wishes};
use mesh_kernel::pods::{Attached, PodNetwork, PodPort};
use tokio::sync::{Notify, OwnedMutexGuard, Semaphore, watch};

mod departure;
mod failure;
mod job;
pub mod journal;
pub mod ledger;
mod netns;
pub mod owner;
pub mod pool;
mod recover;
mod room;
mod serve;
mod succession;

pub(crate) use serve::bind;
pub use serve::{ListenError, serve};
pub(crate) use succession::Succession;

use departure::Departures;
use failure::Trouble;
use ledger::{LedgerError, LedgerHandle, now};
use pool::ReserveError;

/// Interfaces that are made or removed at the same time: the kernel does it one by one anyway, and each takes a thread.
const AT_ONCE: usize = 8;

/// Name of the network in the configuration that we write.
pub(crate) const DEFAULT_NETWORK: &str = "mesh";

/// What the node can do for pods at the moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Readiness {
    /// Blocks that addresses come from.
    pub blocks: Arc<[IpNet]>,
    /// MTU of pods' interfaces.
    pub mtu: u32,
    /// Why no pod can be added; absent when one can.
    pub unavailable: Option<String>,
    /// Why pods are cut off from other nodes; absent when they are not.
    pub limited: Option<String>,
}

impl Readiness {
    /// Nothing works yet, for that reason.
    pub fn starting(why: &str) -> Self {
        Self { blocks: [].into(), mtu: 0, unavailable: Some(why.to_owned()), limited: None }
    }
}

/// Handles requests of the plugin; cheap to clone.
#[derive(Clone)]
pub struct Cni(Arc<Inner>);

struct Inner {
    ledger: LedgerHandle,
    network: Arc<dyn PodNetwork>,
    readiness: watch::Receiver<Readiness>,
    state_dir: PathBuf,
    turns: Semaphore,
    owners: Mutex<HashMap<Owner, Arc<tokio::sync::Mutex<()>>>>,
    absent: Mutex<BTreeSet<Owner>>,
    /// Those whose sandbox the runtime did not know when it was asked last.
    strangers: Mutex<BTreeSet<Owner>>,
    departures: Departures,
    /// Somebody found no address.
    exhausted: Notify,
}

impl Cni {
    /// A service over `ledger`, for the agent whose state is in `state_dir`. Call [`recover`](Self::recover) first.
    pub fn new(
        ledger: LedgerHandle,
        network: Arc<dyn PodNetwork>,
        readiness: watch::Receiver<Readiness>,
        state_dir: PathBuf,
    ) -> Self {
        Self(Arc::new(Inner {
            ledger,
            network,
            readiness,
            state_dir,
            turns: Semaphore::new(AT_ONCE),
            owners: Mutex::default(),
            absent: Mutex::default(),
            strangers: Mutex::default(),
            departures: Departures::default(),
            exhausted: Notify::new(),
        }))
    }

    /// Does what the plugin asks for. Errors are answers, too.
    pub async fn handle(&self, request: Request) -> Reply {
        let (what, owner) = describe(&request);
        let result = match request {
            Request::Add { owner, netns, pod, wishes } => {
                self.add(owner, netns, pod, wishes).await.map(Reply::Attached)
            }
            Request::Del { owner } => self.del(&owner).await.map(|()| Reply::Done),
            Request::Check { owner, netns, addresses } => {
                self.check(owner, netns, &addresses).await.map(|()| Reply::Done)
            }
            Request::Gc { network, keep } => self.gc(&network, keep).await.map(|()| Reply::Done),
            Request::Status => self.status().await.map(|()| Reply::Done),
        };
        result.unwrap_or_else(|failure| {
            tracing::warn!(
                what,
                owner,
                code = failure.code,
                why = failure.msg,
                details = failure.details,
                "CNI request failed"
            );
            Reply::Failed(failure)
        })
    }

    async fn add(
        &self,
        owner: Owner,
        netns: PathBuf,
        pod: Option<PodName>,
        wishes: Wishes,
    ) -> Result<Attachment, Failure> {
        valid(&owner)?;
        netns::check(&netns)?;
        let readiness = self.0.readiness.borrow().clone();
        if let Some(why) = readiness.unavailable {
            return Err(Failure::new(Code::TryAgain, "the node is not ready for pods", why));
        }
        let _turn = self.turn(&owner).await;
        self.drain_queue_of(&owner).await?;
        self.0.departures.busy();
        self.finish_departure(&owner).await?;
        let job = job::Add {
            owner: owner.clone(),
            netns,
            pod,
            wishes,
            blocks: readiness.blocks,
            mtu: readiness.mtu,
        };
        let ledger = self.0.ledger.clone();
        let (port, attached) =
            self.blocking(move |network| job.run(network, &ledger)).await.map_err(|error| {
                if let job::AddError::Trouble(Trouble::Ledger(LedgerError::Reserve(
                    ReserveError::Exhausted { .. },
                ))) = &error
                {
                    self.0.exhausted.notify_one();
                }
                Failure::from(error)
            })?;
        let addresses: Vec<std::net::IpAddr> = port.addresses().collect();
        tracing::info!(owner = %owner, ?addresses, "pod attached");
        Ok(attachment(&port, &attached))
    }

    async fn del(&self, owner: &Owner) -> Result<(), Failure> {
        valid(owner)?;
        self.0.departures.busy();
        let _turn = self.turn(owner).await;
        self.depart(owner).await?;
        mesh_cni::queue::list(&self.0.state_dir)
            .into_iter()
            .flatten()
            .filter(|(_, queued)| queued == owner)
            .for_each(|(file, _)| drop(std::fs::remove_file(file)));
        Ok(())
    }

    /// Detaches and releases; the caller holds the owner's turn.
    async fn release(&self, owner: &Owner) -> Result<(), Trouble> {
        let (leaving, ledger) = (owner.clone(), self.0.ledger.clone());
        let released =
            self.blocking(move |network| job::release(&leaving, network, &ledger)).await?;
        self.0.departures.add();
        if released {
            tracing::info!(owner = %owner, "pod detached");
        }
        Ok(())
    }

    async fn check(
        &self,
        owner: Owner,
        netns: PathBuf,
        expected: &[std::net::IpAddr],
    ) -> Result<(), Failure> {
        valid(&owner)?;
        netns::check(&netns)?;
        let asked = owner.clone();
        let lease = self.0.ledger.ask(move |pool| pool.lease(&asked).cloned()).await;
        let missing = |details| Failure::new(Code::Missing, "the interface is incomplete", details);
        let Some(lease) = lease.map_err(Trouble::Ledger)?.filter(|lease| lease.committed) else {
            return Err(missing(format!("no address is reserved for {owner}")));
        };
        let mut lacks: Vec<String> = expected
            .iter()
            .filter(|address| !lease.addresses.contains(address))
            .map(|address| format!("address {address} is not reserved for {owner}"))
            .collect();
        let mtu = self.0.readiness.borrow().mtu;
        let text = owner::describe(&owner, &lease.addresses, None);
        let port = owner::port(&owner, &lease, netns, mtu, text)?;
        let seen = self.blocking(move |network| network.check(&port)).await;
        lacks.extend(seen.map_err(Trouble::List)?.iter().map(ToString::to_string));
        if lacks.is_empty() { Ok(()) } else { Err(missing(lacks.join("; "))) }
    }

    /// Releases what belongs to the network and is not listed. What an agent learned from interfaces alone, or before it
    /// noted networks, counts for the network of our own configuration.
    async fn gc(&self, network: &str, keep: Vec<Owner>) -> Result<(), Failure> {
        let keep: BTreeSet<Owner> = keep.into_iter().collect();
        let network = network.to_owned();
        let mine = move |lease: &pool::Lease| match lease.wishes.network.as_str() {
            "" => network.is_empty() || network == DEFAULT_NETWORK,
            noted => noted == network,
        };
        let owners = move |pool: &pool::Pool| {
            let all = pool.leases().iter().filter(|(_, lease)| mine(lease));
            all.map(|(owner, _)| owner.clone()).collect::<Vec<_>>()
        };
        let all = self.0.ledger.ask(owners).await;
        let mut wrong = vec![];
        for owner in all.map_err(Trouble::Ledger)?.into_iter().filter(|o| !keep.contains(o)) {
            let _turn = self.turn(&owner).await;
            if let Err(trouble) = self.release(&owner).await {
                wrong.push(format!("{owner}: {trouble}"));
            }
        }
        let collected = self.blocking(|network| network.collect_garbage()).await;
        wrong.extend(collected.err().map(|error| error.to_string()));
        if wrong.is_empty() {
            return Ok(());
        }
        Err(Failure::new(Code::Kernel, "not everything could be removed", wrong.join("; ")))
    }

    async fn status(&self) -> Result<(), Failure> {
        let readiness = self.0.readiness.borrow().clone();
        if let Some(why) = readiness.unavailable {
            return Err(Failure::new(Code::NotAvailable, "the node is not ready for pods", why));
        }
        let room = self.0.ledger.ask(move |pool| pool.has_room(&readiness.blocks, now())).await;
        if let Err(full) = room.map_err(Trouble::Ledger)? {
            return Err(Failure::new(Code::NotAvailable, full.to_string(), ""));
        }
        match readiness.limited {
            Some(why) => Err(Failure::new(Code::Limited, "the overlay is down", why)),
            None => Ok(()),
        }
    }

    /// Waits until nobody else works on that owner.
    async fn turn(&self, owner: &Owner) -> Turn {
        let lock = {
            let mut owners = self.0.owners.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(owners.entry(owner.clone()).or_default())
        };
        let guard = Arc::clone(&lock).lock_owned().await;
        Turn {
            guard: Some(guard),
            lock: Some(lock),
            inner: Arc::clone(&self.0),
            owner: owner.clone(),
        }
    }

    /// Runs a kernel call on a thread where it may block.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn PodNetwork) -> T + Send + 'static,
    ) -> T {
        let _turn = self.0.turns.acquire().await.expect("the semaphore is never closed");
        let network = Arc::clone(&self.0.network);
        match tokio::task::spawn_blocking(move || work(&*network)).await {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }
}

/// The right to work on an owner; forgets the owner when nobody else waits.
struct Turn {
    guard: Option<OwnedMutexGuard<()>>,
    lock: Option<Arc<tokio::sync::Mutex<()>>>,
    inner: Arc<Inner>,
    owner: Owner,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut owners = self.inner.owners.lock().unwrap_or_else(PoisonError::into_inner);
        self.guard = None;
        self.lock = None;
        // One is left: the map's own. Whoever comes next takes the map's lock first.
        if owners.get(&self.owner).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            owners.remove(&self.owner);
        }
    }
}

fn valid(owner: &Owner) -> Result<(), Failure> {
    Owner::new(&owner.container, &owner.interface)
        .map(drop)
        .map_err(|why| Failure::new(Code::Environment, "invalid request", why))
}

fn describe(request: &Request) -> (&'static str, String) {
    match request {
        Request::Add { owner, .. } => ("ADD", owner.to_string()),
        Request::Del { owner } => ("DEL", owner.to_string()),
        Request::Check { owner, .. } => ("CHECK", owner.to_string()),
        Request::Gc { .. } => ("GC", String::new()),
        Request::Status => ("STATUS", String::new()),
    }
}

fn attachment(port: &PodPort, attached: &Attached) -> Attachment {
    let gateway = |address: std::net::IpAddr| match address {
        std::net::IpAddr::V4(_) => mesh_model::wellknown::POD_GATEWAY.into(),
        std::net::IpAddr::V6(_) => mesh_kernel::pods::POD_GATEWAY_V6.into(),
    };
    Attachment {
        host_interface: port.host_interface.to_string(),
        host_mac: attached.host_mac.to_string(),
        interface: port.interface.to_string(),
        mac: attached.pod_mac.to_string(),
        netns: port.netns.clone(),
        mtu: port.mtu,
        addresses: port
            .addresses()
            .map(|address| Address { address, gateway: gateway(address) })
            .collect(),
    }
}

#[cfg(test)]
mod tests;
