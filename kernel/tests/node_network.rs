//! The node's own network, and the way between a pod and the overlay device.
//!
//! ```text
//!   pod 10.244.1.5 -- mvA (TC) -- node -- (TC) mesh-wg, a TUN device whose other end is this test
//! ```

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use mesh_abi::Reason;
use mesh_kernel::node::{Desired, LinuxNodeNetwork, Masquerade, NodeNetwork, SysctlWatch};
use mesh_kernel::pods::{LinuxPodNetwork, PodNetwork};
use mesh_kernel::{IfName, Programs};

use crate::lab::{Lab, Net, PATIENCE, privileged};
use crate::pod_network::port;

struct Node {
    network: LinuxNodeNetwork,
    programs: Arc<Programs>,
    net: Net,
    lab: Lab,
}

impl Node {
    fn new() -> Self {
        let (lab, net) = (Lab::new(), Net::new());
        let programs = Arc::new(lab.load());
        let network = LinuxNodeNetwork::new(net.handle(), programs.clone(), overlay());
        Self { network, programs, net, lab }
    }

    /// Reconciles until nothing is left to do, and checks that it is one round.
    fn settle(&self, desired: &Desired) {
        let (_, applied) = self.network.reconcile(desired).unwrap();
        assert!(applied.failed.is_empty(), "{:#?}", applied.failed);
        let (plan, _) = self.network.reconcile(desired).unwrap();
        assert!(plan.steps.is_empty(), "{:#?}", plan.steps);
    }
}

fn overlay() -> IfName {
    "mesh-wg".parse().unwrap()
}

fn desired() -> Desired {
    let nets = |all: &[&str]| all.iter().map(|text| text.parse().unwrap()).collect();
    Desired {
        local_addresses: ["169.254.20.10".parse().unwrap(), "fd7a:6d65:7368::10".parse().unwrap()]
            .into(),
        overlay: overlay(),
        overlay_mtu: 1420,
        overlay_addresses: ["10.244.1.1".parse().unwrap(), "fd10:244:0:1::1".parse().unwrap()]
            .into(),
        remote_blocks: nets(&["10.244.2.0/24", "fd10:244:0:2::/64"]),
        block_mtus: [].into(),
        refused: nets(&["10.244.0.0/16", "fd10:244::/56", "10.96.0.0/16"]),
        masquerade: Some(Masquerade {
            sources: nets(&["10.244.1.0/24", "fd10:244:0:1::/64"]),
            inside: nets(&["10.244.0.0/16", "fd10:244::/56"]),
        }),
    }
}

/// A TUN device in the namespace; it lives as long as the file.
pub(crate) fn tun(net: &Net) -> File {
    net.run(|| {
        let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
        let mut request = [0_u8; 40];
        request[..7].copy_from_slice(b"mesh-wg");
        let flags = u16::try_from(libc::IFF_TUN | libc::IFF_NO_PI).unwrap();
        request[16..18].copy_from_slice(&flags.to_ne_bytes());
        const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
        // SAFETY: the request is a `struct ifreq` with a name that ends in zeroes, and outlives the call.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        file
    })
}

/// The next packet that is not the kernel's own chatter.
fn next_packet(tun: &mut File, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let mut buffer = [0; 2048];
    loop {
        let mut fds =
            [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(tun), nix::poll::PollFlags::POLLIN)];
        let patience = nix::poll::PollTimeout::try_from(PATIENCE).unwrap();
        assert_eq!(nix::poll::poll(&mut fds, patience), Ok(1), "no packet came");
        let length = tun.read(&mut buffer).unwrap();
        if wanted(&buffer[..length]) {
            return buffer[..length].to_vec();
        }
    }
}

