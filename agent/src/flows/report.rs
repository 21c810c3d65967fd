//! From an event to what people read.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mesh_kernel::flows::{Direction, End, Event, Kind, Reason, monotonic};
use mesh_model::NodeName;
use mesh_model::flow::{Flow, FlowParty, FlowService, FlowSide, FlowStats, FlowVerdict};

use super::names::Names;

/// How far the clock on the wall is ahead of the monotonic one.
pub(crate) fn wall_offset() -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.saturating_sub(monotonic())
}

/// What turns events into reports.
pub(super) struct Reporter<'n> {
    pub(super) node: &'n NodeName,
    pub(super) names: &'n Names,
    /// The kernel's names of its reasons.
    pub(super) reasons: &'n BTreeMap<u32, String>,
    /// See [`wall_offset`].
    pub(super) wall_offset: Duration,
    /// The identity that the programs give to an address.
    pub(super) identity: &'n dyn Fn(IpAddr) -> Option<u32>,
}

impl Reporter<'_> {
    /// The report. `sender` is the address of the namespace that an event without a source came from.
    pub(super) fn report(&self, event: &Event, sender: Option<IpAddr>) -> Flow {
        let source = if event.source.ip().is_unspecified() {
            SocketAddr::new(sender.unwrap_or(event.source.ip()), event.source.port())
        } else {
            event.source
        };
        let service = event.service.map(|address| FlowService {
            address,
            name: self.names.service(address, event.protocol),
        });
        let (source, destination) =
            (self.party(source, event.at), self.party(event.destination, event.at));
        Flow {
            time_us: u64::try_from((self.wall_offset + event.at).as_micros()).unwrap_or_default(),
            node: self.node.clone(),
            verdict: verdict(event),
            side: match event.direction {
                Direction::Forward => FlowSide::Forward,
                Direction::Egress => FlowSide::Egress,
                Direction::Ingress => FlowSide::Ingress,
            },
            protocol: protocol(event),
            reason: self.reason(event, &source, &destination),
            source,
            destination,
            service,
            stats: (event.kind == Kind::Closed).then(|| stats(event)),
            unreported: event.unreported,
        }
    }

    fn party(&self, socket: SocketAddr, at: Duration) -> FlowParty {
        let address = socket.ip();
        FlowParty {
            address,
            port: (socket.port() != 0).then_some(socket.port()),
            pod: self.names.pod(address, at),
            node: self.names.node(address),
            identity: (self.identity)(address),
        }
    }

    fn reason(&self, event: &Event, source: &FlowParty, destination: &FlowParty) -> Option<String> {
        match event.kind {
            Kind::Opened | Kind::Datagram => None,
            Kind::Closed | Kind::Failed => Some(end(event.end).to_owned()),
            Kind::Refused => Some("no backend".to_owned()),
            Kind::Dropped => {
                let reason = drop_reason(event);
                let names = self.names;
                let (sender, receiver) = (source.pod.as_ref(), destination.pod.as_ref());
                let policy = match reason {
                    Some(Reason::PolicyEgress) => sender.and_then(|pod| names.egress_policy(pod)),
                    Some(Reason::PolicyIngress) => {
                        receiver.and_then(|pod| names.ingress_policy(pod))
                    }
                    _ => None,
                };
                let name = reason.map_or_else(|| event.reason.to_string(), |r| r.name().to_owned());
                Some(policy.map_or(name.clone(), |p| format!("{name}: no rule of the {p}")))
            }
            Kind::KernelDropped => {
                let name = self.reasons.get(&event.reason).cloned();
                let name = name.unwrap_or_else(|| event.reason.to_string());
                Some(format!("kernel: {name}"))
            }
        }
    }
}

fn drop_reason(event: &Event) -> Option<Reason> {
    Reason::ALL.into_iter().find(|reason| *reason as u32 == event.reason)
}

/// What a policy forbids is denied; everything else that does not get through is dropped.
fn verdict(event: &Event) -> FlowVerdict {
    match event.kind {
        Kind::Dropped if drop_reason(event).is_some_and(Reason::is_policy) => FlowVerdict::Denied,
        Kind::Opened => FlowVerdict::Opened,
        Kind::Closed => FlowVerdict::Closed,
        Kind::Failed => FlowVerdict::Failed,
        Kind::Datagram => FlowVerdict::Datagram,
        Kind::Refused => FlowVerdict::Refused,
        Kind::Dropped | Kind::KernelDropped => FlowVerdict::Dropped,
    }
}

fn end(end: End) -> &'static str {
    match end {
        End::Unknown => "unknown",
        End::Finished => "finished",
        End::Reset => "reset",
        End::Refused => "refused",
        End::TimedOut => "timed out",
        End::Unreachable => "unreachable",
        End::Aborted => "aborted",
    }
}

fn stats(event: &Event) -> FlowStats {
    let micros = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    FlowStats {
        sent_bytes: event.sent_bytes,
        received_bytes: event.received_bytes,
        duration_us: micros(event.duration),
        rtt_us: micros(event.rtt),
        retransmits: event.retransmits,
    }
}

