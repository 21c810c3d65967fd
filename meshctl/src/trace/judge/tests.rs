//! One row for each fault that is known: facts as nodes and the API tell them, and the word that has to come of it.

use mesh_model::flow::{FlowParty, FlowSide};
use mesh_model::report::{KeyState, PathReport};
use mesh_model::snapshot::WgKey;
use mesh_model::trace::ServiceFacts;

use super::super::order::tests::{node, step};
use super::*;

/// Everything is well, but that nothing came back; each row breaks one thing.
struct World {
    report: TraceReport,
    flows: Vec<Flow>,
    timeline: Vec<TraceStep>,
    nodes: Vec<NodeTrace>,
    silent: Vec<String>,
    target: Option<PodState>,
    selected: Selected,
    peer: Option<PeerReport>,
    bytes: u16,
}

fn world() -> World {
    let backend: SocketAddr = "10.244.2.7:8080".parse().unwrap();
    World {
        report: TraceReport {
            node: "a".parse().unwrap(),
            begun_us: 1,
            took_us: 2_000_000,
            missing: vec![],
            failures: vec![],
            resolved: Some(vec!["10.96.0.1".parse().unwrap()]),
            name: Some(NameAnswer::Addresses(vec!["10.96.0.1".parse().unwrap()])),
            reached: None,
            service: Some(ServiceFacts {
                name: ObjectKey::new("default", "web"),
                ports: vec![80],
                backends: Some(vec![backend]),
                affinity_secs: None,
            }),
            source: Some("0.0.0.0:40000".parse().unwrap()),
            asked: Some("10.96.0.1:80".parse().unwrap()),
            outcome: Some(Outcome::TimedOut),
        },
        flows: vec![],
        timeline: vec![step("a", 1, StepHook::FromPod, true, "pod_to_overlay")],
        nodes: vec![node("a", vec![]), node("b", vec![])],
        silent: vec![],
        target: Some(PodState {
            name: ObjectKey::new("default", "web-1"),
            node: "b".to_owned(),
            ready: true,
            terminating: false,
            node_ready: true,
        }),
        selected: Selected::default(),
        bytes: 0,
        peer: Some(PeerReport {
            node: Some("b".parse().unwrap()),
            public_key: WgKey([1; 32]),
            endpoint: None,
            allowed_ips: vec![],
            handshake_age_secs: Some(3),
            preshared_key: KeyState::Agreed,
            keys: vec![],
            knows_next_key: false,
            received_bytes: 0,
            sent_bytes: 0,
            path: PathReport { state: PathState::Direct, ..PathReport::default() },
        }),
    }
}

fn flow(verdict: FlowVerdict, reason: &str) -> Flow {
    let party = |address: &str, port| FlowParty {
        address: address.parse().unwrap(),
        port: Some(port),
        pod: None,
        node: None,
        identity: None,
    };
    Flow {
        time_us: 2,
        node: "b".parse().unwrap(),
        verdict,
        side: FlowSide::Forward,
        protocol: "tcp".to_owned(),
        source: party("10.244.1.5", 40000),
        destination: party("10.244.2.7", 8080),
        service: None,
        reason: Some(reason.to_owned()),
        stats: None,
        unreported: 0,
    }
}

fn judged(change: impl FnOnce(&mut World)) -> Verdict {
    let mut world = world();
    change(&mut world);
    judge(&Facts {
        report: &world.report,
        flows: &world.flows,
        timeline: &world.timeline,
        nodes: &world.nodes,
        silent: &world.silent,
        target: world.target.as_ref(),
        is_pod_address: true,
        selected: &world.selected,
        peer: world.peer.as_ref(),
        bytes: world.bytes,
    })
}

/// The packet came out of the tunnel and was delivered.
fn came(world: &mut World, bytes: u32) {
    let seen = step("b", 2, StepHook::FromOverlay, true, "seen");
    world.timeline.push(TraceStep { bytes, ..seen });
    world.timeline.push(step("b", 3, StepHook::FromOverlay, true, "overlay_to_pod"));
}

