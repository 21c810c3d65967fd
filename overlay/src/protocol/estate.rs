//! What a process leaves to its successor: its sessions, and what else of the protocol only it knows.
//!
//! Data, and nothing that acts. A session is in an estate only after it can seal no more ([`Session::leave`]), and an estate
//! is neither cloned nor kept: whoever has it is the only one who may go on, and no number of a session is used twice.
//! Secrets are wiped from memory on drop and not shown by `Debug`.
//!
//! [`Session::leave`]: super::noise::Session::leave

use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mesh_model::snapshot::WgKey;
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::Zeroizing;

/// Everything that a node's protocol core knows and no configuration tells.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Estate {
    /// The last stamp of an initiation, since the Unix epoch: the next ones are above it.
    pub last_stamp: Duration,
    /// The peers.
    pub peers: Vec<PeerEstate>,
}

/// One peer. What is missing starts anew: handshakes that are under way, and packets that wait for them.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerEstate {
    /// By which it is configured: the key that it had first.
    pub name: WgKey,
    /// The key of ours, beside the one that all know, that it has proved to know.
    pub introduced: Option<WgKey>,
    /// The upper bits of all indices that it was told.
    pub number: u32,
    /// The lower ones of the newest.
    pub last_index: u8,
    /// How large packets to it may be.
    pub path_mtu: PathMtuEstate,
    /// Its sessions.
    pub sessions: SessionsEstate,
    /// Which pre-shared key is in the session that waits for the peer to use it.
    pub answered_with: Secret<32>,
    /// Stamp of its newest call.
    pub last_call_stamp: Secret<12>,
    /// When that was.
    pub last_call: Option<Moment>,
    /// The cookie that it wants to see, and since when.
    pub cookie: Option<(Secret<16>, Moment)>,
    /// The pre-shared keys.
    pub secrets: SecretsEstate,
    /// Where it is.
    pub places: PlacesEstate,
    /// What passed.
    pub activity: ActivityEstate,
    /// It has called since our last call.
    pub yielded: bool,
    /// It has answered where it is looked for.
    pub met: bool,
    /// Initiations since it was heard.
    pub unanswered: u32,
    /// The last one.
    pub last_initiation: Moment,
    /// No initiation before this time.
    pub next_initiation: Moment,
    /// When an endpoint is tried beside the relay.
    pub next_trial: Moment,
    /// Handshakes that it answered past the relay.
    pub direct_answers: u64,
}

/// The sessions of a peer.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SessionsEstate {
    /// The one to send with.
    pub current: Option<SessionEstate>,
    /// The one that the peer has yet to use.
    pub next: Option<SessionEstate>,
    /// Those before, the newest first.
    pub past: [Option<SessionEstate>; 2],
}

/// A session that its process can use no more.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SessionEstate {
    /// By which this side tells it.
    pub index: u32,
    /// By which the other side does.
    pub remote_index: u32,
    /// When it was agreed.
    pub created: Moment,
    /// Whether this side called.
    pub caller: bool,
    /// Whether the other side has shown that it has it.
    pub confirmed: bool,
    /// Key for messages of this side.
    pub sender: Secret<32>,
    /// Key for messages of the other side.
    pub receiver: Secret<32>,
    /// Number of the next message: none at or above it was ever used.
    pub next_counter: u64,
    /// The highest number seen of the other side, plus one.
    pub window_next: u64,
    /// Which of those before it were seen, as the ring of the window, in little endian words.
    pub window: Secret<1024>,
}

/// The pre-shared keys of a peer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretsEstate {
    /// The one to use.
    pub present: Secret<32>,
    /// The one before.
    pub former: Option<Secret<32>>,
    /// When a handshake with the present one succeeded.
    pub proven: Option<Moment>,
}

/// Where a peer was found.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlacesEstate {
    /// The endpoint in use, or looked for.
    pub current: Option<SocketAddr>,
    /// When an authentic message came from there.
    pub proven: Option<Moment>,
    /// The relay in use.
    pub relay: Option<SocketAddr>,
    /// The one before it.
    pub left: Option<SocketAddr>,
}

