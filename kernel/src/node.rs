//! The node's own part: addresses, routes to other nodes, sysctls, masquerading, and the overlay device's TC program.
//!
//! [`Desired`] -> [`plan`] with [`Observed`] -> [`NodeNetwork::apply`]. While the overlay device does not exist, what needs
//! it is left out of the plan; plan again when it does.

mod fake;
mod linux;
mod nft;
mod plan;
mod routes;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_model::Snapshot;
use mesh_model::cluster::node_overlay_address;
use mesh_model::wellknown::{NODE_LOCAL_ADDRESS, NODE_LOCAL_ADDRESS_V6, OVERLAY_DEVICE};

use crate::IfName;
use crate::steps::{Applied, StepError};

pub use fake::FakeNodeNetwork;
pub use linux::LinuxNodeNetwork;
pub use nft::{Masquerade, NftError, TABLE as NFT_TABLE};
pub use plan::plan;
pub use watch::SysctlWatch;

/// Routing protocol number that marks the node's routes as ours.
pub const NODE_ROUTE_PROTOCOL: u8 = 77;
/// Metric of the routes that refuse what no other route takes: any other route wins.
pub const REFUSE_METRIC: u32 = 4_000_000;

/// What the node should have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    /// Addresses on the loopback device where DNS and L7 proxy answer.
    pub local_addresses: BTreeSet<IpAddr>,
    /// Name of the overlay device. Somebody else creates it.
    pub overlay: IfName,
    /// MTU of the overlay device.
    pub overlay_mtu: u32,
    /// Addresses of the node on the overlay, one for each block of its own.
    pub overlay_addresses: BTreeSet<IpAddr>,
    /// Other nodes' blocks, reached through the overlay.
    pub remote_blocks: BTreeSet<IpNet>,
    /// Largest packets to those of them whose way carries less than the overlay device, in bytes.
    pub block_mtus: BTreeMap<IpNet, u32>,
    /// Ranges that must never leave in the clear: what no better route takes is answered with "unreachable".
    pub refused: BTreeSet<IpNet>,
    /// Masquerading of pods' traffic that leaves the cluster.
    pub masquerade: Option<Masquerade>,
}

impl Desired {
    /// What a snapshot asks for.
    pub fn from_snapshot(snapshot: &Snapshot, overlay_mtu: u32) -> Self {
        let cluster = &snapshot.cluster;
        let own = &snapshot.node.blocks;
        let remote = snapshot.peers.iter().flat_map(|peer| peer.allowed_ips.iter().copied());
        Self {
            local_addresses: [NODE_LOCAL_ADDRESS.into(), NODE_LOCAL_ADDRESS_V6.into()].into(),
            overlay: OVERLAY_DEVICE.parse().expect("a constant and valid interface name"),
            overlay_mtu,
            overlay_addresses: own.iter().map(node_overlay_address).collect(),
            remote_blocks: remote.map(|block| block.trunc()).collect(),
            block_mtus: BTreeMap::new(),
            refused: cluster.pod_cidrs.iter().chain(&cluster.service_cidrs).copied().collect(),
            masquerade: (!own.is_empty())
                .then(|| Masquerade::new(own.clone(), cluster.pod_cidrs.clone())),
        }
    }
}

/// What the node has, as far as it is ours.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// Our addresses on the loopback device.
    pub local_addresses: BTreeSet<IpAddr>,
    /// The overlay device; nothing while it does not exist.
    pub overlay: Option<ObservedOverlay>,
    /// Routes with our protocol number.
    pub routes: BTreeSet<Route>,
    /// Remote blocks in the eBPF map.
    pub remote_blocks: BTreeSet<IpNet>,
    /// Overlay interface index in the eBPF map; 0 when none.
    pub overlay_ifindex: u32,
    /// Sysctls that we care about, by name below `/proc/sys`.
    pub sysctls: BTreeMap<String, String>,
    /// Text of our nftables table, as we wrote it; nothing when there is no table, or not as we wrote it.
    pub masquerade: Option<Masquerade>,
    /// Whether a table of ours exists at all.
    pub table_exists: bool,
    /// Destinations of other people's routes in the main table, the default route left out.
    pub foreign: BTreeSet<Foreign>,
}

/// A route that is not ours.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Foreign {
    /// Where to.
    pub destination: IpNet,
    /// Whether those addresses are on a link of the node, not behind a gateway.
    pub on_link: bool,
}

/// A range of the cluster that the node uses for something else.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the cluster's range {range} overlaps {destination}, to which this node has a route of its own"
)]
pub struct RangeConflict {
    /// The cluster's range.
    pub range: IpNet,
    /// Where the node's route leads.
    pub destination: IpNet,
}

