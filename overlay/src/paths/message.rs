//! What agents say to each other about paths: one message per datagram, through the tunnel.
//!
//! `"MP"`, version, kind, then the fields of the kind: integers big-endian, keys as 32 bytes, booleans as 0 or 1,
//! endpoints as 4 or 6, the address and the port.
//! A datagram that is not exactly one message is refused; a newer version is too, so that nothing is half understood.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_model::snapshot::WgKey;

use super::votes::Vote;

const MAGIC: [u8; 2] = *b"MP";
const VERSION: u8 = 1;

/// Votes in one message.
pub const MAX_VOTES: usize = 16;
/// No message is longer: it fits into the smallest tunnel without fragments.
pub const MAX_BYTES: usize = 5 + MAX_VOTES * VOTE_BYTES;
const VOTE_BYTES: usize = 32 + 32 + 8 + 1;

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Is your agent there? For nodes whose kernel does not answer echoes.
    Ping {
        /// Comes back in the answer.
        token: u32,
    },
    /// The answer.
    Pong {
        /// Of the question.
        token: u32,
    },
    /// Do you hear this node? Answered only if so, after a fresh echo.
    Ask {
        /// The node in question.
        subject: WgKey,
    },
    /// An echo of the subject has just come.
    Sighting {
        /// The node in question.
        subject: WgKey,
        /// How long the echo took.
        rtt: Duration,
        /// Whether it came without a relay.
        direct: bool,
    },
    /// What watchers found.
    Votes(Vec<Vote>),
    /// Tell me all that you know to be down.
    Sync,
    /// Forward between me and this node, from now on for a while.
    RelayRequest {
        /// The other node.
        peer: WgKey,
    },
    /// I forward between you and this node: send to the relay port with this number.
    RelayGrant {
        /// The other node.
        peer: WgKey,
        /// The port, counted from the first relay port.
        slot: u8,
    },
    /// I do not.
    RelayRefusal {
        /// The other node.
        peer: WgKey,
    },
    /// The direct path between you and me works again, both ways: I use no relay any more.
    RelayOver,
    /// You appear to me at this endpoint, which is none of those that I know as yours.
    SeenAt {
        /// Address and port on the underlay.
        endpoint: SocketAddr,
    },
    /// At which endpoint do I appear to you?
    WhereAmI,
    /// Does your overlay take calls by this key of mine, which takes over from the present one?
    KeyAsk {
        /// The public key.
        key: WgKey,
    },
    /// It does.
    KeyKnown {
        /// The public key in question.
        key: WgKey,
    },
}

/// The datagram is not a message of this version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a message about paths")]
pub struct Malformed;

impl Message {
    /// The datagram, at most [`MAX_BYTES`]; votes beyond [`MAX_VOTES`] are left out.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![MAGIC[0], MAGIC[1], VERSION, self.kind()];
        match self {
            Self::Ping { token } | Self::Pong { token } => out.extend(token.to_be_bytes()),
            Self::Ask { subject } => out.extend(subject.0),
            Self::Sighting { subject, rtt, direct } => {
                out.extend(subject.0);
                out.extend(u32::try_from(rtt.as_micros()).unwrap_or(u32::MAX).to_be_bytes());
                out.push(u8::from(*direct));
            }
            Self::Votes(votes) => {
                let votes = &votes[..votes.len().min(MAX_VOTES)];
                out.push(votes.len() as u8);
                votes.iter().for_each(|vote| encode_vote(vote, &mut out));
            }
            Self::Sync | Self::RelayOver | Self::WhereAmI => {}
            Self::SeenAt { endpoint } => {
                match endpoint.ip() {
                    IpAddr::V4(ip) => out.extend([&[4][..], &ip.octets()].concat()),
                    IpAddr::V6(ip) => out.extend([&[6][..], &ip.octets()].concat()),
                }
                out.extend(endpoint.port().to_be_bytes());
            }
            Self::RelayRequest { peer } | Self::RelayRefusal { peer } => out.extend(peer.0),
            Self::KeyAsk { key } | Self::KeyKnown { key } => out.extend(key.0),
            Self::RelayGrant { peer, slot } => {
                out.extend(peer.0);
                out.push(*slot);
            }
        }
        out
    }

    /// Reads a datagram, strictly.
    pub fn decode(datagram: &[u8]) -> Result<Self, Malformed> {
        let mut rest = Reader(datagram);
        if rest.take::<2>()? != MAGIC || rest.take::<1>()? != [VERSION] {
            return Err(Malformed);
        }
        let [kind] = rest.take()?;
        let message = match kind {
            1 => Self::Ping { token: rest.u32()? },
            2 => Self::Pong { token: rest.u32()? },
            3 => Self::Ask { subject: rest.key()? },
            4 => Self::Sighting {
                subject: rest.key()?,
                rtt: Duration::from_micros(rest.u32()?.into()),
                direct: rest.flag()?,
            },
            5 => Self::Votes(rest.votes()?),
            6 => Self::Sync,
            7 => Self::RelayRequest { peer: rest.key()? },
            8 => Self::RelayGrant { peer: rest.key()?, slot: rest.take::<1>()?[0] },
            9 => Self::RelayRefusal { peer: rest.key()? },
            10 => Self::RelayOver,
            11 => Self::SeenAt { endpoint: rest.endpoint()? },
            12 => Self::WhereAmI,
            13 => Self::KeyAsk { key: rest.key()? },
            14 => Self::KeyKnown { key: rest.key()? },
            _ => return Err(Malformed),
        };
        if rest.0.is_empty() { Ok(message) } else { Err(Malformed) }
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Ping { .. } => 1,
            Self::Pong { .. } => 2,
            Self::Ask { .. } => 3,
            Self::Sighting { .. } => 4,
            Self::Votes(_) => 5,
            Self::Sync => 6,
            Self::RelayRequest { .. } => 7,
            Self::RelayGrant { .. } => 8,
            Self::RelayRefusal { .. } => 9,
            Self::RelayOver => 10,
            Self::SeenAt { .. } => 11,
            Self::WhereAmI => 12,
            Self::KeyAsk { .. } => 13,
            Self::KeyKnown { .. } => 14,
        }
    }
}

