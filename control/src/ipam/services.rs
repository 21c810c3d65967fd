//! ClusterIPs and node ports of Services: reserved while an object is being written, kept once it is.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use mesh_model::ClusterConfig;
use mesh_model::wellknown::{DNS_SERVICE, SYSTEM_NAMESPACE};

use super::FieldError;
use super::families::{Family, is_external_name, is_headless, requested_addresses, resolve};
use super::pool::{Pool, Refusal};
use state::{AddressRange, State};
use update::{drop_node_ports, inherit_node_ports, normalise, take_over, unchanged};

mod state;
mod update;

/// The assigner of ClusterIPs and node ports. Cheap to clone; clones share one state.
#[derive(Debug, Clone)]
pub struct ServiceAddresses(Arc<Mutex<State>>);

/// Addresses and ports that were taken for one write of a Service.
///
/// Dropping it gives back what this write took; [`commit`](Self::commit) keeps it and gives back what the
/// write made superfluous.
#[derive(Debug)]
#[must_use = "dropping a reservation releases what it holds: commit it after the object is stored"]
pub struct Reservation {
    owner: String,
    addresses: ServiceAddresses,
    taken: Vec<Item>,
    kept: Vec<Item>,
    superfluous: Vec<Item>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Item {
    Address(IpAddr),
    Port(Protocol, u16),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl ServiceAddresses {
    /// All addresses and ports of the cluster's ranges, free; the DNS addresses only for the DNS Service.
    pub fn new(cluster: &ClusterConfig) -> Self {
        let dns = format!("{SYSTEM_NAMESPACE}/{DNS_SERVICE}");
        let mut ranges: Vec<_> = cluster.service_cidrs.iter().map(AddressRange::new).collect();
        for vip in &cluster.dns_vips {
            for range in &mut ranges {
                if let Some(number) = range.number(*vip) {
                    range.pool.reserve(number, &dns);
                }
            }
        }
        let (first, last) = (u32::from(cluster.node_ports.0), u32::from(cluster.node_ports.1));
        let band = ((last.saturating_sub(first) + 1) / 32).clamp(0, 128);
        let ports = [(); 3].map(|()| Pool::new(first, last, first + band));
        Self(Arc::new(Mutex::new(State { ranges, node_ports: cluster.node_ports, ports })))
    }

    /// Marks what stored Services hold. Call once at start, before the first [`assign`](Self::assign).
    ///
    /// Two Services with one address (an older defect, a hand-edited store) are logged; the first keeps it.
    pub fn load(&self, services: &[Service]) {
        let mut state = self.lock();
        for service in services {
            let owner = key(service);
            for item in items(service.spec.as_ref()) {
                if state.take(item, &owner).is_err() {
                    tracing::warn!(service = %owner, ?item, "service holds what is not its own");
                }
            }
        }
        for range in &mut state.ranges {
            range.pool.continue_after_highest();
        }
        for pool in &mut state.ports {
            pool.continue_after_highest();
        }
    }

    /// Fills in families, ClusterIPs and node ports of `service`, which replaces `old` (or is new).
    ///
    /// Requested values are honoured or refused; what an update leaves out is taken over from `old`.
    pub fn assign(
        &self,
        service: &mut Service,
        old: Option<&Service>,
    ) -> Result<Reservation, FieldError> {
        let mut spec = service.spec.clone().unwrap_or_default();
        let old_spec = old.and_then(|old| old.spec.as_ref());
        // Declared before the guard: on an early return the guard is gone when the reservation is dropped.
        let mut reservation = Reservation {
            owner: key(service),
            addresses: self.clone(),
            taken: Vec::new(),
            kept: Vec::new(),
            superfluous: Vec::new(),
        };
        let mut state = self.lock();
        let held: BTreeSet<Item> = items(old_spec).into_iter().collect();
        let mut writer = Writer { state: &mut state, held: &held, reservation: &mut reservation };
        writer.addresses(&mut spec, old_spec)?;
        writer.ports(&mut spec, old_spec)?;
        drop(state);
        let kept: BTreeSet<Item> = items(Some(&spec)).into_iter().collect();
        reservation.superfluous = held.difference(&kept).copied().collect();
        reservation.kept = kept.into_iter().collect();
        service.spec = Some(spec);
        Ok(reservation)
    }

    /// Frees what a deleted Service held.
    pub fn release(&self, service: &Service) {
        let owner = key(service);
        let mut state = self.lock();
        for item in items(service.spec.as_ref()) {
            state.free(item, &owner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no code panics while it holds the address pools")
    }
}

impl Reservation {
    /// Keeps what was taken: the object is stored.
    pub fn commit(mut self) {
        self.taken.clear();
        let superfluous = std::mem::take(&mut self.superfluous);
        let kept = std::mem::take(&mut self.kept);
        let mut state = self.addresses.lock();
        for item in kept {
            // A rival write of the same object may have taken it first, lost, and given it back.
            if state.take(item, &self.owner).is_err() {
                tracing::error!(service = %self.owner, ?item, "stored what another service holds");
            }
        }
        for item in superfluous {
            state.free(item, &self.owner);
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.taken.is_empty() {
            return;
        }
        let mut state = self.addresses.lock();
        for item in &self.taken {
            state.free(*item, &self.owner);
        }
    }
}

/// One `assign` under way.
struct Writer<'a> {
    state: &'a mut State,
    held: &'a BTreeSet<Item>,
    reservation: &'a mut Reservation,
}

impl Writer<'_> {
    fn addresses(
        &mut self,
        spec: &mut ServiceSpec,
        old: Option<&ServiceSpec>,
    ) -> Result<(), FieldError> {
        if is_external_name(spec) {
            spec.cluster_ip = None;
            spec.cluster_ips = None;
            spec.ip_families = None;
            spec.ip_family_policy = None;
            return Ok(());
        }
        let old = old.filter(|old| !is_external_name(old));
        if let Some(old) = old {
            take_over(spec, old);
        }
        normalise(spec)?;
        if let Some(old) = old {
            unchanged(spec, old)?;
        }
        let available = self.state.families();
        let families = resolve(spec, &available)?;
        if is_headless(spec) {
            spec.cluster_ip = Some("None".to_owned());
            spec.cluster_ips = Some(vec!["None".to_owned()]);
            return Ok(());
        }
        let requested = requested_addresses(spec)?;
        let mut addresses = Vec::new();
        for (i, family) in families.iter().enumerate() {
            let address = match requested.get(i) {
                Some((text, address)) => self.requested_address(i, text, *address)?,
                None => self.any_address(*family)?,
            };
            addresses.push(address.to_string());
        }
        spec.cluster_ip = addresses.first().cloned();
        spec.cluster_ips = Some(addresses);
        Ok(())
    }

    fn requested_address(
        &mut self,
        index: usize,
        text: &str,
        address: IpAddr,
    ) -> Result<IpAddr, FieldError> {
        let field = || format!("spec.clusterIPs[{index}]");
        match self.take(Item::Address(address)) {
            Ok(()) => Ok(address),
            Err(Refusal::Taken) => {
                Err(FieldError::invalid(field(), text, "provided IP is already allocated"))
            }
            Err(Refusal::OutOfRange) => {
                let ranges: Vec<_> = self.state.ranges.iter().map(|r| r.net.to_string()).collect();
                let detail = format!(
                    "the provided IP is not in the valid range. The range of valid IPs is {}",
                    ranges.join(", ")
                );
                Err(FieldError::invalid(field(), text, &detail))
            }
        }
    }

    fn any_address(&mut self, family: Family) -> Result<IpAddr, FieldError> {
        let range = self.state.ranges.iter_mut().find(|range| range.family() == family);
        let taken = range.and_then(|range| {
            let number = range.pool.take_any(&self.reservation.owner)?;
            Some(range.address(number))
        });
        let address = taken.ok_or_else(|| {
            let detail = format!("no free {} address: the service range is full", family.name());
            FieldError::internal("spec.clusterIPs", &detail)
        })?;
        self.reservation.taken.push(Item::Address(address));
        Ok(address)
    }

    fn ports(
        &mut self,
        spec: &mut ServiceSpec,
        old: Option<&ServiceSpec>,
    ) -> Result<(), FieldError> {
        let type_ = spec.type_.clone().unwrap_or_else(|| "ClusterIP".to_owned());
        let wanted = exposes_node_ports(spec);
        let local = spec.external_traffic_policy.as_deref() == Some("Local");
        let automatic = match type_.as_str() {
            "LoadBalancer" => spec.allocate_load_balancer_node_ports != Some(false),
            _ => wanted,
        };
        let ports = spec.ports.get_or_insert_default();
        for port in ports.iter_mut() {
            port.node_port = port.node_port.filter(|number| *number != 0);
        }
        if !wanted {
            spec.health_check_node_port = None;
            return drop_node_ports(ports, &type_, self.held);
        }
        // Who wants none gives those back that an update leaves out: there is no other way to say so.
        if automatic {
            inherit_node_ports(ports, old);
        }
        let mut seen = BTreeSet::new();
        for (i, port) in ports.iter().enumerate() {
            if let Some(number) = port.node_port {
                let field = format!("spec.ports[{i}].nodePort");
                if !seen.insert((Protocol::of(port), number)) {
                    return Err(FieldError::duplicate(field, number));
                }
                self.requested_port(field, Protocol::of(port), number)?;
            }
        }
        if automatic {
            self.fill_ports(ports)?;
        }
        if type_ == "LoadBalancer" && local && spec.health_check_node_port.unwrap_or(0) == 0 {
            let inherited = old.and_then(|old| old.health_check_node_port).filter(|n| *n != 0);
            spec.health_check_node_port = Some(match inherited {
                Some(number) => number,
                None => self.any_port(Protocol::Tcp, "spec.healthCheckNodePort")?.into(),
            });
        } else if let Some(number) = spec.health_check_node_port.filter(|n| *n != 0) {
            self.requested_port("spec.healthCheckNodePort".to_owned(), Protocol::Tcp, number)?;
        }
        Ok(())
    }

    /// Gives a number to each port without one; the same for TCP and UDP of one port where possible.
    fn fill_ports(&mut self, ports: &mut [ServicePort]) -> Result<(), FieldError> {
        for i in 0..ports.len() {
            if ports[i].node_port.is_some() {
                continue;
            }
            let protocol = Protocol::of(&ports[i]);
            let twin = ports
                .iter()
                .filter(|p| p.port == ports[i].port && Protocol::of(p) != protocol)
                .find_map(|p| p.node_port.and_then(|n| u16::try_from(n).ok()));
            let free_twin = twin.filter(|n| self.take_new(Item::Port(protocol, *n)));
            let number = match free_twin {
                Some(number) => number,
                None => self.any_port(protocol, &format!("spec.ports[{i}].nodePort"))?,
            };
            ports[i].node_port = Some(number.into());
        }
        Ok(())
    }

    fn requested_port(
        &mut self,
        field: String,
        protocol: Protocol,
        number: i32,
    ) -> Result<(), FieldError> {
        let (first, last) = self.state.node_ports;
        let result = match u16::try_from(number) {
            Ok(port) => self.take(Item::Port(protocol, port)),
            Err(_) => Err(Refusal::OutOfRange),
        };
        result.map_err(|refusal| match refusal {
            Refusal::Taken => {
                FieldError::invalid(field, number, "provided port is already allocated")
            }
            Refusal::OutOfRange => {
                let detail = format!(
                    "provided port is not in the valid range. The range of valid ports is {first}-{last}"
                );
                FieldError::invalid(field, number, &detail)
            }
        })
    }

    fn any_port(&mut self, protocol: Protocol, field: &str) -> Result<u16, FieldError> {
        let number = self.state.ports[protocol as usize].take_any(&self.reservation.owner);
        let number = number.and_then(|n| u16::try_from(n).ok()).ok_or_else(|| {
            FieldError::internal(field, "no free node port: the node port range is full")
        })?;
        self.reservation.taken.push(Item::Port(protocol, number));
        Ok(number)
    }

    /// Takes `item` unless the Service has it already.
    fn take(&mut self, item: Item) -> Result<(), Refusal> {
        if self.held.contains(&item) {
            return Ok(());
        }
        if self.state.take(item, &self.reservation.owner)? {
            self.reservation.taken.push(item);
        }
        Ok(())
    }

    /// Takes `item` if nobody, not even this Service, has it.
    fn take_new(&mut self, item: Item) -> bool {
        let new = self.state.take(item, &self.reservation.owner) == Ok(true);
        if new {
            self.reservation.taken.push(item);
        }
        new
    }
}

impl Protocol {
    fn of(port: &ServicePort) -> Self {
        match port.protocol.as_deref() {
            Some("UDP") => Self::Udp,
            Some("SCTP") => Self::Sctp,
            _ => Self::Tcp,
        }
    }
}

fn exposes_node_ports(spec: &ServiceSpec) -> bool {
    matches!(spec.type_.as_deref(), Some("NodePort" | "LoadBalancer"))
}

/// Everything that a Service of this spec holds.
fn items(spec: Option<&ServiceSpec>) -> Vec<Item> {
    let Some(spec) = spec.filter(|spec| !is_external_name(spec)) else {
        return Vec::new();
    };
    let listed = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip);
    let addresses: BTreeSet<_> = listed.filter_map(|ip| ip.parse::<IpAddr>().ok()).collect();
    let ports = spec.ports.iter().flatten().filter_map(|port| {
        let number = u16::try_from(port.node_port?).ok().filter(|n| *n != 0)?;
        Some(Item::Port(Protocol::of(port), number))
    });
    let health = spec.health_check_node_port.and_then(|n| u16::try_from(n).ok());
    let health = health.filter(|n| *n != 0).map(|n| Item::Port(Protocol::Tcp, n));
    addresses.into_iter().map(Item::Address).chain(ports).chain(health).collect()
}

fn key(service: &Service) -> String {
    let meta = &service.metadata;
    format!(
        "{}/{}",
        meta.namespace.as_deref().unwrap_or_default(),
        meta.name.as_deref().unwrap_or_default()
    )
}

#[cfg(test)]
mod tests;
