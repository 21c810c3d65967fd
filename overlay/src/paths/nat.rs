//! Who appears where: a node behind NAT learns it from the others, and keeps the way to them open.
//!
//! A node that hears another one at an endpoint that is none of its own tells it so, through the tunnel. Only who was
//! told sends keepalives, and only to those that told it. What was told is asked for again when it is not repeated.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_model::snapshot::WgKey;

use super::message::Message;

/// What is new is told so often, because datagrams get lost.
const TELLS: u32 = 3;
/// Pause between the first ones.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// What is true for long is repeated at this pace.
const REPEAT_EVERY: Duration = Duration::from_secs(30);
/// What was not repeated for so long is asked for.
const DOUBT_AFTER: Duration = Duration::from_secs(75);
/// Pause between questions.
const ASK_EVERY: Duration = Duration::from_secs(15);

/// What this node sees of others, and what others see of it.
#[derive(Debug, Default)]
pub(super) struct Nat {
    /// This node's own endpoints: to be seen there is nothing to tell.
    own: BTreeSet<SocketAddr>,
    seen: BTreeMap<WgKey, Seen>,
    told: BTreeMap<WgKey, Told>,
}

/// Where another node appears here.
#[derive(Debug, Clone, Copy)]
struct Seen {
    at: SocketAddr,
    /// Whether that is none of its own endpoints.
    translated: bool,
    /// How often it was told, and when it is next; never for one that was always in its own place.
    tells: u32,
    next: Option<Instant>,
}

/// Where another node says that this one appears, and when it did, or is to be asked next.
#[derive(Debug, Clone, Copy)]
struct Told {
    at: SocketAddr,
    doubt: Instant,
}

impl Nat {
    /// Goes on with what an earlier process was told.
    pub(super) fn adopt(&mut self, now: Instant, key: WgKey, at: SocketAddr) {
        self.told.insert(key, Told { at, doubt: now + TELL_EVERY });
    }

    /// Takes over this node's own endpoints; returns whether something follows from that.
    pub(super) fn set_own(&mut self, own: BTreeSet<SocketAddr>) -> bool {
        self.own = own;
        let before = self.told.len();
        self.told.retain(|_, told| !self.own.contains(&told.at));
        self.told.len() != before
    }

    /// Forgets the others.
    pub(super) fn keep(&mut self, stays: impl Fn(&WgKey) -> bool) {
        self.seen.retain(|key, _| stays(key));
        self.told.retain(|key, _| stays(key));
    }

    /// A node is heard from there; returns whether that is new.
    pub(super) fn appears(
        &mut self,
        now: Instant,
        key: WgKey,
        at: SocketAddr,
        translated: bool,
    ) -> bool {
        let old = self.seen.get(&key).copied();
        if old.is_some_and(|old| (old.at, old.translated) == (at, translated)) {
            return false;
        }
        // Who is back in its own place has to hear that too.
        let news = translated || old.is_some_and(|old| old.translated || old.next.is_some());
        let next = news.then_some(now);
        self.seen.insert(key, Seen { at, translated, tells: 0, next });
        translated || old.is_some_and(|old| old.translated)
    }

    /// A node says where this one appears to it; returns whether that is new.
    pub(super) fn told(&mut self, now: Instant, by: WgKey, at: SocketAddr) -> bool {
        if self.own.contains(&at) {
            return self.told.remove(&by).is_some();
        }
        let told = Told { at, doubt: now + DOUBT_AFTER };
        self.told.insert(by, told).is_none_or(|old| old.at != at)
    }

    /// What a node is answered that asks where it appears.
    pub(super) fn answer(&self, to: &WgKey) -> Option<Message> {
        self.seen.get(to).map(|seen| Message::SeenAt { endpoint: seen.at })
    }

    /// Where this node appears to another, when that is not an endpoint of its own.
    pub(super) fn outside(&self, key: &WgKey) -> Option<SocketAddr> {
        self.told.get(key).map(|told| told.at)
    }

