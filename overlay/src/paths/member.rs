//! One other node: the echoes that came from it, and what follows from them.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use mesh_model::snapshot::WgKey;
use serde::{Deserialize, Serialize};

use super::{
    BACK_AFTER, DIRECT_PROOFS, GONE_AFTER, LONG_DOWN, LONGEST_ROUND_TRIP, PROBE_DOWN_EVERY,
    PROBE_EVERY, PROBE_SUSPECT_EVERY, RELAPSE_WITHIN, RELAPSES_COUNTED, RELAY_OVER_REPEATS,
    RELAY_OVER_WITHIN, SIGHTING_LASTS, SUSPECT_AFTER,
};

/// Probes that are remembered: some seconds.
const WINDOW: usize = 32;
/// Requests for help with one node at the same time.
const MAX_HELP: usize = 32;
/// Doublings of the proof that a direct path has to give: the last one still comes within half a minute.
const PROOFS_DOUBLED: u32 = 2;

/// How a node is doing, as seen from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Standing {
    /// It answers, or nothing speaks against it.
    Up,
    /// It has missed echoes; others are being asked.
    Suspect,
    /// Others hear it, this node does not.
    Unreachable,
    /// Nobody hears it.
    Down,
}

impl Standing {
    /// Whether it makes sense to send it traffic.
    pub fn serves(self) -> bool {
        matches!(self, Self::Up | Self::Suspect)
    }
}

/// The way through a relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Via {
    /// The node that forwards.
    pub relay: WgKey,
    /// Its port, counted from the first relay port.
    pub slot: u8,
}

/// What decides about a standing.
#[derive(Debug, Clone, Copy)]
struct Evidence {
    silence: Duration,
    suspect_after: Duration,
    gone_after: Duration,
    /// Echoes in a row, and how many it takes to come back.
    streak: (u32, u32),
    /// Whether another node has heard it lately.
    sighted: bool,
}

/// The next standing. Pure, and the only place where it is decided.
fn judge(old: Standing, evidence: &Evidence) -> Standing {
    let Evidence { silence, suspect_after, gone_after, streak: (streak, needed), sighted } =
        *evidence;
    match old {
        Standing::Up | Standing::Suspect if silence < suspect_after => Standing::Up,
        Standing::Up | Standing::Suspect if silence < gone_after => Standing::Suspect,
        Standing::Unreachable | Standing::Down if silence < suspect_after && streak >= needed => {
            Standing::Up
        }
        Standing::Unreachable | Standing::Down if silence < gone_after => old,
        _ if sighted => Standing::Unreachable,
        _ => Standing::Down,
    }
}

#[derive(Debug, Clone, Copy)]
struct Probe {
    token: u32,
    sent: Instant,
    answered: bool,
}

/// Another node has heard it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sighting {
    pub(super) by: WgKey,
    pub(super) at: Instant,
    pub(super) rtt: Duration,
    pub(super) direct: bool,
}

/// Another node wants to know whether this one hears it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Help {
    pub(super) asker: WgKey,
    pub(super) since: Instant,
}

/// The relay in use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Route {
    pub(super) via: Via,
    pub(super) next_refresh: Instant,
}

/// What is known about one node.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) standing: Standing,
    /// Since when, or since when the route is what it is.
    pub(super) changed: Instant,
    pub(super) heard: Instant,
    /// When its kernel answered last, and not its agent.
    pub(super) kernel_heard: Instant,
    pub(super) kernel_silent: bool,
    /// The last echo that came without a relay.
    pub(super) heard_direct: Option<Instant>,
    /// Whether it was probed in the last tick.
    pub(super) probed: bool,
    /// It is watched closely until then, although nobody said so.
    pub(super) hot_until: Option<Instant>,
    pub(super) next_probe: Instant,
    pub(super) next_ask: Instant,
    pub(super) next_relay: Instant,
    pub(super) sightings: Vec<Sighting>,
    pub(super) help: Vec<Help>,
    pub(super) route: Option<Route>,
    pub(super) barred: Vec<(WgKey, Instant)>,
    /// When its relay was left because the direct path works.
    pub(super) over: Option<Instant>,
    /// How often it is still to be told so, and when next.
    pub(super) tell_over: (u32, Instant),
    probes: VecDeque<Probe>,
    srtt: Option<Duration>,
    streak: u32,
    relapses: u32,
    back: Option<Instant>,
    direct_proofs: u32,
}

impl Member {
    /// Nothing speaks against it yet; or something did before this process started.
    pub(super) fn new(now: Instant, standing: Standing) -> Self {
        Self {
            standing,
            changed: now,
            heard: now,
            kernel_heard: now,
            kernel_silent: false,
            heard_direct: None,
            probed: false,
            hot_until: None,
            next_probe: now,
            next_ask: now,
            next_relay: now,
            sightings: vec![],
            help: vec![],
            route: None,
            barred: vec![],
            over: None,
            tell_over: (0, now),
            probes: VecDeque::new(),
            srtt: None,
            streak: 0,
            relapses: 0,
            back: None,
            direct_proofs: 0,
        }
    }

