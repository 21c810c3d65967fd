//! Ports of the node that lead to pods, bandwidth, and MAC addresses of choice.
//!
//! ```text
//!   outside 192.0.2.2 -- up0 192.0.2.1, .9 -- node -- pod 10.244.1.5
//!                                                  \\- pod 10.244.1.6
//! ```

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Instant;

use mesh_kernel::pods::{
    AttachError, Bandwidth, HostPort, LinuxPodNetwork, PodNetwork as _, PodPort, Rate,
};
use mesh_model::snapshot::Protocol;

use crate::lab::{Net, at, privileged};
use crate::pod_network::{Node, port};

fn wire(node: &Node) -> Net {
    let outside = Net::new();
    node.net.ip("link add up0 type veth peer name up1");
    node.net.ip(&format!("link set up1 netns {}", outside.path().display()));
    for (net, device, addresses) in [
        (&node.net, "up0", ["192.0.2.1/24", "192.0.2.9/24", "2001:db8::1/64"].as_slice()),
        (&outside, "up1", &["192.0.2.2/24", "2001:db8::2/64"]),
    ] {
        net.run(|| mesh_kernel::sysctl::write(&format!("net/ipv6/conf/{device}/accept_dad"), "0"))
            .unwrap();
        for address in addresses {
            net.ip(&format!("addr add {address} dev {device}"));
        }
        net.ip(&format!("link set {device} up"));
    }
    for name in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        node.net.run(|| mesh_kernel::sysctl::write(name, "1")).unwrap();
    }
    outside
}

fn published(protocol: Protocol, address: Option<&str>, port: u16, pod_port: u16) -> HostPort {
    HostPort { protocol, address: address.map(|a| a.parse().unwrap()), port, pod_port }
}

fn to(address: &str, port: u16) -> SocketAddr {
    at(address.parse().unwrap(), port)
}

#[test]
fn ports_of_the_node_lead_to_the_pod_from_everywhere_until_it_goes() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    let outside = wire(&node);
    let (other, _) = node.pod(6);
    let pod = Net::new();
    let port = PodPort {
        ports: vec![
            published(Protocol::Tcp, None, 8080, 80),
            published(Protocol::Tcp, Some("192.0.2.9"), 9090, 80),
            published(Protocol::Udp, Some("0.0.0.0"), 53, 5353),
            published(Protocol::Sctp, None, 3868, 3868),
        ],
        ..port(&pod, 5)
    };
    node.network.attach(&port).unwrap();
    pod.greeter("[::]:80", "pod");
    pod.answerer("0.0.0.0:5353", "pod");
    for address in ["192.0.2.1", "192.0.2.9", "2001:db8::1"] {
        for from in [&outside, &node.net, &other, &pod] {
            assert_eq!(from.tcp(to(address, 8080)).unwrap(), "pod", "{address}");
        }
    }
    assert_eq!(outside.tcp(to("192.0.2.9", 9090)).unwrap(), "pod");
    assert!(outside.tcp(to("192.0.2.1", 9090)).is_err(), "another address of the node");
    assert!(node.net.tcp(to("127.0.0.1", 8080)).is_err(), "loopback is left alone");
    let udp = outside.udp("0.0.0.0:0");
    udp.send_to(b"?", "192.0.2.1:53").unwrap();
    let mut buffer = [0; 16];
    let (length, from) = udp.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from), (&b"pod"[..], "192.0.2.1:53".parse().unwrap()));
    assert!(node.net.command("nft", "list table inet mesh-ports").contains("sctp . 3868"));

    // Another pod cannot have the port, and leaves nothing.
    let second = Net::new();
    let greedy = PodPort {
        ports: vec![published(Protocol::Tcp, Some("192.0.2.1"), 8080, 80)],
        ..crate::pod_network::port(&second, 7)
    };
    let error = node.network.attach(&greedy).unwrap_err();
    assert!(matches!(error, AttachError::PortTaken { ref port, .. } if port.contains("8080")));
    assert_eq!(node.network.list().unwrap().len(), 2);

    // The next agent, before which somebody has flushed everything.
    let next = LinuxPodNetwork::new(node.net.handle(), node.programs.clone());
    let addresses: Vec<IpAddr> = port.addresses().collect();
    let all = [(port.ports.clone(), addresses.clone())];
    next.publish(&all).unwrap();
    assert_eq!(outside.tcp(to("192.0.2.1", 8080)).unwrap(), "pod");
    node.net.command("nft", "flush ruleset");
    assert!(outside.tcp(to("192.0.2.1", 8080)).is_err());
    next.publish(&all).unwrap();
    assert_eq!(outside.tcp(to("192.0.2.1", 8080)).unwrap(), "pod");

    next.detach(&port.host_interface, &addresses).unwrap();
    assert!(outside.tcp(to("192.0.2.1", 8080)).is_err());
    let table = node.net.command("nft", "list table inet mesh-ports");
    assert!(!table.contains("elements = { tcp") && !table.contains("10.244.1.5"), "{table}");
    next.attach(&greedy).unwrap();
    second.greeter("0.0.0.0:80", "second");
    assert_eq!(outside.tcp(to("192.0.2.1", 8080)).unwrap(), "second");
}

