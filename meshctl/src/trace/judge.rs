//! What is wrong, from all that is known. Pure: the first fault on the way is the one that is named.

use std::net::SocketAddr;

use mesh_model::flow::{Flow, FlowVerdict};
use mesh_model::report::{PathState, PeerReport};
use mesh_model::trace::{NameAnswer, NodeTrace, Outcome, StepHook, TraceReport, TraceStep};
use mesh_model::{NodeName, ObjectKey};
use serde::Serialize;

use super::order::{enters, leaves};
use super::pods::{Place, PodState, Selected};

/// All that is known.
pub(super) struct Facts<'f> {
    pub(super) report: &'f TraceReport,
    /// Flows of the probe, of all nodes, in order.
    pub(super) flows: &'f [Flow],
    /// What the programs of all nodes decided, in order.
    pub(super) timeline: &'f [TraceStep],
    /// What each node knows.
    pub(super) nodes: &'f [NodeTrace],
    /// Nodes whose agents do not answer.
    pub(super) silent: &'f [String],
    /// The pod that has the address which the probe went to.
    pub(super) target: Option<&'f PodState>,
    /// Whether that address is one that pods have.
    pub(super) is_pod_address: bool,
    /// The pods that the service selects.
    pub(super) selected: &'f Selected,
    /// The way from the node of the source to that of the target, where these are two.
    pub(super) peer: Option<&'f PeerReport>,
    /// Bytes that were sent beside the connection.
    pub(super) bytes: u16,
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

pub(super) fn fault(fault: &'static str, detail: impl Into<String>) -> Verdict {
    Verdict { ok: false, fault, detail: detail.into() }
}

/// The first fault on the way, or that there is none.
pub(super) fn judge(facts: &Facts<'_>) -> Verdict {
    let outcome = facts.report.outcome.as_ref();
    if outcome == Some(&Outcome::Answered) {
        let good = || Verdict { ok: true, fault: "none", detail: answered(facts) };
        return lost_when_large(facts).unwrap_or_else(good);
    }
    at_the_name(facts)
        .or_else(|| at_the_service(facts))
        .or_else(|| decided_on_the_way(facts))
        .or_else(|| told_by_flows(facts))
        .or_else(|| at_the_source(facts))
        .or_else(|| at_the_target(facts))
        .or_else(|| between_nodes(facts))
        .unwrap_or_else(|| by_outcome(facts))
}

/// A pod that nobody can reach, and that can reach nobody.
pub(super) fn without_address(pod: &ObjectKey, place: &Place) -> Verdict {
    match &place.node {
        None => fault("podNotScheduled", format!("pod {pod} is on no node yet: see its events")),
        Some(node) => {
            let text = format!("pod {pod} on {node} has no address: it is {}", place.phase);
            fault("podWithoutAddress", text)
        }
    }
}

/// Nobody there can send a probe.
pub(super) fn silent_agent(node: &str, pod: &ObjectKey) -> Verdict {
    let text = format!("the agent of {node}, the node of pod {pod}, does not answer");
    fault("agentSilent", text)
}

fn answered(facts: &Facts<'_>) -> String {
    let micros = facts.report.took_us;
    format!("answered after {}.{:03} ms", micros / 1000, micros % 1000)
}

fn at_the_name(facts: &Facts<'_>) -> Option<Verdict> {
    match facts.report.name.as_ref()? {
        NameAnswer::Addresses(_) => None,
        NameAnswer::NoAddress => Some(fault(
            "nameNotFound",
            "the name has no address: no service of that name, in this namespace or the one given",
        )),
        NameAnswer::Silent => {
            let node = &facts.report.node;
            let worker = match is_silent(facts, node.as_str(), "dns") {
                true => ": its worker does not answer the agent either",
                false => "",
            };
            Some(fault("dnsSilent", format!("the DNS server of {node} does not answer{worker}")))
        }
        NameAnswer::Failed(why) => Some(fault("dnsFailed", format!("DNS failed: {why}"))),
    }
}

fn is_silent(facts: &Facts<'_>, node: &str, worker: &str) -> bool {
    let trace = facts.nodes.iter().find(|trace| trace.node.as_str() == node);
    trace.is_some_and(|trace| trace.silent_workers.iter().any(|silent| silent == worker))
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
    let selected = facts.selected;
    let list =
        |pods: &[ObjectKey]| pods.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if selected.local_only && !selected.ready_on.is_empty() {
        let (here, nodes) = (&facts.report.node, selected.ready_on.join(", "));
        let text = format!(
            "service {name} is for pods of the client's node only, and has none on {here}: they are on {nodes}"
        );
        return Some(fault("noLocalEndpoints", text));
    }
    Some(if !selected.unready.is_empty() {
        let pods = list(&selected.unready);
        fault("podNotReady", format!("no pod of service {name} is ready: {pods} is not"))
    } else if !selected.terminating.is_empty() {
        let pods = list(&selected.terminating);
        let text = format!("all pods of service {name} are about to go: {pods}");
        fault("onlyTerminating", text)
    } else {
        let text = format!("service {name} has no endpoints: no running pod has its labels");
        fault("noEndpoints", text)
    })
}

