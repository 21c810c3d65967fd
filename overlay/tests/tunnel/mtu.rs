//! Links behind the first one that carry less: found with the routers' help and without, and never by fragments.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_kernel::wireguard::FakeWireGuard;
use mesh_overlay::mtu::{self, tunnel_mtu};
use mesh_overlay::{KernelDevice, NodeKey};

use crate::MIB;
use crate::routed::{Routed, node, router, wait_until};
use crate::traffic::{CANARY, Capture, LIMIT};
use crate::world::{inside, privileged};

/// What the device carries where all links carry 9000.
const DEVICE: u16 = 8920;

/// A change of the link between the first router and the rest of the world.
struct Case {
    /// What it carries from then on.
    link: u16,
    /// Underlay of IPv6.
    v6: bool,
    /// Whether the router's messages about it are dropped.
    filtered: bool,
}

#[test]
fn nothing_is_fragmented_where_all_links_are_wide() {
    check(&Case { link: 9000, v6: false, filtered: false });
}

#[test]
fn a_narrow_link_is_found_with_the_routers_help() {
    check(&Case { link: 1400, v6: false, filtered: false });
    check(&Case { link: 1500, v6: true, filtered: false });
}

#[test]
fn a_narrow_link_is_found_where_the_router_is_not_heard() {
    check(&Case { link: 1400, v6: true, filtered: true });
    check(&Case { link: 1500, v6: false, filtered: true });
}

/// The kernel's device asks by echoes beside the tunnel; only the device itself is one in memory here.
#[test]
fn the_kernels_device_finds_a_narrow_link_too() {
    if !privileged() {
        return;
    }
    let world = Routed::new(DEVICE);
    let silence = "table inet silence { chain out { type filter hook output priority 0; \
               icmp type destination-unreachable drop; icmpv6 type packet-too-big drop; }; }";
    world.nft(&router(1), silence);
    for v6 in [false, true] {
        world.ip(&router(1), "link set up0 mtu 9000");
        world.ip("net", "link set p1 mtu 9000");
        let device = Arc::new(FakeWireGuard::new());
        let (file, key) = ("/nonexistent".into(), NodeKey::from_bytes([7; 32]));
        let kernel = KernelDevice::in_memory(Arc::clone(&device), file, key);
        kernel.configure(&world.config(1, DEVICE, v6)).unwrap();
        inside(&world.name(&node(1)), || {
            let await_mtus = |what: &str, good: &dyn Fn(u16) -> bool| {
                let begun = Instant::now();
                loop {
                    // As if it had sent large packets since.
                    device.tamper(|observed| {
                        for peer in observed.peers.values_mut() {
                            peer.statistics.sent_bytes += 1_000_000;
                        }
                    });
                    let found = kernel.status().unwrap().peers;
                    let pause = kernel.measure();
                    if found.iter().all(|peer| peer.mtu.is_some_and(good)) && !found.is_empty() {
                        return;
                    }
                    assert!(begun.elapsed() < LIMIT, "{what}: {found:?}");
                    std::thread::sleep(pause.min(Duration::from_millis(100)));
                }
            };
            await_mtus("wide", &|mtu| mtu == DEVICE);
            world.ip(&router(1), "link set up0 mtu 1400");
            world.ip("net", "link set p1 mtu 1400");
            let fits = tunnel_mtu(1400, Routed::endpoint(2, v6).ip());
            await_mtus("narrow", &|mtu| mtu <= fits && fits - mtu <= 16);
        });
    }
}

