//! Which pre-shared key the kernel is to use for a peer: it takes one, and we may have two.
//!
//! While the other side may not have learned of the present key, a session that should have been renewed and was not
//! means that it has not: then both keys take turns, well before the session ends.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use mesh_kernel::wireguard::Observed;
use mesh_model::snapshot::WgKey;

use crate::config::{OverlayConfig, PeerConfig, PresharedKey};

/// A session is renewed after two minutes (WG section 6.1, Rekey-After-Time), give or take a lost message.
const RENEWED_BY: Duration = Duration::from_secs(130);

/// A key has a turn for so long at least: an answer to the first call of a new device may be on its way, and is not understood with another key.
/// The kernel calls again after five seconds.
const TURN: Duration = Duration::from_secs(2);

/// The state of each peer's keys.
#[derive(Debug, Default)]
pub(super) struct Secrets(BTreeMap<WgKey, Choice>);

#[derive(Debug)]
struct Choice {
    /// The keys by which the device knows the peer.
    keys: Vec<WgKey>,
    present: Option<PresharedKey>,
    former: Option<PresharedKey>,
    /// When the device got the present key; none until it has it. What it agreed on before was by the former one.
    since: Option<SystemTime>,
    /// When the key in use was set.
    turned: SystemTime,
    /// A handshake with the present key has succeeded.
    agreed: bool,
    former_in_use: bool,
}

impl Secrets {
    /// Takes over a configuration: a key that is new is used first.
    pub(super) fn configure(&mut self, now: SystemTime, config: &OverlayConfig) {
        self.0.retain(|key, _| config.peers.iter().any(|peer| peer.public_key == *key));
        for peer in &config.peers {
            let choice = self.0.entry(peer.public_key).or_insert_with(|| Choice::new(now, peer));
            peer.keys().clone_into(&mut choice.keys);
            if choice.present == peer.preshared_key {
                choice.former = peer.former_preshared_key;
            } else {
                *choice = Choice::new(now, peer);
            }
        }
    }

    /// The key to use for a peer.
    pub(super) fn key(&self, peer: &WgKey) -> Option<PresharedKey> {
        let choice = self.0.get(peer)?;
        if choice.former_in_use { choice.former } else { choice.present }
    }

    /// The device has the keys that are to be used.
    pub(super) fn applied(&mut self, now: SystemTime) {
        for choice in self.0.values_mut().filter(|choice| !choice.former_in_use) {
            choice.since.get_or_insert(now);
        }
    }

    /// Whether a handshake with the present key has succeeded.
    pub(super) fn agreed(&self, peer: &WgKey) -> bool {
        self.0.get(peer).is_some_and(|choice| choice.agreed && choice.present.is_some())
    }

    /// Learns from the device, and lets keys take turns; returns whether one has to be changed.
    pub(super) fn tend(&mut self, now: SystemTime, observed: &Observed) -> bool {
        let mut changed = false;
        for choice in self.0.values_mut() {
            let known = choice.keys.iter().filter_map(|key| observed.peers.get(key));
            let handshake = known.filter_map(|peer| peer.statistics.last_handshake).max();
            changed |= choice.tend(now, handshake);
        }
        changed
    }
}

impl Choice {
    fn new(now: SystemTime, peer: &PeerConfig) -> Self {
        Self {
            keys: peer.keys().to_vec(),
            present: peer.preshared_key,
            former: peer.former_preshared_key,
            since: None,
            turned: now,
            agreed: false,
            former_in_use: false,
        }
    }

    fn tend(&mut self, now: SystemTime, handshake: Option<SystemTime>) -> bool {
        // What the kernel noted before the clock was set back says nothing about the present key.
        let handshake = handshake.filter(|at| *at <= now);
        self.since = self.since.map(|since| since.min(now));
        self.turned = self.turned.min(now);
        let by_the_present = handshake.zip(self.since).is_some_and(|(at, since)| at > since);
        self.agreed |= !self.former_in_use && by_the_present;
        let age = handshake.and_then(|at| now.duration_since(at).ok());
        let fresh = age.is_some_and(|age| age < RENEWED_BY);
        let early = now.duration_since(self.turned).is_ok_and(|turn| turn < TURN);
        if self.former.is_none() || self.agreed || fresh || early {
            return false;
        }
        self.former_in_use = !self.former_in_use;
        self.turned = now;
        self.since = None;
        true
    }
}

#[cfg(test)]
mod tests {
    use mesh_kernel::wireguard::ObservedPeer;

    use super::*;

    const PEER: WgKey = WgKey([1; 32]);

    fn config(present: u8, former: Option<u8>) -> OverlayConfig {
        let key = |n: u8| PresharedKey(WgKey([n; 32]));
        let peer = PeerConfig {
            public_key: PEER,
            endpoints: vec![],
            relay: None,
            allowed_ips: vec![],
            persistent_keepalive_secs: None,
            preshared_key: Some(key(present)),
            former_preshared_key: former.map(key),
            keys: vec![],
        };
        OverlayConfig { listen_port: 1, mtu: 1420, peers: vec![peer], own_keys: vec![] }
    }

