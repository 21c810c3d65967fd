//! A service address that leads to the check's own receivers: a Service with endpoints of our choice, for as long as the
//! check takes.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use http::Method;
use mesh_model::encryption::{Mark, Receiver, Watching};
use mesh_model::snapshot::{Frontend, Protocol};
use mesh_model::wellknown::{LABEL_SERVICE_NAME, SYSTEM_NAMESPACE};
use serde_json::{Value, json};

use super::Said;
use crate::connect::{Api, ApiFailure};
use crate::source::{NodeState, Source};

/// Label of what the check makes; its value is the check.
const LABEL: &str = "mesh.dev/check";
const NAME: &str = "mesh-check-";
/// Age at which what an earlier check made is a leftover: none takes so long.
const LEFTOVER: Duration = Duration::from_secs(600);
/// How long nodes may take to learn of it.
const PATIENCE: Duration = Duration::from_secs(10);
/// The first port; one more for each node.
const FIRST_PORT: u16 = 10_000;

const SERVICES: &str = "/api/v1/namespaces/kube-system/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices";

/// A Service in force.
pub(super) struct CheckService {
    name: String,
    addresses: Vec<IpAddr>,
    /// Port of the Service for each node, both protocols.
    ports: BTreeMap<String, u16>,
    /// How many frontends a node has when it knows all of it.
    frontends: usize,
}

impl CheckService {
    /// Makes it, or says why not. Leaves nothing when it fails.
    pub(super) async fn create(
        api: &Api,
        mark: Mark,
        watching: &Said<Watching>,
    ) -> Result<Self, String> {
        // Leftovers disturb nobody; that they stay is no reason to fail.
        let _ = remove_leftovers(api).await;
        let name = format!("{NAME}{}-{}", now_secs(), &mark.to_string()[..8]);
        let able: Vec<(&String, &Watching)> =
            watching.iter().filter_map(|(n, said)| Some((n, said.as_ref().ok()?))).collect();
        let ports = able.iter().zip(FIRST_PORT..).map(|((node, _), port)| ((*node).clone(), port));
        let mut service = Self { name, addresses: vec![], ports: ports.collect(), frontends: 0 };
        let made = service.make(api, &able).await;
        match made {
            Ok(()) => Ok(service),
            Err(error) => {
                let _ = service.remove(api).await;
                Err(format!("no service address: {error}"))
            }
        }
    }

    async fn make(&mut self, api: &Api, able: &[(&String, &Watching)]) -> Result<(), ApiFailure> {
        let made = post(api, SERVICES, &self.manifest()).await?;
        let given = made["spec"]["clusterIPs"].as_array().into_iter().flatten();
        self.addresses = given.filter_map(|a| a.as_str()?.parse().ok()).collect();
        for (node, watching) in able {
            for of_four in [true, false] {
                let is_of = |r: &&Receiver| r.address.is_ipv4() == of_four;
                let takers: Vec<&Receiver> = watching.receivers.iter().filter(is_of).collect();
                let has_address = self.addresses.iter().any(|a| a.is_ipv4() == of_four);
                if takers.is_empty() || !has_address {
                    continue;
                }
                post(api, SLICES, &self.slice(node, of_four, &takers)).await?;
                self.frontends += takers.len();
            }
        }
        Ok(())
    }

    /// The service address of a receiver.
    pub(super) fn address(&self, node: &str, receiver: &Receiver) -> Option<SocketAddr> {
        let of_family = |a: &&IpAddr| a.is_ipv4() == receiver.address.is_ipv4();
        let address = self.addresses.iter().find(of_family)?;
        Some(SocketAddr::new(*address, *self.ports.get(node)?))
    }

