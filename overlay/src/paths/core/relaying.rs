//! Relays: finding one, leaving it, being one.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use mesh_model::snapshot::WgKey;

use super::super::leases::{Pair, SLOTS};
use super::super::member::{Member, Route, Sighting, Standing, Via};
use super::super::message::Message;
use super::super::{
    GONE_AFTER, HOT_FOR, LEASE_REFRESH, RELAY_BARRED, RELAY_DEFER, RELAY_OVER_EVERY, SIGHTING_LASTS,
};
use super::{Action, Core, send};

/// A relay that does not answer a request in this time is passed over.
const RELAY_ANSWERS: Duration = Duration::from_millis(200);
/// A relay that is asked decides in this time.
const RELAY_DECIDES: Duration = Duration::from_millis(300);
/// A relay goes on for a pair whose echoes were interrupted for less.
const RELAY_TOLERATES: Duration = Duration::from_secs(3);

impl Core {
    /// Looks for a relay where one is needed, and after the one in use.
    pub(super) fn relay(&mut self, now: Instant, key: WgKey, out: &mut Vec<Action>) {
        let Some(member) = self.members.get(&key) else { return };
        if let Some(route) = member.route {
            let relay = self.members.get(&route.via.relay);
            let lost = relay.is_none_or(|relay| !relay.standing.serves())
                || now.saturating_duration_since(member.heard) >= member.gone_after();
            if lost {
                self.leave_relay(now, key, route.via.relay);
            } else if now >= route.next_refresh {
                out.push(send(route.via.relay, Message::RelayRequest { peer: key }));
                if let Some(route) = self.members.get_mut(&key).and_then(|m| m.route.as_mut()) {
                    route.next_refresh = now + LEASE_REFRESH;
                }
            }
            return;
        }
        self.tell_over(now, key, out);
        let Some(member) = self.members.get(&key) else { return };
        let defers = self.me > key && now.saturating_duration_since(member.changed) < RELAY_DEFER;
        if member.standing != Standing::Unreachable || now < member.next_relay || defers {
            return;
        }
        let Some(relay) = self.best_relay(now, member) else { return };
        out.push(send(relay, Message::RelayRequest { peer: key }));
        if let Some(member) = self.members.get_mut(&key) {
            member.next_relay = now + RELAY_ANSWERS;
            // Until it answers: then the next one is asked.
            member.bar(relay, now + SIGHTING_LASTS);
        }
    }

    /// Tells the other side that the direct path works, a few times.
    fn tell_over(&mut self, now: Instant, key: WgKey, out: &mut Vec<Action>) {
        let Some(member) = self.members.get_mut(&key) else { return };
        let (left, next) = member.tell_over;
        if left > 0 && now >= next {
            member.tell_over = (left - 1, now + RELAY_OVER_EVERY);
            out.push(send(key, Message::RelayOver));
        }
    }

    /// The other side has proved the direct path, in both directions.
    pub(super) fn relay_over(&mut self, now: Instant, from: WgKey) {
        let Some(member) = self.members.get_mut(&from) else { return };
        if member.route.is_some() {
            member.end_relay(now, false);
            member.hot_until = Some(now + HOT_FOR);
            self.changed();
        }
    }

    /// Of those that hear the node directly and that this node hears directly, the one with the shortest way.
    pub(super) fn best_relay(&self, now: Instant, member: &Member) -> Option<WgKey> {
        let fit = |sighting: &&Sighting| {
            let relay = self.members.get(&sighting.by);
            sighting.direct
                && !member.bars(now, &sighting.by)
                && relay.is_some_and(|r| r.standing == Standing::Up && r.route.is_none())
        };
        let way = |sighting: &&Sighting| {
            let to_it = self.members.get(&sighting.by).and_then(Member::rtt);
            (to_it.unwrap_or_default() + sighting.rtt, sighting.by)
        };
        member.sightings.iter().filter(fit).min_by_key(way).map(|sighting| sighting.by)
    }

    pub(super) fn leave_relay(&mut self, now: Instant, key: WgKey, relay: WgKey) {
        if let Some(member) = self.members.get_mut(&key) {
            member.bar(relay, now + RELAY_BARRED);
            member.set_route(now, None);
            // It was not heard through the relay either: nothing that was known before counts any more.
            member.set(now, Standing::Unreachable);
            member.heard = now.checked_sub(GONE_AFTER).unwrap_or(now);
            member.next_ask = now;
            member.hot_until = Some(now + HOT_FOR);
        }
        self.noted.insert(key);
        self.changed();
    }

