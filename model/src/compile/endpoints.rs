//! Endpoint slices, indexed by their Service.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::ServicePort;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};

use crate::snapshot::{Backend, FULL_WEIGHT, Protocol};
use crate::wellknown;

/// All endpoint slices by namespace and service name.
pub(super) struct Endpoints<'a> {
    slices: HashMap<&'a str, HashMap<&'a str, Vec<&'a EndpointSlice>>>,
}

impl<'a> Endpoints<'a> {
    pub(super) fn index(slices: &'a [Arc<EndpointSlice>]) -> Self {
        let mut index: HashMap<&str, HashMap<&str, Vec<&EndpointSlice>>> = HashMap::new();
        for slice in slices {
            let metadata = &slice.metadata;
            let service =
                metadata.labels.as_ref().and_then(|l| l.get(wellknown::LABEL_SERVICE_NAME));
            if let (Some(namespace), Some(service)) = (&metadata.namespace, service) {
                index.entry(namespace).or_default().entry(service).or_default().push(slice);
            }
        }
        Self { slices: index }
    }

    /// The slices of one Service.
    pub(super) fn of(&self, namespace: &str, service: &str) -> &[&'a EndpointSlice] {
        let services = self.slices.get(namespace);
        services.and_then(|s| s.get(service)).map_or(&[], Vec::as_slice)
    }

    /// Where connections to a service port go: the ready endpoints; when there are none, those that still
    /// serve while they terminate (EndpointSlice v1, `EndpointConditions`). Ordered, without duplicates.
    pub(super) fn backends(
        &self,
        namespace: &str,
        service: &str,
        port: &ServicePort,
        family: Family,
    ) -> Vec<Backend> {
        let mut ready = Vec::new();
        let mut leaving = Vec::new();
        for slice in self.of(namespace, service) {
            let Some(number) = target_port(slice, port) else { continue };
            for endpoint in slice.endpoints.iter().flatten() {
                let list = match condition(endpoint) {
                    Condition::Ready => &mut ready,
                    Condition::Leaving => &mut leaving,
                    Condition::Out => continue,
                };
                let node = endpoint.node_name.as_deref().and_then(|n| n.parse().ok());
                let addresses = endpoint.addresses.iter().filter_map(|a| a.parse().ok());
                list.extend(addresses.filter(|a| family.holds(a)).map(|address| Backend {
                    address,
                    port: number,
                    node: node.clone(),
                    weight: FULL_WEIGHT,
                }));
            }
        }
        let mut backends = if ready.is_empty() { leaving } else { ready };
        backends.sort();
        backends.dedup_by(|a, b| (a.address, a.port) == (b.address, b.port));
        backends
    }
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    pub(super) fn of(address: &IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    fn holds(self, address: &IpAddr) -> bool {
        Self::of(address) == self
    }
}

enum Condition {
    Ready,
    Leaving,
    Out,
}

fn condition(endpoint: &Endpoint) -> Condition {
    let Some(conditions) = &endpoint.conditions else { return Condition::Ready };
    let terminating = conditions.terminating.unwrap_or(false);
    if conditions.ready.unwrap_or(true) {
        Condition::Ready
    } else if terminating && conditions.serving.unwrap_or(false) {
        Condition::Leaving
    } else {
        Condition::Out
    }
}

/// Whether an endpoint gets new connections and is named by DNS.
pub(super) fn is_ready(endpoint: &Endpoint) -> bool {
    matches!(condition(endpoint), Condition::Ready)
}

/// The port number that a slice has for a service port: they are matched by name and protocol.
fn target_port(slice: &EndpointSlice, port: &ServicePort) -> Option<u16> {
    let wanted = (port.name.as_deref().unwrap_or(""), Protocol::parse(port.protocol.as_deref())?);
    slice.ports.iter().flatten().find_map(|p| {
        let (name, protocol, number) = endpoint_port(p)?;
        ((name, protocol) == wanted).then_some(number)
    })
}

/// Name, protocol and number of an endpoint port.
pub(super) fn endpoint_port(port: &EndpointPort) -> Option<(&str, Protocol, u16)> {
    let protocol = Protocol::parse(port.protocol.as_deref())?;
    Some((port.name.as_deref().unwrap_or(""), protocol, port_number(port.port?)?))
}

/// A port number of the API, if it is one.
pub(super) fn port_number(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|n| *n != 0)
}
