//! Ports of the node that lead to pods, in an nftables table of our own.
//!
//! The table is written as a whole, by `nft`, when an agent starts and when somebody has changed it; a pod's ports are elements of its
//! maps, added and deleted by one netlink message each way, in one transaction. It outlives the agent.
//!
//! Loopback addresses are left out: they would need `route_localnet`, which opens what listens there to neighbours.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::process::{Command, Stdio};

use mesh_model::snapshot::Protocol;
use mesh_model::wellknown::{NODE_LOCAL_ADDRESS_V6, OVERLAY_DEVICE};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    socket,
};

/// Name of the table.
pub const PORTS_TABLE: &str = "mesh-ports";

/// A port of the node that leads to a pod.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPort {
    /// Which protocol.
    pub protocol: Protocol,
    /// The node's address; all of them when it is absent or unspecified.
    pub address: Option<IpAddr>,
    /// The node's port.
    pub port: u16,
    /// The pod's port.
    pub pod_port: u16,
}

/// What a packet has to be for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    v4: bool,
    address: Option<IpAddr>,
    protocol: u8,
    port: u16,
}

/// All entries of the table: where packets go.
pub(super) type Entries = BTreeMap<Key, SocketAddr>;

/// The entries for a pod with these addresses.
pub(super) fn entries(ports: &[HostPort], addresses: &[IpAddr]) -> Entries {
    let mut all = Entries::new();
    for port in ports {
        for pod in addresses {
            if port.address.is_some_and(|address| address.is_ipv4() != pod.is_ipv4()) {
                continue;
            }
            let key = Key {
                v4: pod.is_ipv4(),
                address: port.address.filter(|address| !address.is_unspecified()),
                protocol: port.protocol.number(),
                port: port.port,
            };
            all.insert(key, SocketAddr::new(*pod, port.pod_port));
        }
    }
    all
}

/// The first of `new` that somebody else has: exactly, or because one of them means all addresses.
pub(super) fn conflict(present: &Entries, new: &Entries) -> Option<Key> {
    let collide = |a: &Key, b: &Key| {
        (a.v4, a.protocol, a.port) == (b.v4, b.protocol, b.port)
            && (a.address.is_none() || b.address.is_none() || a.address == b.address)
    };
    let taken = |key: &Key, to: &SocketAddr| {
        present.iter().any(|(other, there)| collide(key, other) && there.ip() != to.ip())
    };
    new.iter().find(|(key, to)| taken(key, to)).map(|(key, _)| *key)
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let protocol = match self.protocol {
            6 => "tcp",
            17 => "udp",
            _ => "sctp",
        };
        match self.address {
            Some(address) => write!(f, "{}/{protocol}", SocketAddr::new(address, self.port)),
            None => write!(f, "{}/{protocol}", self.port),
        }
    }
}

impl Key {
    fn map(&self) -> &'static str {
        match (self.v4, self.address.is_some()) {
            (true, false) => "any4",
            (true, true) => "at4",
            (false, false) => "any6",
            (false, true) => "at6",
        }
    }

    fn text(&self) -> String {
        let address = self.address.map(|a| format!("{a} . ")).unwrap_or_default();
        format!("{address}{} . {}", self.protocol, self.port)
    }

    /// Each part fills whole registers of four bytes.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.address.map(address_bytes).unwrap_or_default();
        bytes.extend([self.protocol, 0, 0, 0]);
        bytes.extend(port_bytes(self.port));
        bytes
    }
}

