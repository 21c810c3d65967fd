//! Pods' interfaces in the kernel.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use ipnet::IpNet;
use mesh_abi::maps;
use mesh_model::wellknown::POD_GATEWAY;
use netlink_packet_route::RouteNetlinkMessage;

use super::ports::{self, Entries};
use super::ready::{self, Side};
use super::{
    ALIAS_PREFIX, AttachError, Attached, DetachError, Guard, HostPort, ListError, Missing,
    ObservedPort, POD_GATEWAY_V6, POD_ROUTE_PROTOCOL, PodNetwork, PodPort, check, gone, take_over,
};
use crate::bpf::MapError;
use crate::ifname::MacAddress;
use crate::netlink::device::Device;
use crate::netlink::message::{self, LOOPBACK, RouteRequest, RouteSpec, VethEnd, Via};
use crate::netlink::{Answer, NetlinkError, RouteSocket, tc};
use crate::{IfName, NetNs, Programs, convert, sysctl};

/// The node's ports that lead to pods.
#[derive(Debug, Default)]
struct Ports {
    entries: Entries,
    /// Whether this process has written the table.
    table: bool,
}

/// A [`PodNetwork`] in the kernel.
pub struct LinuxPodNetwork {
    pub(super) node: NetNs,
    pub(super) programs: Arc<Programs>,
    ports: Mutex<Ports>,
    /// Held for writing by garbage collection only, so that it never takes what an attachment is just making.
    collecting: RwLock<()>,
    guard: Option<Arc<dyn Guard>>,
}

impl LinuxPodNetwork {
    /// Pods of the node whose network namespace is `node`.
    pub fn new(node: NetNs, programs: Arc<Programs>) -> Self {
        let (ports, collecting) = (Mutex::default(), RwLock::new(()));
        Self { node, programs, ports, collecting, guard: None }
    }

    /// The same, with somebody who prepares for each pod.
    #[must_use]
    pub fn guarded(self, guard: Arc<dyn Guard>) -> Self {
        Self { guard: Some(guard), ..self }
    }

    pub(super) fn socket(&self) -> io::Result<RouteSocket> {
        RouteSocket::open_in(&self.node)
    }

    /// The pair of devices, made now or found. Also tells whether it was made.
    fn create(
        &self,
        socket: &mut RouteSocket,
        port: &PodPort,
        pod: &NetNs,
    ) -> Result<(Device, bool), AttachError> {
        let name = port.host_interface.as_str();
        let Some(fd) = pod.fd() else {
            let source = io::Error::from(io::ErrorKind::InvalidInput);
            return Err(AttachError::Namespace { path: port.netns.clone(), source });
        };
        let host = VethEnd { name, mac: port.host_mac(), mtu: port.mtu };
        let peer = VethEnd { name: port.interface.as_str(), mac: port.pod_mac(), mtu: port.mtu };
        let failed = |source| netlink_error("create the veth pair", port, source);
        let make = |socket: &mut RouteSocket| {
            socket.batch(vec![message::create_veth(host, peer, fd), message::link_by_name(name)])
        };
        let mut answers = make(socket).map_err(failed)?;
        let in_the_way = matches!(&answers[..], [Err(made), Err(_)] if made.is_exists());
        if in_the_way && gone::bury(socket).map_err(failed)? > 0 {
            // The other end of one that was detached may still have the name in the pod.
            answers = make(socket).map_err(failed)?;
        }
        let found = answers.pop().and_then(Result::ok).as_deref().and_then(Device::in_answer);
        let created = answers.pop().unwrap_or(Err(NetlinkError::Incomplete("an acknowledgement")));
        match (created, found) {
            (Ok(_), Some(device)) => Ok((device, true)),
            (Ok(_), None) => Err(failed(NetlinkError::Incomplete("the new device"))),
            (Err(error), Some(device)) if error.is_exists() && device.is_of_pod() => {
                Ok((device, false))
            }
            // The name is taken: on the node by somebody else, or in the pod.
            (Err(error), Some(_)) if error.is_exists() => {
                Err(AttachError::Exists(port.host_interface.clone()))
            }
            (Err(error), None) if error.is_exists() => {
                Err(AttachError::Exists(port.interface.clone()))
            }
            (Err(error), _) => Err(failed(error)),
        }
    }

