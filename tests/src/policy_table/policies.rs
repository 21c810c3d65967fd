//! Policies by a seed: the same seed, the same policies.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::{Value, json};

use super::{Member, NAMESPACES, PODS};

/// Policies in a set; the one with number `i` lies in namespace `i % 3`, so that the next set replaces all of them.
pub const COUNT: usize = 6;

/// Draws a set of policies for pods with these addresses.
pub fn draw(seed: u64, members: &[Member]) -> Vec<Value> {
    let mut luck = Luck(seed);
    (0..COUNT)
        .map(|number| {
            let mut spec = json!({"podSelector": pods(&mut luck)});
            if luck.below(3) > 0 {
                let types = [&["Ingress"][..], &["Egress"], &["Ingress", "Egress"]];
                spec["policyTypes"] = json!(types[luck.below(3)]);
            }
            spec["ingress"] = rules(&mut luck, "from", members);
            spec["egress"] = rules(&mut luck, "to", members);
            json!({
                "apiVersion": "networking.k8s.io/v1",
                "kind": "NetworkPolicy",
                "metadata": {"name": format!("p{number}"), "namespace": NAMESPACES[number % 3]},
                "spec": spec,
            })
        })
        .collect()
}

/// Numbers that follow from a seed (splitmix64).
struct Luck(u64);

impl Luck {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) % bound as u64) as usize
    }

    fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}

fn pods(luck: &mut Luck) -> Value {
    selector(luck, "pod", &PODS)
}

fn namespaces(luck: &mut Luck) -> Value {
    let key = *luck.one(&["ns", "kubernetes.io/metadata.name"]);
    selector(luck, key, &NAMESPACES)
}

fn selector(luck: &mut Luck, key: &str, values: &[&str; 3]) -> Value {
    let value = *luck.one(values);
    match luck.below(6) {
        0 => json!({}),
        1 | 2 => json!({"matchLabels": {key: value}}),
        3 => {
            json!({"matchExpressions": [{"key": key, "operator": "In", "values": [value, luck.one(values)]}]})
        }
        4 => json!({"matchExpressions": [{"key": key, "operator": "NotIn", "values": [value]}]}),
        _ => {
            let operator = luck.one(&["Exists", "DoesNotExist"]);
            json!({"matchExpressions": [{"key": "tier", "operator": operator}]})
        }
    }
}

fn rules(luck: &mut Luck, peers: &str, members: &[Member]) -> Value {
    let rules = (0..luck.below(3)).map(|_| {
        let list: Vec<Value> = (0..luck.below(3)).map(|_| peer(luck, members)).collect();
        // What a name stands for outside of pods nobody says.
        let names = list.iter().all(|peer| peer.get("ipBlock").is_none());
        let ports: Vec<Value> = (0..luck.below(3)).map(|_| port(luck, names)).collect();
        json!({peers: list, "ports": ports})
    });
    rules.collect()
}

fn peer(luck: &mut Luck, members: &[Member]) -> Value {
    match luck.below(4) {
        0 => json!({"podSelector": pods(luck)}),
        1 => json!({"namespaceSelector": namespaces(luck)}),
        2 => json!({"podSelector": pods(luck), "namespaceSelector": namespaces(luck)}),
        _ => json!({"ipBlock": block(luck, members)}),
    }
}

/// All pods of a family, those of a node, or one; some without another one of them.
fn block(luck: &mut Luck, members: &[Member]) -> Value {
    let family = luck.below(2);
    let one = luck.one(members).addresses[family];
    let bits = match (luck.below(3), one) {
        (0, _) => 0,
        (1, IpAddr::V4(_)) => 24,
        (1, IpAddr::V6(_)) => 64,
        _ => return json!({"cidr": host(one)}),
    };
    let base = network(one, bits);
    let all = members.iter().map(|m| m.addresses[family]);
    let within: Vec<IpAddr> = all.filter(|a| network(*a, bits) == base).collect();
    let except: Vec<String> = (0..luck.below(2)).map(|_| host(*luck.one(&within))).collect();
    json!({"cidr": format!("{base}/{bits}"), "except": except})
}

/// The address with all bits cleared but the first ones.
fn network(address: IpAddr, bits: u32) -> IpAddr {
    match address {
        IpAddr::V4(a) => {
            let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
            Ipv4Addr::from(u32::from(a) & mask).into()
        }
        IpAddr::V6(a) => {
            let mask = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
            Ipv6Addr::from(u128::from(a) & mask).into()
        }
    }
}

fn host(address: IpAddr) -> String {
    format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 })
}

fn port(luck: &mut Luck, names: bool) -> Value {
    let protocol = *luck.one(&["TCP", "UDP", "SCTP"]);
    let first = 70 + luck.below(12);
    match luck.below(if names { 4 } else { 3 }) {
        0 => json!({"protocol": protocol}),
        1 => json!({"protocol": protocol, "port": 80 + luck.below(2)}),
        2 => json!({"protocol": protocol, "port": first, "endPort": first + luck.below(10)}),
        _ => json!({"protocol": *luck.one(&["TCP", "UDP"]), "port": "serve"}),
    }
}

/// The nine on three nodes, with addresses as a cluster gives them.
#[cfg(test)]
pub(crate) fn sample_members() -> Vec<Member> {
    let all = Member::all(|namespace, name| {
        let node = NAMESPACES.iter().position(|ns| *ns == namespace).unwrap();
        let pod = 10 + PODS.iter().position(|pod| *pod == name).unwrap();
        let v4 = format!("10.244.{node}.{pod}").parse()?;
        Ok::<_, std::net::AddrParseError>([v4, format!("fd10:244:0:{node}::{pod}").parse()?])
    });
    all.unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_policies_each_time_and_another_gives_others() {
        let members = sample_members();
        assert_eq!(draw(7, &members), draw(7, &members));
        assert_ne!(draw(7, &members), draw(8, &members));
        let text =
            serde_json::to_string(&(0..50).map(|seed| draw(seed, &members)).collect::<Vec<_>>());
        let text = text.unwrap();
        for part in [
            "except\":[\"",
            "endPort",
            "serve",
            "NotIn",
            "SCTP",
            "namespaceSelector",
            "::/0",
            "/64",
            "/24",
        ] {
            assert!(text.contains(part), "never drawn: {part}");
        }
    }
}
