//! From what the programs tell to what people read.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use mesh_kernel::Programs;
use mesh_kernel::flows::Reason;
use mesh_kernel::traces::{EdgeReason, Event, Hook, Kind};
use mesh_model::Snapshot;
use mesh_model::policy::{OPEN, THIS_NODE};
use mesh_model::report::PeerReport;
use mesh_model::trace::{NodeTrace, StepHook, TraceCollect, TraceMark, TraceStep};
use mesh_overlay::Overlay;
use mesh_worker::Client;

use super::{Marks, facts};
use crate::flows::{Flows, wall_offset};

/// What a node knows of the others and of itself.
pub(crate) struct Sources<'s> {
    pub(crate) snapshot: &'s Snapshot,
    pub(crate) peers: &'s [PeerReport],
    pub(crate) flows: &'s Flows,
    pub(crate) programs: Option<Arc<Programs>>,
    pub(crate) failures: Vec<String>,
    pub(crate) dns: &'s Client,
    pub(crate) overlay: &'s Overlay,
}

/// The node's part of a trace.
pub(crate) async fn collect(marks: &Marks, asked: TraceCollect, sources: Sources<'_>) -> NodeTrace {
    let events = marks.collect(&asked.mark);
    let steps = steps(&events, &asked.mark, &sources);
    let target = match (sources.programs, asked.target) {
        (Some(programs), Some(address)) => {
            let look = tokio::task::spawn_blocking(move || facts::target(programs, address));
            look.await.ok().flatten()
        }
        _ => None,
    };
    NodeTrace {
        node: sources.snapshot.node.name.clone(),
        steps,
        target,
        failures: sources.failures,
        silent_workers: facts::silent_workers(sources.dns, sources.overlay).await,
        sysctls: facts::forwarding_off(),
    }
}

fn steps(events: &[Event], mark: &TraceMark, sources: &Sources<'_>) -> Vec<TraceStep> {
    let teller = Teller {
        snapshot: sources.snapshot,
        peers: sources.peers,
        mark,
        wall_offset: wall_offset(),
        kernel_reason: &|number| sources.flows.kernel_reason(number),
    };
    events.iter().map(|event| teller.step(event)).collect()
}

/// What turns events into steps.
struct Teller<'t> {
    snapshot: &'t Snapshot,
    peers: &'t [PeerReport],
    mark: &'t TraceMark,
    /// How far the clock on the wall is ahead of the monotonic one.
    wall_offset: Duration,
    /// The kernel's name of one of its reasons.
    kernel_reason: &'t dyn Fn(u32) -> String,
}

