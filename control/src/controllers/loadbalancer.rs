//! Addresses for Services of type LoadBalancer, from the cluster's ranges for that. Without such ranges, and for Services of
//! another class, it does nothing: somebody else may.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{LoadBalancerIngress, LoadBalancerStatus, Service, ServiceSpec};
use mesh_model::ObjectKey;
use mesh_model::wellknown::LOAD_BALANCER_CLASS;

use super::queue::WorkQueue;
use super::recorder::Recorder;
use super::runtime::{Context, Reconcile, key};
use crate::error::ApiError;
use crate::objects;

pub(super) struct Controller {
    context: Arc<Context>,
    recorder: Recorder,
}

impl Controller {
    pub(super) fn new(context: Arc<Context>) -> (Arc<Self>, Arc<WorkQueue<ObjectKey>>) {
        let queue = WorkQueue::new();
        let (sink, services) = (queue.clone(), Arc::downgrade(&context.services));
        context.services.listen(move |old, new| {
            if let Some(service) = new {
                sink.add(key(&**service));
            }
            // What is free now may be what another one waits for.
            let held = |service: Option<&Arc<Service>>| service.map(|s| addresses(s));
            if old.is_some_and(|old| !addresses(old).is_empty()) && held(old) != held(new) {
                let all = services.upgrade().map(|services| services.all()).unwrap_or_default();
                let waiting = all.iter().filter(|s| is_ours(s) && addresses(s).is_empty());
                waiting.for_each(|service| sink.add(key(&**service)));
            }
        });
        let recorder = context.recorder.of("load-balancer-controller");
        (Arc::new(Self { context, recorder }), queue)
    }
}

#[async_trait]
impl Reconcile for Controller {
    type Key = ObjectKey;
    const NAME: &'static str = "load-balancer";
    // One at a time: what one takes the next one sees.
    const WORKERS: usize = 1;

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, ApiError> {
        let ranges = &self.context.cluster.load_balancer_cidrs;
        let Some(service) = self.context.services.get(&key.namespace, &key.name) else {
            return Ok(None);
        };
        if ranges.is_empty() || objects::is_terminating(&service.metadata) {
            return Ok(None);
        }
        let wanted = if is_ours(&service) {
            let others = self.context.services.all();
            let others = others.iter().filter(|other| super::runtime::key(&***other) != *key);
            let taken = others.flat_map(|other| addresses(other)).collect();
            match assign(&service, &taken, ranges) {
                Ok(wanted) => wanted,
                Err(why) => {
                    self.recorder.warning(&*service, "AllocationFailed", why);
                    return Ok(None);
                }
            }
        } else if is_load_balancer(&service) {
            return Ok(None);
        } else {
            // It was one. Addresses that are not ours are not for us to take away.
            let ours = |ip: &IpAddr| ranges.iter().any(|range| range.contains(ip));
            addresses(&service).into_iter().filter(|ip| !ours(ip)).collect()
        };
        if wanted != addresses(&service) {
            let mut new = (*service).clone();
            let points: Vec<_> = wanted.iter().map(point).collect();
            let ingress = Some(points).filter(|points| !points.is_empty());
            new.status.get_or_insert_default().load_balancer = Some(LoadBalancerStatus { ingress });
            self.context.services.wrote(self.context.registry.update_status(&new).await?);
        }
        Ok(None)
    }

    fn all(&self) -> Vec<ObjectKey> {
        self.context.services.all().iter().map(|service| key(&**service)).collect()
    }
}

fn point(address: &IpAddr) -> LoadBalancerIngress {
    LoadBalancerIngress {
        ip: Some(address.to_string()),
        // The address is served as it is, not by a proxy behind which it would not be seen.
        ip_mode: Some("VIP".to_owned()),
        ..LoadBalancerIngress::default()
    }
}

fn is_load_balancer(service: &Service) -> bool {
    service.spec.as_ref().and_then(|spec| spec.type_.as_deref()) == Some("LoadBalancer")
}

/// Whether it is for this cluster to serve: no class, or ours.
fn is_ours(service: &Service) -> bool {
    let class = service.spec.as_ref().and_then(|spec| spec.load_balancer_class.as_deref());
    is_load_balancer(service) && class.is_none_or(|class| class == LOAD_BALANCER_CLASS)
}

/// The addresses that it has.
fn addresses(service: &Service) -> Vec<IpAddr> {
    let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let points = balancer.and_then(|b| b.ingress.as_ref()).into_iter().flatten();
    points.filter_map(|point| point.ip.as_deref()?.parse().ok()).collect()
}

