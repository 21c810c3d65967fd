//! Packets and requests get where they should, and nobody between the nodes can read them.
//!
//! ```text
//!   node-1            node-2            node-3
//!   web-a             web-b             web-c        Service web: 80 http, 9000 tcp echo, 9001 udp echo
//!     \____ mesh-wg ____/\____ mesh-wg ____/         Ingress web.test on every node
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_tests::capture::{Capture, contains};
use mesh_tests::command::output;

use crate::tests;
use crate::world::{HOST, World, expect};

tests![
    pods_reach_each_other_by_address,
    pods_reach_a_service_by_address,
    pods_reach_a_service_by_name,
    a_node_reaches_a_service,
    the_client_address_is_kept,
    ingress_answers_on_every_node,
    the_underlay_never_shows_a_payload,
    a_pod_cannot_lie_about_its_address,
];

fn pods_reach_each_other_by_address(world: &World) -> Result<()> {
    let (a, b) = world.two_pods()?;
    for to in [b.v4()?.to_owned(), format!("[{}]", b.v6()?)] {
        expect("http", &a.get(&format!("http://{to}:8080/x"))?, &b.name)?;
        expect("tcp", &a.get(&format!("tcp://{to}:9000/over-tcp"))?, "over-tcp")?;
        expect("udp", &a.get(&format!("udp://{to}:9001/whoami"))?, &b.name)?;
        // More than one packet, and more than one segment of an offloaded one.
        let long = "z".repeat(1300);
        expect("long udp", &a.get(&format!("udp://{to}:9001/{long}"))?, &long)?;
    }
    Ok(())
}

fn pods_reach_a_service_by_address(world: &World) -> Result<()> {
    let (a, _) = world.two_pods()?;
    let names: BTreeSet<String> = world.pods()?.into_iter().map(|p| p.name).collect();
    let (v4, v6) = world.vips()?;
    for vip in [v4, format!("[{v6}]")] {
        for url in
            [format!("http://{vip}/"), format!("tcp://{vip}:9000"), format!("udp://{vip}:9001")]
        {
            let load = world.pod_load(&a, &url, &["--secs", "1", "--rate", "100"])?;
            let report = load.wait()?;
            report.none_failed()?;
            let hosts: BTreeSet<String> = report.hosts.into_keys().collect();
            ensure!(hosts == names, "{url} was answered by {hosts:?}, not by all of {names:?}");
        }
    }
    Ok(())
}

fn pods_reach_a_service_by_name(world: &World) -> Result<()> {
    let (a, b) = world.two_pods()?;
    for name in ["web", "web.default", "web.default.svc", "web.default.svc.cluster.local"] {
        expect(name, &a.get(&format!("http://{name}/"))?, "\"host\":\"web-")?;
    }
    expect("tcp", &a.get("tcp://web:9000/whoami")?, "web-")?;
    expect("udp", &a.get("udp://web:9001/whoami")?, "web-")?;
    let (v4, v6) = world.vips()?;
    let name = "web.default.svc.cluster.local";
    for dns in ["10.96.0.10", "[fd10:96::a]"] {
        expect("A", &b.get(&format!("dns://{dns}/{name}"))?, &v4)?;
        expect("AAAA", &b.get(&format!("dns://{dns}/{name}?AAAA"))?, &v6)?;
    }
    ensure!(
        a.get("dns://10.96.0.10/none.default.svc.cluster.local").is_err(),
        "there is no such name"
    );
    // Another program's resolver, which reads /etc/resolv.conf by itself.
    expect("nslookup", &a.exec(&["/bin/nslookup", name])?, &v4).map(drop)
}

fn a_node_reaches_a_service(world: &World) -> Result<()> {
    let (v4, v6) = world.vips()?;
    for node in world.cluster.nodes() {
        for url in [format!("http://{v4}/"), format!("http://[{v6}]/")] {
            let answer = node.exec(&["curl", "-fsSg", "-m", "5", &url])?;
            expect(&format!("{url} on {}", node.name()), &answer, "\"host\":\"web-")?;
        }
    }
    Ok(())
}

fn the_client_address_is_kept(world: &World) -> Result<()> {
    let (a, b) = world.two_pods()?;
    let direct = a.get(&format!("http://{}:8080/", b.v4()?))?;
    expect("direct", &direct, &format!("{}:", a.v4()?))?;
    let (vip, _) = world.vips()?;
    expect("service", &a.get(&format!("http://{vip}/"))?, &format!("{}:", a.v4()?))?;
    let own = world.cluster.subnet().control().0.to_string();
    let through = world.curl(&world.cluster.node(2), "/", &[])?;
    expect("ingress", &through, &format!("\"x-forwarded-for\":\"{own}\""))
}

