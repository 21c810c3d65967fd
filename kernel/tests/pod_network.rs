//! Real pods on a node.
//!
//! ```text
//!   pod 10.244.1.5 -- mvA (TC) -- node -- (TC) mvB -- pod 10.244.1.6
//! ```

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mesh_abi::Reason;
use mesh_kernel::pods::{AttachError, Bandwidth, LinuxPodNetwork, Missing, PodNetwork, PodPort};
use mesh_kernel::{IfName, Programs};

use crate::lab::{Lab, Net, at, names, privileged};

pub(crate) struct Node {
    pub(crate) network: LinuxPodNetwork,
    pub(crate) programs: Arc<Programs>,
    pub(crate) net: Net,
    pub(crate) lab: Lab,
}

impl Node {
    pub(crate) fn new() -> Self {
        let (lab, net) = (Lab::new(), Net::new());
        let programs = Arc::new(lab.load());
        let network = LinuxPodNetwork::new(net.handle(), programs.clone());
        Self { network, programs, net, lab }
    }

    pub(crate) fn pod(&self, number: u8) -> (Net, PodPort) {
        let pod = Net::new();
        let port = port(&pod, number);
        let attached = self.network.attach(&port).unwrap_or_else(|error| panic!("{error:#?}"));
        assert_eq!(attached.pod_mac, port.pod_mac());
        (pod, port)
    }
}

pub(crate) fn port(pod: &Net, number: u8) -> PodPort {
    let container = format!("container-{number}");
    PodPort {
        netns: pod.path(),
        interface: "eth0".parse().unwrap(),
        host_interface: IfName::for_pod(&container, "eth0"),
        owner: format!("default/pod-{number} {container}"),
        v4: Some([10, 244, 1, number].into()),
        v6: Some([0xfd10, 0x244, 0, 1, 0, 0, 0, u16::from(number)].into()),
        mtu: 1420,
        mac: None,
        ports: vec![],
        bandwidth: Bandwidth::default(),
    }
}

pub(crate) fn exchange(from: &UdpSocket, to: &UdpSocket, address: SocketAddr) {
    from.send_to(b"ping", address).unwrap();
    let mut buffer = [0; 16];
    let (length, sender) = to.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"ping");
    to.send_to(b"pong", sender).unwrap();
    let (length, sender) = from.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], sender), (&b"pong"[..], address));
}

#[test]
fn two_pods_talk_past_the_stack_in_both_families() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    // A new namespace has it from the machine, where it may be on.
    node.net.run(|| mesh_kernel::sysctl::write("net/ipv4/ip_forward", "0")).unwrap();
    let ((one, _), (two, two_port)) = (node.pod(5), node.pod(6));
    for address in two_port.addresses() {
        let tcp = two.greeter(&at(address, 0).to_string(), "hello");
        assert_eq!(one.tcp(tcp).unwrap(), "hello");
        let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let (client, server) = (one.udp(any), two.udp(any));
        exchange(&client, &server, at(address, server.local_addr().unwrap().port()));
    }
    // Nobody has turned forwarding on: only the program can have delivered this.
    assert_eq!(node.net.run(|| mesh_kernel::sysctl::read("net/ipv4/ip_forward")).unwrap(), "0");
    let counters = node.programs.counters().unwrap();
    assert!(counters[&Reason::PodToPod].packets >= 10);
    let dropped: Vec<_> = Reason::ALL
        .into_iter()
        .filter(|r| r.is_drop() && *r != Reason::Noise && counters[r].packets > 0)
        .collect();
    assert!(dropped.is_empty(), "{dropped:?}");
}

#[test]
fn a_pod_and_its_node_talk() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    node.net.ip("addr add 169.254.20.10/32 dev lo");
    node.net.ip("-6 addr add fd7a:6d65:7368::10/128 dev lo nodad");
    let (pod, port) = node.pod(5);
    for address in ["169.254.20.10:0", "[fd7a:6d65:7368::10]:0"] {
        let server = node.net.greeter(address, "node");
        assert_eq!(pod.tcp(server).unwrap(), "node");
    }
    for address in port.addresses() {
        let server = pod.greeter(&at(address, 0).to_string(), "pod");
        assert_eq!(node.net.tcp(server).unwrap(), "pod");
    }
}

