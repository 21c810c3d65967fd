//! The kernel's WireGuard device, by generic netlink.
//!
//! Three types that are never mixed: [`Config`] is what should be, [`Observed`] what is, [`PeerStatistics`] what happened.
//! [`plan`] never removes and re-adds a peer, and never touches the endpoint of a peer that has shaken hands: it may
//! have roamed.

mod fake;
mod genl;
mod linux;
mod plan;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use mesh_model::snapshot::WgKey;

use crate::netlink::NetlinkError;

pub use fake::{FakeMessage, FakePacket, FakeWireGuard};
pub use linux::{KernelWireGuard, supported};
pub use plan::plan;

/// Secret bytes: a private or pre-shared key. Never printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SecretKey(pub [u8; 32]);

impl std::fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SecretKey(..)")
    }
}

/// A device as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The node's private key.
    pub private_key: SecretKey,
    /// UDP port.
    pub listen_port: u16,
    /// Mark of encrypted packets; 0 is none.
    pub fwmark: u32,
    /// Peers by public key.
    pub peers: BTreeMap<WgKey, PeerConfig>,
}

/// A peer as it should be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PeerConfig {
    /// Where to start; nothing when the peer has to come to us.
    pub endpoint: Option<SocketAddr>,
    /// Whether the endpoint counts also where the device has learned another one.
    pub pinned: bool,
    /// Addresses that may come from it, and that are sent to it.
    pub allowed_ips: BTreeSet<IpNet>,
    /// Keepalive interval; nothing is none.
    pub keepalive: Option<Duration>,
    /// Pre-shared key.
    pub preshared_key: Option<SecretKey>,
}

/// A device as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// Private key; nothing when none was set.
    pub private_key: Option<SecretKey>,
    /// UDP port.
    pub listen_port: u16,
    /// Mark of encrypted packets.
    pub fwmark: u32,
    /// Peers by public key.
    pub peers: BTreeMap<WgKey, ObservedPeer>,
}

/// A peer as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ObservedPeer {
    /// Where it is now.
    pub endpoint: Option<SocketAddr>,
    /// Addresses.
    pub allowed_ips: BTreeSet<IpNet>,
    /// Keepalive interval.
    pub keepalive: Option<Duration>,
    /// Pre-shared key.
    pub preshared_key: Option<SecretKey>,
    /// What happened with it.
    pub statistics: PeerStatistics,
}

/// Counters of a peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PeerStatistics {
    /// The last handshake.
    pub last_handshake: Option<SystemTime>,
    /// Bytes received, encrypted.
    pub received_bytes: u64,
    /// Bytes sent, encrypted.
    pub sent_bytes: u64,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Set key, port and mark of the device.
    SetDevice {
        /// Private key, when it changes.
        private_key: Option<SecretKey>,
        /// Port, when it changes.
        listen_port: Option<u16>,
        /// Mark, when it changes.
        fwmark: Option<u32>,
    },
    /// Add a peer, or change what differs.
    PutPeer {
        /// Its public key.
        key: WgKey,
        /// The change.
        change: PeerChange,
    },
    /// Remove a peer.
    RemovePeer(WgKey),
}

/// What changes about a peer; what is absent stays.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PeerChange {
    /// Whether the peer is new. A change of an existing peer never creates one.
    pub add: bool,
    /// New endpoint.
    pub endpoint: Option<SocketAddr>,
    /// What becomes of its addresses.
    pub allowed_ips: Option<AllowedIpsChange>,
    /// New keepalive interval; zero turns it off.
    pub keepalive: Option<Duration>,
    /// New pre-shared key; all zeroes removes it.
    pub preshared_key: Option<SecretKey>,
}

/// What becomes of a peer's addresses. An address belongs to one peer: the one that it had before loses it in the same moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AllowedIpsChange {
    /// These come to those that it has.
    Add(BTreeSet<IpNet>),
    /// It has these and no others. For a moment it has none.
    Replace(BTreeSet<IpNet>),
}

/// What has to be done, in order: device, new and changed peers, addresses that nobody is to have any more, removals.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The steps.
    pub steps: Vec<Step>,
}

/// Why the device could not be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// This kernel has no WireGuard.
    #[error("this kernel has no WireGuard")]
    Unsupported,
    /// The network namespace cannot be entered.
    #[error("enter the network namespace")]
    Namespace(#[source] std::io::Error),
    /// A request failed.
    #[error("{what} on {device}")]
    Netlink {
        /// What was tried.
        what: &'static str,
        /// The device.
        device: String,
        /// The cause.
        #[source]
        source: NetlinkError,
    },
}

/// Whose a name is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Holder {
    /// There is no such device.
    #[default]
    Nobody,
    /// A WireGuard device of the kernel's.
    WireGuard,
    /// A device of another kind.
    Other,
}

/// A WireGuard device in the kernel.
pub trait WireGuardDevice: Send + Sync {
    /// Whose its name is.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    fn holder(&self) -> Result<Holder, DeviceError>;

    /// Creates the device if it does not exist; returns whether it did. It stays down: who uses it brings it up.
    ///
    /// # Errors
    /// When the kernel has no WireGuard or refuses.
    fn ensure(&self) -> Result<bool, DeviceError>;

    /// Reads the device back.
    ///
    /// # Errors
    /// When it does not exist or cannot be read.
    fn observe(&self) -> Result<Observed, DeviceError>;

    /// Carries out the steps in order; stops at the first failure, since later steps of a device depend on earlier ones.
    ///
    /// # Errors
    /// When the kernel refuses a step.
    fn apply(&self, plan: &Plan) -> Result<(), DeviceError>;

    /// Deletes the device, of whatever kind it is. Nothing there is success.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn remove(&self) -> Result<(), DeviceError>;
}
