//! Service addresses at the socket, from a process inside the cgroup.
//!
//! ```text
//!   one namespace with a loopback device and no routes
//!   client (in the cgroup) -> VIP --hook--> 127.0.0.1:x or [::1]:x, servers outside the cgroup
//! ```

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use mesh_kernel::flows::{FlowReader, Settings};
use mesh_kernel::services::{ServiceReconciler, ServiceTable};
use mesh_kernel::sockets::{Ended, end_connections};
use mesh_model::ObjectKey;
use mesh_model::snapshot::{Backend, FULL_WEIGHT, Frontend, FrontendKind, Leaving, Protocol};

use crate::client::Client;
use crate::lab::{Lab, Net, privileged};

/// A service address with port 80.
pub(crate) fn frontend(vip: &str, protocol: Protocol, backends: &[SocketAddr]) -> Frontend {
    Frontend {
        vip: vip.parse().unwrap(),
        protocol,
        port: 80,
        kind: FrontendKind::ClusterIp,
        service: ObjectKey::new("default", "web"),
        port_name: String::new(),
        affinity_secs: None,
        backends: backends
            .iter()
            .map(|b| Backend { address: b.ip(), port: b.port(), node: None, weight: FULL_WEIGHT })
            .collect(),
        leaving: vec![],
    }
}

#[test]
fn tcp_of_both_families_and_mapped_reaches_a_backend_and_sees_the_vip() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let programs = lab.load();
    let (v4, v6) = (net.greeter("127.0.0.1:0", "hello4"), net.greeter("[::1]:0", "hello6"));
    let mut table = ServiceReconciler::new(programs.services());
    let wanted =
        [frontend("10.96.0.1", Protocol::Tcp, &[v4]), frontend("fd10:96::1", Protocol::Tcp, &[v6])];
    assert!(table.reconcile(&wanted).unwrap().failed.is_empty());
    let mut client = Client::start(&lab.cgroup, &net);
    assert_eq!(client.ask("tcp 10.96.0.1:80"), "hello4 from 10.96.0.1:80");
    assert_eq!(client.ask("tcp [fd10:96::1]:80"), "hello6 from [fd10:96::1]:80");
    assert_eq!(client.ask("tcp [::ffff:10.96.0.1]:80"), "hello4 from [::ffff:10.96.0.1]:80");
    assert_eq!(client.ask(&format!("tcp {v4}")), format!("hello4 from {v4}"));
    // Outside the cgroup there is no such address.
    assert!(net.tcp("10.96.0.1:80".parse().unwrap()).is_err());
}

/// Node port 80 of a service with a backend for TCP over each family and one for UDP; returns where those are.
fn put_node_port<T: ServiceTable>(net: &Net, table: &mut ServiceReconciler<T>) -> [SocketAddr; 3] {
    let (v4, v6) = (net.greeter("127.0.0.1:0", "hello4"), net.greeter("[::1]:0", "hello6"));
    let udp = net.answerer("127.0.0.1:0", "datagram");
    let wanted = [
        frontend("0.0.0.0", Protocol::Tcp, &[v4]),
        frontend("::", Protocol::Tcp, &[v6]),
        frontend("0.0.0.0", Protocol::Udp, &[udp]),
    ];
    assert!(table.reconcile(&wanted).unwrap().failed.is_empty());
    [v4, v6, udp]
}

#[test]
fn a_node_port_is_reached_by_the_address_of_any_node_and_by_no_other() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let programs = lab.load();
    let mut table = ServiceReconciler::new(programs.services());
    put_node_port(&net, &mut table);
    let nodes = ["192.0.2.7".parse().unwrap(), "2001:db8::7".parse().unwrap()];
    assert_eq!(table.table().set_node_addresses(&nodes.into()).unwrap(), 2);
    let mut client = Client::start(&lab.cgroup, &net);
    assert_eq!(client.ask("tcp 192.0.2.7:80"), "hello4 from 192.0.2.7:80");
    assert_eq!(client.ask("tcp [2001:db8::7]:80"), "hello6 from [2001:db8::7]:80");
    assert_eq!(client.ask("tcp [::ffff:192.0.2.7]:80"), "hello4 from [::ffff:192.0.2.7]:80");
    assert_eq!(client.ask("udp 192.0.2.7:80"), "datagram from 192.0.2.7:80");
    assert_eq!(client.ask("tcp 192.0.2.8:80"), "error ENETUNREACH");
    // An application that means its own machine does not get the service.
    assert_eq!(client.ask("tcp 0.0.0.0:80"), "error ECONNREFUSED");
    assert_eq!(client.ask("tcp [::]:80"), "error ECONNREFUSED");
    assert_eq!(table.table().set_node_addresses(&[].into()).unwrap(), 2);
    assert_eq!(client.ask("tcp 192.0.2.7:80"), "error ENETUNREACH");
}

