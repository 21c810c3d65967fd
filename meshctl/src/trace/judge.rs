//! What is wrong, from all that is known. Pure: the first fault on the way is the one that is named.

use std::net::SocketAddr;

use mesh_model::ObjectKey;
use mesh_model::flow::{Flow, FlowVerdict};
use mesh_model::report::{PathState, PeerReport};
use mesh_model::trace::{Outcome, TraceReport};
use serde::Serialize;

/// A pod as the API has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PodState {
    pub(super) name: ObjectKey,
    pub(super) node: String,
    pub(super) ready: bool,
    pub(super) node_ready: bool,
}

/// All that is known.
pub(super) struct Facts<'f> {
    pub(super) report: &'f TraceReport,
    /// Flows of the probe, of all nodes, in order.
    pub(super) flows: &'f [Flow],
    /// The pod that has the address which the probe went to.
    pub(super) target: Option<&'f PodState>,
    /// Whether that address is one that pods have.
    pub(super) is_pod_address: bool,
    /// Pods that the service selects and that are not ready.
    pub(super) unready: &'f [ObjectKey],
    /// The way from the node of the source to that of the target, where these are two.
    pub(super) peer: Option<&'f PeerReport>,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Verdict {
    pub(super) ok: bool,
    /// A stable word for programs.
    pub(super) fault: &'static str,
    pub(super) detail: String,
}

fn fault(fault: &'static str, detail: impl Into<String>) -> Verdict {
    Verdict { ok: false, fault, detail: detail.into() }
}

/// The first fault on the way, or that there is none.
pub(super) fn judge(facts: &Facts<'_>) -> Verdict {
    let outcome = facts.report.outcome.as_ref();
    if outcome == Some(&Outcome::Answered) {
        return Verdict { ok: true, fault: "none", detail: answered(facts) };
    }
    at_the_name(facts)
        .or_else(|| at_the_service(facts))
        .or_else(|| told_by_flows(facts))
        .or_else(|| at_the_source(facts))
        .or_else(|| at_the_target(facts))
        .or_else(|| between_nodes(facts))
        .unwrap_or_else(|| by_outcome(outcome))
}

fn answered(facts: &Facts<'_>) -> String {
    let micros = facts.report.took_us;
    format!("answered after {}.{:03} ms", micros / 1000, micros % 1000)
}

fn at_the_name(facts: &Facts<'_>) -> Option<Verdict> {
    let text =
        "the name does not resolve: no service of that name, in this namespace or the one given";
    facts.report.resolved.is_none().then(|| fault("nameNotFound", text))
}

fn at_the_service(facts: &Facts<'_>) -> Option<Verdict> {
    let service = facts.report.service.as_ref()?;
    let name = &service.name;
    let Some(backends) = &service.backends else {
        let ports = service.ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
        let text = format!("service {name} has no such port: it has {ports}");
        return Some(fault("noSuchServicePort", text));
    };
    if !backends.is_empty() {
        return None;
    }
    if facts.unready.is_empty() {
        let text = format!("service {name} has no endpoints: no running pod has its labels");
        return Some(fault("noEndpoints", text));
    }
    let pods = facts.unready.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    Some(fault("podNotReady", format!("no pod of service {name} is ready: {pods} is not")))
}

/// What some node has seen of the probe itself is beyond doubt.
fn told_by_flows(facts: &Facts<'_>) -> Option<Verdict> {
    let of = |verdict| facts.flows.iter().find(move |flow| flow.verdict == verdict);
    if let Some(flow) = of(FlowVerdict::Denied) {
        let rule = flow.reason.as_deref().unwrap_or("a rule");
        let text = format!("a policy denies it on {}: {rule}", flow.node);
        return Some(fault("policyDenied", text));
    }
    let flow = of(FlowVerdict::Dropped)?;
    let (node, reason) = (&flow.node, flow.reason.as_deref().unwrap_or("unknown"));
    Some(match reason {
        "kernel: no_socket" => {
            let to = flow.destination.port.map_or("that port".to_owned(), |p| format!("port {p}"));
            let who =
                flow.destination.pod.as_ref().map_or("the pod".to_owned(), ToString::to_string);
            fault(
                "notListening",
                format!("{who} does not listen on {to}: its kernel says so on {node}"),
            )
        }
        "spoofed_address" | "spoofed_mac" => fault(
            "spoofedSource",
            format!("{node} dropped it: its source is not the pod's ({reason})"),
        ),
        "kernel: pkt_too_big" => {
            fault("tooLarge", format!("{node} dropped it: too large for the way"))
        }
        other => fault("dropped", format!("{node} dropped it: {other}")),
    })
}

