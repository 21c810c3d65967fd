//! ```text
//!   namespace one                      namespace two
//!   east 192.0.2.1/24 ---- veth ----  west 192.0.2.2/24
//!   quiet (dummy, called the overlay device)
//! ```

use std::time::Instant;

use mesh_kernel::capture::{Capture, LONGEST_PACKET, ways_out};
use mesh_kernel::netns::NetNs;

use crate::lab::{Net, PATIENCE, privileged};

fn pair() -> (Net, Net) {
    let (one, two) = (Net::new(), Net::new());
    one.ip(&format!("link add east type veth peer name west netns {}", two.path().display()));
    one.ip("addr add 192.0.2.1/24 dev east");
    two.ip("addr add 192.0.2.2/24 dev west");
    one.ip("link set east up");
    two.ip("link set west up");
    (one, two)
}

fn wait_for(capture: &Capture, text: &[u8]) -> bool {
    let mut buffer = vec![0; LONGEST_PACKET];
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        match capture.next(&mut buffer).unwrap() {
            Some(passed) if passed.packet.ends_with(text) => return passed.outgoing,
            Some(_) => {}
            None => std::thread::yield_now(),
        }
    }
    panic!("nothing passed");
}

#[test]
fn both_directions_are_seen_on_ways_out_only() {
    if !privileged() {
        return;
    }
    let (one, two) = pair();
    one.ip("link add quiet type bridge");
    one.ip("link set quiet up");
    let links = one.run(|| ways_out(&"quiet".parse().unwrap())).unwrap();
    assert_eq!(links.iter().map(|l| l.name.as_str()).collect::<Vec<_>>(), ["east"]);
    let capture = one.run(|| Capture::start(links[0].clone())).unwrap();
    let (here, there) = (one.udp("192.0.2.1:700"), two.udp("192.0.2.2:700"));
    here.send_to(b"a canary goes", "192.0.2.2:700").unwrap();
    assert!(wait_for(&capture, b"a canary goes"), "outgoing");
    there.send_to(b"a canary comes", "192.0.2.1:700").unwrap();
    assert!(!wait_for(&capture, b"a canary comes"), "incoming");
    assert_eq!(capture.lost().unwrap(), 0);
}

#[test]
fn what_is_not_read_in_time_is_counted() {
    if !privileged() {
        return;
    }
    let (one, _two) = pair();
    let links = one.run(|| ways_out(&"none".parse().unwrap())).unwrap();
    let capture = one.run(|| Capture::start(links[0].clone())).unwrap();
    let socket = one.udp("192.0.2.1:700");
    // What is sent before the neighbour is known never leaves.
    socket.send_to(b"a canary goes", "192.0.2.2:700").unwrap();
    assert!(wait_for(&capture, b"a canary goes"));
    // More than the queue takes, with what the kernel adds to each. An emulated machine sends few in a second.
    let overflows = (0..120).any(|_| {
        for _ in 0..1000 {
            let _ = socket.send_to(&[7; 1400], "192.0.2.2:700");
        }
        capture.lost().unwrap() > 0
    });
    assert!(overflows);
    assert_eq!(capture.lost().unwrap(), 0, "since it was last asked");
}

#[test]
fn a_namespace_is_found_by_its_device() {
    if !privileged() {
        return;
    }
    // Only namespaces of processes are looked into; this one lives as long as the sleeping process in it.
    let net = Net::new();
    net.ip("link add mine address 02:6d:65:73:68:07 type bridge");
    let mac = mesh_kernel::ifname::MacAddress([0x02, 0x6d, 0x65, 0x73, 0x68, 0x07]);
    assert!(NetNs::with_device(mac).unwrap().is_none());
    let mut sleeper = net.run(|| std::process::Command::new("sleep").arg("60").spawn()).unwrap();
    let found = NetNs::with_device(mac);
    let own = net.run(|| std::fs::read_link("/proc/thread-self/ns/net").unwrap());
    let entered =
        found.unwrap().map(|found| found.run(|| std::fs::read_link("/proc/thread-self/ns/net")));
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    assert_eq!(entered.unwrap().unwrap().unwrap(), own);
}
