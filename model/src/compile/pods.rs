//! The pods that a node runs, each with the values that its containers refer to.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    ConfigMap, EnvFromSource, EnvVar, Pod, PodSpec, Secret, Service, Volume,
};
use k8s_openapi::api::discovery::v1::Endpoint;

use super::Objects;
use super::directory::{self, Directory};
use super::endpoints::port_number;
use super::services::cluster_ips;
use crate::snapshot::{Departure, PodWork, Protocol};
use crate::{NodeName, ObjectKey};

type Values = BTreeMap<String, BTreeMap<String, Vec<u8>>>;

/// Whose pods are told of something that has changed.
pub(super) struct Touched {
    pub(super) everywhere: bool,
    pub(super) namespaces: BTreeSet<String>,
}

impl Touched {
    fn holds(&self, pod: &Pod) -> bool {
        let namespace = pod.metadata.namespace.as_ref();
        self.everywhere || namespace.is_some_and(|name| self.namespaces.contains(name))
    }
}

/// The work as it was made last, and of which pods.
#[derive(Default)]
pub(super) struct Memory {
    made: Vec<(Arc<Pod>, Arc<PodWork>)>,
    work: Arc<Vec<Arc<PodWork>>>,
}

impl Memory {
    pub(super) fn work(&self) -> &Arc<Vec<Arc<PodWork>>> {
        &self.work
    }

    /// `other` when pods have come, gone or changed; `changed` are services whose slices may say something else.
    pub(super) fn follow(
        &mut self,
        objects: &Objects,
        directory: &Directory,
        node: &NodeName,
        other: bool,
        touched: &Touched,
        changed: &BTreeSet<ObjectKey>,
    ) {
        // Only of a pod that is being deleted it matters what slices say.
        let told = |pod: &Pod| {
            let namespace = pod.metadata.namespace.as_deref();
            pod.metadata.deletion_timestamp.is_some()
                && changed.iter().any(|key| Some(key.namespace.as_str()) == namespace)
        };
        let stale = |pod: &Pod| touched.holds(pod) || told(pod);
        if !other && !self.made.iter().any(|(pod, _)| stale(pod)) {
            return;
        }
        let before: HashMap<*const Pod, (Arc<Pod>, Arc<PodWork>)> =
            std::mem::take(&mut self.made).into_iter().map(|m| (Arc::as_ptr(&m.0), m)).collect();
        let bound = |p: &&Arc<Pod>| {
            p.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(node.as_str())
        };
        for pod in objects.pods.iter().filter(bound) {
            let old = before.get(&Arc::as_ptr(pod)).map(|(_, work)| work);
            let work = match old.filter(|_| !stale(pod)) {
                Some(old) => Arc::clone(old),
                None => {
                    let fresh = one(objects, directory, pod);
                    let same = old.filter(|old| ***old == fresh).cloned();
                    same.unwrap_or_else(|| Arc::new(fresh))
                }
            };
            self.made.push((Arc::clone(pod), work));
        }
        self.made.sort_by(|(a, _), (b, _)| sort_key(a).cmp(&sort_key(b)));
        let work = self.made.iter().map(|(_, work)| Arc::clone(work)).collect();
        super::compiler::share(&mut self.work, work);
    }
}

fn sort_key(pod: &Pod) -> (&Option<String>, &Option<String>, &Option<String>) {
    (&pod.metadata.namespace, &pod.metadata.name, &pod.metadata.uid)
}

fn one(objects: &Objects, directory: &Directory, pod: &Pod) -> PodWork {
    let references = References::of(pod.spec.as_ref());
    let namespace = pod.metadata.namespace.as_deref();
    let links = pod.spec.as_ref().and_then(|s| s.enable_service_links).unwrap_or(true);
    let config_maps: Vec<(&str, &ConfigMap)> = objects
        .config_maps
        .iter()
        .filter(|c| c.metadata.namespace.as_deref() == namespace)
        .filter_map(|c| Some((*references.config_maps.get(c.metadata.name.as_deref()?)?, &**c)))
        .collect();
    PodWork {
        pod: pod.clone(),
        config_maps: config_maps
            .iter()
            .map(|(name, c)| ((*name).to_owned(), config_map_values(c)))
            .collect(),
        binary_keys: config_maps
            .iter()
            .filter_map(|(name, c)| Some(((*name).to_owned(), binary_keys(c)?)))
            .collect(),
        secrets: objects
            .secrets
            .iter()
            .filter(|s| s.metadata.namespace.as_deref() == namespace)
            .filter_map(|s| references.secrets.get(s.metadata.name.as_deref()?).map(|n| (n, s)))
            .map(|(name, s)| ((*name).to_owned(), secret_values(s)))
            .collect::<Values>(),
        service_env: service_env(directory, namespace, links),
        departure: departure(directory, pod),
    }
}

