//! What stands for machines and cables: a bridge, network namespaces, and a veth pair for each node.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::command::{run, succeeds};
use crate::layout::{Layout, NodeLayout, Subnet};

/// MTU of the cables.
pub const MTU: u16 = 1500;

/// Makes the bridge and its addresses; leaves what is there already.
pub fn make_bridge(layout: &Layout, subnet: Subnet) -> Result<()> {
    refuse_conflicts(layout, subnet)?;
    let bridge = layout.bridge();
    if !link_exists(&bridge) {
        run("ip", &["link", "add", &bridge, "type", "bridge"])?;
    }
    // With br_netfilter loaded, the host's firewall would otherwise judge what passes a cable.
    for setting in ["nf_call_iptables", "nf_call_ip6tables", "nf_call_arptables"] {
        let _ = run("ip", &["link", "set", &bridge, "type", "bridge", setting, "0"]);
    }
    let (v4, v6) = subnet.control();
    add_addresses(&[], &bridge, v4, v6)?;
    run("ip", &["link", "set", &bridge, "mtu", &MTU.to_string(), "up"]).map(drop)
}

/// Makes a node's namespace with `eth0` in it, joined to the bridge; leaves what is there already.
pub fn make_node(layout: &Layout, node: &NodeLayout, subnet: Subnet) -> Result<()> {
    if !node.netns_path().exists() {
        run("ip", &["netns", "add", &node.netns])?;
    }
    if !link_exists(&node.port) {
        let (port, netns) = (node.port.as_str(), node.netns.as_str());
        let mtu = MTU.to_string();
        run(
            "ip",
            &[
                "link", "add", port, "mtu", &mtu, "type", "veth", "peer", "name", "eth0", "mtu",
                &mtu, "netns", netns,
            ],
        )?;
    }
    run("ip", &["link", "set", &node.port, "master", &layout.bridge(), "up"])?;
    let inside = ["-n", node.netns.as_str()];
    run("ip", &["-n", &node.netns, "link", "set", "lo", "up"])?;
    let (v4, v6) = subnet.node(node.number);
    add_addresses(&inside, "eth0", v4, v6)?;
    run("ip", &["-n", &node.netns, "link", "set", "eth0", "up"]).map(drop)
}

/// Removes the bridge, and every namespace and device with the cluster's names. Nothing there is fine.
pub fn remove(layout: &Layout) -> Result<()> {
    for netns in namespaces(layout) {
        run("ip", &["netns", "del", &netns])?;
    }
    for name in devices(layout)? {
        // A device goes away with the other end of its cable.
        let removed = run("ip", &["link", "del", &name]);
        if link_exists(&name) {
            removed.with_context(|| format!("remove device {name}"))?;
        }
    }
    Ok(())
}

/// The bridge and the cables' ends at it.
pub fn devices(layout: &Layout) -> Result<Vec<String>> {
    let (bridge, prefix) = (layout.bridge(), format!("{}-", layout.bridge()));
    let is_ours = |name: &String| *name == bridge || name.starts_with(&prefix);
    Ok(links()?.into_iter().filter(is_ours).collect())
}

/// Names of the cluster's network namespaces.
pub fn namespaces(layout: &Layout) -> Vec<String> {
    let prefix = layout.netns_prefix();
    let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|e| e.file_name().into_string().ok())
        .filter(|n| n.starts_with(&prefix))
        .collect();
    names.sort();
    names
}

fn links() -> Result<Vec<String>> {
    let entries = fs::read_dir("/sys/class/net").context("list devices")?;
    Ok(entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect())
}

fn link_exists(name: &str) -> bool {
    Path::new("/sys/class/net").join(name).exists()
        || succeeds("ip", &["link", "show", "dev", name])
}