fn encode_vote(vote: &Vote, out: &mut Vec<u8>) {
    out.extend(vote.watcher.0);
    out.extend(vote.subject.0);
    out.extend(vote.number.to_be_bytes());
    out.push(u8::from(vote.down));
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (field, rest) = self.0.split_first_chunk().ok_or(Malformed)?;
        self.0 = rest;
        Ok(*field)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.take().map(u32::from_be_bytes)
    }

    fn key(&mut self) -> Result<WgKey, Malformed> {
        self.take().map(WgKey)
    }

    fn flag(&mut self) -> Result<bool, Malformed> {
        match self.take()? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(Malformed),
        }
    }

    fn endpoint(&mut self) -> Result<SocketAddr, Malformed> {
        let ip: IpAddr = match self.take()? {
            [4] => self.take::<4>()?.into(),
            [6] => self.take::<16>()?.into(),
            _ => return Err(Malformed),
        };
        Ok(SocketAddr::new(ip, u16::from_be_bytes(self.take()?)))
    }

    fn votes(&mut self) -> Result<Vec<Vote>, Malformed> {
        let [count] = self.take()?;
        if usize::from(count) > MAX_VOTES {
            return Err(Malformed);
        }
        (0..count).map(|_| self.vote()).collect()
    }

    fn vote(&mut self) -> Result<Vote, Malformed> {
        Ok(Vote {
            watcher: self.key()?,
            subject: self.key()?,
            number: self.take().map(u64::from_be_bytes)?,
            down: self.flag()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key() -> impl Strategy<Value = WgKey> {
        any::<[u8; 32]>().prop_map(WgKey)
    }

    fn message() -> impl Strategy<Value = Message> {
        let vote = (key(), key(), any::<u64>(), any::<bool>())
            .prop_map(|(watcher, subject, number, down)| Vote { watcher, subject, number, down });
        prop_oneof![
            any::<u32>().prop_map(|token| Message::Ping { token }),
            any::<u32>().prop_map(|token| Message::Pong { token }),
            key().prop_map(|subject| Message::Ask { subject }),
            (key(), any::<u32>(), any::<bool>()).prop_map(|(subject, rtt, direct)| {
                Message::Sighting { subject, rtt: Duration::from_micros(rtt.into()), direct }
            }),
            prop::collection::vec(vote, 0..=MAX_VOTES).prop_map(Message::Votes),
            Just(Message::Sync),
            Just(Message::RelayOver),
            Just(Message::WhereAmI),
            key().prop_map(|key| Message::KeyAsk { key }),
            key().prop_map(|key| Message::KeyKnown { key }),
            (any::<IpAddr>(), any::<u16>())
                .prop_map(|(ip, port)| Message::SeenAt { endpoint: SocketAddr::new(ip, port) }),
            key().prop_map(|peer| Message::RelayRequest { peer }),
            (key(), any::<u8>()).prop_map(|(peer, slot)| Message::RelayGrant { peer, slot }),
            key().prop_map(|peer| Message::RelayRefusal { peer }),
        ]
    }

    proptest! {
        #[test]
        fn every_message_comes_back_and_no_other_length_does(message in message()) {
            let datagram = message.encode();
            prop_assert!(datagram.len() <= MAX_BYTES);
            prop_assert_eq!(Message::decode(&datagram), Ok(message));
            prop_assert_eq!(Message::decode(&datagram[..datagram.len() - 1]), Err(Malformed));
            let mut longer = datagram;
            longer.push(0);
            prop_assert_eq!(Message::decode(&longer), Err(Malformed));
        }

        #[test]
        fn noise_is_refused_or_means_what_it_says(noise in prop::collection::vec(any::<u8>(), 0..1500)) {
            let mut framed = b"MP\x01".to_vec();
            framed.extend(&noise);
            for datagram in [noise, framed] {
                if let Ok(message) = Message::decode(&datagram) {
                    prop_assert_eq!(message.encode(), datagram);
                }
            }
        }
    }

    #[test]
    fn another_version_is_refused() {
        let mut datagram = Message::Sync.encode();
        datagram[2] = 2;
        assert_eq!(Message::decode(&datagram), Err(Malformed));
    }
}