    /// A probe goes out.
    pub(super) fn probe(&mut self, now: Instant, token: u32) {
        if self.probes.len() == WINDOW {
            self.probes.pop_front();
        }
        self.probes.push_back(Probe { token, sent: now, answered: false });
    }

    /// An echo came back; when its probe was sent and how long it took, if it was one of ours.
    pub(super) fn echoed(&mut self, now: Instant, token: u32) -> Option<(Instant, Duration)> {
        let probe = self.probes.iter_mut().find(|p| p.token == token && !p.answered)?;
        probe.answered = true;
        let sent = probe.sent;
        let rtt = now.saturating_duration_since(sent);
        self.srtt = Some(self.srtt.map_or(rtt, |srtt| (srtt * 7 + rtt) / 8));
        self.heard = now;
        if self.route.is_none() {
            self.heard_direct = Some(now);
        }
        self.streak = self.streak.saturating_add(1);
        Some((sent, rtt))
    }

    /// Decides anew; returns whether the standing changed.
    pub(super) fn judge(&mut self, now: Instant) -> bool {
        self.sightings.retain(|s| now.saturating_duration_since(s.at) < SIGHTING_LASTS);
        let silence = now.saturating_duration_since(self.heard);
        let suspect_after = SUSPECT_AFTER + self.round_trip() * 2;
        if silence >= suspect_after {
            self.streak = 0;
        }
        let evidence = Evidence {
            silence,
            suspect_after,
            gone_after: self.gone_after(),
            streak: (self.streak, self.back_after()),
            sighted: !self.sightings.is_empty(),
        };
        let new = judge(self.standing, &evidence);
        new != self.standing && self.set(now, new)
    }

    /// Takes a standing that others found.
    pub(super) fn set(&mut self, now: Instant, new: Standing) -> bool {
        let old = std::mem::replace(&mut self.standing, new);
        if old == new {
            return false;
        }
        self.changed = now;
        (self.next_ask, self.next_relay) = (now, now);
        match (old.serves(), new.serves()) {
            (true, false) => {
                let recent = |back: Instant| now.saturating_duration_since(back) < RELAPSE_WITHIN;
                let relapse = self.back.is_some_and(recent);
                self.relapses = if relapse { self.relapses + 1 } else { 0 };
            }
            (false, true) => {
                self.back = Some(now);
                self.sightings.clear();
            }
            _ => {}
        }
        true
    }

    pub(super) fn gone_after(&self) -> Duration {
        GONE_AFTER + self.round_trip() * 3
    }

    /// Whether a relay could count on it: an echo came without a relay within this time.
    pub(super) fn heard_directly(&self, now: Instant, within: Duration) -> bool {
        self.route.is_none()
            && self.heard_direct.is_some_and(|at| now.saturating_duration_since(at) < within)
    }

    pub(super) fn probe_pause(&self, now: Instant) -> Duration {
        match self.standing {
            Standing::Up => PROBE_EVERY,
            Standing::Suspect => PROBE_SUSPECT_EVERY,
            // At the first echo it is looked at as often as the others: in a longer pause the echoes would be no row.
            _ if self.streak == 0 && now.saturating_duration_since(self.changed) > LONG_DOWN => {
                PROBE_DOWN_EVERY
            }
            _ => PROBE_EVERY,
        }
    }

    /// Somebody wants to know whether it is heard.
    pub(super) fn asked(&mut self, now: Instant, asker: WgKey) {
        self.help.retain(|help| help.asker != asker);
        if self.help.len() < MAX_HELP {
            self.help.push(Help { asker, since: now });
        }
    }

    pub(super) fn sighted(&mut self, sighting: Sighting) {
        self.sightings.retain(|old| old.by != sighting.by);
        self.sightings.push(sighting);
    }

    pub(super) fn bar(&mut self, relay: WgKey, until: Instant) {
        self.barred.retain(|(key, _)| *key != relay);
        self.barred.push((relay, until));
    }

    pub(super) fn bars(&self, now: Instant, relay: &WgKey) -> bool {
        self.barred.iter().any(|(key, until)| key == relay && *until > now)
    }

    /// Takes a relay, or none; it has a whole period of silence to prove itself.
    pub(super) fn set_route(&mut self, now: Instant, route: Option<Route>) {
        let leaving = route.is_none();
        self.route = route;
        self.changed = now;
        self.heard = now;
        self.kernel_heard = now;
        self.streak = 0;
        self.direct_proofs = 0;
        self.heard_direct = None;
        if leaving && self.standing.serves() {
            self.back = Some(now);
        }
    }