/// Ranges of the cluster that the node must not use: a route inside of one would take pods' packets away, and addresses on a link around
/// one could not be reached any more. A wider route through a gateway is no conflict: ours are more specific.
pub fn conflicts(desired: &Desired, observed: &Observed) -> Vec<RangeConflict> {
    let all = observed.foreign.iter().flat_map(|foreign| {
        let to = foreign.destination;
        let meets =
            move |range: &&IpNet| range.contains(&to) || (foreign.on_link && to.contains(*range));
        let hit = desired.refused.iter().filter(meets);
        hit.map(move |&range| RangeConflict { range, destination: to })
    });
    all.collect()
}

/// The overlay device as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedOverlay {
    /// Its index.
    pub ifindex: u32,
    /// Its MTU.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
    /// Its addresses, link-local ones left out.
    pub addresses: BTreeSet<IpAddr>,
    /// Whether our TC program is attached.
    pub program: bool,
}

/// A route of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// Where to.
    pub destination: IpNet,
    /// How.
    pub kind: RouteKind,
}

/// How a route leads on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RouteKind {
    /// Through the device with this index, with this preferred source address.
    Device {
        /// Interface index.
        ifindex: u32,
        /// Source address of packets that the node itself sends.
        source: Option<IpAddr>,
        /// Largest packets, where that is less than what the device carries.
        mtu: Option<u32>,
    },
    /// Answered with "unreachable".
    Refuse,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Write a sysctl.
    SetSysctl {
        /// Name below `/proc/sys`.
        name: String,
        /// Value.
        value: String,
    },
    /// Put an address on the loopback device.
    AddLocalAddress(IpAddr),
    /// Set the overlay device up, with this MTU.
    SetOverlay {
        /// Its index.
        ifindex: u32,
        /// Its MTU.
        mtu: u32,
    },
    /// Put an address on the overlay device.
    AddOverlayAddress {
        /// Its index.
        ifindex: u32,
        /// The address.
        address: IpAddr,
    },
    /// Attach our TC program to the overlay device.
    AttachOverlay {
        /// Its index.
        ifindex: u32,
        /// Its name.
        name: IfName,
    },
    /// Tell the programs the index of the overlay device; 0 for none.
    SetOverlayIfindex(u32),
    /// Add or replace a route.
    PutRoute(Route),
    /// Tell the programs that a block is reached through the overlay.
    PutRemoteBlock(IpNet),
    /// Replace our nftables table.
    SetMasquerade(Masquerade),
    /// Forget a block.
    DeleteRemoteBlock(IpNet),
    /// Delete a route.
    DeleteRoute(Route),
    /// Take an address from the overlay device.
    DeleteOverlayAddress {
        /// Its index.
        ifindex: u32,
        /// The address.
        address: IpAddr,
    },
    /// Take an address from the loopback device.
    DeleteLocalAddress(IpAddr),
    /// Delete our nftables table.
    DeleteMasquerade,
}

/// What has to be done, in order: additions, then switches, then deletions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The steps.
    pub steps: Vec<Step>,
}

/// The node's own network configuration.
pub trait NodeNetwork: Send + Sync {
    /// Reads back what is ours.
    ///
    /// # Errors
    /// When the node cannot be looked at.
    fn observe(&self, overlay: &IfName) -> Result<Observed, StepError>;

    /// Carries out the steps in order and does not stop at a failure.
    fn apply(&self, plan: &Plan) -> Applied<Step>;

    /// Observes, plans and applies. The returned plan is what was tried.
    ///
    /// # Errors
    /// When the node cannot be looked at.
    fn reconcile(&self, desired: &Desired) -> Result<(Plan, Applied<Step>), StepError> {
        let plan = plan(desired, &self.observe(&desired.overlay)?);
        let applied = self.apply(&plan);
        Ok((plan, applied))
    }

    /// What the sysctls are that carrying out the plan would change, those included that the kernel changes with them. To be
    /// kept, for [`restore`](Self::restore).
    fn originals(&self, plan: &Plan) -> BTreeMap<String, String> {
        let _ = plan;
        BTreeMap::new()
    }

    /// Gives sysctls the values that they had; what failed.
    fn restore(&self, originals: &BTreeMap<String, String>) -> Vec<StepError> {
        let _ = originals;
        Vec::new()
    }

    /// Removes everything of ours: routes, addresses, the nftables table. Sysctls stay.
    ///
    /// # Errors
    /// When the node cannot be looked at.
    fn remove_all(&self, overlay: &IfName) -> Result<(Plan, Applied<Step>), StepError> {
        let plan = plan::removal(&self.observe(overlay)?);
        let applied = self.apply(&plan);
        Ok((plan, applied))
    }
}
