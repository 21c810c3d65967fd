//! `trace`: one marked probe from a pod or from outside, what every node decided about it as one timeline, and what is wrong.
//!
//! All nodes are told the probe's own address and port before it is sent, so that their programs tell what they decide.

mod gather;
mod judge;
mod order;
mod outside;
mod pods;

use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use mesh_model::ObjectKey;
use mesh_model::flow::Flow;
use mesh_model::report::PeerReport;
use mesh_model::trace::{
    NameAnswer, NodeTrace, OutsideReport, TRACE_PATH, TraceMark, TraceQuery, TraceReport, TraceStep,
};
use serde::Serialize;

use crate::cli::{Global, TraceArgs};
use crate::connect::Api;
use crate::flows::{text, time_of_day};
use crate::output;
use crate::source::{NodeState, Source};
use gather::Gatherer;
use judge::{Facts, Verdict, judge, reached};
use pods::Place;

/// After the probe, until nodes have told what became of it.
const TOLD: Duration = Duration::from_millis(400);
/// An agent that does not answer a probe of a few seconds does not work.
const ANSWER: Duration = Duration::from_secs(12);
/// Ports that clients are given on Linux: probes take theirs among them.
const PORTS: std::ops::Range<u16> = 32_768..60_999;

/// What is printed as JSON.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Trace {
    /// Nothing where no probe could be sent, or none from a pod.
    report: Option<TraceReport>,
    /// Of a probe from outside: what the node knows where it came in.
    #[serde(skip_serializing_if = "Option::is_none")]
    outside: Option<OutsideReport>,
    /// What all nodes decided, in the order of cause and effect.
    timeline: Vec<TraceStep>,
    flows: Vec<Flow>,
    reached: Option<SocketAddr>,
    /// Nodes whose agents do not answer.
    silent: Vec<String>,
    verdict: Verdict,
}

impl Trace {
    /// There was nothing to be sent, or nobody to send it.
    fn without_probe(verdict: Verdict, silent: Vec<String>) -> Self {
        let (timeline, flows) = (vec![], vec![]);
        Self { report: None, outside: None, timeline, flows, reached: None, silent, verdict }
    }
}