/// What is said about a pod that is being deleted; nothing about any other.
fn departure(directory: &Directory, pod: &Pod) -> Option<Departure> {
    pod.metadata.deletion_timestamp.as_ref()?;
    let namespace = pod.metadata.namespace.as_deref()?;
    let mut told = None;
    for slice in directory.of_namespace(namespace).flat_map(|entry| &entry.slices) {
        let mut listed = slice.endpoints.iter().flatten().filter(|e| is_of(e, pod)).peekable();
        if listed.peek().is_none() {
            continue;
        }
        if listed.any(|endpoint| !is_leaving(endpoint)) {
            return Some(Departure::Listed);
        }
        told = told.max(Some(directory::revision(slice).unwrap_or(0)));
    }
    let labels = pod.metadata.labels.as_ref();
    let meant = |service: &Service| {
        let spec = service.spec.as_ref();
        let selector = spec.and_then(|s| s.selector.as_ref()).filter(|s| !s.is_empty());
        selector.is_some_and(|s| s.iter().all(|(k, v)| labels.and_then(|l| l.get(k)) == Some(v)))
    };
    let has_address = pod.status.as_ref().is_some_and(|s| s.pod_ip.is_some());
    let mut services = directory.of_namespace(namespace).filter_map(|e| e.service.as_deref());
    Some(match told {
        Some(revision) => Departure::Told(revision),
        None if has_address && services.any(meant) => Departure::Listed,
        None => Departure::Unlisted,
    })
}

fn is_of(endpoint: &Endpoint, pod: &Pod) -> bool {
    let uid = endpoint.target_ref.as_ref().and_then(|target| target.uid.as_deref());
    if uid.is_some() {
        return uid == pod.metadata.uid.as_deref();
    }
    let ips = pod.status.iter().flat_map(|s| s.pod_ips.iter().flatten()).map(|ip| &ip.ip);
    ips.into_iter().any(|ip| endpoint.addresses.contains(ip))
}

/// Whether it is said to leave. That it is not ready is not enough: it may have become so since.
fn is_leaving(endpoint: &Endpoint) -> bool {
    endpoint.conditions.as_ref().is_some_and(|c| c.terminating == Some(true))
}

fn config_map_values(map: &ConfigMap) -> BTreeMap<String, Vec<u8>> {
    let text = map.data.iter().flatten().map(|(k, v)| (k.clone(), v.clone().into_bytes()));
    let binary = map.binary_data.iter().flatten().map(|(k, v)| (k.clone(), v.0.clone()));
    text.chain(binary).collect()
}

/// Nothing for a map that is all text.
fn binary_keys(map: &ConfigMap) -> Option<BTreeSet<String>> {
    let keys = map.binary_data.as_ref().filter(|values| !values.is_empty())?.keys();
    Some(keys.cloned().collect())
}

fn secret_values(secret: &Secret) -> BTreeMap<String, Vec<u8>> {
    secret.data.iter().flatten().map(|(k, v)| (k.clone(), v.0.clone())).collect()
}

/// Names of the ConfigMaps and Secrets that a pod needs.
#[derive(Default)]
struct References<'a> {
    config_maps: BTreeSet<&'a str>,
    secrets: BTreeSet<&'a str>,
}

impl<'a> References<'a> {
    fn of(spec: Option<&'a PodSpec>) -> Self {
        let mut all = Self::default();
        let Some(spec) = spec else { return all };
        let init = spec.init_containers.iter().flatten();
        for container in spec.containers.iter().chain(init) {
            all.values(container.env_from.as_ref(), container.env.as_ref());
        }
        for added in spec.ephemeral_containers.iter().flatten() {
            all.values(added.env_from.as_ref(), added.env.as_ref());
        }
        for volume in spec.volumes.iter().flatten() {
            all.volume(volume);
        }
        all.secrets.extend(spec.image_pull_secrets.iter().flatten().map(|s| s.name.as_str()));
        all
    }

