//! What Endpoints of a Service say, from its EndpointSlices. Pure.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{EndpointAddress, EndpointPort, EndpointSubset, Endpoints};
use k8s_openapi::api::discovery::v1::{self as discovery, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use mesh_model::wellknown::{LABEL_MANAGED_BY, LABEL_SERVICE_NAME};

use crate::objects;

/// More addresses than this are left out.
const MOST: usize = 1000;
const ANNOTATION_FULL: &str = "endpoints.kubernetes.io/over-capacity";
const LABEL_MADE: &str = "endpoints.kubernetes.io/managed-by";

/// The Endpoints of the Service whose slices these are, in one address family; none without a slice.
pub(super) fn made(slices: &[EndpointSlice], family: &str) -> Option<Endpoints> {
    let first = slices.iter().min_by_key(|slice| objects::created(&slice.metadata))?;
    let mut metadata = metadata(first)?;
    let mut subsets: Vec<EndpointSubset> = Vec::new();
    for slice in slices.iter().filter(|slice| slice.address_type == family) {
        let ports: Vec<EndpointPort> = slice.ports.iter().flatten().map(port).collect();
        let ports = Some(ports).filter(|ports| !ports.is_empty());
        let known = subsets.iter().position(|subset| subset.ports == ports);
        let at = known.unwrap_or_else(|| {
            subsets.push(EndpointSubset { ports, ..EndpointSubset::default() });
            subsets.len() - 1
        });
        slice.endpoints.iter().flatten().for_each(|endpoint| add(&mut subsets[at], endpoint));
    }
    for list in subsets.iter_mut().flat_map(lists) {
        list.sort_by_cached_key(|address| (address.ip.parse::<IpAddr>().ok(), target(address)));
    }
    if cut(&mut subsets) {
        let text = "truncated".to_owned();
        metadata.annotations = Some([(ANNOTATION_FULL.to_owned(), text)].into());
    }
    subsets.retain(|subset| subset.addresses.is_some() || subset.not_ready_addresses.is_some());
    Some(Endpoints { metadata, subsets: Some(subsets).filter(|subsets| !subsets.is_empty()) })
}

/// Adds an endpoint to where it belongs; nowhere, when it has ended its work.
fn add(subset: &mut EndpointSubset, endpoint: &discovery::Endpoint) {
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    let list = match (conditions.ready, conditions.terminating) {
        (Some(false), Some(true)) => return,
        (Some(false), _) => &mut subset.not_ready_addresses,
        _ => &mut subset.addresses,
    };
    let addresses = endpoint.addresses.iter().map(|ip| EndpointAddress {
        ip: ip.clone(),
        hostname: endpoint.hostname.clone(),
        node_name: endpoint.node_name.clone(),
        target_ref: endpoint.target_ref.clone(),
    });
    list.get_or_insert_default().extend(addresses);
}

/// Both lists of addresses, as far as there are any.
fn lists(subset: &mut EndpointSubset) -> impl Iterator<Item = &mut Vec<EndpointAddress>> {
    subset.addresses.iter_mut().chain(&mut subset.not_ready_addresses)
}

/// Pods in a node's network have one address together.
fn target(address: &EndpointAddress) -> Option<String> {
    address.target_ref.as_ref()?.name.clone()
}

/// Leaves out what is too much, of those that are ready last. Whether there was too much.
fn cut(subsets: &mut [EndpointSubset]) -> bool {
    let mut room = MOST;
    let mut is_cut = false;
    let mut fit = |list: &mut Option<Vec<EndpointAddress>>| {
        if let Some(addresses) = list {
            is_cut |= addresses.len() > room;
            addresses.truncate(room);
            room -= addresses.len();
        }
        *list = list.take().filter(|addresses| !addresses.is_empty());
    };
    subsets.iter_mut().for_each(|subset| fit(&mut subset.addresses));
    subsets.iter_mut().for_each(|subset| fit(&mut subset.not_ready_addresses));
    is_cut
}

fn port(port: &discovery::EndpointPort) -> EndpointPort {
    EndpointPort {
        name: port.name.clone().filter(|name| !name.is_empty()),
        port: port.port.unwrap_or_default(),
        protocol: port.protocol.clone(),
        app_protocol: port.app_protocol.clone(),
    }
}

fn metadata(slice: &EndpointSlice) -> Option<ObjectMeta> {
    let mut labels = objects::labels(&slice.metadata);
    let service = labels.remove(LABEL_SERVICE_NAME)?;
    labels.remove(LABEL_MANAGED_BY);
    labels.insert(LABEL_MADE.to_owned(), "endpoint-controller".to_owned());
    Some(ObjectMeta {
        name: Some(service),
        namespace: slice.metadata.namespace.clone(),
        uid: objects::controller_of(&slice.metadata).map(|owner| uid(&owner.uid)),
        creation_timestamp: slice.metadata.creation_timestamp.clone(),
        labels: Some(labels),
        ..ObjectMeta::default()
    })
}

/// Always the same for a Service, and not the Service's own: that with version 8, which has no rule of its own (RFC 9562).
fn uid(service: &str) -> String {
    const VERSION_AT: usize = 14;
    service.chars().enumerate().map(|(at, c)| if at == VERSION_AT { '8' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn slice(family: &str, port: u16, endpoints: Vec<Value>) -> EndpointSlice {
        serde_json::from_value(json!({
            "metadata": {"name": "web-x", "namespace": "default", "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": {"team": "x", "kubernetes.io/service-name": "web",
                    "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"},
                "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": "web",
                    "uid": "e5f4c1ce-1111-4222-8333-444455556666", "controller": true}]},
            "addressType": family, "endpoints": endpoints,
            "ports": [{"name": "", "port": port, "protocol": "TCP"}],
        }))
        .unwrap()
    }

    fn endpoint(ip: &str, ready: bool, terminating: bool) -> Value {
        json!({"addresses": [ip], "conditions": {"ready": ready, "terminating": terminating},
            "nodeName": "n1", "targetRef": {"kind": "Pod", "name": "p"}})
    }

    #[test]
    fn ready_ones_waiting_ones_and_nobody_who_goes() {
        let first = vec![
            endpoint("10.244.0.10", true, false),
            endpoint("10.244.0.9", true, false),
            endpoint("10.244.0.3", false, false),
            endpoint("10.244.0.4", false, true),
        ];
        // One that terminates is ready where the Service publishes all of them.
        let second = vec![endpoint("10.244.0.5", true, true)];
        let slices = [
            slice("IPv4", 80, first),
            slice("IPv4", 81, second),
            slice("IPv6", 80, vec![endpoint("fd10::1", true, false)]),
            slice("IPv4", 82, vec![endpoint("10.244.0.6", false, true)]),
        ];
        let address = |ip: &str| json!({"ip": ip, "nodeName": "n1", "targetRef": {"kind": "Pod", "name": "p"}});
        assert_eq!(
            serde_json::to_value(made(&slices, "IPv4")).unwrap(),
            json!({
                "apiVersion": "v1", "kind": "Endpoints",
                "metadata": {"name": "web", "namespace": "default", "creationTimestamp": "2026-01-01T00:00:00Z",
                    "uid": "e5f4c1ce-1111-8222-8333-444455556666",
                    "labels": {"team": "x", "endpoints.kubernetes.io/managed-by": "endpoint-controller"}},
                "subsets": [
                    {"addresses": [address("10.244.0.9"), address("10.244.0.10")],
                     "notReadyAddresses": [address("10.244.0.3")],
                     "ports": [{"port": 80, "protocol": "TCP"}]},
                    {"addresses": [address("10.244.0.5")], "ports": [{"port": 81, "protocol": "TCP"}]}],
            })
        );
        assert_eq!(made(&[], "IPv4"), None);
        let empty = made(&[slice("IPv4", 80, vec![])], "IPv4").unwrap();
        assert_eq!((empty.metadata.name.as_deref(), empty.subsets), (Some("web"), None));
    }

    #[test]
    fn a_thousand_fit_and_those_that_are_ready_first() {
        let many = |ready: bool, from: usize, to: usize| -> Vec<Value> {
            (from..to)
                .map(|n| endpoint(&format!("10.244.{}.{}", n / 250, n % 250 + 1), ready, false))
                .collect()
        };
        let full = |slices: &[EndpointSlice]| {
            let object = made(slices, "IPv4").unwrap();
            let annotations = object.metadata.annotations.unwrap_or_default();
            let subsets = object.subsets.unwrap().into_iter();
            let counts = subsets.map(|subset| {
                let count = |list: Option<Vec<EndpointAddress>>| list.map_or(0, |l| l.len());
                (count(subset.addresses), count(subset.not_ready_addresses))
            });
            (annotations.get(ANNOTATION_FULL).cloned(), counts.collect::<Vec<_>>())
        };
        let waiting = || slice("IPv4", 80, many(false, 0, 20));
        let fits = [waiting(), slice("IPv4", 81, many(true, 20, 1000))];
        assert_eq!(full(&fits), (None, vec![(0, 20), (980, 0)]));
        let over = [waiting(), slice("IPv4", 81, many(true, 20, 1010))];
        assert_eq!(full(&over), (Some("truncated".to_owned()), vec![(0, 10), (990, 0)]));
    }
}
