//! The edge in the kernel.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use mesh_abi::{self as abi, maps};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};

use super::{Desired, Entry, Observed, Plan, Room, Step, Uplink};
use crate::bpf::{Gate, MapError};
use crate::netlink::device::Device;
use crate::netlink::message::LOOPBACK;
use crate::netlink::{NetlinkError, RouteSocket};
use crate::steps::{Applied, StepError};
use crate::{NetNs, Programs, convert};

/// The edge of the node whose network namespace this is.
#[derive(Debug)]
pub struct LinuxEdge {
    node: NetNs,
    programs: Arc<Programs>,
}

impl LinuxEdge {
    /// The edge of the node whose network namespace is `node`.
    pub fn new(node: NetNs, programs: Arc<Programs>) -> Self {
        Self { node, programs }
    }

    /// How much the maps of services hold.
    pub fn room(&self) -> Room {
        let edge = &self.programs.edge;
        Room {
            entries: edge.services.capacity(),
            tables: edge.tables.capacity(),
            backends: edge.backends.capacity(),
            sources: edge.sources.capacity(),
        }
    }

    /// Reads back everything that `desired` is about. Costs time in proportion to the tables.
    ///
    /// # Errors
    /// When a map or the devices cannot be read.
    pub fn observe(&self, desired: &Desired) -> Result<Observed, StepError> {
        let mut observed = self.look(desired)?;
        self.observe_maps(&mut observed)?;
        Ok(observed)
    }

    /// Looks at the devices only; the maps are as they were when `known` was true.
    ///
    /// # Errors
    /// When the devices cannot be read.
    pub fn observe_again(&self, desired: &Desired, known: Observed) -> Result<Observed, StepError> {
        let Observed { uplinks, stray, .. } = self.look(desired)?;
        Ok(Observed { uplinks, stray, ..known })
    }

    fn look(&self, desired: &Desired) -> Result<Observed, StepError> {
        let inside = || {
            let mut socket =
                RouteSocket::open_in(&NetNs::current()).map_err(StepError::Namespace)?;
            self.observe_devices(&mut socket, desired)
        };
        self.node.run(inside).map_err(StepError::Namespace)?
    }

    fn observe_devices(
        &self,
        socket: &mut RouteSocket,
        desired: &Desired,
    ) -> Result<Observed, StepError> {
        let mut observed = Observed::default();
        let uplinks = holders(socket, &desired.addresses)?;
        for device in Device::all(socket)? {
            let Some(mac) = device.mac().filter(|_| uplinks.contains(&device.ifindex)) else {
                continue;
            };
            let ifindex = device.ifindex;
            let mut attached =
                |gate| self.programs.is_gate_attached(socket, gate, &device.name, ifindex);
            let program = attached(Gate::Uplink)?;
            let answers = attached(Gate::Answers)?;
            observed.uplinks.insert(device.name, Uplink { ifindex, mac, program, answers });
        }
        let attached = self.programs.uplinks().map_err(MapError::of("links"))?;
        observed.stray =
            attached.into_iter().filter(|n| !observed.uplinks.contains_key(n)).collect();
        Ok(observed)
    }