#[test]
fn a_node_port_is_reached_by_loopback_from_the_node_and_not_from_a_pod() {
    if !privileged() {
        return;
    }
    let (lab, net, pod) = (Lab::new(), Net::new(), Net::new());
    let programs = lab.load();
    let mut table = ServiceReconciler::new(programs.services());
    let [v4, ..] = put_node_port(&net, &mut table);
    // Makes the node's own network known.
    let _flows = FlowReader::open(&programs, &net.handle(), Settings::default()).unwrap();
    let mut process = Client::start(&lab.cgroup, &net);
    assert_eq!(process.ask("tcp 127.0.0.1:80"), "hello4 from 127.0.0.1:80");
    assert_eq!(process.ask("tcp 127.8.9.10:80"), "hello4 from 127.8.9.10:80");
    assert_eq!(process.ask("tcp [::1]:80"), "hello6 from [::1]:80");
    assert_eq!(process.ask("tcp [::ffff:127.0.0.1]:80"), "hello4 from [::ffff:127.0.0.1]:80");
    assert_eq!(process.ask("udp 127.0.0.1:80"), "datagram from 127.0.0.1:80");
    // What is no node port is the machine's own, as before.
    assert_eq!(process.ask(&format!("tcp {v4}")), format!("hello4 from {v4}"));
    assert_eq!(process.ask("tcp 127.0.0.1:81"), "error ECONNREFUSED");
    let mut pod = Client::start(&lab.cgroup, &pod);
    assert_eq!(pod.ask("tcp 127.0.0.1:80"), "error ECONNREFUSED");
    assert_eq!(pod.ask("tcp [::1]:80"), "error ECONNREFUSED");
}

#[test]
fn a_backend_that_leaves_keeps_what_it_has_and_gets_nothing_new() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let programs = lab.load();
    let servers = ["a", "b"].map(|name| net.answerer("127.0.0.1:0", name));
    let mut table = ServiceReconciler::new(programs.services());
    let mut wanted = frontend("10.96.0.1", Protocol::Udp, &servers);
    wanted.affinity_secs = Some(3600);
    table.reconcile(&[&wanted]).unwrap();
    let mut client = Client::start(&lab.cgroup, &net);
    let first = client.ask("udp 10.96.0.1:80");
    let kept = usize::from(first.starts_with('b'));
    wanted.backends.remove(kept);
    wanted.leaving = vec![Leaving { address: servers[kept], terminating: true }];
    assert_eq!(table.reconcile(&[&wanted]).unwrap().gone, []);
    for _ in 0..20 {
        assert_ne!(client.ask("udp 10.96.0.1:80"), first, "neither sticks nor has affinity to it");
    }
}

#[test]
fn udp_connected_or_not_gets_answers_from_the_vip() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let programs = lab.load();
    let (v4, v6) = (net.answerer("127.0.0.1:0", "hello4"), net.answerer("[::1]:0", "hello6"));
    let mut table = ServiceReconciler::new(programs.services());
    let wanted = [
        frontend("10.96.0.1", Protocol::Udp, &[v4]),
        frontend("10.96.0.2", Protocol::Udp, &[v4]),
        frontend("fd10:96::1", Protocol::Udp, &[v6]),
    ];
    assert!(table.reconcile(&wanted).unwrap().failed.is_empty());
    let mut client = Client::start(&lab.cgroup, &net);
    for vip in ["10.96.0.1:80", "10.96.0.2:80", "[::ffff:10.96.0.1]:80", "[fd10:96::1]:80"] {
        let text = if vip.starts_with("[fd") { "hello6" } else { "hello4" };
        assert_eq!(client.ask(&format!("udp {vip}")), format!("{text} from {vip}"));
        let expected = format!("{text} from {vip} peer {vip}");
        assert_eq!(client.ask(&format!("udp-connected {vip}")), expected);
    }
    // A socket that talks to the backend by its own address sees that. (Not one that talks by both: a known gap.)
    let mut direct = Client::start(&lab.cgroup, &net);
    assert_eq!(direct.ask(&format!("udp {v6}")), format!("hello6 from {v6}"));
}

