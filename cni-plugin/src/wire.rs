//! What plugin and agent say to each other: one JSON line each way, then the connection ends.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Longest request or answer: a garbage collection that names some ten thousand attachments.
pub const MAX_LINE_BYTES: u64 = 8 << 20;

/// Longest container id that is accepted: twice what containerd uses.
pub const MAX_CONTAINER_ID: usize = 128;

/// One interface of one container: what an address is leased to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Owner {
    /// `CNI_CONTAINERID`.
    pub container: String,
    /// `CNI_IFNAME`.
    pub interface: String,
}

impl Owner {
    /// An owner whose two parts obey the specification; the text says what is wrong.
    pub fn new(container: &str, interface: &str) -> Result<Self, String> {
        check_container(container)?;
        check_interface(interface)?;
        Ok(Self { container: container.to_owned(), interface: interface.to_owned() })
    }
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.container, self.interface)
    }
}

/// Whether a container id, or a network name, starts with a letter or digit and goes on with those, `_`, `.` or `-`.
pub fn is_identifier(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

/// Says what is wrong with a container id.
pub fn check_container(id: &str) -> Result<(), String> {
    if id.len() > MAX_CONTAINER_ID {
        return Err(format!("container id of {} characters, at most {MAX_CONTAINER_ID}", id.len()));
    }
    if is_identifier(id) {
        return Ok(());
    }
    Err(format!(
        "container id {id:?}: must start with a letter or digit and go on with those, '_', '.' or '-'"
    ))
}

/// Says what is wrong with an interface name (`dev_valid_name` in Linux).
pub fn check_interface(name: &str) -> Result<(), String> {
    let bad = |c: char| c == '/' || c == ':' || c == '\0' || c.is_whitespace() || c.is_control();
    let why = if name.is_empty() || name.len() > 15 {
        "must have 1 to 15 bytes"
    } else if name == "." || name == ".." {
        "is reserved"
    } else if name.contains(bad) {
        "must not contain '/', ':' or white space"
    } else {
        return Ok(());
    };
    Err(format!("interface name {name:?} {why}"))
}

/// The pod that containerd makes the network for (`K8S_POD_*` in `CNI_ARGS`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// What a runtime wants of an interface beyond having one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Wishes {
    /// Name of the network that it belongs to; a garbage collection is about one network.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub network: String,
    /// These addresses, at most one of each family, in the place of any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// This MAC address inside the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Ports of the node that lead to it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortMapping>,
    /// How much may pass it.
    #[serde(skip_serializing_if = "Bandwidth::is_unlimited")]
    pub bandwidth: Bandwidth,
}

/// A port of the node that leads to a port of the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// The node's port.
    pub host_port: u16,
    /// The pod's port.
    pub container_port: u16,
    /// The transport.
    pub protocol: Transport,
    /// The node's address; all of them when it is absent or unspecified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

/// A protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// Limits, in bits and bits per second; 0 is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Bandwidth {
    /// What the pod may receive in a second.
    pub ingress_rate: u64,
    /// And at once.
    pub ingress_burst: u64,
    /// What the pod may send in a second.
    pub egress_rate: u64,
    /// And at once.
    pub egress_burst: u64,
}

impl Bandwidth {
    /// Whether there is no limit in either direction.
    pub fn is_unlimited(&self) -> bool {
        self.ingress_rate == 0 && self.egress_rate == 0
    }
}

impl Wishes {
    /// Whether nothing is wanted at all.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Request {
    /// Make an interface.
    Add {
        /// For whom.
        owner: Owner,
        /// Path of the network namespace.
        netns: PathBuf,
        /// The pod, where containerd says so.
        pod: Option<PodName>,
        /// What is special about it.
        #[serde(default, skip_serializing_if = "Wishes::is_none")]
        wishes: Wishes,
    },
    /// Remove an interface and release its addresses.
    Del {
        /// Whose.
        owner: Owner,
    },
    /// Say whether all is there.
    Check {
        /// Whose.
        owner: Owner,
        /// Path of the network namespace.
        netns: PathBuf,
        /// Addresses that the runtime believes it has.
        addresses: Vec<IpAddr>,
    },
    /// Remove all interfaces of a network but these.
    Gc {
        /// The network's name.
        #[serde(default)]
        network: String,
        /// Those that are in use.
        keep: Vec<Owner>,
    },
    /// Say whether an ADD would work.
    Status,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Reply {
    /// It worked, and there is nothing to say.
    Done,
    /// The interface exists.
    Attached(Attachment),
    /// It did not work.
    Failed(Failure),
}

/// An interface, as a result describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// Name on the node.
    pub host_interface: String,
    /// MAC address on the node.
    pub host_mac: String,
    /// Name inside the pod.
    pub interface: String,
    /// MAC address inside the pod.
    pub mac: String,
    /// Path of the network namespace.
    pub netns: PathBuf,
    /// MTU of both ends.
    pub mtu: u32,
    /// Addresses, each with the gateway of its family.
    pub addresses: Vec<Address>,
}

/// An address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Address {
    /// The address; its prefix is the whole length.
    pub address: IpAddr,
    /// The gateway.
    pub gateway: IpAddr,
}

/// Why something did not work, as containerd gets to see it (specification, section "Error").
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// A [`Code`].
    pub code: u32,
    /// What went wrong.
    pub msg: String,
    /// More of it; may be empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl Failure {
    /// A failure with that code.
    pub fn new(code: Code, msg: impl Into<String>, details: impl Into<String>) -> Self {
        Self { code: code as u32, msg: msg.into(), details: details.into() }
    }
}

/// The one table of CNI error codes. Below 100: the specification's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Version not supported, or command not in that version.
    Version = 1,
    /// A key of the configuration is not served.
    UnsupportedField = 2,
    /// Environment.
    Environment = 4,
    /// Reading standard input, or writing.
    Io = 5,
    /// Not JSON, or not an object.
    Decode = 6,
    /// The configuration is wrong.
    Config = 7,
    /// `CNI_NETNS` is not the namespace of a container.
    Namespace = 8,
    /// Nothing is wrong with the request; it may work later.
    TryAgain = 11,
    /// STATUS: an ADD would fail.
    NotAvailable = 50,
    /// STATUS: existing containers are cut off, too.
    Limited = 51,
    /// The kernel refused.
    Kernel = 100,
    /// The interface exists already.
    Exists = 101,
    /// CHECK found something missing.
    Missing = 102,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_obey_the_specification() {
        assert!(Owner::new("abc_1.2-3", "eth0").is_ok());
        let long = "a".repeat(300);
        for id in ["", "-a", "a/b", "a b", "..", "../x", long.as_str()] {
            assert!(Owner::new(id, "eth0").is_err(), "{id}");
        }
        for name in ["", ".", "..", "a/b", "a:b", "a b", "sixteen-bytes-xx", "a\u{a0}b"] {
            assert!(Owner::new("abc", name).is_err(), "{name}");
        }
    }
}