impl Teller<'_> {
    fn step(&self, event: &Event) -> TraceStep {
        let socket = event.hook == Hook::Socket;
        let (decision, dropped, detail) = self.decision(event);
        TraceStep {
            time_us: u64::try_from((self.wall_offset + event.at).as_micros()).unwrap_or_default(),
            node: self.snapshot.node.name.clone(),
            hook: hook(event.hook),
            forth: socket || self.mark.ends.contains(&event.source),
            source: (!socket).then_some(event.source),
            destination: event.destination,
            chosen: event.chosen,
            bytes: event.bytes,
            decision,
            dropped,
            detail,
            identities: [event.sender, event.receiver],
        }
    }

    /// The word, whether the packet ends here, and why.
    fn decision(&self, event: &Event) -> (String, bool, String) {
        let to = event.destination;
        match event.kind {
            Kind::Seen => ("seen".to_owned(), false, format!("{} bytes", event.bytes)),
            Kind::Straight => {
                ("straight".to_owned(), false, format!("{to} is no service's address"))
            }
            Kind::Refused => {
                let text = format!("service {} has no backend", self.service(event));
                ("refused".to_owned(), true, text)
            }
            Kind::Chosen => ("chosen".to_owned(), false, self.choice(event)),
            Kind::Policy if event.decision == Kind::ALLOWED => {
                ("policy_allowed".to_owned(), false, self.allowed(event))
            }
            Kind::Policy => (reason(event.decision).to_owned(), true, self.denied(event)),
            Kind::Verdict => self.verdict(event),
            Kind::Edge => {
                let known = EdgeReason::ALL.into_iter().find(|r| *r as u32 == event.decision);
                let name = known.map_or("unknown", EdgeReason::name);
                let dropped = known.is_some_and(|r| r as u32 >= EdgeReason::NoBackend as u32);
                (format!("edge_{name}"), dropped, String::new())
            }
            Kind::KernelDrop => {
                let name = (self.kernel_reason)(event.decision);
                (format!("kernel: {name}"), true, format!("the kernel dropped it: {name}"))
            }
        }
    }

    fn service(&self, event: &Event) -> String {
        let at = event.destination;
        let is_it = |f: &&Arc<mesh_model::snapshot::Frontend>| {
            f.protocol.number() == event.protocol && SocketAddr::new(f.vip, f.port) == at
        };
        let found = self.snapshot.frontends.iter().find(is_it);
        // A node port has an entry for all addresses of nodes at once.
        found.map_or_else(|| at.to_string(), |frontend| frontend.service.to_string())
    }

    fn choice(&self, event: &Event) -> String {
        let Some(chosen) = event.chosen else { return String::new() };
        let service = self.service(event);
        // From outside, a table by client decides.
        if event.hook != Hook::Socket {
            return format!("{service}: {chosen}, by the client's address and port");
        }
        let why = match (event.egress, event.ingress) {
            (1, _) => "the only backend".to_owned(),
            (count, 0) => format!("one of {count} at random"),
            (count, secs) => format!("one of {count}, kept for this client for {secs} s"),
        };
        format!("service {service}: {chosen}, {why}")
    }

    /// Egress is asked of the side that began, ingress of the other.
    fn allowed(&self, event: &Event) -> String {
        let name = |number| self.snapshot.policy.name(number);
        let side = |word: &str, policy: u32, rule: u32| {
            let policy_name = name(policy);
            match (policy, rule) {
                (OPEN, _) => None,
                (_, 0) => Some(format!("{word}: {policy_name} was asked before")),
                (_, THIS_NODE) => Some(format!("{word}: the own node is always allowed")),
                (_, rule) => Some(format!("{word}: rule {} of {policy_name}", name(rule))),
            }
        };
        let sides = [
            side("egress", event.egress, event.egress_rule),
            side("ingress", event.ingress, event.ingress_rule),
        ];
        let text = sides.into_iter().flatten().collect::<Vec<_>>().join("; ");
        if text.is_empty() { "no policy applies".to_owned() } else { text }
    }

    fn denied(&self, event: &Event) -> String {
        let number = match Reason::ALL.into_iter().find(|r| *r as u32 == event.decision) {
            Some(Reason::PolicyEgress) => event.egress,
            Some(Reason::PolicyIngress) => event.ingress,
            _ => 0,
        };
        match self.snapshot.policy.name(number) {
            "" if number == 0 => "the pod's policies are not programmed yet".to_owned(),
            "" => format!("no rule of policy {number}"),
            name => format!("no rule of the {name}"),
        }
    }

    fn verdict(&self, event: &Event) -> (String, bool, String) {
        let found = Reason::ALL.into_iter().find(|r| *r as u32 == event.decision);
        let Some(found) = found else { return (event.decision.to_string(), true, String::new()) };
        let detail = match found {
            Reason::PodToOverlay => self.peer(event.destination.ip()),
            Reason::PodToStack | Reason::OverlayToStack => "to the node's own stack".to_owned(),
            Reason::PodToPod | Reason::OverlayToPod => "to the pod's device".to_owned(),
            _ => String::new(),
        };
        (found.name().to_owned(), drops(found), detail)
    }

    /// The node behind the tunnel, and what is known of the way.
    fn peer(&self, address: IpAddr) -> String {
        let has = |peer: &&PeerReport| peer.allowed_ips.iter().any(|b| b.contains(&address));
        let Some(peer) = self.peers.iter().find(has) else {
            return "no peer has that address".to_owned();
        };
        let node = peer.node.as_ref().map_or("a stranger".to_owned(), ToString::to_string);
        let via = peer.path.via.as_ref().map_or(String::new(), |via| format!(" by {via}"));
        let mtu = peer.path.mtu.map_or(String::new(), |mtu| format!(", MTU {mtu}"));
        format!("to {node}, {}{via}{mtu}", peer.path.state)
    }
}

fn hook(hook: Hook) -> StepHook {
    match hook {
        Hook::Socket => StepHook::Socket,
        Hook::FromPod => StepHook::FromPod,
        Hook::ToPod => StepHook::ToPod,
        Hook::FromOverlay => StepHook::FromOverlay,
        Hook::FromUplink => StepHook::FromUplink,
        Hook::ToUplink => StepHook::ToUplink,
        Hook::Kernel => StepHook::Kernel,
    }
}

fn reason(number: u32) -> &'static str {
    let found = Reason::ALL.into_iter().find(|reason| *reason as u32 == number);
    found.map_or("unknown", Reason::name)
}