    fn values(&mut self, from: Option<&'a Vec<EnvFromSource>>, env: Option<&'a Vec<EnvVar>>) {
        for from in from.into_iter().flatten() {
            self.config_maps.extend(from.config_map_ref.as_ref().map(|r| r.name.as_str()));
            self.secrets.extend(from.secret_ref.as_ref().map(|r| r.name.as_str()));
        }
        for source in env.into_iter().flatten().filter_map(|e| e.value_from.as_ref()) {
            self.config_maps.extend(source.config_map_key_ref.as_ref().map(|r| r.name.as_str()));
            self.secrets.extend(source.secret_key_ref.as_ref().map(|r| r.name.as_str()));
        }
    }

    fn volume(&mut self, volume: &'a Volume) {
        self.config_maps.extend(volume.config_map.as_ref().map(|v| v.name.as_str()));
        self.secrets.extend(volume.secret.as_ref().and_then(|v| v.secret_name.as_deref()));
        let projected = volume.projected.iter().flat_map(|p| p.sources.iter().flatten());
        for source in projected {
            self.config_maps.extend(source.config_map.as_ref().map(|r| r.name.as_str()));
            self.secrets.extend(source.secret.as_ref().map(|r| r.name.as_str()));
        }
    }
}

/// Name and namespace of the Service that stands for the API.
const API: (&str, &str) = ("kubernetes", "default");

pub(super) fn is_api(service: &Service) -> bool {
    let metadata = &service.metadata;
    (metadata.name.as_deref(), metadata.namespace.as_deref()) == (Some(API.0), Some(API.1))
}

/// The variables `NAME_SERVICE_HOST` and `NAME_SERVICE_PORT` of the pod's namespace, and always those of the API, unless the
/// namespace has a Service of that name.
fn service_env(
    directory: &Directory,
    namespace: Option<&str>,
    links: bool,
) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    let api = directory.service(&ObjectKey::new(API.1, API.0));
    let own = namespace.filter(|_| links).into_iter();
    let own =
        own.flat_map(|name| directory.of_namespace(name)).filter_map(|e| e.service.as_deref());
    for service in api.into_iter().chain(own) {
        one_service_env(service, service.metadata.name.as_deref().unwrap_or_default(), &mut env);
    }
    env
}

fn one_service_env(service: &Service, name: &str, env: &mut BTreeMap<String, String>) {
    let Some(address) = cluster_ips(service).first().copied() else { return };
    let prefix = name.to_uppercase().replace(['-', '.'], "_");
    let mut ports = service.spec.iter().flat_map(|s| s.ports.iter().flatten()).peekable();
    let Some(first) = ports.peek() else { return };
    env.insert(format!("{prefix}_SERVICE_HOST"), address.to_string());
    env.insert(format!("{prefix}_SERVICE_PORT"), first.port.to_string());
    let url = |port: u16, protocol: Protocol| {
        let host = std::net::SocketAddr::new(address, port);
        format!("{}://{host}", protocol.to_string().to_lowercase())
    };
    for (index, port) in ports.enumerate() {
        let Some(number) = port_number(port.port) else { continue };
        let Some(protocol) = Protocol::parse(port.protocol.as_deref()) else { continue };
        if let Some(port_name) = &port.name {
            let suffix = port_name.to_uppercase().replace(['-', '.'], "_");
            env.insert(format!("{prefix}_SERVICE_PORT_{suffix}"), number.to_string());
        }
        if index == 0 {
            env.insert(format!("{prefix}_PORT"), url(number, protocol));
        }
        let stem = format!("{prefix}_PORT_{number}_{protocol}");
        env.insert(stem.clone(), url(number, protocol));
        env.insert(format!("{stem}_PROTO"), protocol.to_string().to_lowercase());
        env.insert(format!("{stem}_PORT"), number.to_string());
        env.insert(format!("{stem}_ADDR"), address.to_string());
    }
}
