//! Golden packets: what the TC programs of an object do with packets whose verdict is known, before they guard anybody.
//!
//! The programs run on maps of their own, which are thrown away: neither counters nor events of the node change. Socket hooks
//! cannot be run like that; for them there is the verifier only.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use aya::maps::Map as AyaMap;
use aya::{Ebpf, EbpfLoader};
use mesh_abi as abi;
use mesh_abi::{Address, Plain, maps, programs};

use super::load::{self, LoadError};
use super::map::Map;
use super::test_run::{self, Input};

/// `lo`, which every namespace has: it stands for the pod's host-side veth.
const PORT: u32 = 1;
/// Another pod's host-side veth; never looked at.
const OTHER_PORT: u32 = 2;
const POD_MAC: [u8; 6] = [2, 0, 0, 0, 0, 5];
const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 6];
const POD: [u8; 4] = [10, 244, 1, 5];
const OTHER_POD: [u8; 4] = [10, 244, 1, 6];
const STRANGER: [u8; 4] = [192, 0, 2, 9];

// Verdicts, linux/pkt_cls.h.
const NEXT: u32 = u32::MAX;
const DROP: u32 = 2;
const REDIRECT: u32 = 7;

/// A packet and what has to become of it.
struct Case {
    name: &'static str,
    program: &'static str,
    packet: Vec<u8>,
    verdict: u32,
    /// To whom the packet is addressed afterwards.
    to: Option<[u8; 6]>,
}

/// Loads the object apart from everything, and runs the packets.
pub(super) fn check(object: &[u8]) -> Result<(), LoadError> {
    let mut loader = EbpfLoader::new();
    for name in SMALL {
        loader.map_max_entries(name, 64);
    }
    loader.map_max_entries(maps::FLOWS, 4096);
    loader.map_max_entries(maps::TRACE_EVENTS, 4096);
    let mut ebpf = loader.load(object).map_err(|error| LoadError::Object(Box::new(error)))?;
    fill(&ebpf).map_err(LoadError::GoldenMaps)?;
    let guard = load::load_one(&mut ebpf, programs::FROM_POD)?.0;
    let overlay = load::load_one(&mut ebpf, programs::FROM_OVERLAY)?.0;
    for case in cases() {
        let program = if case.program == programs::FROM_POD { &guard } else { &overlay };
        run(program, &case)?;
    }
    Ok(())
}

/// Maps that need no room for a few packets, and would have all their memory from the start, beside the node's own.
const SMALL: [&str; 28] = [
    maps::SERVICES,
    maps::SLOTS,
    maps::MEMBERS,
    maps::NODE_ADDRESSES,
    maps::REVERSE,
    maps::STICKY,
    maps::AFFINITY,
    maps::LOCAL_PODS,
    maps::POD_PORTS,
    maps::FLOW_LIMITS,
    maps::FLOW_SLOTS,
    maps::DATAGRAMS,
    maps::NAMESPACES,
    maps::EDGE_SERVICES,
    maps::EDGE_TABLES,
    maps::EDGE_BACKENDS,
    maps::EDGE_FLOWS,
    maps::EDGE_FRAGMENTS,
    maps::EDGE_NODES,
    maps::EDGE_OWNED,
    maps::POD_POLICIES,
    maps::IDENTITIES,
    maps::CONNECTIONS,
    maps::FRAGMENTS,
    maps::HOST_PORTS,
    maps::TRACES,
    maps::BEGINNINGS,
    ALLOWED,
];

/// Known to the programs only.
const ALLOWED: &str = "ALLOWED";

fn run(program: &OwnedFd, case: &Case) -> Result<(), LoadError> {
    let input = Input { packet: &case.packet, ifindex: PORT, repeat: 1 };
    let failed = |source| LoadError::GoldenRun { case: case.name, source };
    let output = test_run::run(program.as_fd(), &input).map_err(failed)?;
    let reached = case.to.is_none_or(|mac| output.packet.starts_with(&mac));
    if output.verdict == case.verdict && reached {
        return Ok(());
    }
    Err(LoadError::Golden {
        program: case.program,
        case: case.name,
        expected: case.verdict,
        seen: output.verdict,
    })
}

/// A pod behind `lo`, and another one on the same node.
fn fill(ebpf: &Ebpf) -> io::Result<()> {
    let address = |octets: [u8; 4]| Address::v4(u32::from_ne_bytes(octets));
    let port = abi::PodPort { v4: address(POD), mac: POD_MAC, ..abi::PodPort::default() };
    put(ebpf, maps::POD_PORTS, &PORT, &port)?;
    for (octets, ifindex, pod_mac) in [(POD, PORT, POD_MAC), (OTHER_POD, OTHER_PORT, OTHER_MAC)] {
        let pod = abi::LocalPod { ifindex, pod_mac, host_mac: [2, 0, 0, 0, 1, 0] };
        put(ebpf, maps::LOCAL_PODS, &address(octets), &pod)?;
    }
    Ok(())
}

fn put<K: Plain, V: Plain>(ebpf: &Ebpf, name: &'static str, key: &K, value: &V) -> io::Result<()> {
    let Some(AyaMap::HashMap(map)) = ebpf.map(name) else {
        return Err(io::Error::new(io::ErrorKind::NotFound, name));
    };
    Map::<K, V>::of(name, map.fd().as_fd().try_clone_to_owned()?)?.put(key, value)
}

fn cases() -> Vec<Case> {
    let from_pod = |name, packet, verdict, to| {
        let program = programs::FROM_POD;
        Case { name, program, packet, verdict, to }
    };
    let from_overlay = |name, to: [u8; 4], verdict, mac| {
        let (program, packet) = (programs::FROM_OVERLAY, ipv4(STRANGER, to));
        Case { name, program, packet, verdict, to: mac }
    };
    let sent = |source_mac, from, to| [ethernet(source_mac), ipv4(from, to)].concat();
    let mut short = sent(POD_MAC, POD, STRANGER);
    short[14] = 0x41;
    vec![
        from_pod("a pod to the world", sent(POD_MAC, POD, STRANGER), NEXT, None),
        from_pod(
            "a pod to a pod beside it",
            sent(POD_MAC, POD, OTHER_POD),
            REDIRECT,
            Some(OTHER_MAC),
        ),
        from_pod("another's address", sent(POD_MAC, OTHER_POD, STRANGER), DROP, None),
        from_pod("another's MAC address", sent(OTHER_MAC, POD, STRANGER), DROP, None),
        from_pod("a header that is too short", short, DROP, None),
        from_overlay("the overlay to a pod", POD, REDIRECT, Some(POD_MAC)),
        from_overlay("the overlay to the node", STRANGER, NEXT, None),
    ]
}

fn ethernet(source: [u8; 6]) -> Vec<u8> {
    [&[2, 0, 0, 0, 1, 0][..], &source, &[8, 0]].concat()
}

/// A datagram of 4 bytes.
fn ipv4(from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let header = [0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0];
    [&header[..], &from, &to, &[0x10, 0, 0, 53, 0, 12, 0, 0, 1, 2, 3, 4]].concat()
}