    fn observe_maps(&self, observed: &mut Observed) -> Result<(), StepError> {
        let edge = &self.programs.edge;
        for (key, value) in edge.services.entries().map_err(MapError::of(maps::EDGE_SERVICES))? {
            if let Some(key) = convert::frontend_key(&key) {
                let entry = Entry { id: value.id, count: value.count, flags: value.flags };
                observed.entries.insert(key, entry);
            }
        }
        let tables = edge.tables.keys().map_err(MapError::of(maps::EDGE_TABLES))?;
        observed.tables = tables.into_iter().collect();
        for (key, value) in edge.backends.entries().map_err(MapError::of(maps::EDGE_BACKENDS))? {
            observed.backends.insert((key.service, key.index), convert::edge_backend(&value));
        }
        for (key, _) in edge.sources.entries().map_err(MapError::of(maps::EDGE_SOURCES))? {
            observed.sources.extend(convert::source(&key));
        }
        for (address, node) in edge.nodes.entries().map_err(MapError::of(maps::EDGE_NODES))? {
            observed.nodes.insert(convert::ip(address), node.mtu);
        }
        let config =
            edge.config.lookup(&0).map_err(MapError::of(maps::EDGE_CONFIG))?.unwrap_or_default();
        let own = [config.v4, config.v6].into_iter().filter(|a| *a != abi::Address::UNSPECIFIED);
        observed.own = own.map(convert::ip).collect();
        for (ifindex, uplink) in edge.uplinks.entries().map_err(MapError::of(maps::EDGE_UPLINKS))? {
            observed.known_uplinks.insert(ifindex, uplink.mac);
        }
        let addresses = edge.addresses.entries().map_err(MapError::of(maps::EDGE_ADDRESSES))?;
        observed.addresses = addresses.into_iter().map(|(a, _)| convert::ip(a)).collect();
        let owned = edge.owned.entries().map_err(MapError::of(maps::EDGE_OWNED))?;
        observed.owned = owned.into_iter().map(|(address, _)| convert::ip(address)).collect();
        Ok(())
    }

    /// Carries out the steps in order and does not stop at a failure, but leaves out what belongs to a service of which a step
    /// has failed: no table may name a backend that is not there. `observed` becomes what is then.
    pub fn apply(&self, plan: &Plan, observed: &mut Observed) -> Applied<Step> {
        let mut applied = Applied::default();
        let mut broken = BTreeSet::new();
        let inside = || {
            let mut socket = RouteSocket::open_in(&NetNs::current())?;
            for step in &plan.steps {
                let service = step.service();
                if service.is_some_and(|service| broken.contains(&service)) {
                    continue;
                }
                match self.carry_out(&mut socket, step) {
                    Ok(()) => {
                        observed.apply(step);
                        applied.done += 1;
                    }
                    Err(error) => {
                        broken.extend(service);
                        applied.failed.push((step.clone(), error));
                    }
                }
            }
            Ok(())
        };
        if let Err(error) = self.node.run(inside).and_then(|result| result)
            && let Some(step) = plan.steps.first()
        {
            applied.failed.push((step.clone(), StepError::Namespace(error)));
        }
        applied
    }

    fn carry_out(&self, socket: &mut RouteSocket, step: &Step) -> Result<(), StepError> {
        let mut attach = |gate, name: &str, ifindex| {
            let attached = self.programs.attach_gate(socket, gate, name, ifindex);
            attached.map_err(StepError::from)
        };
        let detach = |gate, name: &str| {
            self.programs
                .detach_gate(gate, name)
                .map_err(MapError::of("links"))
                .map_err(StepError::from)
        };
        match step {
            Step::AttachUplink { ifindex, name } => attach(Gate::Uplink, name, *ifindex),
            Step::AttachAnswers { ifindex, name } => attach(Gate::Answers, name, *ifindex),
            Step::DetachAnswers(name) => detach(Gate::Answers, name),
            Step::DetachUplink(name) => {
                detach(Gate::Answers, name)?;
                detach(Gate::Uplink, name)
            }
            _ => self.write(step),
        }
    }

