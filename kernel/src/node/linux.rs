//! The node's network in the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use mesh_abi::maps;
use mesh_model::wellknown::{NODE_LOCAL_ADDRESS, NODE_LOCAL_ADDRESS_V6};

use super::plan::sysctls;
use super::{Masquerade, NodeNetwork, Observed, ObservedOverlay, Plan, Step, nft, routes};
use crate::bpf::MapError;
use crate::netlink::device::Device;
use crate::netlink::message::{self, LOOPBACK, RouteRequest};
use crate::netlink::{NetlinkError, RouteSocket};
use crate::pods::check::addresses;
use crate::steps::{Applied, StepError};
use crate::{IfName, NetNs, Programs, convert, sysctl};

/// A [`NodeNetwork`] in the kernel.
#[derive(Debug)]
pub struct LinuxNodeNetwork {
    node: NetNs,
    programs: Arc<Programs>,
    overlay: IfName,
    table: nft::Reader,
}

impl LinuxNodeNetwork {
    /// The node whose network namespace is `node` and whose overlay device has the given name.
    pub fn new(node: NetNs, programs: Arc<Programs>, overlay: IfName) -> Self {
        Self { node, programs, overlay, table: nft::Reader::default() }
    }

    /// Everything that needs the calling thread to be in the node's namespace.
    fn observe_inside(&self, overlay: &IfName) -> Result<Observed, StepError> {
        let mut socket = RouteSocket::open_in(&NetNs::current()).map_err(StepError::Namespace)?;
        let device = self.observe_overlay(&mut socket, overlay)?;
        let local = addresses(&mut socket, LOOPBACK)?.into_iter().filter(is_node_local);
        let nft::Table { exists: table_exists, masquerade } = self.table.observe()?;
        let own = device.as_ref().map(|device| device.ifindex);
        let (routes, foreign) = routes::observe(&mut socket, own)?;
        let names = sysctls(device.as_ref().map(|_| overlay.as_str())).into_keys();
        Ok(Observed {
            local_addresses: local.collect(),
            overlay: device,
            routes,
            foreign,
            sysctls: names
                .filter_map(|name| sysctl::read(&name).map(|value| (name, value)))
                .collect(),
            masquerade,
            table_exists,
            ..Observed::default()
        })
    }

    fn observe_overlay(
        &self,
        socket: &mut RouteSocket,
        name: &IfName,
    ) -> Result<Option<ObservedOverlay>, NetlinkError> {
        let Some(device) = Device::find(socket, name.as_str())? else { return Ok(None) };
        let ifindex = device.ifindex;
        let addresses = addresses(socket, ifindex)?.into_iter().filter(|a| !is_link_local(a));
        Ok(Some(ObservedOverlay {
            ifindex,
            mtu: device.mtu,
            up: device.up,
            addresses: addresses.collect(),
            program: self.programs.is_overlay_attached(socket, name.as_str(), ifindex)?,
        }))
    }

    fn carry_out(&self, socket: &mut RouteSocket, step: &Step) -> Result<(), StepError> {
        let programs = &self.programs;
        match step {
            Step::SetSysctl { name, value } => set_sysctl(name, value)?,
            Step::AttachOverlay { ifindex, name } => {
                programs.attach_overlay(socket, name.as_str(), *ifindex)?;
            }
            Step::SetOverlayIfindex(overlay_ifindex) => {
                let config = mesh_abi::NodeConfig { overlay_ifindex: *overlay_ifindex, flags: 0 };
                programs.node.put(&0, &config).map_err(MapError::of(maps::NODE))?;
            }
            Step::PutRemoteBlock(block) => {
                let value = mesh_abi::RemoteBlock::default();
                let key = convert::remote_block(block);
                programs
                    .remote_blocks
                    .put(&key, &value)
                    .map_err(MapError::of(maps::REMOTE_BLOCKS))?;
            }
            Step::DeleteRemoteBlock(block) => {
                let key = convert::remote_block(block);
                programs.remote_blocks.delete(&key).map_err(MapError::of(maps::REMOTE_BLOCKS))?;
            }
            Step::SetMasquerade(masquerade) => self.masquerade(masquerade)?,
            Step::DeleteMasquerade => nft::delete()?,
            _ => {
                if let Some((request, deletes)) = netlink_request(step) {
                    match socket.request(request.message, request.flags) {
                        Err(error) if deletes && error.is_missing() => {}
                        other => drop(other?),
                    }
                }
            }
        }
        Ok(())
    }

    fn masquerade(&self, masquerade: &Masquerade) -> Result<(), nft::NftError> {
        nft::replace(masquerade, &self.overlay)
    }
}

impl NodeNetwork for LinuxNodeNetwork {
    fn observe(&self, overlay: &IfName) -> Result<Observed, StepError> {
        let inside = self.node.run(|| self.observe_inside(overlay));
        let mut observed = inside.map_err(StepError::Namespace)??;
        let programs = &self.programs;
        let blocks = programs.remote_blocks.entries().map_err(MapError::of(maps::REMOTE_BLOCKS))?;
        observed.remote_blocks =
            blocks.iter().filter_map(|(key, _)| convert::block(key)).collect::<BTreeSet<_>>();
        let config = programs.node.lookup(&0).map_err(MapError::of(maps::NODE))?;
        observed.overlay_ifindex = config.unwrap_or_default().overlay_ifindex;
        Ok(observed)
    }