/// `meshctl trace`. Exit status 1 when something is wrong.
pub(crate) async fn trace(global: &Global, args: TraceArgs) -> anyhow::Result<ExitCode> {
    let source = Source::open(global).await?;
    let Source::Api(api) = &source else {
        bail!("trace asks several nodes: it needs the API, not --socket");
    };
    let trace = match args.source.parse() {
        Ok(client) => outside::run(&source, api, &args, client).await?,
        Err(_) => run(&source, api, &args).await?,
    };
    output::report(global.output, &trace, || print(&trace))?;
    Ok(if trace.verdict.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn run(source: &Source, api: &Api, args: &TraceArgs) -> anyhow::Result<Trace> {
    let pod = key(api, args, &args.source);
    let place = pods::place(api, &pod).await?;
    let Some(name) = place.node.clone().filter(|_| !place.addresses.is_empty()) else {
        return Ok(Trace::without_probe(judge::without_address(&pod, &place), vec![]));
    };
    let node = NodeState { name, ready: true };
    let (host, port) = match destination(api, args).await? {
        Destination::Host(host, port) => (host, port),
        Destination::NoAddress(pod, place) => {
            return Ok(Trace::without_probe(judge::without_address(&pod, &place), vec![]));
        }
    };
    let nodes = source.nodes(None).await?;
    let source_port = some_port();
    let ends = place.addresses.iter().map(|ip| SocketAddr::new(*ip, source_port)).collect();
    let mark = TraceMark { ends, protocol: args.protocol() };
    let gatherer = Gatherer { source, nodes: &nodes, mark: &mark };
    let silent = gatherer.mark().await;
    if silent.contains(&node.name) {
        return Ok(Trace::without_probe(judge::silent_agent(&node.name, &pod), silent));
    }
    let (protocol, wait_ms, bytes) = (args.protocol(), args.wait_ms, args.bytes);
    let query = TraceQuery { pod, host, port, protocol, wait_ms, source_port, bytes };
    let asked = source.tell(&node, TRACE_PATH, &query);
    let report: TraceReport =
        tokio::time::timeout(ANSWER, asked).await.context("the agent does not answer")??;
    tokio::time::sleep(TOLD).await;
    conclude(&gatherer, api, &node, report, silent, bytes).await
}

/// Not a number that must be hard to guess: it only has to be another one than that of other probes.
fn some_port() -> u16 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let spread = now.subsec_micros() ^ (std::process::id().wrapping_mul(2_654_435_761) >> 12);
    PORTS.start + (spread % u32::from(PORTS.end - PORTS.start)) as u16
}

fn key(api: &Api, args: &TraceArgs, text: &str) -> ObjectKey {
    let (namespace, name) =
        text.split_once('/').unwrap_or_else(|| (api.namespace(args.namespace.as_deref()), text));
    ObjectKey::new(namespace, name)
}

/// Where the probe is to go.
enum Destination {
    /// A name or an address, and a port.
    Host(String, u16),
    /// A pod that cannot be reached by anybody.
    NoAddress(ObjectKey, Place),
}

/// Host and port: of an address, a name, or `pod/NAME`.
async fn destination(api: &Api, args: &TraceArgs) -> anyhow::Result<Destination> {
    let (host, port) = args.destination.rsplit_once(':').context(
        "the destination needs a port: web:80, 10.96.0.1:80, [fd10:96::1]:80, pod/web-1:8080",
    )?;
    let port = port.parse().with_context(|| format!("{port:?} is no port"))?;
    let Some(name) = host.strip_prefix("pod/") else {
        return Ok(Destination::Host(host.trim_matches(['[', ']']).to_owned(), port));
    };
    let key = key(api, args, name);
    let place = pods::place(api, &key).await?;
    Ok(match place.addresses.first() {
        Some(address) => Destination::Host(address.to_string(), port),
        None => Destination::NoAddress(key, place),
    })
}

async fn conclude(
    gatherer: &Gatherer<'_>,
    api: &Api,
    node: &NodeState,
    report: TraceReport,
    silent: Vec<String>,
    bytes: u16,
) -> anyhow::Result<Trace> {
    let flows = gatherer.flows(&report).await;
    let reached = reached(&report, &flows);
    let backend = report.service.as_ref().and_then(|s| s.backends.as_ref()?.first().copied());
    let address = match reached {
        Some(to) if Some(to) == report.asked && report.service.is_some() => backend,
        other => other,
    };
    let traces = gatherer.collect(address.map(|to| to.ip())).await;
    let timeline = order::order(&traces);
    let pods = api.read("/api/v1/pods").await?;
    let nodes = gatherer.source.nodes(None).await?;
    let target = address.and_then(|to| pods::with_address(&pods, to.ip(), &nodes));
    let peers = gatherer.peers(node).await;
    let contains =
        |peer: &&PeerReport, ip: IpAddr| peer.allowed_ips.iter().any(|block| block.contains(&ip));
    let peer = address.and_then(|to| peers.iter().find(|peer| contains(peer, to.ip())));
    let selected = match &report.service {
        Some(service) => pods::selected(api, &pods, &service.name).await,
        None => pods::Selected::default(),
    };
    let facts = Facts {
        report: &report,
        flows: &flows,
        timeline: &timeline,
        nodes: &traces,
        silent: &silent,
        target: target.as_ref(),
        is_pod_address: peer.is_some() || report.service.is_some() || is_here(&traces, &report),
        selected: &selected,
        peer,
        bytes,
    };
    let verdict = judge(&facts);
    Ok(Trace { report: Some(report), outside: None, timeline, flows, reached, silent, verdict })
}

/// Whether the node of the source found the pod with the target's address.
fn is_here(traces: &[NodeTrace], report: &TraceReport) -> bool {
    traces.iter().any(|trace| trace.node == report.node && trace.target.is_some())
}

fn print(trace: &Trace) {
    if let Some(report) = &trace.report {
        print_source(report);
    }
    if let Some(OutsideReport { node, service: Some(service), backends, .. }) = &trace.outside {
        println!("{node}: service {service} with {} backends", backends.len());
    }
    for silent in &trace.silent {
        println!("{silent}: the agent does not answer: its node's decisions are not known");
    }
    for step in &trace.timeline {
        println!("{}", step_text(step));
    }
    for flow in &trace.flows {
        println!("{}", text(flow, true));
    }
    let word = if trace.verdict.ok { "ok" } else { trace.verdict.fault };
    println!("{word}: {}", trace.verdict.detail);
}

fn print_source(report: &TraceReport) {
    let node = &report.node;
    match &report.name {
        Some(NameAnswer::Addresses(all)) => {
            let all = all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            println!("{node}: DNS says {all}");
        }
        Some(NameAnswer::NoAddress) => println!("{node}: DNS says that the name has no address"),
        Some(NameAnswer::Silent) => println!("{node}: DNS does not answer"),
        Some(NameAnswer::Failed(why)) => println!("{node}: DNS failed: {why}"),
        None => {}
    }
    if let Some(service) = &report.service {
        let count = service.backends.as_ref().map_or(0, Vec::len);
        let kept = service.affinity_secs.map_or(String::new(), |s| format!(", kept for {s} s"));
        println!("{node}: service {} with {count} backends{kept}", service.name);
    }
    for missing in &report.missing {
        println!("{node}: {missing}");
    }
}

/// `12:00:00.000001 node-1       from_pod     > pod_to_overlay 10.244.1.5:40000 -> 10.244.2.7:8080: to node-2, direct`
fn step_text(step: &TraceStep) -> String {
    let source = step.source.map_or("the socket".to_owned(), |source| source.to_string());
    let identities = match step.identities {
        [0, 0] => String::new(),
        [sender, receiver] => format!(" (identities {sender}, {receiver})"),
    };
    let detail = if step.detail.is_empty() { String::new() } else { format!(": {}", step.detail) };
    format!(
        "{:<15} {:<12} {:<12} {} {:<16} {source} -> {}{identities}{detail}",
        time_of_day(step.time_us),
        step.node.to_string(),
        step.hook.name(),
        match (step.dropped, step.forth) {
            (true, _) => "x",
            (false, true) => ">",
            (false, false) => "<",
        },
        step.decision,
        step.destination,
    )
}

#[cfg(test)]
mod tests {
    use mesh_model::trace::StepHook;

    use super::order::tests::step;
    use super::*;

    #[test]
    fn a_line_says_where_and_what_and_why() {
        let mut seen = step("a", 1, StepHook::FromPod, true, "pod_to_overlay");
        seen.detail = "to b, direct, MTU 1420".to_owned();
        seen.identities = [100, 0];
        let line = step_text(&seen);
        assert!(
            line.ends_with(
                "10.244.1.5:40000 -> 10.244.2.7:8080 (identities 100, 0): to b, direct, MTU 1420"
            ),
            "{line}"
        );
        assert!(line.contains("from_pod     > pod_to_overlay"), "{line}");
        seen.dropped = true;
        assert!(step_text(&seen).contains(" x pod_to_overlay"));
    }

    #[test]
    fn a_probe_has_a_port_as_clients_have() {
        assert!(PORTS.contains(&some_port()));
    }
}