#[test]
fn without_a_backend_the_connection_is_refused_at_once() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let programs = lab.load();
    let mut table = ServiceReconciler::new(programs.services());
    let both = [Protocol::Tcp, Protocol::Udp];
    let wanted: Vec<Frontend> = ["10.96.0.1", "fd10:96::1"]
        .iter()
        .flat_map(|vip| both.map(|protocol| frontend(vip, protocol, &[])))
        .collect();
    assert!(table.reconcile(&wanted).unwrap().failed.is_empty());
    let mut client = Client::start(&lab.cgroup, &net);
    for vip in ["10.96.0.1:80", "[fd10:96::1]:80", "[::ffff:10.96.0.1]:80"] {
        for what in ["tcp", "udp", "udp-connected"] {
            assert_eq!(client.ask(&format!("{what} {vip}")), "error ECONNREFUSED", "{what} {vip}");
        }
    }
    // What is no service is left to the kernel, which has no route here.
    assert_eq!(client.ask("tcp 10.96.0.9:80"), "error ENETUNREACH");
}

#[test]
fn a_datagram_socket_keeps_its_backend_until_that_leaves() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let programs = lab.load();
    let names = ["a", "b", "c"];
    let servers = names.map(|name| net.answerer("127.0.0.1:0", name));
    let mut table = ServiceReconciler::new(programs.services());
    table.reconcile(&[frontend("10.96.0.1", Protocol::Udp, &servers)]).unwrap();
    let mut client = Client::start(&lab.cgroup, &net);
    let first = client.ask("udp 10.96.0.1:80");
    for _ in 0..20 {
        assert_eq!(client.ask("udp 10.96.0.1:80"), first);
    }
    let kept = names.iter().position(|name| first.starts_with(name)).unwrap();
    let rest: Vec<SocketAddr> =
        servers.iter().enumerate().filter(|(i, _)| *i != kept).map(|(_, s)| *s).collect();
    table.reconcile(&[frontend("10.96.0.1", Protocol::Udp, &rest)]).unwrap();
    let second = client.ask("udp 10.96.0.1:80");
    assert_ne!(second, first);
    // Others come and go: the one that it has stays.
    table.reconcile(&[frontend("10.96.0.1", Protocol::Udp, &servers)]).unwrap();
    assert_eq!(client.ask("udp 10.96.0.1:80"), second);
}

#[test]
fn connections_spread_and_affinity_gathers_them() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let programs = lab.load();
    let servers = ["a", "b", "c"].map(|name| net.greeter("127.0.0.1:0", name));
    let mut table = ServiceReconciler::new(programs.services());
    let spread = frontend("10.96.0.1", Protocol::Tcp, &servers);
    let gathered =
        Frontend { affinity_secs: Some(3600), ..frontend("10.96.0.2", Protocol::Tcp, &servers) };
    table.reconcile(&[spread, gathered]).unwrap();
    let mut client = Client::start(&lab.cgroup, &net);
    let mut seen = |vip: &str| -> BTreeSet<String> {
        (0..60).map(|_| client.ask(&format!("tcp {vip}:80"))).collect()
    };
    // That 60 random choices miss one of three: 3 * (2/3)^60 < 1e-10.
    assert_eq!(seen("10.96.0.1").len(), 3);
    assert_eq!(seen("10.96.0.2").len(), 1);
}

#[test]
fn programs_outlive_the_loader_and_a_second_load_changes_nothing_for_clients() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let server = net.answerer("127.0.0.1:0", "hello");
    let wanted = [frontend("10.96.0.1", Protocol::Udp, &[server])];
    let programs = lab.load();
    ServiceReconciler::new(programs.services()).reconcile(&wanted).unwrap();
    drop(programs);
    let mut client = Client::start(&lab.cgroup, &net);
    assert_eq!(client.ask("udp 10.96.0.1:80"), "hello from 10.96.0.1:80");
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reloading = scope.spawn(|| {
            for _ in 0..5 {
                let programs = lab.load();
                let mut table = ServiceReconciler::new(programs.services());
                assert_eq!(table.reconcile(&wanted).unwrap().operations, 0);
            }
            done.store(true, std::sync::atomic::Ordering::Release);
        });
        while !done.load(std::sync::atomic::Ordering::Acquire) && !reloading.is_finished() {
            assert_eq!(client.ask("udp 10.96.0.1:80"), "hello from 10.96.0.1:80");
        }
        reloading.join().unwrap();
    });
    mesh_kernel::bpf::detach_all(&lab.bpf_dir()).unwrap();
    assert_eq!(client.ask("udp 10.96.0.1:80"), "error ENETUNREACH");
}

