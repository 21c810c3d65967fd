//! Interface names and MAC addresses: 15 bytes and 6 bytes with rules.

use std::fmt;
use std::str::FromStr;

/// Name of a network interface: 1 to 15 bytes, no slash, no white space, not `.` or `..` (`dev_valid_name` in Linux).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IfName(String);

/// The text cannot name an interface.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid interface name {0:?}: 1 to 15 bytes without slash, colon or white space")]
pub struct InvalidIfName(pub String);

impl IfName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Name of the host-side veth of a pod's interface: `mv` and 12 hexadecimal digits, the same for the same input.
    pub fn for_pod(container_id: &str, interface: &str) -> Self {
        let hash = fnv1a(&[container_id, "\0", interface]);
        Self(format!("mv{:012x}", hash & 0xffff_ffff_ffff))
    }
}

impl FromStr for IfName {
    type Err = InvalidIfName;

    fn from_str(text: &str) -> Result<Self, InvalidIfName> {
        let valid = (1..=15).contains(&text.len())
            && text != "."
            && text != ".."
            && !text.bytes().any(|b| b == b'/' || b == b':' || b == 0 || b.is_ascii_whitespace());
        if valid { Ok(Self(text.to_owned())) } else { Err(InvalidIfName(text.to_owned())) }
    }
}

impl fmt::Display for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A MAC address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// A locally administered unicast address, the same for the same words.
    pub fn derived(words: &[&str]) -> Self {
        let [_, _, a, b, c, d, e, f] = fnv1a(words).to_be_bytes();
        Self([(a & 0xfc) | 0x02, b, c, d, e, f])
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// FNV-1a, 64 bits, with a final mix so that the low bits are good too. Names only: no adversary gains by a collision,
/// because creating an interface whose name exists fails.
fn fnv1a(words: &[&str]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in words.iter().flat_map(|word| word.bytes().chain([0xff])) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash ^= hash >> 29;
    hash = hash.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash ^ (hash >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_kernel() {
        assert!("eth0".parse::<IfName>().is_ok());
        for bad in ["", ".", "..", "a/b", "a b", "sixteen-bytes-xx"] {
            assert_eq!(bad.parse::<IfName>(), Err(InvalidIfName(bad.to_owned())));
        }
    }

    #[test]
    fn pod_names_are_valid_stable_and_distinct() {
        let one = IfName::for_pod("abc", "eth0");
        assert_eq!(one, IfName::for_pod("abc", "eth0"));
        assert_ne!(one, IfName::for_pod("abc", "eth1"));
        assert_ne!(one, IfName::for_pod("abce", "th0"));
        assert!(one.as_str().parse::<IfName>().is_ok());
    }

    #[test]
    fn derived_macs_are_local_unicast() {
        let mac = MacAddress::derived(&["pod", "abc"]);
        assert_eq!(mac.0[0] & 3, 2);
        assert_ne!(mac, MacAddress::derived(&["host", "abc"]));
    }
}