    /// The guard first, then everything through which packets could pass it.
    fn configure(
        &self,
        socket: &mut RouteSocket,
        port: &PodPort,
        host: &Device,
        pod: &NetNs,
    ) -> Result<(), AttachError> {
        let ifindex = host.ifindex;
        self.put_port(port, ifindex)?;
        self.configure_host(socket, port, ifindex)
            .map_err(|source| netlink_error("configure the node's side", port, source))?;
        self.place(port, ifindex)?;
        let mut inside = self.configure_pod(port, host, pod)?;
        let addresses: Vec<IpAddr> = port.addresses().collect();
        ready::wait([
            Side { socket, device: port.host_interface.as_str(), local: &[] },
            Side { socket: &mut inside, device: port.interface.as_str(), local: &addresses },
        ])
        .map_err(|source| netlink_error("wait for the devices", port, source))?;
        self.put_local(port, ifindex)?;
        self.open_ports(port)
    }

    /// Says what may come out of the pod.
    pub(super) fn put_port(&self, port: &PodPort, ifindex: u32) -> Result<(), AttachError> {
        self.programs
            .pod_ports
            .put(&ifindex, &convert::pod_port(port))
            .map_err(|source| map_error(maps::POD_PORTS, port, source))
    }

    /// Has the guard prepare.
    pub(super) fn place(&self, port: &PodPort, ifindex: u32) -> Result<(), AttachError> {
        let Some(guard) = &self.guard else { return Ok(()) };
        guard.place(port, ifindex).map_err(|source| map_error(maps::POD_POLICIES, port, source))
    }

    /// Lets the programs deliver to the pod.
    pub(super) fn put_local(&self, port: &PodPort, ifindex: u32) -> Result<(), AttachError> {
        for address in port.addresses() {
            self.programs
                .local_pods
                .put(&convert::address(address), &convert::local_pod(port, ifindex))
                .map_err(|source| map_error(maps::LOCAL_PODS, port, source))?;
        }
        Ok(())
    }

    /// The pod's side, from inside its namespace, to which the socket that is returned belongs.
    fn configure_pod(
        &self,
        port: &PodPort,
        host: &Device,
        pod: &NetNs,
    ) -> Result<RouteSocket, AttachError> {
        let incomplete = NetlinkError::Incomplete("the index of the pod's device");
        let ifindex =
            host.peer_ifindex.ok_or(netlink_error("find the pod's side", port, incomplete))?;
        let inside = || {
            let mut socket = RouteSocket::open_in(&NetNs::current())
                .map_err(|source| AttachError::Namespace { path: port.netns.clone(), source })?;
            // By it the pod is known where only its sockets are seen. Without it the pod works all the same.
            if let Ok(cookie) = socket.namespace_cookie() {
                let _ = self.programs.namespaces.put(&cookie, &host.ifindex);
            }
            pod_sysctls(port).map_err(|source| AttachError::Sysctl {
                interface: port.interface.clone(),
                source,
            })?;
            all_done(socket.batch(pod_requests(port, ifindex)))
                .map_err(|source| netlink_error("configure the pod's side", port, source))?;
            Ok(socket)
        };
        pod.run(inside)
            .map_err(|source| AttachError::Namespace { path: port.netns.clone(), source })?
    }