fn address_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn port_bytes(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

fn target_bytes(to: SocketAddr) -> Vec<u8> {
    let mut bytes = address_bytes(to.ip());
    bytes.extend(port_bytes(to.port()));
    bytes
}

/// The whole table.
fn ruleset(entries: &Entries) -> String {
    let mut maps = String::new();
    for (map, key, target) in [
        ("any4", "inet_proto . inet_service", "ipv4_addr . inet_service"),
        ("at4", "ipv4_addr . inet_proto . inet_service", "ipv4_addr . inet_service"),
        ("any6", "inet_proto . inet_service", "ipv6_addr . inet_service"),
        ("at6", "ipv6_addr . inet_proto . inet_service", "ipv6_addr . inet_service"),
    ] {
        let own = entries.iter().filter(|(key, _)| key.map() == map);
        let own: Vec<String> =
            own.map(|(key, to)| format!("{} : {} . {}", key.text(), to.ip(), to.port())).collect();
        let elements = match own.join(", ") {
            none if none.is_empty() => String::new(),
            some => format!(" elements = {{ {some} }};"),
        };
        let _ = writeln!(maps, "  map {map} {{ type {key} : {target};{elements} }}");
    }
    let mut hooks = String::new();
    for (chain, hook) in
        [("prerouting", "prerouting priority dstnat"), ("output", "output priority -100")]
    {
        let _ = writeln!(
            hooks,
            "  chain {chain} {{ type nat hook {hook}; policy accept;\n    \
             ip daddr {{ 127.0.0.0/8, 169.254.0.0/16 }} return\n    \
             ip6 daddr {{ ::1, {NODE_LOCAL_ADDRESS_V6} }} return\n    \
             fib daddr type local jump ports\n  }}"
        );
    }
    // A pod answers another pod past the node's stack, which alone knows whom the question was for: so it has to answer the node.
    format!(
        "add table inet {PORTS_TABLE}\ndelete table inet {PORTS_TABLE}\ntable inet {PORTS_TABLE} {{\n{maps}  \
         chain ports {{\n    \
         meta l4proto != {{ tcp, udp, sctp }} return\n    \
         dnat ip to ip daddr . meta l4proto . th dport map @at4\n    \
         dnat ip to meta l4proto . th dport map @any4\n    \
         dnat ip6 to ip6 daddr . meta l4proto . th dport map @at6\n    \
         dnat ip6 to meta l4proto . th dport map @any6\n  }}\n{hooks}  \
         chain postrouting {{ type nat hook postrouting priority srcnat; policy accept;\n    \
         oifname \"mv*\" iifname \"mv*\" ct status dnat masquerade\n    \
         oifname \"mv*\" iifname \"{OVERLAY_DEVICE}\" ct status dnat masquerade\n  }}\n}}\n"
    )
}

/// Replaces the table, in one transaction, or takes it away when there is nothing in it. In the calling thread's namespace.
pub(super) fn replace(entries: &Entries) -> io::Result<()> {
    if entries.is_empty() {
        return nft(&format!("add table inet {PORTS_TABLE}\ndelete table inet {PORTS_TABLE}\n"));
    }
    nft(&ruleset(entries))
}

fn nft(script: &str) -> io::Result<()> {
    let mut command = Command::new("nft");
    command.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // When it ended early, its own words say why.
        let _ = stdin.write_all(script.as_bytes());
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

/// Of `linux/netfilter/nfnetlink.h` and `nf_tables.h`, like all numbers below.
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 16;
const NFNL_MSG_BATCH_END: u16 = 17;
const NFT_MSG_NEWSETELEM: u16 = NFNL_SUBSYS_NFTABLES << 8 | 12;
const NFT_MSG_DELSETELEM: u16 = NFNL_SUBSYS_NFTABLES << 8 | 14;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NLA_F_NESTED: u16 = 1 << 15;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const CREATE: u16 = 0x400;
const NFPROTO_INET: u8 = 1;

/// Adds or deletes entries, all or none. In the calling thread's namespace.
pub(super) fn change(entries: &Entries, add: bool) -> io::Result<()> {
    if entries.is_empty() {
        return Ok(());
    }
    let mut bytes = vec![];
    let subsystem = NFNL_SUBSYS_NFTABLES;
    message(&mut bytes, NFNL_MSG_BATCH_BEGIN, REQUEST, 0, (0, subsystem), &[]);
    let (kind, flags) = if add { (NFT_MSG_NEWSETELEM, CREATE) } else { (NFT_MSG_DELSETELEM, 0) };
    let mut wanted = 0_u32;
    for (key, to) in entries {
        wanted += 1;
        let body = element(key, add.then_some(*to));
        message(&mut bytes, kind, REQUEST | ACK | flags, wanted, (NFPROTO_INET, 0), &body);
    }
    message(&mut bytes, NFNL_MSG_BATCH_END, REQUEST, wanted + 1, (0, subsystem), &[]);
    let netfilter = SockProtocol::NetlinkNetFilter;
    let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, netfilter)?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    send(fd.as_raw_fd(), &bytes, MsgFlags::empty())?;
    let mut buffer = vec![0; 16 << 10];
    let mut answered = 0;
    while answered < wanted {
        let length = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..length];
        while rest.len() >= 20 {
            let word = |at: usize| {
                u32::from_ne_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]])
            };
            let (size, code) = (word(0) as usize, word(16).cast_signed());
            if code != 0 {
                return Err(io::Error::from_raw_os_error(-code));
            }
            answered += 1;
            rest = rest.get(size.next_multiple_of(4).max(16)..).unwrap_or_default();
        }
    }
    Ok(())
}

