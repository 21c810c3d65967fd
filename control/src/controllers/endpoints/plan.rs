//! The EndpointSlices of a Service, from the Service and the pods that it selects.
//!
//! Slices change as little as possible: an endpoint stays in its slice, and a slice whose endpoints did not
//! change is not written, so that what the nodes hear is proportional to what happened.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForNode, ForZone,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use mesh_model::containers::lasting;
use mesh_model::wellknown::{
    ANNOTATION_WEIGHT, ANNOTATION_WEIGHTS, LABEL_HEADLESS, LABEL_MANAGED_BY, LABEL_SERVICE_NAME,
};

use crate::controllers::availability::{LostNodes, serving_since};
use crate::objects::{self, Labels};

/// Value of the managed-by label on the slices that this controller owns.
pub(in crate::controllers) const MANAGER: &str = objects::SLICE_MANAGER;
/// More endpoints than this do not go into one slice.
pub(in crate::controllers) const MAX_ENDPOINTS: usize = 100;

/// One change of a Service's slices.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::controllers) enum Step {
    /// Create a slice; its name is made from `generateName`.
    Create(Box<EndpointSlice>),
    /// Replace a slice.
    Update(Box<EndpointSlice>),
    /// Delete a slice.
    Delete(String),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = |slice: &EndpointSlice| slice.endpoints.as_ref().map_or(0, Vec::len);
        match self {
            Self::Create(slice) => {
                write!(f, "create {} slice with {} endpoints", slice.address_type, size(slice))
            }
            Self::Update(slice) => {
                let name = objects::name(&slice.metadata);
                write!(f, "update slice {name} to {} endpoints", size(slice))
            }
            Self::Delete(name) => write!(f, "delete slice {name}"),
        }
    }
}

/// What the cluster adds to what the pods say.
#[derive(Debug, Clone, Default)]
pub(in crate::controllers) struct Surroundings {
    /// Nodes that nobody hears from.
    pub(in crate::controllers) lost: LostNodes,
    /// Zone of each node that has one.
    pub(in crate::controllers) zones: BTreeMap<String, String>,
}

/// Plans for `service`. `pods` may hold foreign pods of the namespace; `existing` its slices that carry our
/// [`MANAGER`] label. Both in any order.
pub(in crate::controllers) fn plan(
    service: &Service,
    pods: &[Arc<Pod>],
    surroundings: &Surroundings,
    existing: &[Arc<EndpointSlice>],
) -> Vec<Step> {
    if !objects::selects_pods(service) || objects::is_terminating(&service.metadata) {
        return Vec::new();
    }
    let wanted = wanted(service, pods, surroundings);
    let (families, weights) = (families(service), weights(service, pods));
    let mut slices: Vec<&EndpointSlice> = existing.iter().map(AsRef::as_ref).collect();
    slices.sort_by_key(|slice| (objects::created(&slice.metadata), slice.metadata.name.clone()));
    let mut steps = Vec::new();
    for slice in slices.iter().filter(|s| !families.contains(&s.address_type)) {
        steps.push(Step::Delete(objects::name(&slice.metadata).to_owned()));
    }
    for family in &families {
        let present: Vec<_> =
            slices.iter().copied().filter(|s| s.address_type == *family).collect();
        let groups = wanted.get(family).cloned().unwrap_or_default();
        steps.extend(Family { service, family, groups, weights: &weights }.plan(&present));
    }
    // Endpoints whose ports change move to another slice. They are in both for a moment rather than in none, where clients would
    // be refused.
    steps.sort_by_key(|step| matches!(step, Step::Delete(_)));
    steps
}

/// Endpoints by the ports that they share.
type Groups = BTreeMap<PortsKey, BTreeMap<Place, Endpoint>>;

/// An address, and the unique id of the pod that has it: those in a node's network have one together.
type Place = (String, Option<String>);

fn place(endpoint: &Endpoint) -> Option<Place> {
    let uid = endpoint.target_ref.as_ref().and_then(|pod| pod.uid.clone());
    Some((endpoint.addresses.first()?.clone(), uid))
}

/// Shares of new connections, by address, where a pod has one of its own.
type Weights = BTreeMap<String, u16>;
const HEAVIEST: u16 = 1000;

/// The share that a pod asks for. What is no number, or too large a one, asks for nothing.
pub(super) fn weight(pod: &Pod) -> Option<u16> {
    let text = pod.metadata.annotations.as_ref()?.get(ANNOTATION_WEIGHT)?;
    text.trim().parse().ok().filter(|weight| *weight <= HEAVIEST)
}