/// A packet whose IP header could not be read has no address either.
fn protocol(event: &Event) -> String {
    match event.protocol {
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        132 => "sctp".to_owned(),
        1 => "icmp".to_owned(),
        58 => "icmpv6".to_owned(),
        0 => "-".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use super::*;
    use mesh_model::policy::{OPEN, PodPolicy};
    use mesh_model::snapshot::{Frontend, FrontendKind, Protocol};
    use mesh_model::{ObjectKey, Objects, compile};

    pub(in crate::flows) fn event() -> Event {
        Event {
            at: Duration::from_secs(1),
            kind: Kind::Opened,
            direction: Direction::Egress,
            protocol: 6,
            source: "10.244.1.5:40000".parse().unwrap(),
            destination: "10.244.2.7:8080".parse().unwrap(),
            service: Some("10.96.0.1:80".parse().unwrap()),
            netns: 0,
            socket: 0,
            end: End::Unknown,
            sent_bytes: 0,
            received_bytes: 0,
            duration: Duration::ZERO,
            rtt: Duration::ZERO,
            retransmits: 0,
            reason: 0,
            ifindex: 0,
            unreported: 0,
        }
    }

    fn names() -> Names {
        let mut snapshot = compile(&Objects::default(), &"a".parse().unwrap());
        snapshot.node.blocks = vec!["10.244.1.0/24".parse().unwrap()];
        let frontend = Frontend {
            vip: "10.96.0.1".parse().unwrap(),
            protocol: Protocol::Tcp,
            port: 80,
            kind: FrontendKind::ClusterIp,
            service: ObjectKey::new("default", "web"),
            port_name: String::new(),
            affinity_secs: None,
            backends: vec![],
            leaving: vec![],
        };
        snapshot.frontends = Arc::new(vec![Arc::new(frontend)]);
        let client = PodPolicy { identity: 8, ingress: OPEN, egress: 9 };
        let policy = Arc::make_mut(&mut snapshot.policy);
        policy.pods.insert(ObjectKey::new("default", "client"), client);
        policy.names.insert(9, "egress policies of default: quiet".to_owned());
        let mut names = Names::default();
        let owner = "abc/eth0 10.244.1.5 - default/client".to_owned();
        names.learn(Duration::ZERO, &Arc::new(snapshot), std::iter::once(owner));
        names
    }

    fn report(event: &Event, sender: Option<IpAddr>) -> Flow {
        let reasons = BTreeMap::from([(3, "no_socket".to_owned())]);
        Reporter {
            node: &"a".parse().unwrap(),
            names: &names(),
            reasons: &reasons,
            wall_offset: Duration::from_secs(1000),
            identity: &|address| (address == IpAddr::from([10, 244, 1, 5])).then_some(100),
        }
        .report(event, sender)
    }

    #[test]
    fn addresses_get_names() {
        let flow = report(&event(), None);
        assert_eq!(flow.source.pod, Some(ObjectKey::new("default", "client")));
        assert_eq!(flow.source.node, Some("a".parse().unwrap()));
        assert_eq!((flow.source.identity, flow.destination.identity), (Some(100), None));
        assert_eq!((flow.destination.pod, flow.destination.node), (None, None));
        assert_eq!(flow.service.unwrap().name, Some(ObjectKey::new("default", "web")));
        assert_eq!((flow.time_us, flow.stats, flow.reason), (1_001_000_000, None, None));
    }

    #[test]
    fn a_socket_without_an_address_has_that_of_its_pod() {
        let unbound = Event {
            kind: Kind::Datagram,
            protocol: 17,
            source: "[::]:0".parse().unwrap(),
            ..event()
        };
        let flow = report(&unbound, Some("10.244.1.5".parse().unwrap()));
        assert_eq!(flow.source.pod, Some(ObjectKey::new("default", "client")));
        assert_eq!(flow.source.port, None);
        assert_eq!(flow.service.unwrap().name, None, "a service of TCP");
    }

    #[test]
    fn reasons_are_words() {
        let of = |kind, reason, end| {
            let flow = report(&Event { kind, reason, end, ..event() }, None);
            (flow.verdict.name(), flow.reason.unwrap())
        };
        let expect = |kind, reason, end, verdict, text: &str| {
            assert_eq!(of(kind, reason, end), (verdict, text.to_owned()));
        };
        expect(Kind::Closed, 0, End::Reset, "closed", "reset");
        expect(Kind::Failed, 0, End::Refused, "failed", "refused");
        let not_sent = Reason::PolicyEgress as u32;
        let text = "policy_egress: no rule of the egress policies of default: quiet";
        expect(Kind::Dropped, not_sent, End::Unknown, "denied", text);
        let not_accepted = Reason::PolicyIngress as u32;
        expect(Kind::Dropped, not_accepted, End::Unknown, "denied", "policy_ingress");
        let spoofed = Reason::SpoofedAddress as u32;
        expect(Kind::Dropped, spoofed, End::Unknown, "dropped", "spoofed_address");
        expect(Kind::KernelDropped, 3, End::Unknown, "dropped", "kernel: no_socket");
        expect(Kind::KernelDropped, 4, End::Unknown, "dropped", "kernel: 4");
        expect(Kind::Refused, 0, End::Unknown, "refused", "no backend");
    }
}