/// Bits per second of a TCP stream of so many bytes.
fn speed(from: &Net, receiver: &Net, address: IpAddr, bytes: usize) -> f64 {
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let listener = receiver.run(|| TcpListener::bind(any)).unwrap();
    let target = at(address, listener.local_addr().unwrap().port());
    let receiving = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (mut buffer, mut count) = (vec![0; 64 << 10], 0);
        let start = Instant::now();
        loop {
            match stream.read(&mut buffer).unwrap() {
                0 => return count as f64 * 8.0 / start.elapsed().as_secs_f64(),
                length => count += length,
            }
        }
    });
    let mut stream =
        from.run(|| TcpStream::connect_timeout(&target, crate::lab::PATIENCE)).unwrap();
    stream.write_all(&vec![7; bytes]).unwrap();
    drop(stream);
    receiving.join().unwrap()
}

#[test]
fn bandwidth_is_limited_in_both_directions_and_nobody_elses() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    let outside = wire(&node);
    outside.ip("route add 10.244.1.0/24 via 192.0.2.1");
    let (free, free_port) = node.pod(6);
    let pod = Net::new();
    let rate = |megabits: u64| {
        // What containerd writes for annotations.
        Some(Rate { bits_per_sec: megabits * 1_000_000, burst_bits: Some(u64::from(u32::MAX)) })
    };
    let port =
        PodPort { bandwidth: Bandwidth { to_pod: rate(40), from_pod: rate(20) }, ..port(&pod, 5) };
    node.network.attach(&port).unwrap();
    assert_eq!(node.network.check(&port).unwrap(), []);
    for address in port.addresses() {
        let seen = speed(&free, &pod, address, 10 << 20);
        assert!((30e6..44e6).contains(&seen), "{seen} from pod to {address}");
    }
    let seen = speed(&outside, &pod, port.v4.unwrap().into(), 10 << 20);
    assert!((30e6..44e6).contains(&seen), "{seen} from outside");
    for address in free_port.addresses() {
        let seen = speed(&pod, &free, address, 5 << 20);
        assert!((15e6..22e6).contains(&seen), "{seen} to {address}");
    }
    let unlimited = speed(&outside, &free, free_port.v4.unwrap().into(), 10 << 20);
    assert!(unlimited > 100e6, "{unlimited}");
    node.network.detach(&port.host_interface, &[]).unwrap();
    assert_eq!(node.network.bury().unwrap(), 1);
}

#[test]
fn a_pod_gets_the_mac_address_that_was_asked_for() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    let (other, other_port) = node.pod(6);
    let pod = Net::new();
    let mac = mesh_kernel::pods::MacAddress([2, 0, 0, 0, 0, 0xab]);
    let port = PodPort { mac: Some(mac), ..port(&pod, 5) };
    assert_eq!(node.network.attach(&port).unwrap().pod_mac, mac);
    assert_eq!(node.network.check(&port).unwrap(), []);
    assert!(pod.ip("link show eth0").contains("02:00:00:00:00:ab"));
    assert!(node.network.list().unwrap().iter().any(|seen| seen.pod_mac == mac));
    let server = pod.greeter("10.244.1.5:0", "pod");
    assert_eq!(other.tcp(server).unwrap(), "pod");
    let server = other.greeter(&at(other_port.v4.unwrap().into(), 0).to_string(), "other");
    assert_eq!(pod.tcp(server).unwrap(), "other");
}