fn weights(service: &Service, pods: &[Arc<Pod>]) -> Weights {
    let selector = service.spec.as_ref().and_then(|s| s.selector.clone()).unwrap_or_default();
    let meant =
        pods.iter().filter(|pod| objects::selects_all(&selector, pod.metadata.labels.as_ref()));
    let weighed = meant.filter_map(|pod| Some((pod, weight(pod)?)));
    weighed
        .flat_map(|(pod, weight)| addresses(pod).into_iter().map(move |a| (a.to_owned(), weight)))
        .collect()
}

/// Ports in an order and form that can be compared.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PortsKey(Vec<(String, String, i32, String)>);

impl PortsKey {
    pub(super) fn of(ports: &[EndpointPort]) -> Self {
        let mut key: Vec<_> = ports
            .iter()
            .map(|p| {
                (
                    p.name.clone().unwrap_or_default(),
                    p.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
                    p.port.unwrap_or(0),
                    p.app_protocol.clone().unwrap_or_default(),
                )
            })
            .collect();
        key.sort();
        Self(key)
    }

    pub(super) fn ports(&self) -> Vec<EndpointPort> {
        let port = |(name, protocol, port, app): &(String, String, i32, String)| EndpointPort {
            name: Some(name.clone()),
            protocol: Some(protocol.clone()),
            port: Some(*port),
            app_protocol: Some(app.clone()).filter(|app| !app.is_empty()),
        };
        self.0.iter().map(port).collect()
    }
}

fn families(service: &Service) -> Vec<String> {
    let spec = service.spec.as_ref();
    let named = spec.and_then(|s| s.ip_families.clone()).unwrap_or_default();
    if named.is_empty() { vec!["IPv4".to_owned()] } else { named }
}

fn wanted(
    service: &Service,
    pods: &[Arc<Pod>],
    surroundings: &Surroundings,
) -> BTreeMap<String, Groups> {
    let mut result: BTreeMap<String, Groups> = BTreeMap::new();
    let selector = service.spec.as_ref().and_then(|s| s.selector.clone()).unwrap_or_default();
    for pod in pods {
        if objects::have_ended(pod)
            || !objects::selects_all(&selector, pod.metadata.labels.as_ref())
        {
            continue;
        }
        let ports = PortsKey::of(&ports(service, pod));
        for address in addresses(pod) {
            let family = if address.contains(':') { "IPv6" } else { "IPv4" };
            let endpoint = endpoint(service, pod, address, surroundings);
            let groups = result.entry(family.to_owned()).or_default();
            let place = (address.to_owned(), pod.metadata.uid.clone());
            groups.entry(ports.clone()).or_default().insert(place, endpoint);
        }
    }
    result
}

fn addresses(pod: &Pod) -> BTreeSet<&str> {
    let status = pod.status.as_ref();
    let many = status.iter().flat_map(|s| s.pod_ips.iter().flatten()).map(|ip| ip.ip.as_str());
    let one = status.and_then(|s| s.pod_ip.as_deref());
    many.chain(one).filter(|ip| !ip.is_empty()).collect()
}