fn at_the_source(facts: &Facts<'_>) -> Option<Verdict> {
    if let Some(first) = facts.report.missing.first() {
        let kind = if first.contains("TC program") {
            "programDetached"
        } else if first.contains("route") {
            "routeMissing"
        } else if first.contains("map ") {
            "mapEntryMissing"
        } else {
            "interfaceIncomplete"
        };
        return Some(fault(kind, format!("the pod's interface is not whole: {first}")));
    }
    let failure = facts.report.failures.first()?;
    let kind = if failure.contains("forward") { "forwardingOff" } else { "agentFailure" };
    Some(fault(kind, format!("the agent of {} cannot set up: {failure}", facts.report.node)))
}

fn at_the_target(facts: &Facts<'_>) -> Option<Verdict> {
    let Some(target) = facts.target else {
        let stale = facts.is_pod_address;
        return stale.then(|| fault("staleEndpoint", "no pod has the address that it went to"));
    };
    if !target.node_ready {
        let text = format!("node {} of pod {} is down", target.node, target.name);
        return Some(fault("nodeDown", text));
    }
    if facts.report.outcome == Some(Outcome::Refused) {
        let text = format!("pod {} refuses: nobody listens there", target.name);
        return Some(fault("notListening", text));
    }
    (!target.ready).then(|| fault("podNotReady", format!("pod {} is not ready", target.name)))
}

fn between_nodes(facts: &Facts<'_>) -> Option<Verdict> {
    let peer = facts.peer?;
    let node = peer.node.as_ref().map_or("the other node".to_owned(), ToString::to_string);
    match peer.path.state {
        PathState::Down => Some(fault("nodeDown", format!("{node} does not answer anybody"))),
        PathState::Unreachable => {
            let text =
                format!("{node} lives, but not on the way from here, and no relay was found");
            Some(fault("peerUnreachable", text))
        }
        _ if peer.handshake_age_secs.is_none() => {
            let text = format!("there has never been a session with {node}: is its UDP port open?");
            Some(fault("noSession", text))
        }
        _ => None,
    }
}

fn by_outcome(outcome: Option<&Outcome>) -> Verdict {
    match outcome {
        Some(Outcome::Refused) => fault("refused", "the other side refuses: nobody listens there"),
        Some(Outcome::Silent) => fault(
            "silent",
            "it was sent and nobody dropped it; the server does not answer such bytes",
        ),
        Some(Outcome::TimedOut) => fault(
            "lost",
            "no answer, and no node has seen it dropped: it was lost on the way, or by the other side",
        ),
        Some(Outcome::Unreachable) => fault("unreachable", "there is no route to that address"),
        Some(Outcome::TooLarge) => fault("tooLarge", "it is larger than what the way carries"),
        Some(Outcome::Other(text)) => fault("other", text.clone()),
        Some(Outcome::Answered) | None => fault("unknown", "there was no probe"),
    }
}

/// Where the probe went in the end: to the backend that was chosen, where a node has seen that.
pub(super) fn reached(report: &TraceReport, flows: &[Flow]) -> Option<SocketAddr> {
    let chosen = flows.iter().find_map(|flow| {
        let served = flow.service.is_some() && flow.verdict != FlowVerdict::Refused;
        let destination = &flow.destination;
        served.then(|| Some(SocketAddr::new(destination.address, destination.port?))).flatten()
    });
    chosen.or(report.asked)
}

#[cfg(test)]
mod tests;