#[test]
fn a_pod_cannot_speak_for_another() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    let ((one, _), (two, _)) = (node.pod(5), node.pod(6));
    one.ip("addr add 10.244.1.77/32 dev eth0");
    one.ip("-6 addr add fd10:244:0:1::77/128 dev eth0 nodad");
    for (spoofed, honest, target) in [
        ("10.244.1.77:0", "10.244.1.5:0", "10.244.1.6"),
        ("[fd10:244:0:1::77]:0", "[fd10:244:0:1::5]:0", "fd10:244:0:1::6"),
    ] {
        let target: IpAddr = target.parse().unwrap();
        let server = two.udp(&at(target, 0).to_string());
        let address = server.local_addr().unwrap();
        let before = node.programs.counters().unwrap()[&Reason::SpoofedAddress].packets;
        one.udp(spoofed).send_to(b"lie", address).unwrap();
        let client = one.udp(honest);
        client.send_to(b"truth", address).unwrap();
        let mut buffer = [0; 16];
        // Sent later, and the first to arrive.
        let (length, from) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(
            (&buffer[..length], from.ip()),
            (&b"truth"[..], client.local_addr().unwrap().ip())
        );
        let after = node.programs.counters().unwrap()[&Reason::SpoofedAddress].packets;
        assert_eq!(after, before + 1);
    }
}

#[test]
fn attaching_again_repairs_and_check_names_what_is_missing() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    let (pod, port) = node.pod(5);
    assert_eq!(node.network.check(&port).unwrap(), []);
    let host = port.host_interface.as_str();
    node.net.ip(&format!("route del 10.244.1.5/32 dev {host}"));
    node.net.ip(&format!("-6 neigh del fd10:244:0:1::5 dev {host}"));
    pod.ip("addr del 10.244.1.5/32 dev eth0");
    node.net.command("tc", &format!("qdisc del dev {host} clsact"));
    let missing = node.network.check(&port).unwrap();
    let interface = port.host_interface.clone();
    let v4 = IpAddr::V4(Ipv4Addr::new(10, 244, 1, 5));
    for expected in [
        Missing::HostRoute { address: v4, interface: interface.clone() },
        Missing::HostNeighbour { address: port.v6.unwrap().into(), interface: interface.clone() },
        Missing::Program(interface.clone()),
        Missing::PodAddress(v4),
    ] {
        assert!(missing.contains(&expected), "{expected:?} is not in {missing:?}");
    }
    let first = node.network.list().unwrap();
    node.network.attach(&port).unwrap();
    assert_eq!(node.network.check(&port).unwrap(), []);
    assert_eq!(node.network.list().unwrap(), first);
    node.network.detach(&interface, &[]).unwrap();
    assert_eq!(node.network.check(&port).unwrap(), [Missing::HostInterface(interface)]);
}

#[test]
fn detached_interfaces_are_out_of_service_at_once_and_buried_together() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    let (one, port_one) = node.pod(5);
    let (two, port_two) = node.pod(6);
    let (_stays, port_three) = node.pod(7);
    node.net.ip("link add foreign type bridge");
    for port in [&port_one, &port_two] {
        node.network.detach(&port.host_interface, &[]).unwrap();
    }
    assert!(!one.ip("link show eth0").contains("LOWER_UP"), "no carrier");
    assert_eq!(node.network.list().unwrap().len(), 1);
    assert!(!node.net.ip("route").contains("10.244.1.5"));
    // The address at once for another, and the same pod again, although its old interface is still inside.
    let (_next, _) =
        (Net::new(), node.network.attach(&PodPort { v4: port_one.v4, ..port(&two, 6) }).unwrap());
    assert!(two.ip("link show eth0").contains("LOWER_UP"));
    assert_eq!(node.network.bury().unwrap(), 0, "that one has buried what was in its way");
    node.network.detach(&port_two.host_interface, &[]).unwrap();
    node.net.ip("link set foreign group 1835365224");
    assert_eq!(node.network.bury().unwrap(), 1);
    assert!(!node.net.ip("link").contains("mx"), "nothing is left");
    node.net.ip("link show foreign");
    assert_eq!(node.network.check(&port_three).unwrap(), []);
    node.net.ip("link del foreign");
    node.network.detach(&port_three.host_interface, &[]).unwrap();
    assert_eq!(node.network.bury().unwrap(), 1);
}

#[test]
fn detaching_leaves_nothing_and_touches_nobody_else() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    let (_one, port_one) = node.pod(5);
    let (_two, port_two) = node.pod(6);
    let addresses: Vec<IpAddr> = port_one.addresses().collect();
    for _ in 0..2 {
        node.network.detach(&port_one.host_interface, &addresses).unwrap();
        assert_eq!(node.network.check(&port_two).unwrap(), []);
    }
    // A late detach with addresses that belong to somebody else by now.
    let taken: Vec<IpAddr> = port_two.addresses().collect();
    node.network.detach(&port_one.host_interface, &taken).unwrap();
    assert_eq!(node.network.check(&port_two).unwrap(), []);
    node.network.detach(&port_two.host_interface, &taken).unwrap();
    assert_eq!(node.network.list().unwrap(), []);
    let links = names(&node.lab.bpf_dir().join(format!("v{}/links", mesh_abi::VERSION)));
    assert!(links.iter().all(|name| name.starts_with("cgroup-")), "{links:?}");
    for map in ["LOCAL_PODS", "POD_PORTS"] {
        assert_eq!(node.programs.pressure().unwrap()[map].0, 0, "{map}");
    }
}