fn endpoint(service: &Service, pod: &Pod, address: &str, surroundings: &Surroundings) -> Endpoint {
    let spec = service.spec.as_ref();
    let regardless = spec.and_then(|s| s.publish_not_ready_addresses) == Some(true);
    let serving = serving_since(pod, &surroundings.lost).is_some();
    let terminating = objects::is_terminating(&pod.metadata);
    let node = objects::node_of(pod).map(str::to_owned);
    let zone = node.as_ref().and_then(|node| surroundings.zones.get(node)).cloned();
    Endpoint {
        addresses: vec![address.to_owned()],
        conditions: Some(EndpointConditions {
            ready: Some(regardless || (serving && !terminating)),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hostname: hostname(service, pod),
        hints: hints(service, node.as_deref(), zone.as_deref()).filter(|_| serving && !terminating),
        node_name: node,
        zone,
        target_ref: Some(ObjectReference {
            kind: Some("Pod".to_owned()),
            name: pod.metadata.name.clone(),
            namespace: pod.metadata.namespace.clone(),
            uid: pod.metadata.uid.clone(),
            ..ObjectReference::default()
        }),
        ..Endpoint::default()
    }
}

/// For whom an endpoint is, where the Service prefers near ones (`spec.trafficDistribution`).
fn hints(service: &Service, node: Option<&str>, zone: Option<&str>) -> Option<EndpointHints> {
    let preference = service.spec.as_ref()?.traffic_distribution.as_deref()?;
    let zone = || zone.map(|zone| vec![ForZone { name: zone.to_owned() }]);
    let hints = match preference {
        "PreferSameNode" => EndpointHints {
            for_nodes: node.map(|node| vec![ForNode { name: node.to_owned() }]),
            for_zones: zone(),
        },
        "PreferSameZone" | "PreferClose" => EndpointHints { for_nodes: None, for_zones: zone() },
        _ => return None,
    };
    (hints != EndpointHints::default()).then_some(hints)
}

/// The pod's own name below the Service's, when the pod asks for it.
fn hostname(service: &Service, pod: &Pod) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let hostname = spec.hostname.clone().filter(|name| !name.is_empty())?;
    (spec.subdomain.as_deref() == Some(objects::name(&service.metadata))).then_some(hostname)
}

/// The Service's ports as they are on that pod; named ones only if the pod has them.
fn ports(service: &Service, pod: &Pod) -> Vec<EndpointPort> {
    let ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
    ports
        .filter_map(|port| {
            Some(EndpointPort {
                name: Some(port.name.clone().unwrap_or_default()),
                protocol: Some(protocol(port.protocol.as_ref())),
                port: Some(target_port(port, Some(pod))?),
                app_protocol: port.app_protocol.clone(),
            })
        })
        .collect()
}

fn target_port(port: &ServicePort, pod: Option<&Pod>) -> Option<i32> {
    match &port.target_port {
        None | Some(IntOrString::Int(0)) => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(name)) => match name.parse() {
            Ok(number) => Some(number),
            Err(_) => named_port(pod?, name, &protocol(port.protocol.as_ref())),
        },
    }
}

fn named_port(pod: &Pod, name: &str, wanted: &str) -> Option<i32> {
    let spec = pod.spec.as_ref()?;
    let ports = lasting(spec).flat_map(|c| c.ports.iter().flatten());
    ports
        .filter(|p| p.name.as_deref() == Some(name) && protocol(p.protocol.as_ref()) == wanted)
        .map(|p| p.container_port)
        .next()
}

fn protocol(protocol: Option<&String>) -> String {
    protocol.cloned().unwrap_or_else(|| "TCP".to_owned())
}

/// The slices of one address family.
struct Family<'a> {
    service: &'a Service,
    family: &'a str,
    groups: Groups,
    weights: &'a Weights,
}

