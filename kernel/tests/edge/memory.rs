//! Connections stay where they are, also when their memory is lost or full.

use std::net::{SocketAddr, TcpStream};

use mesh_model::snapshot::Protocol;

use super::{
    CLIENT, CLIENT6, Published, World, ask, at, echo, frontends, say, udp_teller, unchanged, v4,
};
use crate::lab::{Net, PATIENCE, allow_many_files, privileged};

#[test]
fn a_connection_stays_where_it_is_while_backends_come_and_go() {
    if !privileged() {
        return;
    }
    let world = World::new();
    for (node, name) in [(0, "one"), (1, "two")] {
        let address = v4(node as u8 + 1, 5);
        udp_teller(&world.nodes[node].pod, at(address, 53), name);
        echo(&world.nodes[node].pod, name);
    }
    let both: &[Published<'_>] = &[
        (Protocol::Tcp, 30_001, &[(1, 80), (2, 80)]),
        (Protocol::Udp, 30_001, &[(1, 53), (2, 53)]),
    ];
    world.publish(both, unchanged);
    let frontend = frontends(30_001)[0];
    let mut streams: Vec<TcpStream> = (0..40)
        .map(|_| world.client.run(|| TcpStream::connect_timeout(&frontend, PATIENCE)).unwrap())
        .collect();
    let say = |stream: &mut TcpStream| say(stream).unwrap();
    let before: Vec<String> = streams.iter_mut().map(say).collect();
    for name in ["one", "two"] {
        let share = before.iter().filter(|n| *n == name).count();
        assert!((8..=32).contains(&share), "{share} of 40 went to {name}");
    }
    let socket = world.client.udp("0.0.0.0:0");
    let first = ask(&socket, frontend, 1).0;
    // The second node's pods are taken away: open connections go on, new ones and datagrams go to the first.
    world.publish(
        &[(Protocol::Tcp, 30_001, &[(1, 80)]), (Protocol::Udp, 30_001, &[(1, 53)])],
        unchanged,
    );
    let after: Vec<String> = streams.iter_mut().map(say).collect();
    assert_eq!(after, before);
    assert!(ask(&socket, frontend, 1).0.starts_with("one"), "it was {first}");
    for _ in 0..10 {
        let mut new = world.client.run(|| TcpStream::connect_timeout(&frontend, PATIENCE)).unwrap();
        assert_eq!(say(&mut new), "one");
    }
}

#[test]
fn every_node_chooses_the_same_and_a_full_memory_drops_nothing() {
    if !privileged() {
        return;
    }
    let world = World::new();
    for (node, name) in [(0, "one"), (1, "two")] {
        echo(&world.nodes[node].pod, name);
    }
    world.publish(&[(Protocol::Tcp, 30_001, &[(1, 80), (2, 80)])], unchanged);
    let mut streams: Vec<TcpStream> = frontends(30_001)
        .into_iter()
        .cycle()
        .take(20)
        .map(|to| world.client.run(|| TcpStream::connect_timeout(&to, PATIENCE)).unwrap())
        .collect();
    let say = |stream: &mut TcpStream| say(stream).unwrap();
    let before: Vec<String> = streams.iter_mut().map(say).collect();
    for _ in 0..3 {
        // As after eviction, or on another node that takes over the address: nobody remembers anything.
        for node in &world.nodes {
            assert!(node.programs.forget_flows().unwrap() > 0);
        }
        let after: Vec<String> = streams.iter_mut().map(say).collect();
        assert_eq!(after, before);
    }
}

/// Segments that the client has sent again: what was lost shows there, even if it got through in the end.
fn retransmitted(client: &Net) -> u64 {
    let text = client.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp")).unwrap();
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.split(' ').position(|name| name == "RetransSegs").unwrap();
    values.split(' ').nth(at).unwrap().parse().unwrap()
}

/// Many more connections are open than the memories of both nodes hold, at the edge and of policies: every new one finds them full.
#[test]
fn new_connections_do_not_fail_when_the_memory_of_connections_is_full() {
    if !privileged() {
        return;
    }
    const ENTRIES: u32 = 128;
    const OPEN: usize = 400;
    const NEW: usize = 2_000;
    allow_many_files();
    let world = World::with(&[("EDGE_FLOWS", ENTRIES), ("CONNECTIONS", ENTRIES)]);
    for (node, name) in [(0, "one"), (1, "two")] {
        world.nodes[node].restrict(&[CLIENT, CLIENT6]);
        echo(&world.nodes[node].pod, name);
    }
    world.publish(&[(Protocol::Tcp, 30_001, &[(1, 80), (2, 80)])], unchanged);
    let connect = |to: &SocketAddr| {
        let mut stream = world.client.run(|| TcpStream::connect_timeout(to, PATIENCE))?;
        say(&mut stream).map(|name| (stream, name))
    };
    let some = |count: usize| frontends(30_001).into_iter().cycle().take(count);
    let mut open: Vec<(TcpStream, String)> = some(OPEN).map(|to| connect(&to).unwrap()).collect();
    // Each needs two entries. Of a full table a part is free, which the kernel keeps in hand for each CPU.
    let (entries, capacity) = world.nodes[0].programs.pressure().unwrap()["EDGE_FLOWS"];
    assert!(capacity == ENTRIES && entries < OPEN, "{entries} entries for {OPEN} connections");
    let before = retransmitted(&world.client);
    let failed = some(NEW).filter(|to| connect(to).is_err()).count();
    let lost = usize::try_from(retransmitted(&world.client) - before).unwrap();
    println!("{NEW} new connections: {failed} failed, {lost} segments sent again");
    assert!(failed * 1000 <= NEW, "{failed} failed");
    // A machine that stands still for a moment repeats what is not lost.
    assert!(lost * 100 <= NEW, "{lost} segments were lost");
    // Those that are forgotten go on where they were: the choice is the same without a memory.
    for (stream, name) in &mut open {
        assert_eq!(say(stream).unwrap(), *name);
    }
}