    fn ports(&self) -> MutexGuard<'_, Ports> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_ports(&self, port: &PodPort) -> Result<(), AttachError> {
        if port.ports.is_empty() {
            return Ok(());
        }
        let addresses: Vec<IpAddr> = port.addresses().collect();
        let mut new = ports::entries(&port.ports, &addresses);
        let mut ports = self.ports();
        if let Some(key) = ports::conflict(&ports.entries, &new) {
            let interface = port.host_interface.clone();
            return Err(AttachError::PortTaken { port: key.to_string(), interface });
        }
        let mut all = ports.entries.clone();
        all.extend(new.clone());
        new.retain(|key, _| !ports.entries.contains_key(key));
        self.write_ports(&mut ports, all, &new, true)
            .map_err(|source| AttachError::Ports { interface: port.host_interface.clone(), source })
    }

    fn close_ports(&self, addresses: &BTreeSet<IpAddr>) -> io::Result<()> {
        let mut ports = self.ports();
        let (old, rest): (Entries, Entries) =
            ports.entries.clone().into_iter().partition(|(_, to)| addresses.contains(&to.ip()));
        self.write_ports(&mut ports, rest, &old, false)
    }

    /// Makes `all` the entries of the table, which is known to differ by `change`.
    fn write_ports(
        &self,
        ports: &mut Ports,
        all: Entries,
        change: &Entries,
        add: bool,
    ) -> io::Result<()> {
        if change.is_empty() {
            return Ok(());
        }
        let table = ports.table;
        let write = || match ports::change(change, add) {
            Ok(()) if table => Ok(()),
            // Never written, or somebody has flushed it.
            _ => ports::replace(&all),
        };
        self.node.run(write)??;
        *ports = Ports { entries: all, table: true };
        Ok(())
    }

    /// Guard, mark, up, routes and neighbours. The order is of no consequence yet: the pod's side is still down.
    fn configure_host(
        &self,
        socket: &mut RouteSocket,
        port: &PodPort,
        ifindex: u32,
    ) -> Result<(), NetlinkError> {
        self.put_guards(socket, ifindex, host_requests(port, ifindex))
    }

    /// Attaches the programs, or switches to them; and then more.
    pub(super) fn put_guards(
        &self,
        socket: &mut RouteSocket,
        ifindex: u32,
        then: impl IntoIterator<Item = RouteRequest>,
    ) -> Result<(), NetlinkError> {
        let mut requests = vec![tc::prepare(ifindex)];
        requests.extend(self.programs.guard_requests(ifindex)?);
        requests.extend(then);
        let mut answers = socket.batch(requests)?.into_iter();
        match answers.next() {
            Some(Err(error)) if !error.is_exists() => Err(error),
            _ => all_done(Ok(answers.collect())),
        }
    }

    /// Removes map entries of the port. They are recognised by the MAC addresses, which only this port has.
    fn forget(
        &self,
        host_interface: &IfName,
        addresses: &BTreeSet<IpAddr>,
    ) -> Result<(), DetachError> {
        let failed = |what| {
            move |source| DetachError::Bpf { what, interface: host_interface.clone(), source }
        };
        let host_mac = MacAddress::derived(&["host", host_interface.as_str()]).0;
        for address in addresses {
            let key = convert::address(*address);
            let pods = &self.programs.local_pods;
            let entry = pods.lookup(&key).map_err(failed(maps::LOCAL_PODS))?;
            if let Some(entry) = entry.filter(|entry| entry.host_mac == host_mac) {
                pods.delete(&key).map_err(failed(maps::LOCAL_PODS))?;
                self.forget_port(host_interface, entry.device())?;
            }
        }
        Ok(())
    }

    pub(super) fn forget_port(
        &self,
        host_interface: &IfName,
        ifindex: u32,
    ) -> Result<(), DetachError> {
        let failed = |what| {
            move |source| DetachError::Bpf { what, interface: host_interface.clone(), source }
        };
        let policies = &self.programs.policy.pods;
        let forgotten = policies.delete(&ifindex).map(drop).map_err(failed(maps::POD_POLICIES));
        self.programs.pod_ports.delete(&ifindex).map_err(failed(maps::POD_PORTS))?;
        forgotten
    }

    /// Addresses that the map knows for a device.
    fn known_addresses(&self, ifindex: u32) -> Vec<IpAddr> {
        let port = self.programs.pod_ports.lookup(&ifindex).ok().flatten();
        let all = port.iter().flat_map(|port| [port.v4, port.v6]);
        all.filter(|a| *a != mesh_abi::Address::UNSPECIFIED).map(convert::ip).collect()
    }

    /// As it was made, or, when the map does not know the device, as it is made by default.
    fn pod_mac(&self, device: &Device) -> MacAddress {
        let port = self.programs.pod_ports.lookup(&device.ifindex).ok().flatten();
        port.map_or_else(
            || MacAddress::derived(&["pod", &device.name]),
            |port| MacAddress(port.mac),
        )
    }

    fn devices(&self) -> Result<Vec<Device>, ListError> {
        let mut socket = self.socket().map_err(ListError::NodeNamespace)?;
        Ok(Device::of_pods(&mut socket)?)
    }
}

impl std::fmt::Debug for LinuxPodNetwork {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LinuxPodNetwork").field("node", &self.node).finish_non_exhaustive()
    }
}

