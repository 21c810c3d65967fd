//! `metrics.k8s.io/v1beta1`: what nodes and pods use, as `kubectl top` asks for it. Nothing is stored: each answer is
//! asked of the agents.

use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use futures_util::future::join_all;
use http::{Method, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use k8s_openapi::api::core::v1::{Node, Pod};
use mesh_model::kinds::{self, Kind};
use mesh_model::report::{PodUsage, Usage, UsageReport};
use serde_json::{Value, json};

use super::query::Query;
use super::selector::Selector;
use super::target::not_served;
use super::{Api, proxy, respond};
use crate::error::ApiError;
use crate::registry::Object;

/// The API group.
pub(crate) const GROUP: &str = "metrics.k8s.io";
/// Its version.
pub(crate) const VERSION: &str = "v1beta1";
const USAGE_PATH: &str = "/mesh/v1/usage";
/// An agent that takes longer is left out, as one that is away.
const LIMIT: Duration = Duration::from_secs(10);
const LARGEST_REPORT_BYTES: usize = 8 << 20;

/// What a path below the group means.
#[derive(Debug, PartialEq, Eq)]
enum Asked<'a> {
    Nodes,
    Node(&'a str),
    Pods(Option<&'a str>),
    Pod(&'a str, &'a str),
}

fn parse(path: &str) -> Option<Asked<'_>> {
    let rest = path.strip_prefix("/apis/metrics.k8s.io/v1beta1/")?;
    Some(match rest.split('/').collect::<Vec<_>>().as_slice() {
        ["nodes"] => Asked::Nodes,
        ["nodes", name] => Asked::Node(name),
        ["pods"] => Asked::Pods(None),
        ["namespaces", ns, "pods"] => Asked::Pods(Some(ns)),
        ["namespaces", ns, "pods", name] => Asked::Pod(ns, name),
        _ => return None,
    })
}

impl Api {
    /// Answers a request below the group.
    pub(super) async fn metrics(
        &self,
        path: &str,
        method: &Method,
        query: &Query,
    ) -> Result<Response, ApiError> {
        let asked = parse(path).ok_or_else(|| not_served(&format!("nothing is at {path}")))?;
        if !matches!(*method, Method::GET | Method::HEAD) {
            return Err(ApiError::MethodNotAllowed);
        }
        let value = match asked {
            Asked::Nodes => {
                let nodes = self.selected::<Node>("nodes", None, query)?;
                list("NodeMetricsList", self.usage(nodes).await, |(node, usage)| {
                    vec![node_metrics(&node, &usage)]
                })
            }
            Asked::Node(name) => {
                let node: Node = self.0.registry.get(None, name)?;
                let found = self.usage(vec![node]).await.pop();
                let (node, usage) = found.ok_or_else(|| away("nodes", name))?;
                node_metrics(&node, &usage)
            }
            Asked::Pods(ns) => {
                let pods = self.selected::<Pod>("pods", ns, query)?;
                let usage = self.usage(self.nodes_of(&pods)).await;
                list("PodMetricsList", usage, |(_, usage)| {
                    usage.pods.iter().filter_map(|used| pod_metrics(&pods, used, &usage)).collect()
                })
            }
            Asked::Pod(ns, name) => {
                let pods = vec![self.0.registry.get::<Pod>(Some(ns), name)?];
                let usage = self.usage(self.nodes_of(&pods)).await.pop();
                let (_, usage) = usage.ok_or_else(|| away("pods", name))?;
                let mut used = usage.pods.iter();
                let found = used.find_map(|used| pod_metrics(&pods, used, &usage));
                found.ok_or_else(|| away("pods", name))?
            }
        };
        Ok(respond::json(StatusCode::OK, &value))
    }

    fn selected<K: Object>(
        &self,
        plural: &str,
        ns: Option<&str>,
        query: &Query,
    ) -> Result<Vec<K>, ApiError> {
        let selector = Selector::of(kind(plural), query)?;
        let mut all = self.0.registry.list::<K>(ns)?.items;
        if !selector.is_empty() {
            all.retain(|o| serde_json::to_value(o).is_ok_and(|value| selector.matches(&value)));
        }
        Ok(all)
    }

    fn nodes_of(&self, pods: &[Pod]) -> Vec<Node> {
        let mut names: Vec<&str> = pods.iter().filter_map(crate::objects::node_of).collect();
        names.sort_unstable();
        names.dedup();
        names.into_iter().filter_map(|name| self.0.registry.get(None, name).ok()).collect()
    }

    /// What the agents of these nodes say; without those that do not.
    async fn usage(&self, nodes: Vec<Node>) -> Vec<(Node, UsageReport)> {
        let asked = nodes.into_iter().map(async |node| {
            let report = tokio::time::timeout(LIMIT, self.report(&node)).await;
            match report {
                Ok(Ok(report)) => Some((node, report)),
                Ok(Err(error)) => {
                    tracing::debug!(node = node.metadata.name, %error, "no usage of a node");
                    None
                }
                Err(_) => None,
            }
        });
        join_all(asked).await.into_iter().flatten().collect()
    }

    async fn report(&self, node: &Node) -> Result<UsageReport, ApiError> {
        let request = proxy::request(Method::GET, USAGE_PATH, Body::empty())?;
        let answer = self.0.agents.ask(node, request).await?;
        if !answer.status().is_success() {
            return Err(proxy::refusal(answer).await);
        }
        let body = Limited::new(answer.into_body(), LARGEST_REPORT_BYTES).collect().await;
        let body = body.map_err(|e| ApiError::BadGateway(e.to_string()))?.to_bytes();
        serde_json::from_slice(&body).map_err(|e| ApiError::BadGateway(e.to_string()))
    }
}

fn kind(plural: &str) -> &'static Kind {
    kinds::by_plural("", "v1", plural).expect("nodes and pods are served")
}

