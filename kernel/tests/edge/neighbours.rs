//! Addresses on the local network: who answers for them, and how they move.

use std::net::{IpAddr, TcpStream};

use mesh_abi::EdgeReason;
use mesh_kernel::edge::Service;
use mesh_kernel::services::FrontendKey;
use mesh_model::snapshot::Protocol;

use super::{NODE, NODE6, World, any, at, teller, unchanged, v4, v6};
use crate::lab::{PATIENCE, privileged};

#[test]
fn questions_for_a_services_address_are_answered_while_it_is_ours() {
    if !privileged() {
        return;
    }
    let world = World::new();
    teller(&world.nodes[0].pod, 80, "one");
    teller(&world.nodes[1].pod, 80, "two");
    let vips: [IpAddr; 2] = ["192.0.2.77".parse().unwrap(), "2001:db8::77".parse().unwrap()];
    let mut desired = world.wanted(&[], unchanged);
    for vip in vips {
        let address = |node, host| if vip.is_ipv4() { v4(node, host) } else { v6(node, host) };
        for (port, backend) in [
            (80, (at(address(1, 5), 80), None)),
            (81, (at(address(2, 5), 80), Some(address(2, 1)))),
        ] {
            let service = Service { backends: [backend].into(), ..Service::default() };
            let key = FrontendKey { vip, protocol: Protocol::Tcp, port };
            desired.services.insert(key, service);
        }
    }
    world.nodes[0].settle(&desired);
    let quick = |vip: IpAddr| {
        let patience = std::time::Duration::from_millis(400);
        world.client.run(|| TcpStream::connect_timeout(&at(vip, 80), patience)).map(drop)
    };
    for vip in vips {
        assert!(quick(vip).is_err(), "nobody is to answer for {vip} yet");
    }
    desired.owned = vips.into();
    world.nodes[0].settle(&desired);
    world.client.ip("neigh flush dev down0");
    for vip in vips {
        assert!(world.tcp(at(vip, 80)).unwrap().starts_with("one "), "{vip}");
        assert!(world.tcp(at(vip, 81)).unwrap().starts_with("two "), "{vip}");
    }
    assert!(world.nodes[0].counted(EdgeReason::Answered) >= 2);
    let devices = |name: &str| world.nodes[0].net.ip(&format!("-br link show {name}"));
    let mac = devices("up0").split_whitespace().nth(2).unwrap().to_owned();
    for family in ["-4", "-6"] {
        let neighbours = world.client.ip(&format!("{family} neigh show dev down0"));
        let line = neighbours.lines().find(|line| line.contains("77 ")).unwrap().to_owned();
        assert!(line.contains(&mac), "{line}");
    }
}

#[test]
fn an_address_that_is_ours_answers_echoes_and_refuses_what_no_service_has() {
    if !privileged() {
        return;
    }
    let world = World::new();
    let vips: [IpAddr; 2] = ["192.0.2.77".parse().unwrap(), "2001:db8::77".parse().unwrap()];
    let mut desired = world.wanted(&[], unchanged);
    desired.owned = vips.into();
    // Where somebody has given away an address that is the node's own.
    desired.owned.extend([NODE, NODE6].map(|own| own.parse::<IpAddr>().unwrap()));
    let node = &world.nodes[0];
    node.settle(&desired);
    for vip in vips {
        world.client.command("ping", &format!("-n -c 1 -W 5 -s 1000 {vip}"));
        let quick = std::time::Duration::from_secs(1);
        let tried = world.client.run(|| TcpStream::connect_timeout(&at(vip, 81), quick));
        assert_eq!(tried.unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused, "{vip}");
        let socket = world.client.udp(any(at(vip, 81)));
        world.client.run(|| socket.connect(at(vip, 81))).unwrap();
        socket.send(b"?").unwrap();
        let error = socket.recv(&mut [0; 16]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{vip}");
    }
    let (echoes, refused) = (EdgeReason::Answered, EdgeReason::NoBackend);
    let counted = || (node.counted(echoes), node.counted(refused));
    let before = counted();
    for own in [NODE, NODE6] {
        let server = node.net.greeter(&at(own.parse().unwrap(), 0).to_string(), "own");
        assert_eq!(world.tcp(server).unwrap(), "own");
        world.client.command("ping", &format!("-n -c 1 -W 5 {own}"));
    }
    assert_eq!(counted().1, before.1);
    // An address that is not ours is the stack's business, which does not forward here.
    desired.owned.clear();
    node.settle(&desired);
    let gone = world.client.run(|| {
        let mut ping = std::process::Command::new("ping");
        ping.args(["-n", "-c", "1", "-W", "1", "192.0.2.77"]).output().unwrap()
    });
    assert!(!gone.status.success());
}

#[test]
fn an_announcement_moves_an_address_to_another_machine() {
    if !privileged() {
        return;
    }
    let world = World::new();
    let vips = ["192.0.2.77", "2001:db8::77"];
    for vip in vips {
        world.client.ip(&format!("neigh add {vip} lladdr 02:00:00:00:00:09 dev down0 nud stale"));
    }
    let node = &world.nodes[0].net;
    let text = node.ip("-o link show up0");
    let ifindex: u32 = text.split(':').next().unwrap().parse().unwrap();
    let mac = node.ip("-br link show up0").split_whitespace().nth(2).unwrap().to_owned();
    let bytes: Vec<u8> = mac.split(':').map(|b| u8::from_str_radix(b, 16).unwrap()).collect();
    let devices = [(ifindex, <[u8; 6]>::try_from(bytes).unwrap())].into();
    let owned = vips.iter().map(|vip| vip.parse().unwrap()).collect();
    let announcement = node.run(|| mesh_kernel::edge::Announcement::new(owned, &devices)).unwrap();
    // The group of the IPv6 address, for as long as it is ours.
    assert!(node.ip("maddr show dev up0").contains("33:33:ff:00:00:77"));
    node.run(|| announcement.tell()).unwrap();
    let start = std::time::Instant::now();
    for vip in vips {
        while !world.client.ip(&format!("neigh show {vip} dev down0")).contains(&mac) {
            assert!(start.elapsed() < PATIENCE, "{vip} has not moved");
            std::thread::yield_now();
        }
    }
    drop(announcement);
    assert!(!node.ip("maddr show dev up0").contains("33:33:ff:00:00:77"));
}
