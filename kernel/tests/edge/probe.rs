//! A probe as if a client outside had sent it: it goes on for real, and the answer goes to the client.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use mesh_abi::EdgeReason;
use mesh_kernel::edge::{Entered, Probe, Service, enter};
use mesh_kernel::services::FrontendKey;
use mesh_kernel::traces::{Event, Hook, Kind, Mark, Traces};
use mesh_model::snapshot::Protocol;

use super::host::{self, NODES};
use super::{CLIENT, CLIENT6, World, at, teller, udp_teller, v4, v6};
use crate::lab::{PATIENCE, privileged};

/// Port of the services of pods, by where these are; those of the nodes' own processes are `host`'s.
const PODS: u16 = 31_001;

/// Services at the first node: pods here and there, beside the nodes' own processes.
fn publish(world: &World) {
    let mut desired = host::desired(world, 0, false);
    for vip in NODES[0].map(|text| text.parse::<IpAddr>().unwrap()) {
        for place in 0..2_u8 {
            let address =
                |host| if vip.is_ipv4() { v4(place + 1, host) } else { v6(place + 1, host) };
            for (protocol, port) in [(Protocol::Tcp, host::TCP), (Protocol::Udp, host::UDP)] {
                let backend = (at(address(5), port), (place == 1).then(|| address(1)));
                let service = Service { backends: [backend].into(), ..Service::default() };
                let key = FrontendKey { vip, protocol, port: PODS + u16::from(place) };
                desired.services.insert(key, service);
            }
        }
    }
    world.nodes[0].settle(&desired);
    world.nodes[1].settle(&host::desired(world, 1, false));
}

/// What both nodes tell until the first one has sent the answer out, in the order of each.
fn told(traces: &mut [Traces; 2]) -> [Vec<Event>; 2] {
    let mut all = [vec![], vec![]];
    let start = Instant::now();
    let answered = |event: &Event| {
        let out = [EdgeReason::PodToClient, EdgeReason::HostToClient, EdgeReason::NodeToClient];
        event.kind == Kind::Edge && out.iter().any(|reason| *reason as u32 == event.decision)
    };
    while !all[0].iter().any(answered) {
        assert!(start.elapsed() < PATIENCE, "no answer: {all:#?}");
        for (events, traces) in all.iter_mut().zip(&mut *traces) {
            events.extend(std::iter::from_fn(|| traces.next_event()));
        }
        std::thread::yield_now();
    }
    all
}

/// Decisions of one program, in order.
fn decided(events: &[Event], hook: Hook) -> Vec<u32> {
    let edge = events.iter().filter(|event| event.hook == hook && event.kind == Kind::Edge);
    edge.map(|event| event.decision).collect()
}

#[test]
fn a_probe_goes_on_to_wherever_the_backend_is_and_is_answered() {
    if !privileged() {
        return;
    }
    let world = host::world();
    host::serve(&world);
    for (node, name) in [(0, "one"), (1, "two")] {
        teller(&world.nodes[node].pod, host::TCP, name);
        for address in [v4(node as u8 + 1, 5), v6(node as u8 + 1, 5)] {
            udp_teller(&world.nodes[node].pod, at(address, host::UDP), name);
        }
    }
    publish(&world);
    let node = &world.nodes[0];
    let mut traces = [0, 1].map(|node| Traces::open(&world.nodes[node].programs).unwrap());
    use EdgeReason::{
        ClientToHost, ClientToNode, ClientToPod, HostToClient, HostToNode, NodeToHost, NodeToPod,
        PodToClient, PodToNode,
    };
    let here = [(PODS, Entered::ToPod, ClientToPod), (host::PORT, Entered::ToStack, ClientToHost)];
    let there = [(PODS + 1, NodeToPod, PodToNode), (host::PORT + 1, NodeToHost, HostToNode)];
    let mut source_port = 47_000;
    for (client, vip) in [CLIENT, CLIENT6].into_iter().zip(NODES[0]) {
        for (protocol, number) in [(Protocol::Tcp, 6), (Protocol::Udp, 17)] {
            let mut send = |port: u16| {
                source_port += 1;
                let source = at(client.parse().unwrap(), source_port);
                let destination: SocketAddr = at(vip.parse().unwrap(), port);
                traces.iter().for_each(|t| t.mark(Mark::End(source, number)).unwrap());
                let probe = Probe { source, destination, protocol };
                let entered = enter(&node.net.handle(), &node.programs, &probe).unwrap();
                let events = told(&mut traces);
                traces.iter().for_each(|t| t.unmark(Mark::End(source, number)).unwrap());
                (entered, events)
            };
            for (port, way, reason) in here {
                let (entered, [events, _]) = send(port);
                assert_eq!(entered, way, "{vip}:{port}");
                let chosen = EdgeReason::Chosen as u32;
                let first = &decided(&events, Hook::FromUplink)[..2];
                assert_eq!(first, [chosen, reason as u32], "{events:#?}");
                let (hook, out) = match way {
                    Entered::ToPod => (Hook::FromPod, PodToClient),
                    _ => (Hook::ToUplink, HostToClient),
                };
                assert_eq!(decided(&events, hook)[0], out as u32, "{events:#?}");
            }
            for (port, arrival, departure) in there {
                let (entered, [near, far]) = send(port);
                assert_eq!(entered, Entered::ToNode, "{vip}:{port}");
                assert_eq!(decided(&near, Hook::FromUplink)[1], ClientToNode as u32);
                assert_eq!(decided(&far, Hook::FromOverlay)[0], arrival as u32, "{far:#?}");
                let hook = if arrival == NodeToPod { Hook::FromPod } else { Hook::ToUplink };
                assert_eq!(decided(&far, hook)[0], departure as u32, "{far:#?}");
            }
        }
    }
}

#[test]
fn a_probe_that_nobody_serves_ends_where_it_came_in() {
    if !privileged() {
        return;
    }
    let world = World::new();
    world.publish(&[(Protocol::Tcp, 30_001, &[])], super::unchanged);
    let node = &world.nodes[0];
    let send = |source: &str, destination: &str| {
        let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
        let probe = Probe { source, destination, protocol: Protocol::Tcp };
        enter(&node.net.handle(), &node.programs, &probe)
    };
    assert_eq!(send("192.0.2.2:4001", "192.0.2.1:30001").unwrap(), Entered::Ended);
    assert_eq!(node.counted(EdgeReason::NoBackend), 1);
    assert!(send("192.0.2.2:4001", "[2001:db8::1]:30001").is_err(), "no packet has both");
}