/// What a program or the kernel decided about the probe itself is beyond doubt.
fn decided_on_the_way(facts: &Facts<'_>) -> Option<Verdict> {
    let ends = |forth: bool| facts.timeline.iter().find(move |s| s.dropped && s.forth == forth);
    let step = ends(true).or_else(|| ends(false))?;
    let (node, detail) = (&step.node, &step.detail);
    let way = if step.forth { "it" } else { "the answer" };
    let word = step.decision.as_str();
    Some(match word {
        "policy_egress" => {
            fault("policyEgress", format!("a policy lets {way} not out, on {node}: {detail}"))
        }
        "policy_ingress" if detail.contains("isolation of namespace") => {
            fault("namespaceIsolated", format!("{node} does not let {way} in: {detail}"))
        }
        "policy_ingress" => {
            fault("policyIngress", format!("a policy lets {way} not in, on {node}: {detail}"))
        }
        "host_protected" => {
            let text = format!("{node} dropped {way}: pods may not reach {}", step.destination);
            fault("hostProtected", text)
        }
        "spoofed_address" | "spoofed_mac" => spoofed(node.as_str(), word),
        "kernel: no_socket" => not_listening(facts, step),
        "kernel: netfilter_drop" => {
            fault("hostFirewall", format!("a firewall rule of {node} dropped {way}"))
        }
        "kernel: pkt_too_big" => {
            fault("tooLarge", format!("{node} dropped {way}: too large for the way"))
        }
        // What the node does with a packet for nobody is its own way to say so.
        _ if facts.target.is_none() && facts.is_pod_address => stale(),
        other => {
            let text = format!("{node} dropped {way} in {}: {other}", step.hook.name());
            why_kernel_dropped(facts, step).unwrap_or_else(|| fault("dropped", text))
        }
    })
}

/// The kernel's word for a drop says how, not why.
fn why_kernel_dropped(facts: &Facts<'_>, step: &TraceStep) -> Option<Verdict> {
    if step.hook != StepHook::Kernel {
        return None;
    }
    incomplete("the pod's interface", &facts.report.missing)
        .or_else(|| incomplete_at_target(facts))
        .or_else(|| forwarding_off(facts, &step.node))
}

fn incomplete_at_target(facts: &Facts<'_>) -> Option<Verdict> {
    let target = facts.target?;
    let there = facts.nodes.iter().find(|trace| trace.node.as_str() == target.node)?;
    incomplete(&format!("the interface of pod {}", target.name), there.target.as_deref()?)
}

fn stale() -> Verdict {
    fault("staleEndpoint", "no pod has the address that it went to")
}

fn forwarding_off(facts: &Facts<'_>, node: &NodeName) -> Option<Verdict> {
    let trace =
        facts.nodes.iter().find(|trace| trace.node == *node && !trace.sysctls.is_empty())?;
    let names = trace.sysctls.join(", ");
    Some(fault("forwardingOff", format!("{node} forwards nothing: {names} is 0")))
}

fn spoofed(node: &str, reason: &str) -> Verdict {
    let text = format!("{node} dropped it: its source is not the pod's ({reason})");
    fault("spoofedSource", text)
}

fn not_listening(facts: &Facts<'_>, step: &TraceStep) -> Verdict {
    let who = facts.target.map_or("the other side".to_owned(), |t| format!("pod {}", t.name));
    let (port, node) = (step.destination.port(), &step.node);
    let text = format!("{who} does not listen on port {port}: its kernel says so on {node}");
    fault("notListening", text)
}

/// What flows tell of it that is no step: a packet whose source is not the probe's.
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
        "spoofed_address" | "spoofed_mac" => spoofed(node.as_str(), reason),
        other => fault("dropped", format!("{node} dropped it: {other}")),
    })
}

fn at_the_source(facts: &Facts<'_>) -> Option<Verdict> {
    let node = &facts.report.node;
    if let Some(verdict) = incomplete("the pod's interface", &facts.report.missing) {
        return Some(verdict);
    }
    if crosses(facts) && is_silent(facts, node.as_str(), "overlay") {
        return Some(overlay_stopped(node.as_str()));
    }
    let to_stack = facts.timeline.last().is_some_and(|s| s.decision == "pod_to_stack");
    if let Some(verdict) = forwarding_off(facts, node).filter(|_| to_stack) {
        return Some(verdict);
    }
    let failure = facts.report.failures.first()?;
    let kind = if failure.contains("forward") { "forwardingOff" } else { "agentFailure" };
    Some(fault(kind, format!("the agent of {node} cannot set up: {failure}")))
}