/// The largest packets, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PathMtuEstate {
    /// That the device carries.
    pub device: u16,
    /// That the way to the peer does.
    pub path: u16,
}

/// What passed: times in milliseconds since the epoch, plus one, as the link keeps them.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ActivityEstate {
    /// Where times begin.
    pub epoch: Moment,
    /// Anything sent, data sent, anything received, data received, data that waits for an answer, data that we owe one.
    pub stamps: [u64; 6],
    /// Bytes of packets sent.
    pub sent_bytes: u64,
    /// Bytes of packets received.
    pub received_bytes: u64,
}

/// A time, in nanoseconds after the moment of leaving; before it when negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment(i64);

impl Moment {
    /// The time `at`, for a process that leaves at `left`.
    pub fn new(left: Instant, at: Instant) -> Self {
        let nanos = |time: Duration| i64::try_from(time.as_nanos()).unwrap_or(i64::MAX);
        match at.checked_duration_since(left) {
            Some(later) => Self(nanos(later)),
            None => Self(-nanos(left - at)),
        }
    }

    /// The same for the successor, whose clock showed `left` at that moment; none when its clock cannot show it.
    pub fn after(self, left: Instant) -> Option<Instant> {
        let distance = Duration::from_nanos(self.0.unsigned_abs());
        if self.0 < 0 { left.checked_sub(distance) } else { left.checked_add(distance) }
    }
}

/// Bytes that nobody may see, base64 where they are written.
pub struct Secret<const N: usize>(Zeroizing<[u8; N]>);

impl<const N: usize> Secret<N> {
    /// Takes them over.
    pub fn new(bytes: [u8; N]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8; N] {
        &self.0
    }
}

impl<const N: usize> fmt::Debug for Secret<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl<const N: usize> Serialize for Secret<N> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = Zeroizing::new(vec![0; N.div_ceil(3) * 4]);
        let len = STANDARD.encode_slice(self.bytes(), &mut text);
        let len = len.map_err(serde::ser::Error::custom)?;
        let text = std::str::from_utf8(&text[..len]).map_err(serde::ser::Error::custom)?;
        serializer.serialize_str(text)
    }
}

impl<'de, const N: usize> Deserialize<'de> for Secret<N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text<const N: usize>;
        impl<const N: usize> Visitor<'_> for Text<N> {
            type Value = Secret<N>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{N} bytes in base64")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Secret<N>, E> {
                let mut bytes = Zeroizing::new(vec![0; N.div_ceil(3) * 3]);
                let len = STANDARD.decode_slice(text, &mut bytes);
                let len = len.map_err(|_| E::custom("no base64 of that length"))?;
                let bytes = bytes[..len].try_into().map_err(|_| E::invalid_length(len, &self))?;
                Ok(Secret::new(bytes))
            }
        }
        deserializer.deserialize_str(Text::<N>)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_written_and_read_and_never_shown() {
        let secret = Secret::new([7; 32]);
        assert_eq!(format!("{secret:?}"), "Secret(..)");
        let text = serde_json::to_string(&secret).unwrap();
        assert_eq!(serde_json::from_str::<Secret<32>>(&text).unwrap().bytes(), &[7; 32]);
        for wrong in [r#""AAAA""#, r#""not base64!""#, "7", r#""""#] {
            let refusal = serde_json::from_str::<Secret<32>>(wrong).unwrap_err().to_string();
            assert!(!refusal.contains("AAAA") && !refusal.contains("not"), "{refusal}");
        }
        assert!(serde_json::from_str::<Secret<31>>(&text).is_err());
    }

    #[test]
    fn moments_are_the_same_for_both() {
        let (left, other) = (Instant::now(), Instant::now() + Duration::from_secs(1000));
        let near = Duration::from_secs(5);
        assert_eq!(Moment::new(left, left + near).after(other), Some(other + near));
        assert_eq!(Moment::new(left, left - near).after(other), Some(other - near));
    }
}
