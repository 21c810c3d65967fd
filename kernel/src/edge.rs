//! The edge: services as clients outside see them, the devices by which these come in, and the addresses that this node
//! answers for on the local network.
//!
//! [`Observed`] is what the kernel has, [`plan`] turns it into what [`Desired`] asks for, [`LinuxEdge`] reads and writes.
//! Connections themselves are remembered by the programs alone.

mod announce;
mod linux;
mod maglev;
mod plan;
mod probe;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::services::FrontendKey;

pub use announce::Announcement;
pub use linux::LinuxEdge;
pub use maglev::table;
pub use plan::{plan, plan_changes, plan_within};
pub use probe::{EnterError, Entered, Probe, enter};

/// What the edge should be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Desired {
    /// Services by what clients use.
    pub services: BTreeMap<FrontendKey, Service>,
    /// Other nodes by their address on the overlay, and the largest packets on the way there, in bytes.
    pub nodes: BTreeMap<IpAddr, u32>,
    /// This node's addresses on the overlay, one of each family at most.
    pub own: BTreeSet<IpAddr>,
    /// This node's addresses on the underlay: clients come in by the devices that have them.
    pub addresses: BTreeSet<IpAddr>,
    /// Addresses of services that this node answers for on the local network.
    pub owned: BTreeSet<IpAddr>,
}

/// A service port as clients outside see it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Service {
    /// Whether all connections of one client address go to one backend.
    pub affinity: bool,
    /// Whether to be silent without a backend: another node may have one.
    pub local_only: bool,
    /// Clients that are let in; nothing lets in all.
    pub sources: Option<BTreeSet<IpNet>>,
    /// Backends: of this node, or of the node with this address on the overlay. One with a node's own address is a process there.
    pub backends: BTreeMap<SocketAddr, Option<IpAddr>>,
}

/// A frontend's entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Number under which its backends are filed.
    pub id: u32,
    /// Number of backends.
    pub count: u32,
    /// Bits of [`mesh_abi::EdgeService`].
    pub flags: u32,
}

/// A device by which clients come in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uplink {
    /// Its index.
    pub ifindex: u32,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Whether our TC program for what comes in is attached.
    pub program: bool,
    /// Whether the one for answers of this node's own processes is.
    pub answers: bool,
}

/// What the kernel has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// Frontends.
    pub entries: BTreeMap<FrontendKey, Entry>,
    /// Numbers of services that have a table.
    pub tables: BTreeSet<u32>,
    /// Backends by service number and index.
    pub backends: BTreeMap<(u32, u32), (SocketAddr, Option<IpAddr>)>,
    /// Clients let in, by service number.
    pub sources: BTreeSet<(u32, IpNet)>,
    /// Other nodes.
    pub nodes: BTreeMap<IpAddr, u32>,
    /// This node's addresses on the overlay.
    pub own: BTreeSet<IpAddr>,
    /// Its addresses on the underlay, where backends may be that are no pods of the overlay.
    pub addresses: BTreeSet<IpAddr>,
    /// Devices that have one of the wanted addresses, by name.
    pub uplinks: BTreeMap<String, Uplink>,
    /// Devices that the programs know.
    pub known_uplinks: BTreeMap<u32, [u8; 6]>,
    /// Names of devices that have our program and should not.
    pub stray: BTreeSet<String>,
    /// Addresses that this node answers for.
    pub owned: BTreeSet<IpAddr>,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Tell the programs about another node.
    PutNode(IpAddr, u32),
    /// Tell the programs this node's addresses on the overlay.
    SetOwn(BTreeSet<IpAddr>),
    /// Tell the programs an address of this node on the underlay.
    PutAddress(IpAddr),
    /// Put a backend in its place.
    PutBackend {
        /// Service number.
        service: u32,
        /// Its index.
        index: u32,
        /// The backend.
        backend: SocketAddr,
        /// The node that has it; nothing for this one.
        via: Option<IpAddr>,
    },
    /// Let clients in.
    PutSource(u32, IpNet),
    /// Switch the table of a service.
    PutTable {
        /// Service number.
        service: u32,
        /// Index of a backend by place.
        slots: Vec<u16>,
    },
    /// Create or switch a frontend.
    PutEntry(FrontendKey, Entry),
    /// Tell the programs about a device.
    PutUplink(u32, [u8; 6]),
    /// Attach our TC program.
    AttachUplink {
        /// Index of the device.
        ifindex: u32,
        /// Its name.
        name: String,
    },
    /// Attach the program that puts answers of this node's own processes right.
    AttachAnswers {
        /// Index of the device.
        ifindex: u32,
        /// Its name.
        name: String,
    },
    /// Answer for an address.
    PutOwned(IpAddr),
    /// Answer for it no more.
    DeleteOwned(IpAddr),
    /// Detach our programs.
    DetachUplink(String),
    /// Detach the one for answers alone.
    DetachAnswers(String),
    /// Forget a device.
    DeleteUplink(u32),
    /// Remove a frontend.
    DeleteEntry(FrontendKey),
    /// Remove a table.
    DeleteTable(u32),
    /// Remove a backend.
    DeleteBackend(u32, u32),
    /// Let clients in no more.
    DeleteSource(u32, IpNet),
    /// Forget a node.
    DeleteNode(IpAddr),
    /// Forget an address of this node.
    DeleteAddress(IpAddr),
}

