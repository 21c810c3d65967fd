//! Maps of the edge, and the program on the devices by which clients come in.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use mesh_abi::{self as abi, maps};

use super::bpffs::{Pins, remove_file};
use super::load::LoadError;
use super::{AttachError, Map, Programs, link};
use crate::netlink::{NetlinkError, RouteSocket, tc};

/// The name of an uplink's pinned link is this, and the device's name.
pub(super) const UPLINK_PIN: &str = "uplink";
/// As [`UPLINK_PIN`], of the link for answers.
pub(super) const ANSWERS_PIN: &str = "answers";

/// How long a listed pressure is good enough.
const SAMPLED_FOR: Duration = Duration::from_secs(60);

type Pressure = BTreeMap<&'static str, (usize, u32)>;

/// The maps that the edge is made of.
#[derive(Debug)]
pub(crate) struct EdgeMaps {
    pub(crate) services: Map<abi::ServiceKey, abi::EdgeService>,
    pub(crate) tables: Map<u32, abi::EdgeTable>,
    pub(crate) backends: Map<abi::EdgeBackendKey, abi::EdgeBackend>,
    pub(crate) sources: Map<abi::EdgeSourceKey, u32>,
    pub(crate) nodes: Map<abi::Address, abi::EdgeNode>,
    pub(crate) config: Map<u32, abi::EdgeConfig>,
    pub(crate) uplinks: Map<u32, abi::EdgeUplink>,
    pub(crate) owned: Map<abi::Address, u32>,
    pub(crate) addresses: Map<abi::Address, u32>,
    flows: Map<abi::FlowKey, abi::Flow>,
    /// The pressure as it was seen last, and when.
    sampled: Mutex<Option<(Instant, Pressure)>>,
    counters: Map<u32, abi::Counter>,
}

impl EdgeMaps {
    pub(super) fn open(pins: &Pins) -> Result<Self, LoadError> {
        Ok(Self {
            services: Map::open(pins, maps::EDGE_SERVICES)?,
            tables: Map::open(pins, maps::EDGE_TABLES)?,
            backends: Map::open(pins, maps::EDGE_BACKENDS)?,
            sources: Map::open(pins, maps::EDGE_SOURCES)?,
            nodes: Map::open(pins, maps::EDGE_NODES)?,
            config: Map::open(pins, maps::EDGE_CONFIG)?,
            uplinks: Map::open(pins, maps::EDGE_UPLINKS)?,
            owned: Map::open(pins, maps::EDGE_OWNED)?,
            addresses: Map::open(pins, maps::EDGE_ADDRESSES)?,
            flows: Map::open(pins, maps::EDGE_FLOWS)?,
            sampled: Mutex::default(),
            counters: Map::open(pins, maps::EDGE_COUNTERS)?,
        })
    }

    /// Number of entries and capacity by map. Only the kernel knows what it has forgotten, so that they have to be listed: from
    /// time to time.
    pub(super) fn pressure(&self) -> io::Result<Pressure> {
        let mut sampled = self.sampled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, pressure)) = sampled.as_ref().filter(|(at, _)| at.elapsed() < SAMPLED_FOR) {
            return Ok(pressure.clone());
        }
        let pressure = self.listed_pressure()?;
        *sampled = Some((Instant::now(), pressure.clone()));
        Ok(pressure)
    }

    fn listed_pressure(&self) -> io::Result<Pressure> {
        Ok(BTreeMap::from([
            (maps::EDGE_SERVICES, self.services.pressure()?),
            (maps::EDGE_BACKENDS, self.backends.pressure()?),
            (maps::EDGE_SOURCES, self.sources.pressure()?),
            // Full is no failure here: what was used longest ago is forgotten.
            (maps::EDGE_FLOWS, self.flows.pressure()?),
        ]))
    }
}

impl Programs {
    /// Packets and bytes at the edge by what became of them, summed over all CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn edge_counters(&self) -> io::Result<BTreeMap<abi::EdgeReason, abi::Counter>> {
        let mut sums = BTreeMap::new();
        for reason in abi::EdgeReason::ALL {
            let per_cpu = self.edge.counters.per_cpu(&(reason as u32))?;
            let mut sum = abi::Counter::default();
            for one in per_cpu {
                sum.packets = sum.packets.wrapping_add(one.packets);
                sum.bytes = sum.bytes.wrapping_add(one.bytes);
            }
            sums.insert(reason, sum);
        }
        Ok(sums)
    }

    /// Forgets all connections, and tells how many entries that were. They go on: the next packet of each chooses again.
    ///
    /// # Errors
    /// When the map cannot be read or written.
    pub fn forget_flows(&self) -> io::Result<usize> {
        let keys = self.edge.flows.keys()?;
        for key in &keys {
            self.edge.flows.delete(key)?;
        }
        Ok(keys.len())
    }

    /// Attaches `from_uplink` to a device of the calling thread's namespace.
    pub(crate) fn attach_uplink(
        &self,
        socket: &mut RouteSocket,
        name: &str,
        ifindex: u32,
    ) -> Result<(), AttachError> {
        let pin = pin(UPLINK_PIN, name);
        self.attach_tc(socket, &pin, abi::programs::FROM_UPLINK, ifindex, tc::Hook::Ingress)
    }

    /// Attaches `to_uplink` to a device of the calling thread's namespace.
    pub(crate) fn attach_answers(
        &self,
        socket: &mut RouteSocket,
        name: &str,
        ifindex: u32,
    ) -> Result<(), AttachError> {
        let pin = pin(ANSWERS_PIN, name);
        self.attach_tc(socket, &pin, abi::programs::TO_UPLINK, ifindex, tc::Hook::Egress)
    }

    /// Whether the device carries our program.
    pub(crate) fn is_uplink_attached(
        &self,
        socket: &mut RouteSocket,
        name: &str,
        ifindex: u32,
    ) -> Result<bool, NetlinkError> {
        let pin = pin(UPLINK_PIN, name);
        self.is_tc_attached(socket, &pin, abi::programs::FROM_UPLINK, ifindex, tc::Hook::Ingress)
    }

    /// Whether the device carries our program for answers.
    pub(crate) fn is_answers_attached(
        &self,
        socket: &mut RouteSocket,
        name: &str,
        ifindex: u32,
    ) -> Result<bool, NetlinkError> {
        let pin = pin(ANSWERS_PIN, name);
        self.is_tc_attached(socket, &pin, abi::programs::TO_UPLINK, ifindex, tc::Hook::Egress)
    }

    /// Takes the programs from a device.
    pub(crate) fn detach_uplink(&self, name: &str) -> io::Result<()> {
        self.detach_answers(name)?;
        self.detach(UPLINK_PIN, name)
    }

    /// Takes the program for answers from a device.
    pub(crate) fn detach_answers(&self, name: &str) -> io::Result<()> {
        self.detach(ANSWERS_PIN, name)
    }

    /// A link that is only let go of is taken off later, and until then the same program cannot be attached again.
    fn detach(&self, kind: &str, device: &str) -> io::Result<()> {
        let pin = self.pins.link(&pin(kind, device));
        link::detach(&pin)?;
        remove_file(&pin)
    }

    /// Names of the devices whose links are pinned.
    pub(crate) fn uplinks(&self) -> io::Result<Vec<String>> {
        let names = self.pins.link_names()?;
        let device = |name: &String| match name.split_once('-') {
            Some((UPLINK_PIN | ANSWERS_PIN, device)) => Some(device.to_owned()),
            _ => None,
        };
        Ok(names.iter().filter_map(device).collect())
    }
}

fn pin(kind: &str, device: &str) -> String {
    format!("{kind}-{device}")
}
