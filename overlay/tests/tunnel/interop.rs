//! The other side is wireguard-go, configured by wg(8).

use std::io::Write as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;

use crate::traffic::{Capture, LIMIT, Stream, echo};
use crate::world::{Side, World, privileged};

/// wireguard-go in the node of side B, and its control socket; both end with the test.
struct Go(Child, String);

impl Drop for Go {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = std::fs::remove_file(&self.1);
    }
}

fn installed(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        assert!(
            std::env::var_os("CI").is_none(),
            "CI needs {program} (wireguard-go, wireguard-tools)"
        );
        println!("skipped: {program} is not installed (packages wireguard-go, wireguard-tools)");
    }
    found
}

#[test]
fn wireguard_go_understands_us() {
    if !privileged() || !installed("wireguard-go") || !installed("wg") {
        return;
    }
    let mut world = World::new();
    let capture = Capture::start(&world, Side::A);
    let device = format!("mg{}", std::process::id());
    let node = world.name("node", Side::B);
    let child = Command::new("ip")
        .args(["netns", "exec", &node, "wireguard-go", "-f", &device])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let socket = format!("/var/run/wireguard/{device}.sock");
    let _go = Go(child, socket.clone());
    let begun = Instant::now();
    while !std::path::Path::new(&socket).exists() {
        assert!(begun.elapsed() < LIMIT, "wireguard-go did not start");
        std::thread::sleep(Duration::from_millis(10));
    }
    let preshared = mesh_model::snapshot::WgKey([0x5a; 32]);
    configure_go(&world, &node, &device, &preshared.to_string());
    world.ip("node", Side::B, &format!("link set {device} mtu 1420 up"));
    world.ip("node", Side::B, &format!("route add 10.71.0.0/24 dev {device}"));
    world.ip("node", Side::B, &format!("route add fd71::/64 dev {device}"));

    world.start(Side::A);
    let mut config = world.config(Side::A, false);
    config.peers[0].preshared_key = Some(mesh_overlay::PresharedKey(preshared));
    world.configure(Side::A, &config);
    world.ip("node", Side::A, "route add 10.72.0.0/24 dev mesh-wg");
    world.ip("node", Side::A, "route add fd72::/64 dev mesh-wg");
    for (port, from) in [(7001, Side::A), (7002, Side::B)] {
        for v6 in [false, true] {
            let stream = Stream::start(&world, from, v6, port);
            stream.wait_for(8 << 20);
            stream.finish();
            echo(&world, from, v6, port + 10);
        }
    }
    // Killed and back: wireguard-go accepts the new session.
    let stream = Stream::start(&world, Side::B, false, 7003);
    stream.wait_for(4 << 20);
    world.kill(Side::A);
    world.start(Side::A);
    stream.wait_for(4 << 20);
    stream.finish();
    capture.finish().assert_sealed();
}

fn configure_go(world: &World, node: &str, device: &str, preshared: &str) {
    let private = world.key(Side::B).private_bytes();
    let private = base64::engine::general_purpose::STANDARD.encode(private);
    let public = world.key(Side::A).public();
    let text = format!(
        "[Interface]\nPrivateKey = {private}\nListenPort = 51900\n\
         [Peer]\nPublicKey = {public}\nPresharedKey = {preshared}\nEndpoint = 192.0.2.1:51900\n\
         AllowedIPs = 10.71.0.0/24, fd71::/64\n"
    );
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let output = Command::new("ip")
        .args(["netns", "exec", node, "wg", "setconf", device])
        .arg(file.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