    /// Answers came past the relay; returns whether that is enough to do without it.
    pub(super) fn answered_directly(&mut self, times: u32) -> bool {
        self.direct_proofs = self.direct_proofs.saturating_add(times);
        self.direct_proofs >= DIRECT_PROOFS << self.relapses.min(PROOFS_DOUBLED)
    }

    /// The direct path works: no relay any more, and the other side is told when it was this one that found out.
    pub(super) fn end_relay(&mut self, now: Instant, tell: bool) {
        self.set_route(now, None);
        self.over = Some(now);
        self.tell_over = (if tell { RELAY_OVER_REPEATS } else { 0 }, now);
    }

    /// Whether the relay was left so lately that the other side may still use it.
    pub(super) fn just_over(&self, now: Instant) -> bool {
        self.over.is_some_and(|at| now.saturating_duration_since(at) < RELAY_OVER_WITHIN)
    }

    /// The smoothed round trip, if an echo has ever come.
    pub(super) fn rtt(&self) -> Option<Duration> {
        self.srtt
    }

    /// Probes without an echo, of a thousand; only those that had time enough.
    pub(super) fn loss_permille(&self, now: Instant) -> u16 {
        let due = |probe: &&Probe| {
            probe.answered || now.saturating_duration_since(probe.sent) > self.gone_after()
        };
        let all = self.probes.iter().filter(due).count();
        let lost = self.probes.iter().filter(due).filter(|probe| !probe.answered).count();
        (lost * 1000).checked_div(all).unwrap_or(0) as u16
    }

    fn round_trip(&self) -> Duration {
        self.srtt.unwrap_or_default().min(LONGEST_ROUND_TRIP)
    }

    /// A relay that was just taken is believed at its first echo: it is watched closely.
    fn back_after(&self) -> u32 {
        if self.route.is_some() { 1 } else { BACK_AFTER << self.relapses.min(RELAPSES_COUNTED) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn evidence(silence: Duration, streak: u32, sighted: bool) -> Evidence {
        Evidence {
            silence,
            suspect_after: SUSPECT_AFTER,
            gone_after: GONE_AFTER,
            streak: (streak, BACK_AFTER),
            sighted,
        }
    }

    #[test]
    fn a_standing_follows_from_silence_sightings_and_what_was_before() {
        use Standing::{Down, Suspect, Unreachable, Up};
        for (old, silence, streak, sighted, new) in [
            (Up, 0, 9, false, Up),
            (Up, 350, 0, false, Suspect),
            (Suspect, 10, 1, false, Up),
            (Suspect, 600, 0, false, Down),
            (Suspect, 600, 0, true, Unreachable),
            (Down, 600, 0, true, Unreachable),
            (Unreachable, 600, 0, false, Down),
            (Down, 10, 2, false, Down),
            (Down, 10, 3, false, Up),
            (Unreachable, 10, 3, true, Up),
            (Down, 350, 5, true, Down),
        ] {
            let seen = judge(old, &evidence(silence * MS, streak, sighted));
            assert_eq!(seen, new, "{old:?} after {silence} ms, {streak} echoes, {sighted}");
        }
    }

    #[test]
    fn one_that_comes_and_goes_has_to_prove_more_each_time() {
        let mut now = Instant::now();
        let mut member = Member::new(now, Standing::Up);
        let mut waits = vec![];
        for _ in 0..3 {
            now += GONE_AFTER;
            assert!(member.judge(now) && member.standing == Standing::Down);
            let mut echoes = 0;
            while member.standing == Standing::Down {
                now += PROBE_EVERY;
                member.probe(now, echoes);
                member.echoed(now, echoes);
                member.judge(now);
                echoes += 1;
            }
            waits.push(echoes);
        }
        assert_eq!(waits, [BACK_AFTER, BACK_AFTER * 2, BACK_AFTER * 4]);
        now += RELAPSE_WITHIN * 2;
        member.judge(now);
        assert_eq!(member.relapses, 0, "long ago");
    }

    #[test]
    fn an_answer_counts_once_and_losses_are_counted() {
        let start = Instant::now();
        let mut member = Member::new(start, Standing::Up);
        for token in 0..10 {
            member.probe(start, token);
        }
        assert_eq!(member.loss_permille(start), 0, "they may still be answered");
        for token in 0..8 {
            assert!(member.echoed(start + 2 * MS, token).is_some());
        }
        assert!(member.echoed(start + 2 * MS, 3).is_none() && member.echoed(start, 77).is_none());
        assert_eq!(member.rtt(), Some(2 * MS));
        assert_eq!(member.loss_permille(start + Duration::from_secs(1)), 200);
    }
}