impl Observed {
    /// What is after a step.
    pub fn apply(&mut self, step: &Step) {
        match step {
            Step::PutNode(address, mtu) => drop(self.nodes.insert(*address, *mtu)),
            Step::SetOwn(own) => self.own.clone_from(own),
            Step::PutBackend { service, index, backend, via } => {
                self.backends.insert((*service, *index), (*backend, *via));
            }
            Step::PutSource(service, net) => drop(self.sources.insert((*service, *net))),
            Step::PutTable { service, .. } => drop(self.tables.insert(*service)),
            Step::PutEntry(key, entry) => drop(self.entries.insert(*key, *entry)),
            Step::PutUplink(ifindex, mac) => drop(self.known_uplinks.insert(*ifindex, *mac)),
            Step::AttachUplink { name, .. } => {
                if let Some(uplink) = self.uplinks.get_mut(name) {
                    uplink.program = true;
                }
            }
            Step::AttachAnswers { name, .. } => self.set_answers(name, true),
            Step::DetachAnswers(name) => self.set_answers(name, false),
            Step::PutAddress(address) => drop(self.addresses.insert(*address)),
            Step::DeleteAddress(address) => drop(self.addresses.remove(address)),
            Step::PutOwned(address) => drop(self.owned.insert(*address)),
            Step::DeleteOwned(address) => drop(self.owned.remove(address)),
            Step::DetachUplink(name) => drop(self.stray.remove(name)),
            Step::DeleteUplink(ifindex) => drop(self.known_uplinks.remove(ifindex)),
            Step::DeleteEntry(key) => drop(self.entries.remove(key)),
            Step::DeleteTable(service) => drop(self.tables.remove(service)),
            Step::DeleteBackend(service, index) => {
                self.backends.remove(&(*service, *index));
            }
            Step::DeleteSource(service, net) => drop(self.sources.remove(&(*service, *net))),
            Step::DeleteNode(address) => drop(self.nodes.remove(address)),
        }
    }

    fn set_answers(&mut self, uplink: &str, attached: bool) {
        if let Some(uplink) = self.uplinks.get_mut(uplink) {
            uplink.answers = attached;
        }
    }
}

impl Step {
    /// The number of the service that it belongs to.
    fn service(&self) -> Option<u32> {
        match self {
            Self::PutBackend { service, .. }
            | Self::PutSource(service, _)
            | Self::PutTable { service, .. }
            | Self::DeleteTable(service)
            | Self::DeleteBackend(service, _)
            | Self::DeleteSource(service, _) => Some(*service),
            Self::PutEntry(_, entry) => Some(entry.id),
            _ => None,
        }
    }
}

/// How many entries the maps of services take at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Frontends.
    pub entries: usize,
    /// Services that have backends.
    pub tables: usize,
    /// Backends of all services.
    pub backends: usize,
    /// Ranges of clients of all services.
    pub sources: usize,
}

impl Room {
    /// No limits.
    pub const UNLIMITED: Self =
        Self { entries: usize::MAX, tables: usize::MAX, backends: usize::MAX, sources: usize::MAX };
}

/// A frontend that a map has no room for, as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unfit {
    /// The frontend.
    pub frontend: FrontendKey,
    /// The map.
    pub map: &'static str,
}

/// What has to be done, in order: additions, then switches, then deletions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The steps.
    pub steps: Vec<Step>,
    /// Frontends that it leaves incomplete, because there is no room for all that they should have.
    pub unfit: Vec<Unfit>,
}

impl Plan {
    /// Whether there is more room for services after it.
    pub fn frees(&self) -> bool {
        let frees = |step: &Step| {
            matches!(
                step,
                Step::DeleteEntry(_)
                    | Step::DeleteTable(_)
                    | Step::DeleteBackend(..)
                    | Step::DeleteSource(..)
            )
        };
        self.steps.iter().any(frees)
    }
}
