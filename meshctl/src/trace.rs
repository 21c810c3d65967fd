//! `trace`: one probe from a pod, all that nodes saw of it as one timeline, and what is wrong.

mod judge;

use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use http::Method;
use mesh_model::ObjectKey;
use mesh_model::flow::{FLOWS_PATH, Flow, FlowFilter, FlowLine, FlowQuery};
use mesh_model::report::PeerReport;
use mesh_model::snapshot::Protocol;
use mesh_model::trace::{TRACE_PATH, TraceQuery, TraceReport};
use serde::Serialize;
use serde_json::Value;

use crate::cli::{Global, TraceArgs};
use crate::connect::Api;
use crate::flows::{read_lines, text};
use crate::output;
use crate::source::{NodeState, Source};
use judge::{Facts, PodState, Verdict, judge, reached};

/// After the probe, until nodes have told what became of it.
const TOLD: Duration = Duration::from_millis(400);
/// Clocks of nodes may differ that much.
const CLOCKS_US: u64 = 5_000_000;

/// What is printed as JSON.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Trace {
    report: TraceReport,
    flows: Vec<Flow>,
    reached: Option<SocketAddr>,
    verdict: Verdict,
}

/// `meshctl trace`. Exit status 1 when something is wrong.
pub(crate) async fn trace(global: &Global, args: TraceArgs) -> anyhow::Result<ExitCode> {
    let source = Source::open(global).await?;
    let Source::Api(api) = &source else {
        bail!("trace asks several nodes: it needs the API, not --socket");
    };
    let (host, port) = destination(api, &args).await?;
    let pod = key(api, &args, &args.source);
    let node = pod_node(api, &pod).await?;
    let query = TraceQuery { pod, host, port, protocol: args.protocol(), wait_ms: args.wait_ms };
    let report: TraceReport = source.tell(&node, TRACE_PATH, &query).await?;
    tokio::time::sleep(TOLD).await;
    let nodes = source.nodes(None).await?;
    let flows = match report.source {
        Some(from) => gather(&source, &nodes, &report, from.port(), query.protocol).await,
        None => vec![],
    };
    let trace = conclude(&source, api, &node, report, flows).await?;
    output::report(global.output, &trace, || print(&trace))?;
    Ok(if trace.verdict.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn key(api: &Api, args: &TraceArgs, text: &str) -> ObjectKey {
    let (namespace, name) =
        text.split_once('/').unwrap_or_else(|| (api.namespace(args.namespace.as_deref()), text));
    ObjectKey::new(namespace, name)
}

/// Host and port: of an address, a name, or `pod/NAME`.
async fn destination(api: &Api, args: &TraceArgs) -> anyhow::Result<(String, u16)> {
    let (host, port) = args.destination.rsplit_once(':').context(
        "the destination needs a port: web:80, 10.96.0.1:80, [fd10:96::1]:80, pod/web-1:8080",
    )?;
    let port = port.parse().with_context(|| format!("{port:?} is no port"))?;
    let Some(name) = host.strip_prefix("pod/") else {
        return Ok((host.trim_matches(['[', ']']).to_owned(), port));
    };
    let key = key(api, args, name);
    let pod = api.read(&format!("/api/v1/namespaces/{}/pods/{}", key.namespace, key.name)).await?;
    let address = pod["status"]["podIP"].as_str();
    Ok((address.with_context(|| format!("pod {key} has no address yet"))?.to_owned(), port))
}

async fn pod_node(api: &Api, pod: &ObjectKey) -> anyhow::Result<NodeState> {
    let path = format!("/api/v1/namespaces/{}/pods/{}", pod.namespace, pod.name);
    let object = api.read(&path).await?;
    let node = object["spec"]["nodeName"].as_str().filter(|node| !node.is_empty());
    let name = node.with_context(|| format!("pod {pod} is on no node yet"))?.to_owned();
    Ok(NodeState { name, ready: true })
}

/// What nodes saw of the probe. A node that does not answer has nothing to tell; that shows in the facts.
async fn gather(
    source: &Source,
    nodes: &[NodeState],
    report: &TraceReport,
    port: u16,
    protocol: Protocol,
) -> Vec<Flow> {
    let query = FlowQuery {
        filter: FlowFilter { protocol: Some(protocol.to_string()), ..FlowFilter::default() },
        ..FlowQuery::default()
    };
    let ask = nodes.iter().map(|node| async {
        let stream = source.stream(node, FLOWS_PATH, &query).await?;
        let mut flows = vec![];
        read_lines(stream, async |line| {
            if let FlowLine::Flow(flow) = line {
                flows.push(*flow);
            }
            true
        })
        .await?;
        Ok::<_, anyhow::Error>(flows)
    });
    let answers = futures_util::future::join_all(ask).await;
    let all = answers.into_iter().filter_map(Result::ok).flatten();
    let mut flows: Vec<Flow> = all.filter(|flow| is_of(flow, report, port)).collect();
    flows.sort_by_key(|flow| flow.time_us);
    flows
}

/// By the probe's own port, at its time; the answers' packets go the other way.
fn is_of(flow: &Flow, report: &TraceReport, port: u16) -> bool {
    let after = flow.time_us + CLOCKS_US >= report.begun_us;
    let here = flow.node == report.node;
    let on_time = if here { flow.time_us + 1000 >= report.begun_us } else { after };
    let ports = [flow.source.port, flow.destination.port];
    on_time && ports.contains(&Some(port))
}

async fn conclude(
    source: &Source,
    api: &Api,
    node: &NodeState,
    report: TraceReport,
    flows: Vec<Flow>,
) -> anyhow::Result<Trace> {
    let pods = api.read("/api/v1/pods").await?;
    let nodes = source.nodes(None).await?;
    let reached = reached(&report, &flows);
    let backend = report.service.as_ref().and_then(|s| s.backends.as_ref()?.first().copied());
    let address = match reached {
        Some(to) if Some(to) == report.asked && report.service.is_some() => backend,
        other => other,
    };
    let target = address.and_then(|to| pod_with(&pods, to.ip(), &nodes));
    let peers: Vec<PeerReport> =
        source.ask(node, Method::GET, "/mesh/v1/peers").await.unwrap_or_default();
    let contains =
        |peer: &&PeerReport, ip: IpAddr| peer.allowed_ips.iter().any(|block| block.contains(&ip));
    let peer = address.and_then(|to| peers.iter().find(|peer| contains(peer, to.ip())));
    let unready = match &report.service {
        Some(service) => unready(api, &pods, &service.name).await,
        None => vec![],
    };
    let is_pod_address = peer.is_some() || report.service.is_some();
    let facts = Facts {
        report: &report,
        flows: &flows,
        target: target.as_ref(),
        is_pod_address,
        unready: &unready,
        peer,
    };
    let verdict = judge(&facts);
    Ok(Trace { report, flows, reached, verdict })
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    conditions.into_iter().flatten().any(|c| c["type"] == "Ready" && c["status"] == "True")
}

fn name_of(pod: &Value) -> ObjectKey {
    let part = |name: &str| pod["metadata"][name].as_str().unwrap_or_default().to_owned();
    ObjectKey::new(part("namespace"), part("name"))
}

fn pod_with(pods: &Value, address: IpAddr, nodes: &[NodeState]) -> Option<PodState> {
    let has = |pod: &&Value| {
        let over = matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
        let mut all = pod["status"]["podIPs"].as_array().into_iter().flatten();
        !over && all.any(|ip| ip["ip"].as_str().and_then(|ip| ip.parse().ok()) == Some(address))
    };
    let pod = pods["items"].as_array()?.iter().find(has)?;
    let node = pod["spec"]["nodeName"].as_str().unwrap_or_default().to_owned();
    let node_ready = nodes.iter().any(|n| n.name == node && n.ready);
    Some(PodState { name: name_of(pod), node, ready: is_ready(pod), node_ready })
}

/// Pods that the service selects and that are not ready.
async fn unready(api: &Api, pods: &Value, service: &ObjectKey) -> Vec<ObjectKey> {
    let path = format!("/api/v1/namespaces/{}/services/{}", service.namespace, service.name);
    let Ok(object) = api.read(&path).await else { return vec![] };
    let Some(selector) = object["spec"]["selector"].as_object() else { return vec![] };
    let selected = |pod: &&Value| {
        pod["metadata"]["namespace"] == service.namespace.as_str()
            && selector.iter().all(|(key, value)| pod["metadata"]["labels"][key] == *value)
    };
    let all = pods["items"].as_array().into_iter().flatten();
    all.filter(selected).filter(|pod| !is_ready(pod)).map(name_of).collect()
}

fn print(trace: &Trace) {
    let report = &trace.report;
    let node = &report.node;
    match (&report.resolved, &report.service) {
        (None, _) => println!("{node}: the name has no address"),
        (Some(_), Some(service)) => {
            let count = service.backends.as_ref().map_or(0, Vec::len);
            let kept = service.affinity_secs.map_or(String::new(), |s| format!(", kept for {s} s"));
            println!("{node}: service {} with {count} backends{kept}", service.name);
        }
        (Some(addresses), None) => {
            let all = addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            println!("{node}: no service, address {all}");
        }
    }
    for missing in &report.missing {
        println!("{node}: {missing}");
    }
    for flow in &trace.flows {
        println!("{}", text(flow, true));
    }
    if let Some(reached) = trace.reached.filter(|to| Some(*to) != report.asked) {
        println!("{node}: went to backend {reached}");
    }
    let word = if trace.verdict.ok { "ok" } else { trace.verdict.fault };
    println!("{word}: {}", trace.verdict.detail);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_found_by_address_and_by_what_they_are() {
        let pods = serde_json::json!({ "items": [
            { "metadata": { "namespace": "default", "name": "gone" },
              "spec": { "nodeName": "b" },
              "status": { "phase": "Failed", "podIPs": [{ "ip": "10.244.2.7" }] } },
            { "metadata": { "namespace": "default", "name": "web-1" },
              "spec": { "nodeName": "b" },
              "status": { "phase": "Running", "podIPs": [{ "ip": "10.244.2.7" }],
                          "conditions": [{ "type": "Ready", "status": "True" }] } }
        ]});
        let nodes = [NodeState { name: "b".to_owned(), ready: false }];
        let pod = pod_with(&pods, "10.244.2.7".parse().unwrap(), &nodes).unwrap();
        assert_eq!(pod.name, ObjectKey::new("default", "web-1"));
        assert!(pod.ready && !pod.node_ready);
        assert_eq!(pod_with(&pods, "10.244.2.8".parse().unwrap(), &nodes), None);
    }
}