fn drops(reason: Reason) -> bool {
    !matches!(
        reason,
        Reason::PodToStack
            | Reason::PodToPod
            | Reason::PodToOverlay
            | Reason::OverlayToPod
            | Reason::OverlayToStack
    )
}

#[cfg(test)]
mod tests {
    use mesh_model::snapshot::Protocol;
    use mesh_model::{Objects, compile};

    use super::*;

    fn event(kind: Kind, decision: u32) -> Event {
        Event {
            at: Duration::from_secs(1),
            hook: Hook::FromPod,
            kind,
            decision,
            socket: 0,
            protocol: 6,
            source: "10.244.1.5:40000".parse().unwrap(),
            destination: "10.244.2.7:8080".parse().unwrap(),
            chosen: None,
            ifindex: 7,
            bytes: 74,
            egress: 0,
            ingress: 0,
            egress_rule: 0,
            ingress_rule: 0,
            sender: 100,
            receiver: 101,
        }
    }

    fn told(event: &Event) -> TraceStep {
        let mut snapshot = compile(&Objects::default(), &"a".parse().unwrap());
        let names = [(200, "policies shop/closed"), (300, "shop/open#1")];
        Arc::make_mut(&mut snapshot.policy).names =
            names.into_iter().map(|(number, name)| (number, name.to_owned())).collect();
        let ends = vec!["10.244.1.5:40000".parse().unwrap()];
        let mark = TraceMark { ends, protocol: Protocol::Tcp };
        let teller = Teller {
            snapshot: &snapshot,
            peers: &[],
            mark: &mark,
            wall_offset: Duration::from_secs(10),
            kernel_reason: &|number| format!("reason {number}"),
        };
        teller.step(event)
    }

    #[test]
    fn a_packet_that_comes_back_is_told_from_one_that_goes() {
        let forth = event(Kind::Seen, 0);
        let back = Event { source: forth.destination, destination: forth.source, ..forth };
        assert_eq!((told(&forth).forth, told(&back).forth), (true, false));
        assert_eq!((told(&forth).time_us, told(&forth).identities), (11_000_000, [100, 101]));
    }

    #[test]
    fn policies_are_named_with_the_rule_that_decided() {
        let asked = Event { egress: 200, ingress: 0, ..event(Kind::Policy, Kind::ALLOWED) };
        assert_eq!(told(&asked).detail, "egress: policies shop/closed was asked before");
        let by_rule = told(&Event { egress_rule: 300, ..asked });
        assert_eq!(by_rule.detail, "egress: rule shop/open#1 of policies shop/closed");
        assert!(!by_rule.dropped && by_rule.decision == "policy_allowed");
        let none = told(&event(Kind::Policy, Kind::ALLOWED));
        assert_eq!(none.detail, "no policy applies");
        let denied = Event { decision: Reason::PolicyEgress as u32, ..asked };
        let denied = told(&denied);
        assert_eq!((denied.decision.as_str(), denied.dropped), ("policy_egress", true));
        assert_eq!(denied.detail, "no rule of the policies shop/closed");
    }

    #[test]
    fn what_ends_a_packet_is_told_from_what_does_not() {
        let step = |kind, decision| {
            let step = told(&event(kind, decision));
            (step.decision, step.dropped)
        };
        let verdict = |reason| step(Kind::Verdict, reason as u32);
        assert_eq!(verdict(Reason::PodToOverlay), ("pod_to_overlay".to_owned(), false));
        assert_eq!(verdict(Reason::HostProtected), ("host_protected".to_owned(), true));
        let edge = |reason| step(Kind::Edge, reason as u32);
        assert_eq!(edge(EdgeReason::Chosen), ("edge_chosen".to_owned(), false));
        assert_eq!(edge(EdgeReason::NotAllowed), ("edge_not_allowed".to_owned(), true));
        assert_eq!(step(Kind::KernelDrop, 5), ("kernel: reason 5".to_owned(), true));
    }

    #[test]
    fn a_choice_says_why() {
        let hooked = Event {
            hook: Hook::Socket,
            egress: 3,
            chosen: Some("10.244.2.7:8080".parse().unwrap()),
            destination: "10.96.0.1:80".parse().unwrap(),
            ..event(Kind::Chosen, 0)
        };
        let detail = |event: &Event| told(event).detail;
        assert!(detail(&hooked).ends_with("10.244.2.7:8080, one of 3 at random"));
        assert!(
            detail(&Event { ingress: 60, ..hooked }).ends_with("kept for this client for 60 s")
        );
        assert!(detail(&Event { egress: 1, ..hooked }).ends_with("the only backend"));
        assert_eq!(told(&hooked).source, None);
    }
}