    pub(super) fn relay_granted(
        &mut self,
        now: Instant,
        relay: WgKey,
        peer: WgKey,
        slot: u8,
        out: &mut Vec<Action>,
    ) {
        let fit = |m: &Member| m.standing.serves() && m.route.is_none();
        let relay_fit = self.members.get(&relay).is_some_and(fit);
        let Some(member) = self.members.get_mut(&peer) else { return };
        if !relay_fit || relay == peer || slot >= SLOTS {
            return;
        }
        let via = Via { relay, slot };
        member.barred.retain(|(key, _)| *key != relay);
        match &member.route {
            Some(route) if route.via == via || route.via.relay != relay => return,
            None if member.standing == Standing::Up => return,
            _ => {}
        }
        member.set_route(now, Some(Route { via, next_refresh: now + LEASE_REFRESH }));
        self.noted.insert(peer);
        self.changed();
        self.echo(now, peer, out);
    }

    pub(super) fn relay_refused(&mut self, now: Instant, relay: WgKey, peer: WgKey) {
        let Some(member) = self.members.get_mut(&peer) else { return };
        if member.route.is_some_and(|route| route.via.relay == relay) {
            self.leave_relay(now, peer, relay);
        } else {
            member.bar(relay, now + RELAY_BARRED);
            member.next_relay = now;
        }
    }

    pub(super) fn relay_requested(
        &mut self,
        now: Instant,
        from: WgKey,
        peer: WgKey,
        out: &mut Vec<Action>,
    ) {
        if !self.members.contains_key(&peer) || peer == from {
            return out.push(send(from, Message::RelayRefusal { peer }));
        }
        self.requests.retain(|(a, b, _)| (*a, *b) != (from, peer));
        self.requests.push((from, peer, now));
        for side in [from, peer] {
            if !self.is_probed(now, &side) {
                self.echo(now, side, out);
            }
        }
        self.decide_requests(now, out);
    }

    /// Grants what can be granted; a relay must hear both sides directly.
    pub(super) fn decide_requests(&mut self, now: Instant, out: &mut Vec<Action>) {
        let mut forward = false;
        for (from, peer, since) in std::mem::take(&mut self.requests) {
            let held =
                self.leases.pairs().any(|p| [(p.a, p.b), (p.b, p.a)].contains(&(from, peer)));
            let within = if held { RELAY_TOLERATES } else { SIGHTING_LASTS };
            let hears = |key: &WgKey| {
                self.members.get(key).is_some_and(|member| member.heard_directly(now, within))
            };
            if hears(&from) && hears(&peer) {
                let Some(slot) = self.leases.extend(now, from, peer) else {
                    out.push(send(from, Message::RelayRefusal { peer }));
                    continue;
                };
                forward |= !held;
                self.noted.extend([from, peer]);
                let pair = Pair { a: from.min(peer), b: from.max(peer), slot };
                if self.forwarded.contains(&pair) {
                    grant(pair, out);
                } else {
                    self.promised.insert(pair);
                }
            } else if now.saturating_duration_since(since) < RELAY_DECIDES {
                self.requests.push((from, peer, since));
            } else {
                forward |= self.leases.remove(from, peer);
                out.push(send(from, Message::RelayRefusal { peer }));
            }
        }
        if forward {
            out.push(Action::Forward(self.leases.pairs().collect()));
        }
    }

    /// The relay forwards between these pairs and no others. Only now what was promised is granted: a pair that gets no echo
    /// through a relay passes it over for a while, and a relay may take its time to start.
    pub fn forwards(&mut self, pairs: &[Pair], out: &mut Vec<Action>) {
        self.forwarded = pairs.iter().copied().collect();
        let leased: BTreeSet<Pair> = self.leases.pairs().collect();
        self.promised.retain(|pair| leased.contains(pair));
        for pair in self.promised.extract_if(.., |pair| self.forwarded.contains(pair)) {
            grant(pair, out);
        }
    }

    pub(super) fn lease(&mut self, now: Instant, out: &mut Vec<Action>) {
        if self.leases.expire(now) {
            out.push(Action::Forward(self.leases.pairs().collect()));
        }
        self.decide_requests(now, out);
    }
}

/// Tells both sides.
fn grant(Pair { a, b, slot }: Pair, out: &mut Vec<Action>) {
    out.push(send(a, Message::RelayGrant { peer: b, slot }));
    out.push(send(b, Message::RelayGrant { peer: a, slot }));
}