    /// Returns when a node knows all of it, or takes too long for that.
    pub(super) async fn wait_known(&self, source: &Source, node: &NodeState) {
        let known = async {
            loop {
                let answer: anyhow::Result<Vec<Frontend>> =
                    source.ask(node, Method::GET, "/mesh/v1/services").await;
                let Ok(frontends) = answer else { return };
                let ours = frontends.iter().filter(|f| {
                    f.service.name == self.name
                        && f.service.namespace == SYSTEM_NAMESPACE
                        && !f.backends.is_empty()
                });
                if ours.count() >= self.frontends {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let _ = tokio::time::timeout(PATIENCE, known).await;
    }

    /// Removes it.
    pub(super) async fn remove(&self, api: &Api) -> Result<(), ApiFailure> {
        remove(api, &self.name).await
    }

    fn manifest(&self) -> Value {
        let port = |(place, port): (usize, &u16), protocol: Protocol| json!({"name": port_name(place, protocol), "port": port, "protocol": protocol.to_string()});
        let ports = self.ports.values().enumerate();
        let both = ports.flat_map(|at| [port(at, Protocol::Udp), port(at, Protocol::Tcp)]);
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": self.name, "labels": {LABEL: self.name}},
            "spec": {"ipFamilyPolicy": "PreferDualStack", "ports": both.collect::<Vec<_>>()},
        })
    }

    fn slice(&self, node: &str, of_four: bool, takers: &[&Receiver]) -> Value {
        let place = self.ports.keys().position(|n| n == node).unwrap_or_default();
        let family = if of_four { "IPv4" } else { "IPv6" };
        let port = |taker: &&Receiver| {
            let protocol = taker.protocol;
            let number = taker.address.port();
            json!({"name": port_name(place, protocol), "port": number, "protocol": protocol.to_string()})
        };
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{}-{place}-{}", self.name, family.to_lowercase()),
                "labels": {LABEL: self.name, LABEL_SERVICE_NAME: self.name},
            },
            "addressType": family,
            "ports": takers.iter().map(port).collect::<Vec<_>>(),
            "endpoints": [{
                "addresses": [takers[0].address.ip()],
                "nodeName": node,
                "conditions": {"ready": true},
            }],
        })
    }
}

fn port_name(place: usize, protocol: Protocol) -> String {
    format!("{}{place}", if protocol == Protocol::Udp { "u" } else { "t" })
}

async fn post(api: &Api, path: &str, object: &Value) -> Result<Value, ApiFailure> {
    let content = Some(("application/json", object.to_string().into_bytes()));
    api.call(Method::POST, path, content, "application/json").await
}

async fn remove(api: &Api, name: &str) -> Result<(), ApiFailure> {
    let slices = format!("{SLICES}?labelSelector={LABEL}%3D{name}");
    let service = format!("{SERVICES}/{name}");
    // The Service first: with it goes what leads to the endpoints.
    for path in [service, slices] {
        match api.call(Method::DELETE, &path, None, "application/json").await {
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// What a check made that was killed.
async fn remove_leftovers(api: &Api) -> Result<(), ApiFailure> {
    let list = api.read(&format!("{SERVICES}?labelSelector={LABEL}")).await?;
    let names = list["items"].as_array().into_iter().flatten();
    for name in names.filter_map(|item| item["metadata"]["name"].as_str()) {
        if is_leftover(name, now_secs()) {
            remove(api, name).await?;
        }
    }
    Ok(())
}

/// By its name, which tells when it was made.
fn is_leftover(name: &str, now_secs: u64) -> bool {
    let made = name.strip_prefix(NAME).and_then(|rest| rest.split('-').next()?.parse::<u64>().ok());
    made.is_some_and(|made| made + LEFTOVER.as_secs() < now_secs)
}

fn now_secs() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_checks_left_long_ago_is_removed() {
        assert!(is_leftover("mesh-check-1000-abcdef01", 1601));
        assert!(!is_leftover("mesh-check-1000-abcdef01", 1599));
        for other in ["kube-dns", "mesh-check-", "mesh-check-x-1"] {
            assert!(!is_leftover(other, u64::MAX), "{other}");
        }
    }
}