/// The first thing that an interface lacks.
fn incomplete(whose: &str, missing: &[String]) -> Option<Verdict> {
    let first = missing.first()?;
    let kind = if first.contains("TC program") {
        "programDetached"
    } else if first.contains("is down") {
        "interfaceDown"
    } else if first.contains("route") {
        "routeMissing"
    } else if first.contains("map ") {
        "mapEntryMissing"
    } else {
        "interfaceIncomplete"
    };
    Some(fault(kind, format!("{whose} is not whole: {first}")))
}

fn overlay_stopped(node: &str) -> Verdict {
    fault("overlayStopped", format!("the overlay worker of {node} does not answer"))
}

/// Whether the way leads to another node.
fn crosses(facts: &Facts<'_>) -> bool {
    facts.timeline.iter().any(enters)
}

fn at_the_target(facts: &Facts<'_>) -> Option<Verdict> {
    let Some(target) = facts.target else {
        let is_stale = facts.is_pod_address;
        return is_stale.then(stale);
    };
    let node = &target.node;
    if !target.node_ready {
        let text = format!("node {node} of pod {} is down", target.name);
        return Some(fault("nodeDown", text));
    }
    if facts.report.outcome == Some(Outcome::Refused) {
        let text = format!("pod {} refuses: nobody listens there", target.name);
        return Some(fault("notListening", text));
    }
    if let Some(verdict) = incomplete_at_target(facts) {
        return Some(verdict);
    }
    if crosses(facts) && is_silent(facts, node, "overlay") {
        return Some(overlay_stopped(node));
    }
    if target.terminating {
        return Some(fault("podTerminating", format!("pod {} is about to go", target.name)));
    }
    (!target.ready).then(|| fault("podNotReady", format!("pod {} is not ready", target.name)))
}

/// It went into the tunnel. Did it come out?
fn between_nodes(facts: &Facts<'_>) -> Option<Verdict> {
    let peer = facts.peer?;
    let node = peer.node.as_ref().map_or("the other node".to_owned(), ToString::to_string);
    match peer.path.state {
        PathState::Down => {
            return Some(fault("nodeDown", format!("{node} does not answer anybody")));
        }
        PathState::Unreachable => {
            let text =
                format!("{node} lives, but not on the way from here, and no relay was found");
            return Some(fault("peerUnreachable", text));
        }
        _ => {}
    }
    if peer.handshake_age_secs.is_none() {
        let text = format!("there has never been a session with {node}: is its UDP port open?");
        return Some(fault("noSession", text));
    }
    if facts.silent.contains(&node) {
        let text = format!("it went to {node}, whose agent does not answer");
        return Some(fault("agentSilent", text));
    }
    let entered = facts.timeline.iter().rfind(|step| step.forth && enters(step))?;
    let came = facts.timeline.iter().any(|step| step.forth && leaves(step));
    (!came).then(|| {
        let text = format!("it left {} for {node} and did not come out there", entered.node);
        fault("lostBetween", text)
    })
}

/// What the narrowest links carry that are worth a name.
const FULL_PACKET: u32 = 1280;

/// Small packets passed. Those that are as large as was asked for left, and nothing of half their size came out of the tunnel:
/// on the way packets are joined and cut, so that the sizes themselves need not agree.
fn lost_when_large(facts: &Facts<'_>) -> Option<Verdict> {
    let largest = |of: fn(&TraceStep) -> bool| {
        let packets = facts.timeline.iter().filter(|step| step.forth && of(step));
        packets.map(|step| step.bytes).max()
    };
    let left = largest(enters)?;
    let came = largest(leaves)?;
    let lost = facts.bytes > 0 && 2 * came < left.min(FULL_PACKET);
    lost.then(|| {
        let node = facts.target.map_or("the other node", |target| &target.node);
        let text = format!(
            "packets of {left} bytes left {} and did not come out at {node}; of {came} bytes they did",
            facts.report.node
        );
        fault("largePacketsLost", text)
    })
}

fn by_outcome(facts: &Facts<'_>) -> Verdict {
    let delivered = facts.timeline.iter().any(|step| {
        let to_pod = matches!(step.decision.as_str(), "pod_to_pod" | "overlay_to_pod");
        step.forth && (to_pod || step.hook == StepHook::ToPod)
    });
    match facts.report.outcome.as_ref() {
        Some(Outcome::Refused) => fault("refused", "the other side refuses: nobody listens there"),
        Some(Outcome::Silent) if delivered => {
            fault("silent", "it was delivered to the pod; the server does not answer such bytes")
        }
        Some(Outcome::Silent) => {
            fault("silent", "it was sent and nobody dropped it, and there was no answer")
        }
        Some(Outcome::TimedOut) if delivered => {
            fault("lost", "it was delivered to the pod, which does not answer")
        }
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
    let chosen = report.reached.or_else(|| {
        flows.iter().find_map(|flow| {
            let served = flow.service.is_some() && flow.verdict != FlowVerdict::Refused;
            let destination = &flow.destination;
            served.then(|| Some(SocketAddr::new(destination.address, destination.port?))).flatten()
        })
    });
    chosen.or(report.asked)
}

#[cfg(test)]
mod tests;