    fn shaken(at: SystemTime) -> Observed {
        let mut peer = ObservedPeer::default();
        peer.statistics.last_handshake = Some(at);
        Observed { peers: [(PEER, peer)].into(), ..Observed::default() }
    }

    /// The device gets what is configured.
    fn set(secrets: &mut Secrets, at: SystemTime, config: &OverlayConfig) {
        secrets.configure(at, config);
        secrets.applied(at);
    }

    #[test]
    fn a_handshake_of_before_the_device_had_the_key_proves_nothing() {
        let start = SystemTime::now();
        let at = |secs: u64| start + Duration::from_secs(secs);
        let mut secrets = Secrets::default();
        set(&mut secrets, at(0), &config(1, None));
        secrets.configure(at(100), &config(2, Some(1)));
        assert!(!secrets.tend(at(102), &shaken(at(101))) && !secrets.agreed(&PEER));
        secrets.applied(at(103));
        assert!(!secrets.tend(at(104), &shaken(at(101))) && !secrets.agreed(&PEER));
        // The next configuration does not begin anew.
        set(&mut secrets, at(110), &config(2, Some(1)));
        assert!(!secrets.tend(at(111), &shaken(at(105))) && secrets.agreed(&PEER));
    }

    #[test]
    fn a_handshake_of_before_the_clock_was_set_back_proves_no_key() {
        let start = SystemTime::now();
        let at = |secs: u64| start + Duration::from_secs(secs);
        let mut secrets = Secrets::default();
        set(&mut secrets, at(4000), &config(1, None));
        secrets.tend(at(4010), &shaken(at(4005)));
        assert!(secrets.agreed(&PEER));
        // An hour back; then the key is replaced.
        set(&mut secrets, at(420), &config(2, Some(1)));
        for secs in [421, 423, 425] {
            secrets.tend(at(secs), &shaken(at(4005)));
            secrets.applied(at(secs));
            assert!(!secrets.agreed(&PEER), "nobody has used the new one");
        }
        secrets.tend(at(431), &shaken(at(430)));
        assert!(secrets.agreed(&PEER));

        // The key is replaced; then the clock is set back.
        set(&mut secrets, at(500), &config(3, None));
        secrets.tend(at(100), &shaken(at(430)));
        secrets.tend(at(111), &shaken(at(110)));
        assert!(secrets.agreed(&PEER));
    }

    #[test]
    fn keys_take_turns_only_while_a_session_is_overdue() {
        let start = SystemTime::now();
        let at = |secs: u64| start + Duration::from_secs(secs);
        let mut secrets = Secrets::default();
        let in_use = |secrets: &Secrets| secrets.key(&PEER).unwrap().0.0[0];
        set(&mut secrets, at(0), &config(1, None));
        assert!(!secrets.tend(at(1), &shaken(at(1))) && secrets.agreed(&PEER));

        set(&mut secrets, at(100), &config(2, Some(1)));
        assert_eq!((in_use(&secrets), secrets.agreed(&PEER)), (2, false));
        assert!(!secrets.tend(at(130), &shaken(at(1))), "not overdue yet");
        for (secs, turn) in [(135, 1), (140, 2), (145, 1)] {
            assert!(secrets.tend(at(secs), &shaken(at(1))));
            set(&mut secrets, at(secs), &config(2, Some(1)));
            assert_eq!(in_use(&secrets), turn);
        }
        // The old key was the right one: it stays.
        assert!(!secrets.tend(at(151), &shaken(at(150))));
        assert_eq!((in_use(&secrets), secrets.agreed(&PEER)), (1, false));
        // The next time it is the new one.
        assert!(secrets.tend(at(285), &shaken(at(150))));
        secrets.applied(at(286));
        assert!(!secrets.tend(at(290), &shaken(at(289))));
        assert_eq!((in_use(&secrets), secrets.agreed(&PEER)), (2, true));
    }

    #[test]
    fn the_key_of_the_first_call_stays_until_it_can_have_been_answered() {
        let start = SystemTime::now();
        let at = |millis: u64| start + Duration::from_millis(millis);
        let mut secrets = Secrets::default();
        let in_use = |secrets: &Secrets| secrets.key(&PEER).unwrap().0.0[0];
        set(&mut secrets, at(0), &config(2, Some(1)));
        let unheard =
            Observed { peers: [(PEER, ObservedPeer::default())].into(), ..Observed::default() };
        assert!(!secrets.tend(at(300), &unheard) && !secrets.tend(at(1900), &unheard));
        assert_eq!(in_use(&secrets), 2);
        // The kernel's next call is by the other key.
        assert!(secrets.tend(at(4900), &unheard));
        assert_eq!(in_use(&secrets), 1);
        // A clock that was set back does not keep it.
        assert!(!secrets.tend(at(0), &unheard));
        assert!(secrets.tend(at(2000), &unheard));
    }
}