impl Family<'_> {
    fn plan(mut self, present: &[&EndpointSlice]) -> Vec<Step> {
        if self.groups.is_empty() {
            return self.plan_empty(present);
        }
        let mut steps = Vec::new();
        for slice in present {
            let key = PortsKey::of(slice.ports.as_deref().unwrap_or_default());
            if !self.groups.contains_key(&key) {
                steps.push(Step::Delete(objects::name(&slice.metadata).to_owned()));
            }
        }
        for (key, endpoints) in std::mem::take(&mut self.groups) {
            let slices = present
                .iter()
                .filter(|s| PortsKey::of(s.ports.as_deref().unwrap_or_default()) == key)
                .copied();
            steps.extend(self.plan_group(&key, endpoints, slices.collect()));
        }
        steps
    }

    /// Without endpoints one empty slice stays, so that watchers know the Service was looked at.
    fn plan_empty(&self, present: &[&EndpointSlice]) -> Vec<Step> {
        let Some((first, rest)) = present.split_first() else {
            let ports = self.service.spec.iter().flat_map(|s| s.ports.iter().flatten());
            let ports: Vec<_> = ports
                .filter_map(|port| {
                    Some(EndpointPort {
                        name: Some(port.name.clone().unwrap_or_default()),
                        protocol: Some(protocol(port.protocol.as_ref())),
                        port: Some(target_port(port, None)?),
                        app_protocol: port.app_protocol.clone(),
                    })
                })
                .collect();
            return vec![self.create(&PortsKey::of(&ports), Vec::new())];
        };
        let delete =
            |slice: &&EndpointSlice| Step::Delete(objects::name(&slice.metadata).to_owned());
        self.update(first, Vec::new()).into_iter().chain(rest.iter().map(delete)).collect()
    }

    fn plan_group(
        &self,
        key: &PortsKey,
        mut missing: BTreeMap<Place, Endpoint>,
        slices: Vec<&EndpointSlice>,
    ) -> Vec<Step> {
        // First everything that can stay where it is.
        let mut kept: Vec<(&EndpointSlice, Vec<Endpoint>)> = Vec::new();
        for slice in slices {
            let stay = slice.endpoints.iter().flatten();
            let stay = stay.filter_map(|endpoint| missing.remove(&place(endpoint)?));
            let stay: Vec<_> = stay.take(MAX_ENDPOINTS).collect();
            kept.push((slice, stay));
        }
        // Then the new ones: into slices that are written anyway, then into others with room.
        let mut order: Vec<usize> = (0..kept.len()).collect();
        order.sort_by_key(|i| self.update(kept[*i].0, kept[*i].1.clone()).is_none());
        let mut rest: Vec<Endpoint> = missing.into_values().collect();
        for i in order {
            let room = MAX_ENDPOINTS.saturating_sub(kept[i].1.len()).min(rest.len());
            kept[i].1.extend(rest.drain(..room));
        }
        let mut steps = Vec::new();
        for (slice, endpoints) in kept {
            if endpoints.is_empty() {
                steps.push(Step::Delete(objects::name(&slice.metadata).to_owned()));
            } else {
                steps.extend(self.update(slice, endpoints));
            }
        }
        steps.extend(rest.chunks(MAX_ENDPOINTS).map(|part| self.create(key, part.to_vec())));
        steps
    }

    fn create(&self, key: &PortsKey, endpoints: Vec<Endpoint>) -> Step {
        Step::Create(Box::new(EndpointSlice {
            metadata: ObjectMeta {
                generate_name: Some(format!("{}-", objects::name(&self.service.metadata))),
                namespace: self.service.metadata.namespace.clone(),
                labels: Some(self.labels()),
                owner_references: Some(vec![self.owner()]),
                annotations: self.annotations(None, &endpoints),
                ..ObjectMeta::default()
            },
            address_type: self.family.to_owned(),
            endpoints: Some(endpoints),
            ports: Some(key.ports()),
        }))
    }

    /// The slice with these endpoints, if that changes anything.
    fn update(&self, slice: &EndpointSlice, endpoints: Vec<Endpoint>) -> Option<Step> {
        let annotations = self.annotations(slice.metadata.annotations.as_ref(), &endpoints);
        let same = slice.endpoints.as_deref().unwrap_or_default() == endpoints
            && slice.metadata.annotations == annotations
            && slice.metadata.labels.as_ref() == Some(&self.labels())
            && slice.metadata.owner_references.as_deref() == Some(&[self.owner()]);
        if same {
            return None;
        }
        let mut slice = slice.clone();
        slice.endpoints = Some(endpoints);
        slice.metadata.labels = Some(self.labels());
        slice.metadata.annotations = annotations;
        slice.metadata.owner_references = Some(vec![self.owner()]);
        Some(Step::Update(Box::new(slice)))
    }

    /// The annotations that a slice has, with the weights of these endpoints.
    fn annotations(&self, present: Option<&Labels>, endpoints: &[Endpoint]) -> Option<Labels> {
        let addresses = endpoints.iter().filter_map(|endpoint| endpoint.addresses.first());
        let weights: BTreeMap<&String, u16> =
            addresses.filter_map(|address| Some((address, *self.weights.get(address)?))).collect();
        let mut annotations = present.cloned().unwrap_or_default();
        annotations.remove(ANNOTATION_WEIGHTS);
        if !weights.is_empty() {
            annotations
                .insert(ANNOTATION_WEIGHTS.to_owned(), serde_json::json!(weights).to_string());
        }
        (present.is_some() || !annotations.is_empty()).then_some(annotations)
    }

    fn labels(&self) -> Labels {
        let meta = &self.service.metadata;
        let mut labels = objects::labels(meta);
        labels.insert(LABEL_SERVICE_NAME.to_owned(), objects::name(meta).to_owned());
        labels.insert(LABEL_MANAGED_BY.to_owned(), MANAGER.to_owned());
        let headless = self.service.spec.as_ref().and_then(|s| s.cluster_ip.as_deref());
        if headless == Some("None") {
            labels.insert(LABEL_HEADLESS.to_owned(), String::new());
        } else {
            labels.remove(LABEL_HEADLESS);
        }
        labels
    }

    fn owner(&self) -> OwnerReference {
        let meta = &self.service.metadata;
        OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Service".to_owned(),
            name: objects::name(meta).to_owned(),
            uid: objects::uid(meta).to_owned(),
            controller: Some(true),
            block_owner_deletion: Some(true),
        }
    }
}

#[cfg(test)]
mod tests;