/// A netlink message of netfilter: header, family and resource, attributes.
fn message(
    out: &mut Vec<u8>,
    kind: u16,
    flags: u16,
    sequence: u32,
    (family, resource): (u8, u16),
    body: &[u8],
) {
    out.extend((20 + low(body.len())).to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend(sequence.to_ne_bytes());
    out.extend([0; 4]);
    out.extend([family, 0]);
    out.extend(resource.to_be_bytes());
    out.extend(body);
}

fn element(key: &Key, to: Option<SocketAddr>) -> Vec<u8> {
    let value = |kind, bytes: &[u8]| nested(kind, &attribute(NFTA_DATA_VALUE, bytes));
    let mut element = value(NFTA_SET_ELEM_KEY, &key.bytes());
    element.extend(to.map(|to| value(NFTA_SET_ELEM_DATA, &target_bytes(to))).unwrap_or_default());
    let list = nested(NFTA_LIST_ELEM, &element);
    let name = |text: &str| [text.as_bytes(), &[0]].concat();
    [
        attribute(NFTA_SET_ELEM_LIST_TABLE, &name(PORTS_TABLE)),
        attribute(NFTA_SET_ELEM_LIST_SET, &name(key.map())),
        nested(NFTA_SET_ELEM_LIST_ELEMENTS, &list),
    ]
    .concat()
}

fn nested(kind: u16, body: &[u8]) -> Vec<u8> {
    attribute(kind | NLA_F_NESTED, body)
}

fn attribute(kind: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![];
    bytes.extend(u16::try_from(4 + body.len()).unwrap_or(u16::MAX).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(body);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn low(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(address: Option<&str>, port: u16) -> HostPort {
        let address = address.map(|a| a.parse().unwrap());
        HostPort { protocol: Protocol::Tcp, address, port, pod_port: 80 }
    }

    #[test]
    fn an_address_means_its_family_and_none_means_both() {
        let pod: [IpAddr; 2] = ["10.244.1.5".parse().unwrap(), "fd10::5".parse().unwrap()];
        assert_eq!(entries(&[port(None, 80)], &pod).len(), 2);
        for (address, map) in
            [("0.0.0.0", "any4"), ("192.0.2.1", "at4"), ("::", "any6"), ("2001:db8::1", "at6")]
        {
            let own = entries(&[port(Some(address), 80)], &pod);
            assert_eq!(own.keys().map(Key::map).collect::<Vec<_>>(), [map]);
        }
    }

    #[test]
    fn a_port_of_all_addresses_collides_with_one_of_a_single() {
        let (a, b): ([IpAddr; 1], [IpAddr; 1]) =
            (["10.0.0.2".parse().unwrap()], ["10.0.0.3".parse().unwrap()]);
        let present = entries(&[port(Some("192.0.2.1"), 80)], &a);
        assert!(conflict(&present, &entries(&[port(None, 80)], &b)).is_some());
        assert!(conflict(&present, &entries(&[port(None, 80)], &a)).is_none(), "its own");
        assert!(conflict(&present, &entries(&[port(None, 81)], &b)).is_none());
        let other = entries(&[port(Some("192.0.2.2"), 80)], &b);
        assert!(conflict(&present, &other).is_none());
        let key = conflict(&present, &entries(&[port(Some("192.0.2.1"), 80)], &b)).unwrap();
        assert_eq!(key.to_string(), "192.0.2.1:80/tcp");
    }

    /// As `nft` was seen to send it.
    #[test]
    fn an_element_is_as_nft_writes_it() {
        let own = entries(&[port(None, 80)], &["10.244.1.6".parse().unwrap()]);
        let (key, to) = own.first_key_value().unwrap();
        assert_eq!(key.bytes(), [6, 0, 0, 0, 0, 80, 0, 0]);
        assert_eq!(target_bytes(*to), [10, 244, 1, 6, 0, 80, 0, 0]);
        let bytes = element(key, None);
        assert_eq!(bytes[..4], [15, 0, 1, 0]);
        assert_eq!(bytes[4..14], *b"mesh-ports");
    }
}
