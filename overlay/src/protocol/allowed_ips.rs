//! Which peer an address belongs to: longest prefix wins (WG section 3).

use std::net::IpAddr;

use ipnet::IpNet;

/// An immutable table from prefixes to peers, numbered by their place in the peer table.
///
/// The nested prefixes are flattened into ranges that do not overlap, so that a look-up is one binary search over
/// contiguous memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowedIps {
    v4: Ranges,
    v6: Ranges,
}

/// Starts of ranges, ascending; each ends where the next one starts.
type Ranges = Vec<(u128, Option<u32>)>;

impl AllowedIps {
    /// Builds the table. A prefix that is listed more than once belongs to the last that lists it.
    pub fn new(prefixes: impl IntoIterator<Item = (IpNet, u32)>) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for (prefix, peer) in prefixes {
            let range = (bits(prefix.network()), bits(prefix.broadcast()), peer);
            if prefix.addr().is_ipv4() { v4.push(range) } else { v6.push(range) }
        }
        Self { v4: flatten(v4), v6: flatten(v6) }
    }

    /// The peer that the address belongs to.
    pub fn lookup(&self, address: IpAddr) -> Option<u32> {
        let ranges = if address.is_ipv4() { &self.v4 } else { &self.v6 };
        let address = bits(address);
        let after = ranges.partition_point(|&(start, _)| start <= address);
        after.checked_sub(1).and_then(|place| ranges[place].1)
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// Sweeps over prefixes (first address, last address, peer), the open ones on a stack: the innermost owns the
/// addresses. Prefixes nest or are disjoint, they never cross.
fn flatten(mut prefixes: Vec<(u128, u128, u32)>) -> Ranges {
    // Stable: among equal prefixes the last one ends on top of the stack.
    prefixes.sort_by_key(|&(first, last, _)| (first, std::cmp::Reverse(last)));
    let mut ranges = Ranges::new();
    let mut open: Vec<(u128, u32)> = Vec::new();
    for (first, last, peer) in prefixes {
        close_before(first, &mut open, &mut ranges);
        open.push((last, peer));
        begin(first, Some(peer), &mut ranges);
    }
    while let Some((last, _)) = open.pop() {
        end_at(last, &open, &mut ranges);
    }
    ranges
}

fn close_before(first: u128, open: &mut Vec<(u128, u32)>, ranges: &mut Ranges) {
    while let Some(&(last, _)) = open.last()
        && last < first
    {
        open.pop();
        end_at(last, open, ranges);
    }
}

/// After `last`, the addresses belong to what is still open around.
fn end_at(last: u128, open: &[(u128, u32)], ranges: &mut Ranges) {
    if let Some(next) = last.checked_add(1) {
        begin(next, open.last().map(|&(_, peer)| peer), ranges);
    }
}

fn begin(start: u128, peer: Option<u32>, ranges: &mut Ranges) {
    match ranges.last_mut() {
        Some(range) if range.0 == start => range.1 = peer,
        _ => ranges.push((start, peer)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table(prefixes: &[(&str, u32)]) -> AllowedIps {
        AllowedIps::new(prefixes.iter().map(|&(p, peer)| (p.parse().unwrap(), peer)))
    }

    #[test]
    fn the_longest_prefix_wins() {
        let table = table(&[
            ("10.0.0.0/8", 0),
            ("10.244.0.0/16", 1),
            ("10.244.3.0/24", 2),
            ("10.244.3.7/32", 3),
            ("fd10:244:0:3::/64", 2),
            ("::/0", 4),
        ]);
        for (address, peer) in [
            ("10.1.2.3", Some(0)),
            ("10.244.2.255", Some(1)),
            ("10.244.3.6", Some(2)),
            ("10.244.3.7", Some(3)),
            ("10.244.3.8", Some(2)),
            ("10.244.4.0", Some(1)),
            ("11.0.0.0", None),
            ("9.255.255.255", None),
            ("fd10:244:0:3::1", Some(2)),
            ("fd10:244:0:4::1", Some(4)),
            ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Some(4)),
        ] {
            assert_eq!(table.lookup(address.parse().unwrap()), peer, "{address}");
        }
    }

    #[test]
    fn an_empty_table_and_whole_families() {
        assert_eq!(table(&[]).lookup("10.0.0.1".parse().unwrap()), None);
        let all = table(&[("0.0.0.0/0", 7)]);
        assert_eq!(all.lookup("255.255.255.255".parse().unwrap()), Some(7));
        assert_eq!(all.lookup("::1".parse().unwrap()), None, "families do not mix");
    }

    /// Addresses and prefixes from a small space, so that they meet.
    fn prefix() -> impl Strategy<Value = IpNet> {
        let v4 = (any::<u8>(), 0u8..=32).prop_map(|(low, len)| {
            let address = std::net::Ipv4Addr::from_bits(0x0af4_0000 | u32::from(low) << 5);
            ipnet::Ipv4Net::new(address, len).unwrap().trunc().into()
        });
        let v6 = (any::<u8>(), 0u8..=128).prop_map(|(low, len)| {
            let address = std::net::Ipv6Addr::from_bits(0xfd10 << 112 | u128::from(low) << 61);
            ipnet::Ipv6Net::new(address, len).unwrap().trunc().into()
        });
        prop_oneof![v4, v6]
    }

    proptest! {
        #[test]
        fn as_a_plain_scan_would_say(
            prefixes in prop::collection::vec((prefix(), 0u32..20), 0..60),
            probes in prop::collection::vec((prefix(), any::<bool>()), 1..60),
        ) {
            let table = AllowedIps::new(prefixes.clone());
            for (probe, last) in probes {
                let address = if last { probe.broadcast() } else { probe.network() };
                let expected = prefixes.iter().enumerate()
                    .filter(|(_, (p, _))| p.contains(&address))
                    .max_by_key(|(place, (p, _))| (p.prefix_len(), *place))
                    .map(|(_, (_, peer))| *peer);
                prop_assert_eq!(table.lookup(address), expected, "{}", address);
            }
        }
    }
}
