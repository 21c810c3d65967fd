//! What endpoint slices say about a service port.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::ServicePort;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};

use crate::snapshot::{FULL_WEIGHT, Protocol};
use crate::{NodeName, wellknown};

/// The endpoints of a service port in one family, in the order of the slices.
pub(super) fn candidates<'a>(
    slices: &'a [Arc<EndpointSlice>],
    port: &ServicePort,
    family: Family,
) -> Vec<Candidate<'a>> {
    let mut candidates = Vec::new();
    for slice in slices {
        let Some(port) = target_port(slice, port) else { continue };
        let weights = weights(slice);
        for endpoint in slice.endpoints.iter().flatten() {
            let addresses = endpoint.addresses.iter().filter_map(|a| Some((a, a.parse().ok()?)));
            candidates.extend(addresses.filter(|(_, a)| family.holds(a)).map(|(text, address)| {
                let weight = weights.get(text).copied().unwrap_or(FULL_WEIGHT);
                Candidate::new(endpoint, address, port, weight)
            }));
        }
    }
    candidates
}

/// One place where an endpoint serves a port.
#[derive(Debug, Clone)]
pub(super) struct Candidate<'a> {
    pub(super) address: IpAddr,
    pub(super) port: u16,
    pub(super) node: Option<NodeName>,
    pub(super) ready: bool,
    pub(super) serving: bool,
    pub(super) terminating: bool,
    pub(super) weight: u16,
    pub(super) for_nodes: Vec<&'a str>,
    pub(super) for_zones: Vec<&'a str>,
}

impl<'a> Candidate<'a> {
    fn new(endpoint: &'a Endpoint, address: IpAddr, port: u16, weight: u16) -> Self {
        let conditions = endpoint.conditions.as_ref();
        let hints = endpoint.hints.as_ref();
        let nodes = hints.into_iter().flat_map(|h| h.for_nodes.iter().flatten());
        let zones = hints.into_iter().flat_map(|h| h.for_zones.iter().flatten());
        Self {
            address,
            port,
            node: endpoint.node_name.as_deref().and_then(|n| n.parse().ok()),
            ready: is_ready(endpoint),
            serving: conditions.and_then(|c| c.serving).unwrap_or(true),
            terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
            weight,
            for_nodes: nodes.map(|n| n.name.as_str()).collect(),
            for_zones: zones.map(|z| z.name.as_str()).collect(),
        }
    }
}

/// Weights that the endpoints controller has found on the pods, by address.
fn weights(slice: &EndpointSlice) -> HashMap<String, u16> {
    let annotations = slice.metadata.annotations.as_ref();
    let text = annotations.and_then(|a| a.get(wellknown::ANNOTATION_WEIGHTS));
    text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
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

/// Whether an endpoint gets new connections and is named by DNS.
pub(super) fn is_ready(endpoint: &Endpoint) -> bool {
    endpoint.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true)
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