#[test]
fn every_seeded_fault_is_named() {
    let service = |w: &mut World, backends| w.report.service.as_mut().unwrap().backends = backends;
    let missing = |w: &mut World, what: &str| w.report.missing = vec![what.to_owned()];
    let told = |w: &mut World, verdict, reason: &str| w.flows = vec![flow(verdict, reason)];
    let ended = |w: &mut World, decision: &str, detail: &str| {
        let end = step("b", 2, StepHook::FromOverlay, true, decision);
        w.timeline.push(TraceStep { dropped: true, detail: detail.to_owned(), ..end });
    };
    let missing_there = |w: &mut World, what: &str| w.nodes[1].target = Some(vec![what.to_owned()]);
    let silent = |w: &mut World, node: usize, worker: &str| {
        w.nodes[node].silent_workers = vec![worker.to_owned()];
    };
    let path = |w: &mut World, state| w.peer.as_mut().unwrap().path.state = state;
    let dropped = FlowVerdict::Dropped;
    type Row<'r> = (&'r str, Box<dyn FnOnce(&mut World) + 'r>);
    let rows: Vec<Row<'_>> = vec![
        ("nameNotFound", Box::new(|w| w.report.name = Some(NameAnswer::NoAddress))),
        ("dnsSilent", Box::new(|w| w.report.name = Some(NameAnswer::Silent))),
        (
            "dnsFailed",
            Box::new(|w| w.report.name = Some(NameAnswer::Failed("SERVFAIL".to_owned()))),
        ),
        ("noSuchServicePort", Box::new(|w| service(w, None))),
        ("noEndpoints", Box::new(|w| service(w, Some(vec![])))),
        (
            "podNotReady",
            Box::new(|w| {
                service(w, Some(vec![]));
                w.selected.unready = vec![ObjectKey::new("default", "web-1")];
            }),
        ),
        (
            "onlyTerminating",
            Box::new(|w| {
                service(w, Some(vec![]));
                w.selected.terminating = vec![ObjectKey::new("default", "web-1")];
            }),
        ),
        (
            "noLocalEndpoints",
            Box::new(|w| {
                service(w, Some(vec![]));
                w.selected.local_only = true;
                w.selected.ready_on = vec!["b".to_owned()];
            }),
        ),
        ("podNotReady", Box::new(|w| w.target.as_mut().unwrap().ready = false)),
        ("policyDenied", Box::new(|w| told(w, FlowVerdict::Denied, "rule 7"))),
        ("policyEgress", Box::new(|w| ended(w, "policy_egress", "no rule"))),
        ("policyIngress", Box::new(|w| ended(w, "policy_ingress", "no rule"))),
        (
            "namespaceIsolated",
            Box::new(|w| ended(w, "policy_ingress", "no rule of the isolation of namespace x")),
        ),
        ("hostProtected", Box::new(|w| ended(w, "host_protected", ""))),
        ("hostFirewall", Box::new(|w| ended(w, "kernel: netfilter_drop", ""))),
        ("notListening", Box::new(|w| ended(w, "kernel: no_socket", ""))),
        ("spoofedSource", Box::new(|w| ended(w, "spoofed_address", ""))),
        ("tooLarge", Box::new(|w| ended(w, "kernel: pkt_too_big", ""))),
        ("dropped", Box::new(|w| ended(w, "edge_forged", ""))),
        ("notListening", Box::new(|w| w.report.outcome = Some(Outcome::Refused))),
        ("spoofedSource", Box::new(|w| told(w, dropped, "spoofed_address"))),
        (
            "tooLarge",
            Box::new(|w| {
                w.timeline = vec![];
                w.report.outcome = Some(Outcome::TooLarge);
            }),
        ),
        ("dropped", Box::new(|w| told(w, dropped, "kernel: netfilter_drop"))),
        ("programDetached", Box::new(|w| missing(w, "no TC program on mesh1234"))),
        ("routeMissing", Box::new(|w| missing(w, "the pod has no default route via 169.254.1.1"))),
        ("mapEntryMissing", Box::new(|w| missing(w, "map LOCAL_PODS has no entry"))),
        ("interfaceDown", Box::new(|w| missing(w, "interface mesh1234 is down"))),
        ("interfaceDown", Box::new(|w| missing_there(w, "interface eth0 is down"))),
        ("interfaceIncomplete", Box::new(|w| missing_there(w, "address 10.244.2.7 is not there"))),
        ("overlayStopped", Box::new(|w| silent(w, 0, "overlay"))),
        ("overlayStopped", Box::new(|w| silent(w, 1, "overlay"))),
        ("podTerminating", Box::new(|w| w.target.as_mut().unwrap().terminating = true)),
        ("agentSilent", Box::new(|w| w.silent = vec!["b".to_owned()])),
        ("lostBetween", Box::new(|_| {})),
        (
            "forwardingOff",
            Box::new(|w| {
                w.timeline = vec![step("a", 1, StepHook::FromPod, true, "pod_to_stack")];
                w.nodes[0].sysctls = vec!["net/ipv4/ip_forward".to_owned()];
            }),
        ),
        (
            "forwardingOff",
            Box::new(|w| {
                w.report.failures = vec!["node: write net/ipv4/ip_forward".to_owned()];
            }),
        ),
        ("agentFailure", Box::new(|w| w.report.failures = vec!["services: map full".to_owned()])),
        ("staleEndpoint", Box::new(|w| w.target = None)),
        ("nodeDown", Box::new(|w| w.target.as_mut().unwrap().node_ready = false)),
        ("nodeDown", Box::new(|w| path(w, PathState::Down))),
        ("peerUnreachable", Box::new(|w| path(w, PathState::Unreachable))),
        ("noSession", Box::new(|w| w.peer.as_mut().unwrap().handshake_age_secs = None)),
        (
            "unreachable",
            Box::new(|w| {
                w.timeline = vec![];
                w.report.outcome = Some(Outcome::Unreachable);
            }),
        ),
        (
            "silent",
            Box::new(|w| {
                came(w, 74);
                w.report.outcome = Some(Outcome::Silent);
            }),
        ),
        ("lost", Box::new(|w| came(w, 74))),
        (
            "largePacketsLost",
            Box::new(|w| {
                w.report.outcome = Some(Outcome::Answered);
                w.bytes = 4000;
                w.timeline[0].bytes = 1400;
                came(w, 60);
            }),
        ),
    ];
    let kinds = rows.iter().map(|(fault, _)| fault).collect::<std::collections::BTreeSet<_>>();
    assert!(kinds.len() >= 30, "{kinds:?}");
    for (i, (expected, change)) in rows.into_iter().enumerate() {
        let verdict = judged(change);
        assert_eq!((verdict.fault, verdict.ok), (expected, false), "row {i}: {}", verdict.detail);
    }
}

#[test]
fn what_answers_has_no_fault() {
    let verdict = judged(|w| {
        w.report.outcome = Some(Outcome::Answered);
        w.report.failures = vec!["dns: something else".to_owned()];
    });
    assert!(verdict.ok && verdict.detail.contains("2000.000 ms"), "{verdict:?}");
}

#[test]
fn large_packets_that_came_are_no_fault() {
    let verdict = judged(|w| {
        w.report.outcome = Some(Outcome::Answered);
        w.bytes = 4000;
        w.timeline[0].bytes = 1434;
        came(w, 1420);
    });
    assert!(verdict.ok, "{verdict:?}");
}

#[test]
fn the_first_fault_on_the_way_is_named() {
    let verdict = judged(|w| {
        w.report.name = Some(NameAnswer::NoAddress);
        w.report.missing = vec!["no TC program on mesh1234".to_owned()];
        w.peer.as_mut().unwrap().path.state = PathState::Down;
    });
    assert_eq!(verdict.fault, "nameNotFound");
}