fn ingress_answers_on_every_node(world: &World) -> Result<()> {
    let folder = world.scratch("ingress")?;
    let (body, back) = (folder.join("body"), folder.join("back"));
    fs::write(&body, "0123456789abcdef".repeat(1 << 16))?;
    for node in world.cluster.nodes() {
        expect("route", &world.curl(&node, "/some/path?q=1", &[])?, "\"path\":\"/some/path\"")?;
        let (v4, v6) = node.addresses();
        let status = |url: String, more: &[&str]| {
            let mut curl = Command::new("curl");
            curl.args(["-sS", "-m", "5", "-g", "-o", "/dev/null", "-w", "%{http_code}"]);
            output(curl.args(more).arg(url))
        };
        let host = format!("Host: {HOST}");
        expect("no route", &status(format!("http://{v4}/"), &["-H", "Host: none.test"])?, "404")?;
        expect("IPv6", &status(format!("http://[{v6}]/"), &["-H", &host])?, "200")?;
        let h2 = ["-H", &host, "--http2-prior-knowledge"];
        expect("HTTP/2", &status(format!("http://{v4}/"), &h2)?, "200")?;
        let upload = format!("@{}", body.display());
        let into = back.display().to_string();
        world.curl(&node, "/echo", &["--data-binary", &upload, "-o", &into])?;
        ensure!(fs::read(&body)? == fs::read(&back)?, "a body of 1 MiB comes back changed");
    }
    websocket(world)
}

fn websocket(world: &World) -> Result<()> {
    let mut curl = Command::new("curl");
    curl.args(["-sS", "-i", "-N", "-m", "2", "--http1.1", "-H", &format!("Host: {HOST}")]);
    curl.args(["-H", "Connection: Upgrade", "-H", "Upgrade: websocket"]);
    curl.args([
        "-H",
        "Sec-WebSocket-Version: 13",
        "-H",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ]);
    let url = format!("http://{}/ws", world.cluster.node(1).addresses().0);
    // The connection stays open, so curl ends by its time limit: only what came matters.
    let out = curl.arg(url).output()?;
    let head = String::from_utf8_lossy(&out.stdout).to_ascii_lowercase();
    expect("upgrade", &head, "http/1.1 101")?;
    expect("accept key", &head, &"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=".to_ascii_lowercase())
}

fn the_underlay_never_shows_a_payload(world: &World) -> Result<()> {
    const CANARY: &str = "canary-7f3a9c51d2e84b60";
    const PLAIN: &str = "control-7f3a9c51d2e84b60";
    let folder = world.scratch("capture")?;
    let (a, b) = world.two_pods()?;
    let captures = [
        Capture::start(&a.node.layout().port, &folder)?,
        Capture::start(&b.node.layout().port, &folder)?,
    ];
    for to in [b.v4()?.to_owned(), format!("[{}]", b.v6()?)] {
        for url in ["http", "tcp", "udp"] {
            let port = match url {
                "http" => 8080,
                "tcp" => 9000,
                _ => 9001,
            };
            expect(url, &a.get(&format!("{url}://{to}:{port}/{CANARY}"))?, CANARY)?;
        }
    }
    let (vip, _) = world.vips()?;
    for _ in 0..6 {
        expect("service", &a.get(&format!("http://{vip}/{CANARY}"))?, CANARY)?;
    }
    // What is sent in the clear from node to node must be seen, or the capture proves nothing.
    let plain = format!("udp://{}:9/{PLAIN}", b.node.addresses().0);
    let hello = world.artifacts.hello.display().to_string();
    let _ = a.node.exec(&[&hello, "get", &plain]);
    std::thread::sleep(Duration::from_millis(300));
    for capture in captures {
        let seen = capture.finish()?;
        ensure!(contains(&seen, PLAIN.as_bytes()), "the capture does not see the underlay");
        ensure!(!contains(&seen, CANARY.as_bytes()), "the payload is readable on the underlay");
    }
    Ok(())
}

fn a_pod_cannot_lie_about_its_address(world: &World) -> Result<()> {
    let (a, b) = world.two_pods()?;
    // The capability to do so is taken from containers, so this is done from outside.
    let foreign = "10.244.250.250";
    let inside = |words: &[&str]| output(&mut a.network_command(words)?);
    let address = format!("{foreign}/32");
    inside(&["ip", "addr", "add", &address, "dev", "eth0"])?;
    let ping = |from: &str| {
        inside(&["ping", "-q", "-c", "2", "-i", "0.2", "-W", "1", "-I", from, b.v4()?])
    };
    let lie = ping(foreign);
    let truth = ping(a.v4()?);
    inside(&["ip", "addr", "del", &address, "dev", "eth0"])?;
    truth?;
    ensure!(lie.is_err(), "a packet with another pod's address was answered");
    Ok(())
}