#[test]
fn one_round_makes_the_node_right_and_removal_takes_it_back() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    let before = (node.net.ip("route"), node.net.ip("-6 route"), node.net.ip("addr show lo"));
    // Without the device nothing may leave.
    node.settle(&desired());
    // Reachable on the node, and never the source of what goes to a pod.
    assert!(node.net.ip("addr show lo").contains("169.254.20.10/32 scope host"));
    assert!(node.net.ip("route").contains("unreachable 10.244.0.0/16 proto 77 metric 4000000"));
    assert!(!node.net.ip("route").contains("10.244.2.0/24"));
    let device = tun(&node.net);
    node.settle(&desired());
    let routes = node.net.ip("route");
    assert!(
        routes.contains("10.244.2.0/24 dev mesh-wg proto 77 scope link src 10.244.1.1"),
        "{routes}"
    );
    assert!(
        node.net
            .ip("-6 route")
            .contains("fd10:244:0:2::/64 dev mesh-wg proto 77 src fd10:244:0:1::1")
    );
    assert!(node.net.command("nft", "list table inet mesh").contains("masquerade fully-random"));
    assert_eq!(node.net.run(|| mesh_kernel::sysctl::read("net/ipv4/ip_forward")).unwrap(), "1");
    assert_eq!(node.programs.pressure().unwrap()["REMOTE_BLOCKS"].0, 2);
    // The way to the other node carries less than the device, then less again, then as much.
    let [v4, v6] = ["10.244.2.0/24", "fd10:244:0:2::/64"].map(|block| block.parse().unwrap());
    for mtu in [Some(1340), Some(1300), None] {
        let block_mtus = mtu.into_iter().flat_map(|mtu| [(v4, mtu), (v6, mtu)]).collect();
        node.settle(&Desired { block_mtus, ..desired() });
        for family in ["-4", "-6"] {
            let routes = node.net.ip(&format!("{family} route show dev mesh-wg proto 77"));
            let shown = mtu.map(|mtu| format!(" mtu {mtu}"));
            assert_eq!(routes.contains(" mtu "), shown.is_some(), "{routes}");
            assert!(routes.contains(&shown.unwrap_or_default()), "{routes}");
        }
    }
    node.settle(&Desired { block_mtus: [(v4, 1340), (v6, 1340)].into(), ..desired() });
    // Another node came, one went.
    let mut changed = desired();
    changed.remote_blocks = ["10.244.3.0/24".parse().unwrap()].into();
    node.settle(&changed);
    assert!(!node.net.ip("route").contains("10.244.2.0/24"));
    drop(device);
    let (_, applied) = node.network.remove_all(&overlay()).unwrap();
    assert!(applied.failed.is_empty(), "{:#?}", applied.failed);
    let after = (node.net.ip("route"), node.net.ip("-6 route"), node.net.ip("addr show lo"));
    assert_eq!(after, before);
    assert_eq!(node.net.command("nft", "list ruleset"), "");
}

#[test]
fn what_others_made_or_broke_is_told_apart() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    let _device = tun(&node.net);
    node.net.ip("route add 192.0.2.0/24 dev lo");
    node.net.ip("addr add 192.0.2.9/32 dev lo");
    node.settle(&desired());
    node.net.ip("route del 10.244.2.0/24");
    node.net.command("nft", "flush chain inet mesh postrouting");
    node.net.run(|| mesh_kernel::sysctl::write("net/ipv4/ip_forward", "0")).unwrap();
    let observed = node.network.observe(&overlay()).unwrap();
    assert_eq!(mesh_kernel::node::plan(&desired(), &observed).steps.len(), 3);
    node.settle(&desired());
    node.network.remove_all(&overlay()).unwrap();
    assert!(node.net.ip("route").contains("192.0.2.0/24"));
    assert!(node.net.ip("addr show lo").contains("192.0.2.9"));
}