impl PodNetwork for LinuxPodNetwork {
    fn attach(&self, port: &PodPort) -> Result<Attached, AttachError> {
        let _running = self.collecting.read().unwrap_or_else(PoisonError::into_inner);
        let namespace = |source| AttachError::Namespace { path: port.netns.clone(), source };
        let pod = NetNs::open(&port.netns).map_err(namespace)?;
        let mut socket = self.socket().map_err(AttachError::NodeNamespace)?;
        let (host, created) = self.create(&mut socket, port, &pod)?;
        if let Err(error) = self.configure(&mut socket, port, &host, &pod) {
            if created {
                self.undo(&mut socket, port, host.ifindex);
            }
            return Err(error);
        }
        Ok(Attached {
            host_ifindex: host.ifindex,
            host_mac: port.host_mac(),
            pod_mac: port.pod_mac(),
        })
    }

    fn take_over(&self, port: &PodPort) -> Result<bool, AttachError> {
        let _running = self.collecting.read().unwrap_or_else(PoisonError::into_inner);
        take_over::take_over(self, port)
    }

    fn detach(&self, host_interface: &IfName, addresses: &[IpAddr]) -> Result<(), DetachError> {
        let mut socket = self.socket().map_err(DetachError::NodeNamespace)?;
        let netlink = |source| DetachError::Netlink { interface: host_interface.clone(), source };
        let found = Device::find(&mut socket, host_interface.as_str()).map_err(netlink)?;
        let mut addresses: BTreeSet<IpAddr> = addresses.iter().copied().collect();
        let Some(host) = found else {
            let _ = self.close_ports(&addresses);
            return self.forget(host_interface, &addresses);
        };
        if !host.is_of_pod() {
            return Err(DetachError::Foreign(host_interface.clone()));
        }
        addresses.extend(self.known_addresses(host.ifindex));
        let closed = self.close_ports(&addresses).map_err(|source| DetachError::Bpf {
            what: "ports of the node",
            interface: host_interface.clone(),
            source,
        });
        // The device goes even when a map entry could not be removed.
        let forgotten = self.forget(host_interface, &addresses);
        match gone::put_aside(&mut socket, host.ifindex) {
            Err(error) if !error.is_missing() => return Err(netlink(error)),
            _ => {}
        }
        closed.and(forgotten).and(self.forget_port(host_interface, host.ifindex))
    }

    fn publish(&self, ports: &[(Vec<HostPort>, Vec<IpAddr>)]) -> io::Result<()> {
        let mut all = Entries::new();
        for (ports, addresses) in ports {
            all.extend(ports::entries(ports, addresses));
        }
        let mut known = self.ports();
        // Adding what is there changes nothing, and fails when the table is not there.
        let same = known.table && known.entries == all;
        let intact = |entries: &Entries| entries.is_empty() || ports::change(entries, true).is_ok();
        if same && self.node.run(|| intact(&all))? {
            return Ok(());
        }
        self.node.run(|| ports::replace(&all))??;
        let table = !all.is_empty();
        *known = Ports { entries: all, table };
        Ok(())
    }

    fn bury(&self) -> Result<usize, ListError> {
        Ok(gone::bury(&mut self.socket().map_err(ListError::NodeNamespace)?)?)
    }

    fn check(&self, port: &PodPort) -> Result<Vec<Missing>, ListError> {
        check::check(self, port)
    }

    fn list(&self) -> Result<Vec<ObservedPort>, ListError> {
        let ports = self.devices()?.into_iter().filter_map(|device| {
            Some(ObservedPort {
                host_interface: device.name.parse().ok()?,
                ifindex: device.ifindex,
                owner: device.owner().to_owned(),
                pod_mac: self.pod_mac(&device),
            })
        });
        Ok(ports.collect())
    }

    fn collect_garbage(&self) -> Result<usize, ListError> {
        let _alone = self.collecting.write().unwrap_or_else(PoisonError::into_inner);
        let programs = &self.programs;
        let devices = self.devices()?;
        let live: BTreeSet<u32> = devices.iter().map(|device| device.ifindex).collect();
        let mut removed = 0;
        for (address, pod) in
            programs.local_pods.entries().map_err(MapError::of(maps::LOCAL_PODS))?
        {
            if !live.contains(&pod.device()) {
                programs.local_pods.delete(&address).map_err(MapError::of(maps::LOCAL_PODS))?;
                removed += 1;
            }
        }
        let policies = &programs.policy.pods;
        for (ifindex, _) in policies.entries().map_err(MapError::of(maps::POD_POLICIES))? {
            if !live.contains(&ifindex) {
                policies.delete(&ifindex).map_err(MapError::of(maps::POD_POLICIES))?;
                removed += 1;
            }
        }
        for (ifindex, _) in programs.pod_ports.entries().map_err(MapError::of(maps::POD_PORTS))? {
            if !live.contains(&ifindex) {
                programs.pod_ports.delete(&ifindex).map_err(MapError::of(maps::POD_PORTS))?;
                removed += 1;
            }
        }
        for (cookie, ifindex) in
            programs.namespaces.entries().map_err(MapError::of(maps::NAMESPACES))?
        {
            if ifindex != 0 && !live.contains(&ifindex) {
                programs.namespaces.delete(&cookie).map_err(MapError::of(maps::NAMESPACES))?;
            }
        }
        Ok(removed)
    }
}