/// As metrics-server answers when it has measured nothing yet.
fn away(plural: &str, name: &str) -> ApiError {
    ApiError::NotFound { kind: kind(plural), name: name.to_owned() }
}

fn list<T>(name: &str, from: Vec<T>, items: impl Fn(T) -> Vec<Value>) -> Value {
    let items: Vec<Value> = from.into_iter().flat_map(items).collect();
    json!({"kind": name, "apiVersion": format!("{GROUP}/{VERSION}"), "metadata": {}, "items": items})
}

fn metrics(name: &str, meta: &impl Object, usage: &UsageReport) -> Value {
    let meta = meta.metadata();
    json!({
        "kind": name,
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "metadata": {
            "name": meta.name,
            "namespace": meta.namespace,
            "labels": meta.labels,
            "creationTimestamp": usage.timestamp,
        },
        "timestamp": usage.timestamp,
        "window": format!("{}ms", usage.window_ms),
    })
}

fn node_metrics(node: &Node, usage: &UsageReport) -> Value {
    let mut value = metrics("NodeMetrics", node, usage);
    value["usage"] = resources(usage.node);
    value
}

/// None when the pod was not asked for.
fn pod_metrics(pods: &[Pod], used: &PodUsage, usage: &UsageReport) -> Option<Value> {
    let pod = pods.iter().find(|pod| {
        let meta = &pod.metadata;
        meta.name.as_ref() == Some(&used.name) && meta.namespace.as_ref() == Some(&used.namespace)
    })?;
    let mut value = metrics("PodMetrics", pod, usage);
    let containers = used.containers.iter();
    let containers: Vec<Value> =
        containers.map(|(name, used)| json!({"name": name, "usage": resources(*used)})).collect();
    value["containers"] = json!(containers);
    Some(value)
}

fn resources(usage: Usage) -> Value {
    json!({
        "cpu": format!("{}n", usage.cpu_nano_cores),
        "memory": format!("{}Ki", usage.memory_bytes / 1024),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_those_of_the_metrics_server() {
        let at = |rest: &str| format!("/apis/metrics.k8s.io/v1beta1/{rest}");
        assert_eq!(parse(&at("nodes")), Some(Asked::Nodes));
        assert_eq!(parse(&at("nodes/n")), Some(Asked::Node("n")));
        assert_eq!(parse(&at("pods")), Some(Asked::Pods(None)));
        assert_eq!(parse(&at("namespaces/a/pods")), Some(Asked::Pods(Some("a"))));
        assert_eq!(parse(&at("namespaces/a/pods/p")), Some(Asked::Pod("a", "p")));
        for wrong in ["", "services", "nodes/n/more"] {
            assert_eq!(parse(&at(wrong)), None, "{wrong}");
        }
    }
}