    fn originals(&self, plan: &Plan) -> BTreeMap<String, String> {
        let inside = || {
            let ours = sysctls(None);
            let mut found = BTreeMap::new();
            for step in &plan.steps {
                let Step::SetSysctl { name, .. } = step else { continue };
                // Those of the overlay device go with it.
                if !ours.contains_key(name) {
                    continue;
                }
                for name in dependents(name).into_iter().chain([name.clone()]) {
                    if let Some(value) = sysctl::read(&name) {
                        found.insert(name, value);
                    }
                }
            }
            found
        };
        self.node.run(inside).unwrap_or_default()
    }

    fn restore(&self, originals: &BTreeMap<String, String>) -> Vec<StepError> {
        let inside = || {
            // First those that change others, and then the others.
            let (first, then): (Vec<_>, Vec<_>) =
                originals.iter().partition(|(name, _)| sysctls(None).contains_key(*name));
            let write = |(name, value): (&String, &String)| {
                if sysctl::read(name).as_ref() == Some(value) {
                    return None;
                }
                // A link may be gone, and its settings with it.
                sysctl::write_if_present(name, value).err().map(StepError::from)
            };
            first.into_iter().chain(then).filter_map(write).collect::<Vec<_>>()
        };
        self.node.run(inside).unwrap_or_else(|error| vec![StepError::Namespace(error)])
    }

    fn apply(&self, plan: &Plan) -> Applied<Step> {
        let mut applied = Applied::default();
        let inside = || {
            let mut socket = RouteSocket::open_in(&NetNs::current())?;
            for step in &plan.steps {
                match self.carry_out(&mut socket, step) {
                    Ok(()) => applied.done += 1,
                    Err(error) => applied.failed.push((step.clone(), error)),
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
}

/// The sysctls of the whole namespace that we set, each with those of single links that the kernel changes with it.
fn dependents(name: &str) -> Vec<String> {
    let of_links = |folder: &str, setting: &str| -> Vec<String> {
        let links = std::fs::read_dir(Path::new("/proc/sys").join(folder));
        let links = links.into_iter().flatten().flatten();
        links.map(|l| format!("{folder}/{}/{setting}", l.file_name().to_string_lossy())).collect()
    };
    match name {
        // ip_forward_sysctl: a router's defaults, for all links (net/ipv4/devinet.c).
        "net/ipv4/ip_forward" => {
            let mut all = of_links("net/ipv4/conf", "forwarding");
            all.push("net/ipv4/conf/all/accept_redirects".to_owned());
            all
        }
        "net/ipv6/conf/all/forwarding" => {
            let mut all = of_links("net/ipv6/conf", "forwarding");
            all.extend(of_links("net/ipv6/conf", "accept_ra"));
            all
        }
        _ => Vec::new(),
    }
}

/// The netlink request of a step, and whether it deletes something.
fn netlink_request(step: &Step) -> Option<(RouteRequest, bool)> {
    Some(match step {
        Step::AddLocalAddress(address) => (message::put_node_local(*address), false),
        Step::DeleteLocalAddress(address) => (message::delete_address(LOOPBACK, *address), true),
        Step::SetOverlay { ifindex, mtu } => (message::set_up(*ifindex, Some(*mtu)), false),
        Step::AddOverlayAddress { ifindex, address } => {
            (message::put_address(*ifindex, *address), false)
        }
        Step::DeleteOverlayAddress { ifindex, address } => {
            (message::delete_address(*ifindex, *address), true)
        }
        Step::PutRoute(route) => (routes::spec(route).put(), false),
        Step::DeleteRoute(route) => (routes::spec(route).delete(), true),
        _ => return None,
    })
}

/// Writes a sysctl. Before IPv6 forwarding is turned on, uplinks that take their routes from advertisements are told to go on
/// with that: a router ignores them otherwise, and the node would lose its default route.
fn set_sysctl(name: &str, value: &str) -> Result<(), sysctl::SysctlError> {
    if name == "net/ipv6/conf/all/forwarding" && value == "1" {
        let devices = std::fs::read_dir("/proc/sys/net/ipv6/conf").into_iter().flatten().flatten();
        for device in devices {
            let accept =
                format!("net/ipv6/conf/{}/accept_ra", device.file_name().to_string_lossy());
            if sysctl::read(&accept).as_deref() == Some("1") {
                sysctl::write_if_present(&accept, "2")?;
            }
        }
    }
    sysctl::write(name, value)
}

fn is_link_local(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// The only addresses that we ever put on the loopback device.
fn is_node_local(address: &IpAddr) -> bool {
    *address == IpAddr::V4(NODE_LOCAL_ADDRESS) || *address == IpAddr::V6(NODE_LOCAL_ADDRESS_V6)
}