impl LinuxPodNetwork {
    /// Takes back a failed attachment. Errors are not reported: the first one is, and garbage collection gets the rest.
    fn undo(&self, socket: &mut RouteSocket, port: &PodPort, ifindex: u32) {
        let _ = self.close_ports(&port.addresses().collect());
        let _ = self.forget(&port.host_interface, &port.addresses().collect());
        let _ = socket.batch(vec![message::delete_link(ifindex)]);
        let _ = self.programs.pod_ports.delete(&ifindex);
        let _ = self.programs.policy.pods.delete(&ifindex);
    }
}

/// The node's side: mark, up, routes and neighbours.
fn host_requests(port: &PodPort, ifindex: u32) -> Vec<RouteRequest> {
    let alias = format!("{ALIAS_PREFIX}{}", port.owner);
    let mut requests = vec![
        message::mark_link(port.host_interface.as_str(), &alias),
        message::set_up(ifindex, None),
    ];
    for address in port.addresses() {
        let route = RouteSpec::new(IpNet::from(address), POD_ROUTE_PROTOCOL, Via::Device(ifindex));
        requests.push(message::put_neighbour(ifindex, address, port.pod_mac()));
        requests.push(route.put());
    }
    requests.extend(port.bandwidth.to_pod.map(|rate| rate.request(ifindex)));
    requests
}

/// No router advertisements, no duplicate address detection: addresses are ours to give.
fn pod_sysctls(port: &PodPort) -> Result<(), sysctl::SysctlError> {
    let name = &port.interface;
    sysctl::write_if_present(&format!("net/ipv6/conf/{name}/accept_ra"), "0")?;
    sysctl::write_if_present(&format!("net/ipv6/conf/{name}/accept_dad"), "0")?;
    let disabled = format!("net/ipv6/conf/{name}/disable_ipv6");
    // Writing it, also what it says already, waits for the lock on devices, and burns a processor meanwhile.
    if port.v6.is_some() && sysctl::read(&disabled).is_some_and(|value| value != "0") {
        sysctl::write(&disabled, "0")?;
    }
    Ok(())
}

fn pod_requests(port: &PodPort, ifindex: u32) -> Vec<RouteRequest> {
    let mut requests = vec![message::set_up(LOOPBACK, None)];
    requests.extend(port.bandwidth.from_pod.map(|rate| rate.request(ifindex)));
    requests.push(message::set_up(ifindex, None));
    // The kernel goes on with an IPv6 address in its own time: it gets the most of it.
    requests.extend(port.v6.map(|address| message::put_address(ifindex, address.into())));
    requests.extend(port.v4.map(|address| message::put_address(ifindex, address.into())));
    for address in port.addresses() {
        let gateway: IpAddr = match address {
            IpAddr::V4(_) => POD_GATEWAY.into(),
            IpAddr::V6(_) => POD_GATEWAY_V6.into(),
        };
        let via = Via::OnLink { ifindex, gateway };
        requests.push(message::put_neighbour(ifindex, gateway, port.host_mac()));
        requests.push(RouteSpec::new(check::default_route(gateway), POD_ROUTE_PROTOCOL, via).put());
    }
    requests
}

/// The first failure of a batch.
fn all_done(
    answers: Result<Vec<Answer<RouteNetlinkMessage>>, NetlinkError>,
) -> Result<(), NetlinkError> {
    answers?.into_iter().try_for_each(|answer| answer.map(drop))
}

pub(super) fn netlink_error(
    what: &'static str,
    port: &PodPort,
    source: NetlinkError,
) -> AttachError {
    AttachError::Netlink { what, interface: port.host_interface.clone(), source }
}

pub(super) fn map_error(map: &'static str, port: &PodPort, source: io::Error) -> AttachError {
    let interface = port.host_interface.clone();
    AttachError::Map { interface, source: MapError::of(map)(source) }
}