    /// Whether a node appears here at an endpoint that is none of its own.
    pub(super) fn is_translated(&self, key: &WgKey) -> bool {
        self.seen.get(key).is_some_and(|seen| seen.translated)
    }

    /// What is to be said now, and to whom.
    pub(super) fn say(&mut self, now: Instant) -> Vec<(WgKey, Message)> {
        let mut out = vec![];
        for (key, seen) in &mut self.seen {
            if seen.next.is_none_or(|next| now < next) {
                continue;
            }
            out.push((*key, Message::SeenAt { endpoint: seen.at }));
            seen.tells = seen.tells.saturating_add(1);
            seen.next = match seen.tells < TELLS {
                true => Some(now + TELL_EVERY),
                false => seen.translated.then_some(now + REPEAT_EVERY),
            };
        }
        for (key, told) in &mut self.told {
            if now >= told.doubt {
                told.doubt = now + ASK_EVERY;
                out.push((*key, Message::WhereAmI));
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: WgKey = WgKey([1; 32]);
    const B: WgKey = WgKey([2; 32]);

    fn at(host: u8, port: u16) -> SocketAddr {
        ([192, 0, 2, host], port).into()
    }

    /// Messages in this many seconds.
    fn said(nat: &mut Nat, now: &mut Instant, seconds: u32) -> Vec<(WgKey, Message)> {
        let mut all = vec![];
        for _ in 0..seconds {
            all.extend(nat.say(*now));
            *now += Duration::from_secs(1);
        }
        all
    }

    #[test]
    fn who_is_in_its_own_place_is_told_nothing() {
        let (mut nat, mut now) = (Nat::default(), Instant::now());
        assert!(!nat.appears(now, A, at(1, 51900), false));
        assert!(!nat.appears(now, A, at(3, 51900), false), "another one of its own");
        assert_eq!(said(&mut nat, &mut now, 600), []);
        assert_eq!(nat.answer(&A), Some(Message::SeenAt { endpoint: at(3, 51900) }));
    }

    #[test]
    fn who_appears_elsewhere_is_told_until_it_is_back() {
        let (mut nat, mut now) = (Nat::default(), Instant::now());
        let outside = at(9, 4711);
        assert!(nat.appears(now, A, outside, true) && !nat.appears(now, A, outside, true));
        assert!(nat.is_translated(&A) && !nat.is_translated(&B));
        let told = said(&mut nat, &mut now, 100);
        assert!((5..=6).contains(&told.len()), "{told:?}");
        assert!(told.iter().all(|one| *one == (A, Message::SeenAt { endpoint: outside })));
        assert!(nat.appears(now, A, at(1, 51900), false));
        let told = said(&mut nat, &mut now, 100);
        let back = (A, Message::SeenAt { endpoint: at(1, 51900) });
        assert_eq!(told, [back.clone(), back.clone(), back]);
    }

    #[test]
    fn what_was_told_counts_until_it_is_taken_back() {
        let (mut nat, mut now) = (Nat::default(), Instant::now());
        nat.set_own([at(1, 51900)].into());
        assert!(!nat.told(now, B, at(1, 51900)), "its own place");
        assert!(nat.told(now, B, at(9, 4711)) && !nat.told(now, B, at(9, 4711)));
        assert_eq!((nat.outside(&B), nat.outside(&A)), (Some(at(9, 4711)), None));
        assert_eq!(said(&mut nat, &mut now, 70), [], "it is repeated by the other side");
        let asked = said(&mut nat, &mut now, 60);
        assert!((3..=5).contains(&asked.len()), "{asked:?}");
        assert!(asked.iter().all(|one| *one == (B, Message::WhereAmI)));
        assert_eq!(nat.outside(&B), Some(at(9, 4711)), "an agent that is away takes nothing back");
        assert!(nat.told(now, B, at(1, 51900)));
        assert_eq!(nat.outside(&B), None);
        assert_eq!(said(&mut nat, &mut now, 600), []);

        nat.told(now, B, at(9, 4711));
        assert!(nat.set_own([at(1, 51900), at(9, 4711)].into()), "it is its own after all");
        assert_eq!(nat.outside(&B), None);
    }
}