/// An address of each family that the Service has and the ranges have: the one that it asks for, the one that it has, or
/// the first that is free. The error says why there is none.
fn assign(
    service: &Service,
    taken: &BTreeSet<IpAddr>,
    ranges: &[IpNet],
) -> Result<Vec<IpAddr>, String> {
    let spec = service.spec.clone().unwrap_or_default();
    let asked = requested(&spec, ranges)?;
    let held = addresses(service);
    let mut assigned = Vec::new();
    for v4 in families(&spec) {
        let same = |ip: &&IpAddr| ip.is_ipv4() == v4;
        if let Some(ip) = asked.as_ref().filter(same) {
            if taken.contains(ip) {
                return Err(format!("spec.loadBalancerIP {ip} belongs to another Service"));
            }
            assigned.push(*ip);
            continue;
        }
        let mut own = ranges.iter().filter(|range| range.addr().is_ipv4() == v4).peekable();
        if own.peek().is_none() {
            continue;
        }
        let free = |ip: &IpAddr| !taken.contains(ip);
        let kept =
            held.iter().filter(same).find(|ip| free(ip) && own.clone().any(|r| r.contains(*ip)));
        let new = || own.clone().flat_map(IpNet::hosts).find(free);
        let full = || format!("no free {} address in the ranges for load balancers", family(v4));
        assigned.push(kept.copied().or_else(new).ok_or_else(full)?);
    }
    if assigned.is_empty() {
        return Err("no range for load balancers has an address family of the Service".to_owned());
    }
    Ok(assigned)
}

fn family(v4: bool) -> &'static str {
    if v4 { "IPv4" } else { "IPv6" }
}

/// `spec.loadBalancerIP`, if there is one.
fn requested(spec: &ServiceSpec, ranges: &[IpNet]) -> Result<Option<IpAddr>, String> {
    let Some(text) = spec.load_balancer_ip.as_deref().filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let ip = text.parse().map_err(|_| format!("spec.loadBalancerIP {text:?} is no address"))?;
    if ranges.iter().any(|range| range.contains(&ip)) {
        Ok(Some(ip))
    } else {
        Err(format!("spec.loadBalancerIP {ip} is in none of the ranges for load balancers"))
    }
}

/// Whether IPv4, in the order of the Service.
fn families(spec: &ServiceSpec) -> Vec<bool> {
    spec.ip_families.iter().flatten().map(|family| family == "IPv4").collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn service(spec: Value, held: &[&str]) -> Service {
        let points: Vec<Value> = held.iter().map(|ip| json!({"ip": ip})).collect();
        serde_json::from_value(json!({
            "metadata": {"name": "web"}, "spec": spec, "status": {"loadBalancer": {"ingress": points}}
        }))
        .unwrap()
    }

    fn given(spec: Value, held: &[&str], taken: &[&str]) -> Result<Vec<String>, String> {
        let ranges: Vec<IpNet> =
            ["192.0.2.240/29", "2001:db8::100/124"].iter().map(|r| r.parse().unwrap()).collect();
        let taken = taken.iter().map(|ip| ip.parse().unwrap()).collect();
        let all = assign(&service(spec, held), &taken, &ranges)?;
        Ok(all.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn each_family_gets_what_is_asked_for_or_held_or_free() {
        let v4 = || json!({"type": "LoadBalancer", "ipFamilies": ["IPv4"]});
        assert_eq!(given(v4(), &[], &["192.0.2.241"]).unwrap(), ["192.0.2.242"]);
        assert_eq!(given(v4(), &["192.0.2.245"], &[]).unwrap(), ["192.0.2.245"]);
        // Somebody has it too, or it is in no range any more.
        assert_eq!(given(v4(), &["192.0.2.245"], &["192.0.2.245"]).unwrap(), ["192.0.2.241"]);
        assert_eq!(given(v4(), &["198.51.100.1"], &[]).unwrap(), ["192.0.2.241"]);
        let both = json!({"ipFamilies": ["IPv6", "IPv4"], "loadBalancerIP": "192.0.2.244"});
        assert_eq!(given(both, &["192.0.2.241"], &[]).unwrap(), ["2001:db8::100", "192.0.2.244"]);
        let six: Vec<String> = (241..=246).map(|n| format!("192.0.2.{n}")).collect();
        let six: Vec<&str> = six.iter().map(String::as_str).collect();
        assert!(given(v4(), &[], &six).unwrap_err().contains("no free IPv4"));
    }

    #[test]
    fn what_cannot_be_had_is_said() {
        let asking = |ip: &str| json!({"ipFamilies": ["IPv4"], "loadBalancerIP": ip});
        let error = given(asking("192.0.2.244"), &[], &["192.0.2.244"]).unwrap_err();
        assert!(error.contains("another Service"), "{error}");
        assert!(given(asking("10.0.0.1"), &[], &[]).unwrap_err().contains("none of the ranges"));
        assert!(given(asking("x"), &[], &[]).unwrap_err().contains("no address"));
    }

    #[test]
    fn other_classes_and_types_are_left_alone() {
        let ours = |spec: Value| is_ours(&service(spec, &[]));
        assert!(ours(json!({"type": "LoadBalancer"})));
        assert!(ours(
            json!({"type": "LoadBalancer", "loadBalancerClass": "mesh.dev/load-balancer"})
        ));
        assert!(!ours(json!({"type": "LoadBalancer", "loadBalancerClass": "example.com/other"})));
        assert!(!ours(json!({"type": "NodePort"})));
    }
}
