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

/// One of the programs on a device by which clients come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gate {
    /// `from_uplink`, for what clients send.
    Uplink,
    /// `to_uplink`, for what they are answered.
    Answers,
}

impl Gate {
    /// The name of a pinned link begins with this; the device's follows.
    const fn pin(self) -> &'static str {
        match self {
            Self::Uplink => "uplink",
            Self::Answers => "answers",
        }
    }

    /// Whose link is pinned under that name.
    pub(super) fn of_pin(pin: &str) -> Option<Self> {
        [Self::Uplink, Self::Answers].into_iter().find(|gate| gate.pin() == pin)
    }

    pub(super) const fn program(self) -> &'static str {
        match self {
            Self::Uplink => abi::programs::FROM_UPLINK,
            Self::Answers => abi::programs::TO_UPLINK,
        }
    }

    const fn hook(self) -> tc::Hook {
        match self {
            Self::Uplink => tc::Hook::Ingress,
            Self::Answers => tc::Hook::Egress,
        }
    }
}

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
            (maps::EDGE_TABLES, self.tables.pressure_by_keys()?),
            (maps::EDGE_BACKENDS, self.backends.pressure()?),
            (maps::EDGE_SOURCES, self.sources.pressure()?),
            (maps::EDGE_NODES, self.nodes.pressure()?),
            (maps::EDGE_UPLINKS, self.uplinks.pressure()?),
            (maps::EDGE_OWNED, self.owned.pressure()?),
            (maps::EDGE_ADDRESSES, self.addresses.pressure()?),
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

    /// Attaches a program to a device of the calling thread's namespace.
    pub(crate) fn attach_gate(
        &self,
        socket: &mut RouteSocket,
        gate: Gate,
        device: &str,
        ifindex: u32,
    ) -> Result<(), AttachError> {
        self.attach_tc(socket, &pin(gate, device), gate.program(), ifindex, gate.hook())
    }

    /// Whether the device carries the program.
    pub(crate) fn is_gate_attached(
        &self,
        socket: &mut RouteSocket,
        gate: Gate,
        device: &str,
        ifindex: u32,
    ) -> Result<bool, NetlinkError> {
        self.is_tc_attached(socket, &pin(gate, device), gate.program(), ifindex, gate.hook())
    }

    /// Takes the program from a device. A link that is only let go of is taken off later, and until then the same program cannot
    /// be attached again.
    pub(crate) fn detach_gate(&self, gate: Gate, device: &str) -> io::Result<()> {
        let pin = self.pins.link(&pin(gate, device));
        link::detach(&pin)?;
        remove_file(&pin)
    }

    /// Names of the devices whose links are pinned.
    pub(crate) fn uplinks(&self) -> io::Result<Vec<String>> {
        let names = self.pins.link_names()?;
        let device = |name: &String| {
            let (pin, device) = name.split_once('-')?;
            Gate::of_pin(pin).map(|_| device.to_owned())
        };
        Ok(names.iter().filter_map(device).collect())
    }
}

fn pin(gate: Gate, device: &str) -> String {
    format!("{}-{device}", gate.pin())
}
