use mesh_model::encryption::canary;
use mesh_model::{Objects, compile};
use serde_json::json;

use super::*;

const MARK: Mark = Mark([0x5a; 16]);

fn snapshot() -> Snapshot {
    let node = |name: &str, number: u8| {
        let key = mesh_model::snapshot::WgKey([number; 32]).to_string();
        let node = json!({
        "metadata": {"name": name, "annotations": {"mesh.dev/wireguard-public-key": key}},
        "spec": {"podCIDRs": [format!("10.244.{number}.0/24"), format!("fd10:244:0:{number}::/64")]},
        "status": {"addresses": [
            {"type": "InternalIP", "address": format!("192.0.2.{number}")},
            {"type": "InternalIP", "address": format!("2001:db8::{number}")},
        ]}});
        std::sync::Arc::new(serde_json::from_value(node).unwrap())
    };
    let objects = Objects { nodes: vec![node("a", 1), node("b", 2)], ..Objects::default() };
    compile(&objects, &"a".parse().unwrap())
}

fn udp4(from: &str, to: &str, ports: [u16; 2], payload: &[u8]) -> Vec<u8> {
    let address = |text: &str| text.parse::<Ipv4Addr>().unwrap().octets();
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, UDP, 0, 0];
    packet.extend(address(from));
    packet.extend(address(to));
    packet.extend(udp(ports, payload));
    packet
}

fn udp6(from: &str, to: &str, ports: [u16; 2], payload: &[u8]) -> Vec<u8> {
    let address = |text: &str| text.parse::<Ipv6Addr>().unwrap().octets();
    let mut packet = vec![0x60, 0, 0, 0, 0, 0, UDP, 64];
    packet.extend(address(from));
    packet.extend(address(to));
    packet.extend(udp(ports, payload));
    packet
}

fn udp(ports: [u16; 2], payload: &[u8]) -> Vec<u8> {
    let mut datagram: Vec<u8> = ports.iter().flat_map(|p| p.to_be_bytes()).collect();
    datagram.extend([0; 4]);
    datagram.extend(payload);
    datagram
}

fn seen(packets: &[Vec<u8>]) -> Findings {
    let mut sieve = Sieve::new(MARK, &snapshot());
    packets.iter().for_each(|packet| sieve.look("eth0", true, packet));
    sieve.findings()
}

#[test]
fn a_canary_is_found_wherever_it_hides() {
    let mut inside_a_tunnel_message = vec![4, 0, 0, 0, 9, 9, 9, 9];
    inside_a_tunnel_message.extend(udp4("10.244.1.5", "10.244.2.5", [1, 2], &canary(MARK, 7)));
    let mut two = canary(MARK, 8).to_vec();
    two.extend(canary(MARK, 9));
    let findings = seen(&[
        udp4("192.0.2.1", "192.0.2.2", [51900, 51900], &inside_a_tunnel_message),
        udp6("2001:db8::1", "2001:db8::2", [700, 9], &two),
        udp4("192.0.2.1", "192.0.2.2", [1, 2], &canary(Mark([1; 16]), 5)),
        [&[0xff; 9], &canary(MARK, 10)[..]].concat(),
    ]);
    let tags: Vec<u32> = findings.readable.iter().map(|r| r.tag).collect();
    assert_eq!(tags, [7, 8, 9, 10]);
    assert_eq!(findings.readable[1].to, "2001:db8::2".parse::<IpAddr>().unwrap());
    assert!(findings.bare.is_empty());
}

#[test]
fn packets_between_pods_are_bare_whoever_sent_them() {
    let findings = seen(&[
        udp4("10.244.1.5", "10.244.2.5", [1, 2], b"secret"),
        udp4("10.244.1.5", "10.244.2.5", [1, 2], b"secret"),
        udp6("fd10:244:0:1::5", "fd10:244:0:2::5", [1, 2], b"secret"),
        udp4("192.0.2.1", "10.244.2.5", [1, 2], b"from the node"),
    ]);
    assert_eq!(findings.bare.iter().map(|b| b.packets).collect::<Vec<_>>(), [2, 1]);
    assert!(findings.readable.is_empty());
}

#[test]
fn traffic_is_counted_by_what_it_is() {
    let data = [4, 0, 0, 0, 1, 2, 3, 4];
    let findings = seen(&[
        udp4("192.0.2.1", "192.0.2.2", [51900, 51900], &data),
        udp4("192.0.2.2", "192.0.2.1", [51900, 51901], &data),
        udp6("2001:db8::2", "2001:db8::1", [51900, 51900], &[1, 0, 0, 0]),
        udp4("192.0.2.1", "192.0.2.2", [700, 9], &data),
        udp4("192.0.2.1", "192.0.2.2", [51900, 51900], b"in the clear"),
        udp4("192.0.2.1", "192.0.2.77", [51900, 51900], &data),
    ]);
    let b = &findings.traffic[0];
    assert_eq!((b.node.as_str(), b.sealed, b.handshakes, b.others), ("b", 2, 1, 2));
}

#[test]
fn what_is_cut_short_or_malformed_is_left_alone() {
    let whole = udp4("192.0.2.1", "192.0.2.2", [51900, 51900], &canary(MARK, 1));
    for len in 0..whole.len() {
        seen(&[whole[..len].to_vec()]);
    }
    let mut long_header = whole.clone();
    long_header[0] = 0x4f;
    seen(&[vec![0x60; 40], vec![0xff; 100], long_header]);
    let mut only_mark = udp4("192.0.2.1", "192.0.2.2", [1, 2], &MARK.0);
    assert!(seen(&[only_mark.clone()]).readable.is_empty());
    only_mark.extend([0, 0, 0]);
    assert!(seen(&[only_mark]).readable.is_empty(), "a tag has four bytes");
}
