//! Pods' interfaces in memory, for tests of those who use them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{
    AttachError, Attached, DetachError, HostPort, ListError, Missing, ObservedPort, PodNetwork,
    PodPort,
};
use crate::IfName;

/// A [`PodNetwork`] without a kernel.
#[derive(Debug, Default)]
pub struct FakePodNetwork {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    ports: BTreeMap<IfName, (u32, PodPort)>,
    last_ifindex: u32,
    refuse: bool,
    linger: bool,
    published: Vec<(Vec<HostPort>, Vec<IpAddr>)>,
    /// Guarded by another version.
    others: BTreeSet<IfName>,
    /// Not to be taken over.
    kept_back: BTreeSet<IfName>,
    taken: Vec<PodPort>,
    /// Detached, and not buried yet.
    gone: usize,
}

impl FakePodNetwork {
    /// Without pods.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets every later attachment fail, or work again.
    pub fn refuse(&self, refuse: bool) {
        self.lock().refuse = refuse;
    }

    /// Lets every later detachment fail, or work again.
    pub fn linger(&self, linger: bool) {
        self.lock().linger = linger;
    }

    /// What is attached, by host-side name.
    pub fn ports(&self) -> Vec<PodPort> {
        self.lock().ports.values().map(|(_, port)| port.clone()).collect()
    }

    /// The node's ports, as they were last published as a whole.
    pub fn published(&self) -> Vec<(Vec<HostPort>, Vec<IpAddr>)> {
        self.lock().published.clone()
    }

    /// Makes all that is attached another version's, as the start of an agent with another ABI does.
    pub fn change_version(&self) {
        let mut state = self.lock();
        state.others = state.ports.keys().cloned().collect();
    }

    /// Lets taking these over fail, and no others.
    pub fn keep_back(&self, host_interfaces: impl IntoIterator<Item = IfName>) {
        self.lock().kept_back = host_interfaces.into_iter().collect();
    }

    /// What another version guards.
    pub fn others(&self) -> BTreeSet<IfName> {
        self.lock().others.clone()
    }

    /// What was said of those that were taken over.
    pub fn taken_over(&self) -> Vec<PodPort> {
        self.lock().taken.clone()
    }

    /// How many detached interfaces wait for being buried.
    pub fn gone(&self) -> usize {
        self.lock().gone
    }

    /// Takes an interface away, as a vanished namespace does.
    pub fn vanish(&self, host_interface: &IfName) {
        let mut state = self.lock();
        state.ports.remove(host_interface);
        state.others.remove(host_interface);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PodNetwork for FakePodNetwork {
    fn attach(&self, port: &PodPort) -> Result<Attached, AttachError> {
        let mut state = self.lock();
        let taken = state.ports.get(&port.host_interface).is_some_and(|(_, old)| old != port);
        if state.refuse || taken {
            return Err(AttachError::Exists(port.host_interface.clone()));
        }
        state.last_ifindex += 1;
        let fresh = (state.last_ifindex, port.clone());
        let (host_ifindex, _) = *state.ports.entry(port.host_interface.clone()).or_insert(fresh);
        Ok(Attached { host_ifindex, host_mac: port.host_mac(), pod_mac: port.pod_mac() })
    }

    fn take_over(&self, port: &PodPort) -> Result<bool, AttachError> {
        let mut state = self.lock();
        if state.kept_back.contains(&port.host_interface) {
            return Err(AttachError::NodeNamespace(io::ErrorKind::PermissionDenied.into()));
        }
        let is_others = state.others.remove(&port.host_interface);
        state.taken.extend(is_others.then(|| port.clone()));
        Ok(is_others)
    }

    fn detach(&self, host_interface: &IfName, _: &[IpAddr]) -> Result<(), DetachError> {
        let mut state = self.lock();
        if state.linger {
            return Err(DetachError::Foreign(host_interface.clone()));
        }
        state.others.remove(host_interface);
        state.gone += usize::from(state.ports.remove(host_interface).is_some());
        Ok(())
    }

    fn publish(&self, ports: &[(Vec<HostPort>, Vec<IpAddr>)]) -> io::Result<()> {
        self.lock().published = ports.to_vec();
        Ok(())
    }

    fn bury(&self) -> Result<usize, ListError> {
        Ok(std::mem::take(&mut self.lock().gone))
    }

    fn check(&self, port: &PodPort) -> Result<Vec<Missing>, ListError> {
        match self.lock().ports.get(&port.host_interface) {
            None => Ok(vec![Missing::HostInterface(port.host_interface.clone())]),
            Some((_, seen)) => {
                let missing = port.addresses().filter(|a| seen.addresses().all(|b| b != *a));
                Ok(missing.map(Missing::PodAddress).collect())
            }
        }
    }

    fn list(&self) -> Result<Vec<ObservedPort>, ListError> {
        let state = self.lock();
        let ports = state.ports.values().map(|(ifindex, port)| ObservedPort {
            host_interface: port.host_interface.clone(),
            ifindex: *ifindex,
            owner: port.owner.clone(),
            pod_mac: port.pod_mac(),
        });
        Ok(ports.collect())
    }

    fn collect_garbage(&self) -> Result<usize, ListError> {
        Ok(0)
    }
}