#[test]
fn the_table_in_the_kernel_reads_back_as_it_was_written() {
    if !privileged() {
        return;
    }
    let lab = Lab::new();
    let programs = lab.load();
    let mut table = ServiceReconciler::new(programs.services());
    let backend = |i: u32| SocketAddr::new(IpAddr::from((0x0af4_0000 + i).to_be_bytes()), 80);
    let many: Vec<Frontend> = (0..300_u32)
        .map(|i| {
            let vip = format!("10.96.{}.{}", i / 250, i % 250 + 1);
            let backends: Vec<SocketAddr> = (i..i + 20).map(backend).collect();
            frontend(&vip, Protocol::Tcp, &backends)
        })
        .collect();
    let outcome = table.reconcile(&many).unwrap();
    assert!(outcome.failed.is_empty());
    assert_eq!(outcome.operations, 300 * 41);
    assert!(!table.refresh().unwrap(), "what was read differs from what was written");
    assert_eq!(programs.pressure().unwrap()["SLOTS"].0, 6000);
    assert_eq!(table.reconcile::<Frontend>(&[]).unwrap().operations, 300 * 41);
    assert_eq!(programs.pressure().unwrap()["SERVICES"].0, 0);
}

#[test]
fn sockets_that_are_connected_to_what_is_gone_end_and_choose_again() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let programs = lab.load();
    let servers = ["a", "b"].map(|name| net.answerer("127.0.0.1:0", name));
    let v6 = net.answerer("[::1]:0", "six");
    let mut table = ServiceReconciler::new(programs.services());
    table.reconcile(&[frontend("10.96.0.1", Protocol::Udp, &servers)]).unwrap();
    let mut client = Client::start(&lab.cgroup, &net);
    let first = client.ask("hold 10.96.0.1:80");
    let gone = servers[usize::from(first.starts_with('b'))];
    let rest = servers[usize::from(!first.starts_with('b'))];
    let outcome = table.reconcile(&[frontend("10.96.0.1", Protocol::Udp, &[rest])]).unwrap();
    assert_eq!(outcome.gone.len(), 1);
    assert_eq!(outcome.gone[0].backend, gone);
    assert_eq!(
        client.ask("held 10.96.0.1:80"),
        first,
        "nothing tells it apart from one that is there"
    );
    // Another process that meant this very address, and no service.
    let mut straight = Client::start(&lab.cgroup, &net);
    let direct = straight.ask(&format!("hold {gone}"));
    let through = |table: &ServiceReconciler<_>| {
        end_connections(&net.handle(), &[Protocol::Udp], |socket| {
            let by = |t: &mesh_kernel::services::BpfServiceTable| {
                t.reached_by(socket.cookie, socket.remote)
            };
            socket.remote == gone && by(table.table()) == Some("10.96.0.1:80".parse().unwrap())
        })
    };
    assert_eq!(through(&table).unwrap(), Ended { ended: 1, refused: 0 });
    assert_eq!(client.ask("held 10.96.0.1:80"), "error EDESTADDRREQ");
    assert_eq!(client.ask("wait 10.96.0.1:80"), "error ECONNABORTED", "who waits for an answer");
    let second = client.ask("again 10.96.0.1:80");
    assert_ne!(second, first, "the same socket, connected again");
    assert_eq!(straight.ask("held 10.96.0.1:80"), direct);
    assert_eq!(through(&table).unwrap(), Ended::default());

    let held = client.ask(&format!("hold {v6}"));
    let mapped = format!("[::ffff:{}]:{}", rest.ip(), rest.port());
    assert!(straight.ask(&format!("hold {mapped}")).starts_with(&second[..1]));
    let ended = end_connections(&net.handle(), &[Protocol::Udp], |socket| {
        [v6, rest].contains(&socket.remote)
    });
    assert_eq!(
        ended.unwrap().ended,
        2,
        "both families, and one in the clothes of the other: {held}"
    );
    assert_eq!(client.ask("held 10.96.0.1:80"), "error EDESTADDRREQ");
}

#[test]
fn a_stream_to_what_is_gone_is_aborted_and_a_listener_stays() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), Net::new());
    let listener = net.run(|| std::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    let mut client = Client::start(&lab.cgroup, &net);
    assert_eq!(client.ask(&format!("tcp-hold {address}")), "connected");
    let (_accepted, _) = listener.accept().unwrap();
    assert_eq!(client.ask(&format!("tcp-held {address}")), "waits");
    let ended = end_connections(&net.handle(), &[Protocol::Tcp], |socket| socket.remote == address);
    assert_eq!(ended.unwrap(), Ended { ended: 1, refused: 0 });
    assert_eq!(client.ask(&format!("tcp-held {address}")), "error ECONNABORTED");
    assert_eq!(client.ask(&format!("tcp-hold {address}")), "connected", "the listener is there");
}