fn add_addresses(inside: &[&str], device: &str, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<()> {
    let (bits4, bits6) = Subnet::PREFIX;
    let add = |address: String, extra: &[&str]| {
        // `replace` leaves an address alone that is there. No duplicate detection: it takes a second.
        let words = ["addr", "replace", address.as_str(), "dev", device];
        let all: Vec<&str> =
            inside.iter().copied().chain(words).chain(extra.iter().copied()).collect();
        run("ip", &all).map(drop)
    };
    add(format!("{v4}/{bits4}"), &[])?;
    add(format!("{v6}/{bits6}"), &["nodad"])
}

/// An index whose subnet no route of this machine covers, for a cluster that may live anywhere.
pub fn free_subnet(layout: &Layout, from: u8) -> Result<Subnet> {
    let routes = routes()?;
    (from..=250)
        .map(Subnet)
        .find(|s| conflict(&routes, layout, *s).is_none())
        .context("all of 10.213.0.0/16 is routed elsewhere on this machine")
}

fn refuse_conflicts(layout: &Layout, subnet: Subnet) -> Result<()> {
    match conflict(&routes()?, layout, subnet) {
        None => Ok(()),
        Some((route, device)) => bail!(
            "the underlay {}/24 is taken: this machine has a route to {route} by {device}; \
             remove that route, or choose another subnet with --subnet N",
            subnet.network().0
        ),
    }
}

fn routes() -> Result<Vec<Value>> {
    let mut all = Vec::new();
    for family in ["-4", "-6"] {
        let text = run("ip", &["-j", family, "route", "show"])?;
        let list: Vec<Value> = serde_json::from_str(text.trim()).unwrap_or_default();
        all.extend(list);
    }
    Ok(all)
}

fn conflict(routes: &[Value], layout: &Layout, subnet: Subnet) -> Option<(String, String)> {
    let (v4, v6) = subnet.network();
    let ours = [(IpAddr::from(v4), Subnet::PREFIX.0), (IpAddr::from(v6), Subnet::PREFIX.1)];
    routes.iter().find_map(|route| {
        let (to, device) = (route["dst"].as_str()?, route["dev"].as_str().unwrap_or("?"));
        let prefix = parse_prefix(to)?;
        let taken = device != layout.bridge() && ours.iter().any(|o| overlap(*o, prefix));
        taken.then(|| (to.to_owned(), device.to_owned()))
    })
}

/// `None` for the default route, which every other one beats.
fn parse_prefix(text: &str) -> Option<(IpAddr, u8)> {
    let (address, bits) = match text.split_once('/') {
        Some((address, bits)) => (address, bits.parse().ok()),
        None => (text, None),
    };
    let address: IpAddr = address.parse().ok()?;
    Some((address, bits.unwrap_or(if address.is_ipv4() { 32 } else { 128 })))
}

fn overlap((a, a_bits): (IpAddr, u8), (b, b_bits): (IpAddr, u8)) -> bool {
    let number = |address| match address {
        IpAddr::V4(a) => (u128::from(u32::from(a)) << 96, true),
        IpAddr::V6(a) => (u128::from(a), false),
    };
    let ((a, a_v4), (b, b_v4)) = (number(a), number(b));
    let bits = u32::from(a_bits.min(b_bits));
    a_v4 == b_v4 && (bits == 0 || a >> (128 - bits) == b >> (128 - bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_overlapping_routes_of_others_conflict() {
        let layout = Layout::new("dev").unwrap();
        let route = |dst: &str, dev: &str| serde_json::json!({"dst": dst, "dev": dev});
        let check = |r: Value| conflict(&[r], &layout, Subnet(3)).is_some();
        assert!(!check(route("default", "eth0")));
        assert!(!check(route("10.213.4.0/24", "eth0")));
        assert!(!check(route("10.213.3.0/24", "mesh-dev")), "our own");
        assert!(!check(route("fd00::/64", "eth0")));
        assert!(check(route("10.213.3.0/24", "eth1")));
        assert!(check(route("10.0.0.0/8", "tun0")));
        assert!(check(route("10.213.3.77", "tun0")));
        assert!(check(route("fd00:213::/32", "tun0")));
    }
}