#[test]
fn a_foreign_interface_is_left_alone() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    let pod = Net::new();
    let port = port(&pod, 5);
    let host = port.host_interface.as_str();
    node.net.ip(&format!("link add {host} type bridge"));
    let error = node.network.attach(&port).unwrap_err();
    assert!(matches!(error, AttachError::Exists(ref name) if *name == port.host_interface));
    assert!(node.network.detach(&port.host_interface, &[]).is_err());
    assert_eq!(
        node.network.check(&port).unwrap(),
        [Missing::ForeignInterface(port.host_interface.clone())]
    );
    node.net.ip(&format!("link show {host}"));
}

#[test]
fn a_failed_attachment_is_undone() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    let pod = Net::new();
    let wrong = PodPort { owner: "x".repeat(300), ..port(&pod, 5) };
    assert!(matches!(node.network.attach(&wrong), Err(AttachError::Netlink { .. })));
    assert_eq!(node.network.list().unwrap(), []);
    for map in ["LOCAL_PODS", "POD_PORTS"] {
        assert_eq!(node.programs.pressure().unwrap()[map].0, 0, "{map}");
    }
    let gone = PodPort { netns: "/nonexistent/netns".into(), ..port(&pod, 5) };
    assert!(matches!(node.network.attach(&gone), Err(AttachError::Namespace { .. })));
    node.network.attach(&port(&pod, 5)).unwrap();
}

#[test]
fn garbage_of_a_vanished_namespace_is_collected() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    let (_one, _) = node.pod(5);
    let (gone, port) = node.pod(6);
    let host = port.host_interface.as_str();
    // As when the kernel takes the pair along with the namespace, which it does in its own time.
    node.net.ip(&format!("link del {host}"));
    drop(gone);
    assert_eq!(node.network.list().unwrap().len(), 1);
    assert_eq!(node.network.collect_garbage().unwrap(), 3);
    assert_eq!(node.network.collect_garbage().unwrap(), 0);
}

/// As an agent leaves it that is killed between the map entry and the preparation of the interface.
#[test]
fn an_interrupted_attachment_is_guarded_by_the_next_load() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    let (_pod, port) = node.pod(5);
    node.net.command("tc", &format!("qdisc del dev {} clsact", port.host_interface.as_str()));
    node.lab.load_on(&node.net);
    assert_eq!(node.network.check(&port).unwrap(), []);
}

#[test]
fn replacing_the_programs_loses_no_packet() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    let ((one, _), (two, two_port)) = (node.pod(5), node.pod(6));
    let (client, server) = (one.udp("0.0.0.0:0"), two.udp("0.0.0.0:0"));
    let address = at(two_port.v4.unwrap().into(), server.local_addr().unwrap().port());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reloading = scope.spawn(|| {
            for _ in 0..5 {
                let old = filter(&node.net, &two_port);
                node.lab.load_on(&node.net);
                assert_ne!(filter(&node.net, &two_port), old);
            }
            done.store(true, Ordering::Release);
        });
        while !done.load(Ordering::Acquire) && !reloading.is_finished() {
            exchange(&client, &server, address);
        }
        reloading.join().unwrap();
    });
    assert_eq!(node.network.check(&two_port).unwrap(), []);
}

/// What the kernel says about the filter of a pod, the program's number included.
pub(crate) fn filter(node: &Net, port: &PodPort) -> String {
    node.command("tc", &format!("filter show dev {} ingress", port.host_interface))
}

#[test]
fn attaching_takes_a_few_milliseconds() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    let pods: Vec<(Net, PodPort)> = (10..40)
        .map(|number| {
            let pod = Net::new();
            let port = port(&pod, number);
            (pod, port)
        })
        .collect();
    let mut times: Vec<std::time::Duration> = pods
        .iter()
        .map(|(_, port)| {
            let start = std::time::Instant::now();
            node.network.attach(port).unwrap();
            start.elapsed()
        })
        .collect();
    let mut ends: Vec<std::time::Duration> = pods[1..]
        .iter()
        .map(|(_, port)| {
            let start = std::time::Instant::now();
            node.network.detach(&port.host_interface, &[]).unwrap();
            start.elapsed()
        })
        .collect();
    ends.sort();
    println!("detach: median {:?}, longest {:?}", ends[ends.len() / 2], ends[ends.len() - 1]);
    let start = std::time::Instant::now();
    assert_eq!(node.network.bury().unwrap(), ends.len());
    println!("bury all: {:?}", start.elapsed());
    times.sort();
    // Printed, not asserted: other work shares the machine.
    println!("attach: median {:?}, longest {:?}", times[times.len() / 2], times[times.len() - 1]);
    assert_eq!(node.network.list().unwrap().len(), 1);
}
