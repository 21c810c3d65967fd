use std::net::{IpAddr, SocketAddr};

use mesh_model::encryption::{Receiver, Traffic};
use mesh_model::snapshot::Protocol;

use super::super::plan::Route;
use super::*;

/// Two nodes, each with a pod, IPv4 only: four canaries and a plain one in each direction.
struct Lab {
    plan: Plan,
    evidence: Evidence,
}

fn watching(name: &str, number: u8) -> Watching {
    let pod = IpAddr::from([10, 244, number, 5]);
    let taker = |protocol, port| Receiver { protocol, address: SocketAddr::new(pod, port) };
    Watching {
        node: name.parse().unwrap(),
        links: vec!["eth0".to_owned()],
        addresses: vec![IpAddr::from([192, 0, 2, number])],
        blocks: vec![format!("10.244.{number}.0/24").parse().unwrap()],
        pod: Some("default/web".to_owned()),
        receivers: vec![taker(Protocol::Udp, 7000), taker(Protocol::Tcp, 7001)],
    }
}

impl Lab {
    /// All as it should be.
    fn new() -> Self {
        let said = |name: &str, number| (name.to_owned(), Ok(watching(name, number)));
        let watching: Said<Watching> = [said("a", 1), said("b", 2)].into();
        let plan = Plan::new(&watching, None, &Route::Straight);
        let findings = ["a", "b"].map(|node| {
            let arrived = plan.flows.iter().filter(|f| f.to == node).map(|f| f.canary.tag);
            let plain = plan.plain.iter().filter(|p| p.from == node).map(|p| p.plain);
            let readable = plain.map(|plain| Readable {
                tag: plain.tag,
                link: "eth0".to_owned(),
                outgoing: true,
                from: "192.0.2.1".parse().unwrap(),
                to: plain.to,
            });
            let other = if node == "a" { "b" } else { "a" };
            let traffic =
                Traffic { node: other.parse().unwrap(), sealed: 5, handshakes: 2, others: 1 };
            let findings = Findings {
                arrived: arrived.collect(),
                readable: readable.collect(),
                traffic: vec![traffic],
                ..Findings::default()
            };
            (node.to_owned(), Ok(findings))
        });
        let sent = ["a", "b"].map(|node| (node.to_owned(), Ok(Sent::default())));
        let evidence = Evidence { watching, sent: sent.into(), findings: findings.into() };
        Self { plan, evidence }
    }

    fn findings(&mut self, node: &str) -> &mut Findings {
        self.evidence.findings.get_mut(node).unwrap().as_mut().unwrap()
    }

    fn verdict(&self, from: &str, to: &str) -> (Outcome, String) {
        let nodes = ["a", "b"].map(|name| NodeState { name: name.to_owned(), ready: true });
        let all = judge(&nodes, &self.plan, &self.evidence);
        assert_eq!(all.len(), 2, "two directions, one family: {all:?}");
        let verdict = all.into_iter().find(|v| v.from == from && v.to == to).unwrap();
        (verdict.outcome, verdict.detail)
    }
}

#[test]
fn silence_is_secrecy_when_all_arrived_and_the_capture_is_proved() {
    let (outcome, detail) = Lab::new().verdict("a", "b");
    assert_eq!(outcome, Outcome::Ok);
    assert!(detail.starts_with("4 canaries arrived") && detail.contains("5 sealed"), "{detail}");
}

#[test]
fn what_anybody_could_read_names_the_pair() {
    let mut lab = Lab::new();
    let flow = lab.plan.flows.iter().find(|f| f.from == "a" && f.to == "b").unwrap();
    let tag = flow.canary.tag;
    // Also when it did not arrive, and the capture is otherwise in doubt.
    let seen = Readable {
        tag,
        link: "eth1".to_owned(),
        outgoing: false,
        from: "10.244.1.5".parse().unwrap(),
        to: "10.244.2.5".parse().unwrap(),
    };
    *lab.findings("b") = Findings { readable: vec![seen], lost_packets: 9, ..Findings::default() };
    let (outcome, detail) = lab.verdict("a", "b");
    assert_eq!(outcome, Outcome::Plaintext);
    assert!(detail.contains("readable: udp from pod; at b on eth1"), "{detail}");
    assert_ne!(lab.verdict("b", "a").0, Outcome::Plaintext);
}

#[test]
fn packets_of_others_outside_the_tunnel_count() {
    let mut lab = Lab::new();
    let bare = Bare {
        link: "eth0".to_owned(),
        from: "10.244.2.9".parse().unwrap(),
        to: "10.244.1.9".parse().unwrap(),
        packets: 3,
    };
    lab.findings("a").bare.push(bare);
    assert_eq!(lab.verdict("b", "a").0, Outcome::Plaintext);
    assert_eq!(lab.verdict("a", "b").0, Outcome::Ok);
}

#[test]
fn doubt_is_never_ok() {
    type Spoil = fn(&mut Lab);
    let doubts: [(&str, Spoil); 7] = [
        ("capture at a does not work", |lab| lab.findings("a").readable.clear()),
        ("capture at b does not work", |lab| {
            lab.findings("b").readable.iter_mut().for_each(|seen| seen.outgoing = false);
        }),
        ("did not arrive", |lab| lab.findings("b").arrived.truncate(3)),
        ("7 packets passed unseen at b", |lab| lab.findings("b").lost_packets = 7),
        ("eth0 is gone", |lab| lab.findings("a").failures.push("eth0 is gone".to_owned())),
        ("killed", |lab| {
            lab.evidence.findings.insert("b".to_owned(), Err("killed".to_owned()));
        }),
        ("busy", |lab| {
            lab.evidence.sent.insert("a".to_owned(), Err("busy".to_owned()));
        }),
    ];
    for (expected, spoil) in doubts {
        let mut lab = Lab::new();
        spoil(&mut lab);
        let (outcome, detail) = lab.verdict("a", "b");
        assert_eq!(outcome, Outcome::Unknown, "{expected}");
        assert!(detail.contains(expected), "{expected}: {detail}");
    }
}

#[test]
fn a_node_that_cannot_look_is_in_doubt_and_not_left_out() {
    let mut lab = Lab::new();
    lab.evidence.watching.insert("b".to_owned(), Err("no answer".to_owned()));
    lab.plan = Plan::new(&lab.evidence.watching, None, &Route::Straight);
    let nodes = ["a", "b"].map(|name| NodeState { name: name.to_owned(), ready: true });
    let all = judge(&nodes, &lab.plan, &lab.evidence);
    assert_eq!(all.len(), 4, "both directions and families");
    assert!(
        all.iter().all(|v| v.outcome == Outcome::Unknown && v.detail == "no answer"),
        "{all:?}"
    );
}

#[test]
fn one_node_alone_has_its_pairs_only() {
    let lab = Lab::new();
    let three: Said<Watching> = [("a", 1), ("b", 2), ("c", 3)]
        .map(|(name, number)| (name.to_owned(), Ok(watching(name, number))))
        .into();
    let plan = Plan::new(&three, Some("c"), &Route::Missing("refused".to_owned()));
    assert_eq!(plan.flows.len(), 4 * 4);
    assert!(plan.flows.iter().all(|f| f.from == "c" || f.to == "c"));
    let tags: std::collections::BTreeSet<u32> = plan.flows.iter().map(|f| f.canary.tag).collect();
    assert_eq!(tags.len(), plan.flows.len(), "each has its own");
    assert!(lab.plan.no_service.is_none() && plan.no_service.is_some());
}