#[test]
fn pods_and_the_overlay_device_exchange_packets_past_the_stack() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    let mut device = tun(&node.net);
    node.settle(&desired());
    let pods = LinuxPodNetwork::new(node.net.handle(), node.programs.clone());
    let pod = Net::new();
    let port = port(&pod, 5);
    pods.attach(&port).unwrap();
    // The stack could forward too: make sure that it is not the one who does.
    node.net.run(|| mesh_kernel::sysctl::write("net/ipv4/ip_forward", "0")).unwrap();
    node.net.run(|| mesh_kernel::sysctl::write("net/ipv6/conf/all/forwarding", "0")).unwrap();
    for (target, family) in [("10.244.2.9:7", 4), ("[fd10:244:0:2::9]:7", 6)] {
        let local = if family == 4 { "10.244.1.5:0" } else { "[fd10:244:0:1::5]:0" };
        let socket = pod.udp(local);
        socket.send_to(b"to another node", target).unwrap();
        let packet = next_packet(&mut device, |p| p[0] >> 4 == family && p.ends_with(b"node"));
        device.write_all(&echoed(&packet)).unwrap();
        let mut buffer = [0; 64];
        let (length, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], from), (&b"to another node"[..], target.parse().unwrap()));
    }
    let counters = node.programs.counters().unwrap();
    assert_eq!(counters[&Reason::PodToOverlay].packets, 2);
    assert_eq!(counters[&Reason::OverlayToPod].packets, 2);
    // A kernel without tcx has the program in a filter instead.
    let linked =
        node.lab.bpf_dir().join(format!("v{}/links/overlay-mesh-wg", mesh_abi::VERSION)).exists();
    let filters = node.net.command("tc", "filter show dev mesh-wg ingress");
    assert!(linked != filters.contains("from_overlay"), "linked: {linked}; {filters}");
}

#[test]
fn a_changed_sysctl_is_told_at_once() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    let _device = tun(&node.net);
    node.settle(&desired());
    let watch = SysctlWatch::open(node.net.handle(), overlay()).unwrap();
    let write = |name: &str, value: &str| {
        node.net.run(|| mesh_kernel::sysctl::write(name, value)).unwrap();
    };
    let (names, told) = std::sync::mpsc::channel();
    // Ends with the namespace's last change, or with the test.
    std::thread::spawn(move || {
        while let Ok(wrong) = watch.wait() {
            if names.send(wrong).is_err() {
                return;
            }
        }
    });
    for (name, wrong, right) in [
        ("net/ipv4/ip_forward", "0", "1"),
        ("net/ipv6/conf/all/forwarding", "0", "1"),
        ("net/ipv4/conf/mesh-wg/rp_filter", "1", "2"),
    ] {
        // A device that comes is told of, too, and is no business of ours.
        node.net.ip("link add lan type veth peer name lan1");
        node.net.ip("link del lan");
        write(name, wrong);
        // One change is several messages: it may have been told of twice.
        while told.recv_timeout(PATIENCE).expect("the kernel tells") != [name] {}
        let (plan, applied) = node.network.reconcile(&desired()).unwrap();
        assert_eq!((plan.steps.len(), applied.failed.len()), (1, 0), "{plan:?}");
        assert_eq!(node.net.run(|| mesh_kernel::sysctl::read(name)).as_deref(), Some(right));
    }
}

/// The same UDP datagram on its way back: addresses and ports swapped. The sums stay right.
fn echoed(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let (source, length, header) = if packet[0] >> 4 == 4 { (12, 4, 20) } else { (8, 16, 40) };
    let (from, to) = (source, source + length);
    for i in 0..length {
        packet.swap(from + i, to + i);
    }
    packet.swap(header, header + 2);
    packet.swap(header + 1, header + 3);
    packet
}