    /// A step that is a map operation.
    fn write(&self, step: &Step) -> Result<(), StepError> {
        let edge = &self.programs.edge;
        let (map, result) = match step {
            Step::PutNode(address, mtu) => {
                let node = abi::EdgeNode { mtu: *mtu };
                (maps::EDGE_NODES, edge.nodes.put(&convert::address(*address), &node))
            }
            Step::SetOwn(own) => (maps::EDGE_CONFIG, edge.config.put(&0, &config(own))),
            Step::PutBackend { service, index, backend, via } => {
                let key = abi::EdgeBackendKey { service: *service, index: *index };
                let value = convert::edge_backend_value(*backend, *via);
                (maps::EDGE_BACKENDS, edge.backends.put(&key, &value))
            }
            Step::PutSource(service, net) => {
                (maps::EDGE_SOURCES, edge.sources.put(&convert::source_key(*service, net), &0))
            }
            Step::PutTable { service, slots } => {
                let mut table = abi::EdgeTable { slots: [0; abi::edge::TABLE_SIZE], pad: 0 };
                table.slots.iter_mut().zip(slots).for_each(|(place, index)| *place = *index);
                (maps::EDGE_TABLES, edge.tables.put(service, &table))
            }
            Step::PutEntry(key, Entry { id, count, flags }) => {
                let value = abi::EdgeService { id: *id, count: *count, flags: *flags };
                (maps::EDGE_SERVICES, edge.services.put(&convert::service_key(key), &value))
            }
            Step::PutUplink(ifindex, mac) => {
                let value = abi::EdgeUplink { mac: *mac, pad: 0 };
                (maps::EDGE_UPLINKS, edge.uplinks.put(ifindex, &value))
            }
            Step::PutAddress(address) => {
                (maps::EDGE_ADDRESSES, edge.addresses.put(&convert::address(*address), &0))
            }
            Step::PutOwned(address) => {
                (maps::EDGE_OWNED, edge.owned.put(&convert::address(*address), &0))
            }
            _ => return self.delete(step),
        };
        Ok(result.map_err(MapError::of(map))?)
    }

    fn delete(&self, step: &Step) -> Result<(), StepError> {
        let edge = &self.programs.edge;
        let (map, result) = match step {
            Step::DeleteOwned(address) => {
                (maps::EDGE_OWNED, edge.owned.delete(&convert::address(*address)))
            }
            Step::DeleteAddress(address) => {
                (maps::EDGE_ADDRESSES, edge.addresses.delete(&convert::address(*address)))
            }
            Step::DeleteUplink(ifindex) => (maps::EDGE_UPLINKS, edge.uplinks.delete(ifindex)),
            Step::DeleteEntry(key) => {
                (maps::EDGE_SERVICES, edge.services.delete(&convert::service_key(key)))
            }
            Step::DeleteTable(service) => (maps::EDGE_TABLES, edge.tables.delete(service)),
            Step::DeleteBackend(service, index) => {
                let key = abi::EdgeBackendKey { service: *service, index: *index };
                (maps::EDGE_BACKENDS, edge.backends.delete(&key))
            }
            Step::DeleteSource(service, net) => {
                (maps::EDGE_SOURCES, edge.sources.delete(&convert::source_key(*service, net)))
            }
            Step::DeleteNode(address) => {
                (maps::EDGE_NODES, edge.nodes.delete(&convert::address(*address)))
            }
            _ => return Ok(()),
        };
        result.map_err(MapError::of(map))?;
        Ok(())
    }
}

fn config(own: &BTreeSet<IpAddr>) -> abi::EdgeConfig {
    let of = |v4: bool| {
        let address = own.iter().find(|address| address.is_ipv4() == v4);
        address.map_or(abi::Address::UNSPECIFIED, |address| convert::address(*address))
    };
    abi::EdgeConfig { v4: of(true), v6: of(false) }
}

/// Indices of the devices that have one of the addresses.
fn holders(
    socket: &mut RouteSocket,
    addresses: &BTreeSet<IpAddr>,
) -> Result<BTreeSet<u32>, NetlinkError> {
    let all = socket.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    let holders = all.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewAddress(message) if message.header.index != LOOPBACK => {
            let wanted = message.attributes.iter().any(|attribute| match attribute {
                AddressAttribute::Local(address) | AddressAttribute::Address(address) => {
                    addresses.contains(address)
                }
                _ => false,
            });
            wanted.then_some(message.header.index)
        }
        _ => None,
    });
    Ok(holders.collect())
}