fn check(case: &Case) {
    if !privileged() {
        return;
    }
    let world = Routed::new(DEVICE);
    if case.filtered {
        world.nft(
            &router(1),
            "table inet silence { chain out { type filter hook output priority 0; \
               icmp type destination-unreachable drop; icmpv6 type packet-too-big drop; }; }",
        );
    }
    let capture = Capture::on(&world.name(&router(1)), "up0");
    for n in [1, 2, 3] {
        world.configure(n, &world.config(n, DEVICE, case.v6));
    }
    let forth = world.stream(1, 2, false, 7001);
    let back = world.stream(2, 1, true, 7002);
    for stream in [&forth, &back] {
        stream.wait_for(4 * MIB);
    }
    wait_until("the wide way is known", || world.peer(1, 2).mtu == Some(DEVICE));

    // The router says so to its node; the bridge on the other side says nothing to anybody.
    world.ip(&router(1), &format!("link set up0 mtu {}", case.link));
    world.ip("net", &format!("link set p1 mtu {}", case.link));
    let narrowed = Instant::now();
    for stream in [&forth, &back] {
        stream.wait_for(2 * MIB);
    }
    let fits = tunnel_mtu(case.link, Routed::endpoint(2, case.v6).ip()).min(DEVICE);
    for (from, to) in [(1, 2), (2, 1)] {
        // A bridge leaves room for a VLAN tag, and packets use it.
        let most = if from == 2 { fits + 4 } else { fits };
        let (mut found, begun) = (0, Instant::now());
        while !(found <= most && most - found <= 16) {
            assert!(begun.elapsed() < LIMIT, "{found} was found from {from} to {to}, {most} fit");
            std::thread::sleep(std::time::Duration::from_millis(10));
            found = world.peer(from, to).mtu.unwrap();
            assert!(found >= mtu::FLOOR);
        }
    }
    println!("{} bytes: measured both ways after {:?}", case.link, narrowed.elapsed());
    assert_eq!(world.peer(2, 3).mtu, Some(DEVICE), "another way is as wide as before");
    // Connections that begin now know it from the start, in both families.
    for (port, v6) in [(7003, false), (7004, true)] {
        let stream = world.stream(1, 2, v6, port);
        stream.wait_for(2 * MIB);
        stream.finish();
    }
    datagrams(&world);
    if fits < DEVICE {
        refused(&world, fits);
    }
    forth.finish();
    back.finish();
    let seen = capture.finish();
    assert!(seen.tunnel > 100, "{seen:?}");
    assert_eq!((seen.canaries, seen.fragments), (0, 0), "{seen:?}");
}

/// Datagrams of all sizes arrive, in pieces inside the tunnel where they have to be.
fn datagrams(world: &Routed) {
    for v6 in [false, true] {
        let to = SocketAddr::new(Routed::pod(2, v6), 7005);
        let server = inside(&world.name("pod2"), || UdpSocket::bind(to).unwrap());
        server.set_nonblocking(true).unwrap();
        for size in [100, 1252, 1300, 1400, 4000, 8000, 20_000] {
            let payload: Vec<u8> = CANARY.iter().copied().cycle().take(size).collect();
            let client =
                inside(&world.name("pod1"), || UdpSocket::bind((Routed::pod(1, v6), 0)).unwrap());
            let mut buffer = vec![0; 65_536];
            wait_until("a datagram arrives", || {
                // The first may be lost: its sender is told then what fits.
                let _ = client.send_to(&payload, to);
                std::thread::sleep(std::time::Duration::from_millis(10));
                matches!(server.recv(&mut buffer), Ok(n) if buffer[..n] == payload)
            });
            while server.recv(&mut buffer).is_ok() {}
        }
    }
}

/// Who does not want its datagrams to be cut is told the size that fits.
fn refused(world: &Routed, fits: u16) {
    let to = SocketAddr::new(Routed::pod(2, false), 7006);
    let told = inside(&world.name("pod1"), || {
        // A source of its own: nothing was told to it before.
        let client = UdpSocket::bind((Routed::pod(1, false), 0)).unwrap();
        set(&client, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO);
        client.connect(to).unwrap();
        let begun = Instant::now();
        loop {
            match client.send(&[7; 8000]) {
                Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                    break mtu_of(&client);
                }
                _ => assert!(begun.elapsed() < LIMIT, "never refused"),
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    });
    // Datagrams before may have been told less, while the way was being measured.
    assert!((mtu::FLOOR..=fits).contains(&told), "{told}, and {fits} fit");
}

fn set(socket: &UdpSocket, option: libc::c_int, value: libc::c_int) {
    let length = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the option reads an int that lives here.
    let result = unsafe {
        let value = (&raw const value).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_IP, option, value, length)
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

fn mtu_of(socket: &UdpSocket) -> u16 {
    let mut mtu: libc::c_int = 0;
    let mut length = size_of_val(&mtu) as libc::socklen_t;
    // SAFETY: the option writes an int that lives here.
    let result = unsafe {
        let mtu = (&raw mut mtu).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_IP, libc::IP_MTU, mtu, &raw mut length)
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    u16::try_from(mtu).unwrap()
}
