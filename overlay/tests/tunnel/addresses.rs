//! A node with several addresses, behind a firewall that lets in what was asked for and nothing else.

use std::process::Command;

use crate::traffic::echo;
use crate::world::{Side, World, privileged};

#[test]
fn what_is_sent_to_an_address_is_answered_from_it_while_the_node_has_it() {
    if !privileged() {
        return;
    }
    for v6 in [false, true] {
        let (second, prefix, family) =
            if v6 { ("fd00:a::12", 64, "ip6") } else { ("192.0.2.12", 24, "ip") };
        let mut world = World::new();
        let nodad = if v6 { "nodad" } else { "" };
        world.ip("node", Side::B, &format!("addr add {second}/{prefix} dev ul0 {nodad}"));
        // Not from where the system sends when it may choose.
        let (node, first) = (world.name("node", Side::A), Side::B.underlay(v6));
        let nft = |rules: &str| {
            let done = Command::new("ip").args(["netns", "exec", &node, "nft", rules]).status();
            assert!(done.unwrap().success(), "{rules}");
        };
        nft(&format!(
            "table inet firewall {{ chain in {{ type filter hook input priority 0; \
             {family} saddr {first} udp dport 51900 drop; }}; }}"
        ));
        let mut configs = [world.config(Side::A, v6), world.config(Side::B, v6)];
        configs[0].peers[0].endpoints[0].set_ip(second.parse().unwrap());
        configs[1].peers[0].endpoints.clear();
        world.connect_with(&configs);
        echo(&world, Side::A, false, 7001);
        let at = world.status(Side::A).peers[0].endpoint.unwrap().ip();
        assert_eq!(at.to_string(), second);

        // The address goes. What the node says next comes from another one, and the other side follows.
        nft("delete table inet firewall");
        world.ip("node", Side::B, &format!("addr del {second}/{prefix} dev ul0"));
        echo(&world, Side::B, false, 7002);
        assert_eq!(world.status(Side::A).peers[0].endpoint.unwrap().ip(), first);
        assert_eq!(world.status(Side::B).drops.get(&mesh_overlay::DropReason::SendFailed), None);
    }
}
