//! The EndpointSlices that say what an Endpoints object says: one for each address family and set of ports.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{self as core, EndpointAddress, Endpoints, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use mesh_model::wellknown::{LABEL_MANAGED_BY, LABEL_SERVICE_NAME, LABEL_SKIP_MIRROR};

use crate::controllers::endpoints::plan::{PortsKey, Step};
use crate::objects::{self, Labels};

/// Value of the managed-by label on the slices that this controller owns.
pub(super) const MANAGER: &str = "endpointslicemirroring-controller.k8s.io";
/// More endpoints than this do not go into one slice, and there is one for each family and set of ports.
pub(super) const MAX_ENDPOINTS: usize = 1000;
/// Annotation on Endpoints that only record who leads.
const ANNOTATION_LEADER: &str = "control-plane.alpha.kubernetes.io/leader";
/// What is said about the Endpoints object itself.
const OWN_ANNOTATIONS: [&str; 2] = [
    "endpoints.kubernetes.io/last-change-trigger-time",
    "kubectl.kubernetes.io/last-applied-configuration",
];

/// Whether the object says where connections are to go. One that is being deleted does not: a slice would hold it up.
pub(super) fn is_meant(endpoints: &Endpoints) -> bool {
    let meta = &endpoints.metadata;
    let has = |map: &Option<Labels>, key: &str| map.as_ref().and_then(|m| m.get(key)).cloned();
    has(&meta.labels, LABEL_SKIP_MIRROR).as_deref() != Some("true")
        && has(&meta.annotations, ANNOTATION_LEADER).is_none()
        && !objects::is_terminating(meta)
}

/// Whether the Service leaves it to people where it leads.
pub(super) fn is_open(service: &Service) -> bool {
    let selector = service.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    selector.is_none_or(|selector| selector.is_empty())
}

/// What is to be done, and how many addresses there is no room for.
pub(super) struct Plan {
    pub(super) steps: Vec<Step>,
    pub(super) skipped: usize,
}

/// Plans for Endpoints that are to be mirrored; without them for none. `existing` are the slices that carry our [`MANAGER`] label, in
/// any order.
pub(super) fn plan(endpoints: Option<&Endpoints>, existing: &[Arc<EndpointSlice>]) -> Plan {
    let mut present: BTreeMap<Group, Vec<&EndpointSlice>> = BTreeMap::new();
    for slice in existing {
        present.entry(Group::of(slice)).or_default().push(slice);
    }
    for slices in present.values_mut() {
        slices
            .sort_by_key(|slice| (objects::created(&slice.metadata), slice.metadata.name.clone()));
    }
    let (mut steps, mut skipped) = (Vec::new(), 0);
    if let Some(endpoints) = endpoints {
        for (group, addresses) in wanted(endpoints) {
            skipped += addresses.len().saturating_sub(MAX_ENDPOINTS);
            let first = present.get_mut(&group).map(|slices| slices.remove(0));
            steps.extend(settle(endpoints, &group, first_of(addresses), first));
        }
    }
    // Last, so that addresses whose ports change are in two slices for a moment rather than in none.
    let superfluous = present.into_values().flatten();
    steps.extend(superfluous.map(|s| Step::Delete(objects::name(&s.metadata).to_owned())));
    Plan { steps, skipped }
}

/// What the endpoints of a slice have in common.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Group {
    family: String,
    ports: PortsKey,
}

impl Group {
    fn of(slice: &EndpointSlice) -> Self {
        let ports = PortsKey::of(slice.ports.as_deref().unwrap_or_default());
        Self { family: slice.address_type.clone(), ports }
    }
}

/// Endpoints by what they have in common. An address that is in both lists of a set of ports is not ready.
fn wanted(endpoints: &Endpoints) -> BTreeMap<Group, BTreeMap<IpAddr, Endpoint>> {
    let mut groups: BTreeMap<Group, BTreeMap<IpAddr, Endpoint>> = BTreeMap::new();
    for ready in [true, false] {
        for subset in endpoints.subsets.iter().flatten() {
            let ports: Vec<_> = subset.ports.iter().flatten().map(port).collect();
            let ports = PortsKey::of(&ports);
            let list = if ready { &subset.addresses } else { &subset.not_ready_addresses };
            for address in list.iter().flatten() {
                let Ok(ip) = address.ip.parse::<IpAddr>() else { continue };
                let ip = ip.to_canonical();
                let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" }.to_owned();
                let group = groups.entry(Group { family, ports: ports.clone() }).or_default();
                group.insert(ip, endpoint(address, ip, ready));
            }
        }
    }
    groups
}

/// As many as a slice takes, the ready ones first.
fn first_of(addresses: BTreeMap<IpAddr, Endpoint>) -> Vec<Endpoint> {
    let mut all: Vec<Endpoint> = addresses.into_values().collect();
    let waits =
        |endpoint: &Endpoint| endpoint.conditions.as_ref().and_then(|c| c.ready) != Some(true);
    all.sort_by_key(waits);
    all.truncate(MAX_ENDPOINTS);
    all
}

fn port(port: &core::EndpointPort) -> EndpointPort {
    EndpointPort {
        name: Some(port.name.clone().unwrap_or_default()),
        protocol: port.protocol.clone(),
        port: Some(port.port),
        app_protocol: port.app_protocol.clone(),
    }
}

fn endpoint(address: &EndpointAddress, ip: IpAddr, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![ip.to_string()],
        conditions: Some(EndpointConditions {
            ready: Some(ready),
            serving: Some(ready),
            terminating: Some(false),
        }),
        hostname: address.hostname.clone().filter(|name| !name.is_empty()),
        node_name: address.node_name.clone(),
        target_ref: address.target_ref.clone(),
        ..Endpoint::default()
    }
}

/// Makes the slice of a group, or changes the one that is there if anything differs.
fn settle(
    endpoints: &Endpoints,
    group: &Group,
    wanted: Vec<Endpoint>,
    present: Option<&EndpointSlice>,
) -> Option<Step> {
    let meta = &endpoints.metadata;
    let mut slice = present.cloned().unwrap_or_else(|| EndpointSlice {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", objects::name(meta))),
            namespace: meta.namespace.clone(),
            ..ObjectMeta::default()
        },
        address_type: group.family.clone(),
        endpoints: None,
        ports: Some(group.ports.ports()),
    });
    slice.endpoints = Some(wanted);
    slice.metadata.labels = Some(labels(meta));
    slice.metadata.annotations = annotations(meta);
    slice.metadata.owner_references = Some(vec![owner(meta)]);
    match present {
        None => Some(Step::Create(Box::new(slice))),
        Some(present) if *present == slice => None,
        Some(_) => Some(Step::Update(Box::new(slice))),
    }
}

fn labels(meta: &ObjectMeta) -> Labels {
    let mut labels = objects::labels(meta);
    labels.insert(LABEL_SERVICE_NAME.to_owned(), objects::name(meta).to_owned());
    labels.insert(LABEL_MANAGED_BY.to_owned(), MANAGER.to_owned());
    labels
}

fn annotations(meta: &ObjectMeta) -> Option<Labels> {
    let mut annotations = meta.annotations.clone().unwrap_or_default();
    annotations.retain(|key, _| !OWN_ANNOTATIONS.contains(&key.as_str()));
    Some(annotations).filter(|annotations| !annotations.is_empty())
}

fn owner(meta: &ObjectMeta) -> OwnerReference {
    OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Endpoints".to_owned(),
        name: objects::name(meta).to_owned(),
        uid: objects::uid(meta).to_owned(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

#[cfg(test)]
mod tests;