#[test]
fn traffic_that_leaves_the_cluster_is_masqueraded_and_the_rest_is_not() {
    if !privileged() {
        return;
    }
    // pod -- node -- uplink -- outside (192.0.2.2)
    let node = Node::new();
    let outside = Net::new();
    node.net.ip("link add up0 type veth peer name down0");
    node.net.run(|| move_link("down0", &outside));
    node.net.ip("addr add 192.0.2.1/24 dev up0");
    node.net.ip("link set up0 up");
    outside.ip("addr add 192.0.2.2/24 dev down0");
    outside.ip("link set down0 up");
    node.net.ip("addr add 2001:db8::1/64 dev up0 nodad");
    outside.ip("addr add 2001:db8::2/64 dev down0 nodad");
    // Asking makes the kernel finish bringing them up.
    node.net.ip("link show up0");
    outside.ip("link show down0");
    let _device = tun(&node.net);
    node.settle(&desired());
    let pods = LinuxPodNetwork::new(node.net.handle(), node.programs.clone());
    let pod = Net::new();
    let port = port(&pod, 5);
    pods.attach(&port).unwrap();
    let seen_as = |there: &str| {
        let any = if there.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
        let (server, client) = (outside.udp(there), pod.udp(any));
        client.send_to(b"hello", server.local_addr().unwrap()).unwrap();
        let mut buffer = [0; 16];
        let (_, from) = server.recv_from(&mut buffer).unwrap();
        server.send_to(b"reply", from).unwrap();
        let (length, back) = client.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], back), (&b"reply"[..], server.local_addr().unwrap()));
        from.ip().to_string()
    };
    assert_eq!(seen_as("192.0.2.2:0"), "192.0.2.1");
    assert_eq!(seen_as("[2001:db8::2]:0"), "2001:db8::1");
    // Ranges where pods keep their addresses. The first two are joined into one that has no prefix.
    outside.ip("route add 10.244.1.0/24 via 192.0.2.1");
    outside.ip("-6 route add fd10:244:0:1::/64 via 2001:db8::1");
    outside.ip("addr add 192.0.2.9/24 dev down0");
    let mut exempt = desired();
    let masquerade = exempt.masquerade.as_mut().unwrap();
    let ranges = ["192.0.2.0/30", "192.0.2.4/31", "2001:db8::/64"];
    masquerade.keep_source_towards(&ranges.map(|range| range.parse().unwrap()));
    node.settle(&exempt);
    assert_eq!(seen_as("192.0.2.2:0"), "10.244.1.5");
    assert_eq!(seen_as("[2001:db8::2]:0"), "fd10:244:0:1::5");
    assert_eq!(seen_as("192.0.2.9:0"), "192.0.2.1", "only those");
    node.settle(&desired());
    assert_eq!(seen_as("192.0.2.2:0"), "192.0.2.1");
    // Nobody has that pod address: refused, not sent out in the clear.
    let error = pod.tcp("10.244.9.9:9".parse().unwrap()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EHOSTUNREACH), "{error}");
}

pub(crate) fn move_link(name: &str, to: &Net) {
    let arguments = ["link", "set", name, "netns", &to.path().to_string_lossy()].map(str::to_owned);
    assert!(std::process::Command::new("ip").args(arguments).status().unwrap().success());
}

#[test]
fn routes_of_others_are_seen_and_ours_are_not_among_them() {
    if !privileged() {
        return;
    }
    let node = Node::new();
    let _tun = tun(&node.net);
    node.net.ip("link add lan type veth peer name lan1");
    node.net.ip("addr add 10.244.9.1/24 dev lan");
    node.net.ip("link set lan up");
    node.net.ip("route add 10.0.0.0/8 via 10.244.9.7");
    node.settle(&desired());
    let observed = node.network.observe(&overlay()).unwrap();
    let seen: Vec<String> = observed
        .foreign
        .iter()
        .filter(|f| f.destination.addr().is_ipv4())
        .map(|f| format!("{} {}", f.destination, f.on_link))
        .collect();
    assert_eq!(seen, ["10.0.0.0/8 false", "10.244.9.0/24 true"]);
    let found = mesh_kernel::node::conflicts(&desired(), &observed);
    assert!(found.iter().any(|c| c.destination == "10.244.9.0/24".parse().unwrap()), "{found:?}");
    assert!(found.iter().all(|c| c.destination != "10.0.0.0/8".parse().unwrap()), "{found:?}");
}
