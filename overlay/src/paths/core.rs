//! All other nodes, and this node's part in watching them.

mod relaying;
mod telling;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_model::snapshot::WgKey;

use self::telling::SYNC_MESSAGES;
use super::leases::{Leases, Pair, SLOTS};
use super::member::{Help, Member, Route, Sighting, Standing, Via};
use super::message::Message;
use super::nat::Nat;
use super::rings::{Rings, splitmix};
use super::votes::{Vote, Votes};
use super::{
    ASK_AGAIN, ASK_AGAIN_LONGEST, GONE_AFTER, HELP_LASTS, HELPERS, HOT_FOR, PROBE_OTHERS_EVERY,
    PROBE_SUSPECT_EVERY, QUORUM, SUSPECT_AFTER, TICK,
};

/// No votes so shortly after this node was alone: the others' echoes are still on their way.
const VOTELESS_AFTER_ISOLATION: Duration = Duration::from_secs(1);

/// What has to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send an echo request that carries the token.
    Echo {
        /// To this node.
        to: WgKey,
        /// Comes back by [`Core::echoed`].
        token: u32,
    },
    /// Send a message.
    Send {
        /// To this node.
        to: WgKey,
        /// The message.
        message: Message,
    },
    /// Forward between these pairs and no others.
    Forward(Vec<Pair>),
}

/// A path as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathView {
    /// The node.
    pub key: WgKey,
    /// How it is doing.
    pub standing: Standing,
    /// The relay in use.
    pub via: Option<Via>,
    /// Round trip of the echoes; nothing before the first.
    pub rtt: Option<Duration>,
    /// Echoes that did not come, of a thousand.
    pub loss_permille: u16,
    /// How long it has been so.
    pub lasts: Duration,
    /// Where this node appears to it, when that is not an endpoint of this node: this one is behind NAT.
    pub outside: Option<SocketAddr>,
    /// Whether it appears here at an endpoint that is none of its own: it is behind NAT.
    pub translated: bool,
}

/// What an earlier process of this node knew when it ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Past {
    /// Nodes that were down: they have to prove themselves. The others get the benefit of the doubt.
    pub down: BTreeSet<WgKey>,
    /// Relays that were in use.
    pub routes: BTreeMap<WgKey, Via>,
    /// Where this node appeared to others, when not at an endpoint of its own.
    pub outside: BTreeMap<WgKey, SocketAddr>,
}

/// Echoes to a node that nobody here watches.
#[derive(Debug, Clone, Copy)]
struct Sample {
    key: WgKey,
    sent: Instant,
    again: bool,
}

/// One node's view of all others. Not shared; everything happens in its methods.
pub struct Core {
    me: WgKey,
    members: BTreeMap<WgKey, Member>,
    rings: Rings,
    watched: BTreeSet<WgKey>,
    /// Those to look at in the next tick beside the watched ones.
    noted: BTreeSet<WgKey>,
    votes: Votes,
    /// Number of this node's last vote.
    number: u64,
    announcing: Vec<(Vote, u32, Instant)>,
    nat: Nat,
    leases: Leases,
    /// Requests for relays that wait for an echo of either side.
    requests: Vec<(WgKey, WgKey, Instant)>,
    /// What the relay forwards, by its own word.
    forwarded: BTreeSet<Pair>,
    /// Pairs that are granted as soon as they are among those.
    promised: BTreeSet<Pair>,
    samples: VecDeque<Sample>,
    next_sample: Instant,
    last_sampled: Option<WgKey>,
    next_gossip: Instant,
    synced: bool,
    /// The last echo of anybody.
    heard: Instant,
    isolated: bool,
    votes_from: Instant,
    last_tick: Instant,
    token: u32,
    random: u64,
    revision: u64,
}

impl Core {
    /// A node without others. `number` must be above that of its votes of earlier runs: milliseconds since 1970 are.
    pub fn new(now: Instant, me: WgKey, number: u64, seed: u64) -> Self {
        Self {
            me,
            members: BTreeMap::new(),
            rings: Rings::default(),
            watched: BTreeSet::new(),
            noted: BTreeSet::new(),
            votes: Votes::default(),
            number,
            announcing: vec![],
            nat: Nat::default(),
            leases: Leases::default(),
            requests: vec![],
            forwarded: BTreeSet::new(),
            promised: BTreeSet::new(),
            samples: VecDeque::new(),
            next_sample: now,
            last_sampled: None,
            next_gossip: now,
            synced: false,
            heard: now,
            isolated: false,
            votes_from: now,
            last_tick: now,
            token: splitmix(seed) as u32,
            random: seed,
            revision: 0,
        }
    }

    /// The other nodes of the cluster; `past` tells about those that are new here.
    pub fn set_members(&mut self, now: Instant, others: &[WgKey], past: &Past) {
        let wanted: BTreeSet<WgKey> =
            others.iter().copied().filter(|key| *key != self.me).collect();
        if wanted.iter().eq(self.members.keys()) {
            return;
        }
        self.members.retain(|key, _| wanted.contains(key));
        self.nat.keep(|key| wanted.contains(key));
        for key in &wanted {
            if !self.members.contains_key(key) {
                self.members.insert(*key, newcomer(now, key, past));
                if let Some(at) = past.outside.get(key) {
                    self.nat.adopt(now, *key, *at);
                }
                self.noted.insert(*key);
            }
        }
        let me = self.me;
        self.votes.keep(|key| *key == me || wanted.contains(key));
        let all: Vec<WgKey> = wanted.into_iter().chain([self.me]).collect();
        self.rings = Rings::new(&all);
        self.changed();
    }

    /// Goes on forwarding what an earlier agent of this node had promised.
    pub fn adopt_leases(&mut self, now: Instant, pairs: &[Pair]) {
        self.leases.adopt(now, pairs);
        self.noted.extend(pairs.iter().flat_map(|pair| [pair.a, pair.b]));
    }

    /// Changes with each standing and each route.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Whether nobody at all is heard: then this node is the one that is cut off.
    pub fn isolated(&self) -> bool {
        self.isolated
    }

    /// All paths, ordered by key.
    pub fn view(&self, now: Instant) -> Vec<PathView> {
        let view = |(key, member): (&WgKey, &Member)| PathView {
            key: *key,
            standing: member.standing,
            via: member.route.map(|route| route.via),
            rtt: member.rtt(),
            loss_permille: member.loss_permille(now),
            lasts: now.saturating_duration_since(member.changed),
            outside: self.nat.outside(key),
            translated: self.nat.is_translated(key),
        };
        self.members.iter().map(view).collect()
    }

    /// Lets time pass; to be called every [`TICK`], after everything that has arrived was handed in.
    pub fn tick(&mut self, now: Instant, out: &mut Vec<Action>) {
        self.forgive_lateness(now);
        self.greet(out);
        self.look_for_isolation(now);
        let noted = std::mem::take(&mut self.noted);
        for key in noted.union(&self.watched.clone()).copied() {
            self.look_at(now, key, out);
        }
        self.vote(now);
        self.sample(now, out);
        self.announce(now, out);
        self.gossip(now, out);
        self.lease(now, out);
        let said = self.nat.say(now);
        out.extend(said.into_iter().map(|(to, message)| send(to, message)));
    }

    /// A node's kernel answered a probe.
    pub fn echoed(&mut self, now: Instant, from: WgKey, token: u32, out: &mut Vec<Action>) {
        if self.answered(now, from, token, out)
            && let Some(member) = self.members.get_mut(&from)
        {
            (member.kernel_heard, member.kernel_silent) = (now, false);
        }
    }

    /// A message of another node's agent came through the tunnel.
    pub fn received(&mut self, now: Instant, from: WgKey, message: Message, out: &mut Vec<Action>) {
        if !self.members.contains_key(&from) {
            return;
        }
        match message {
            Message::Ping { token } => out.push(send(from, Message::Pong { token })),
            Message::Pong { token } => self.ponged(now, from, token, out),
            Message::Ask { subject } => self.asked(now, from, subject, out),
            Message::Sighting { subject, rtt, direct } => {
                if let Some(member) = self.members.get_mut(&subject) {
                    member.sighted(Sighting { by: from, at: now, rtt, direct });
                }
            }
            Message::Votes(votes) => self.told(from, votes, out),
            Message::Sync => self.tell(from, SYNC_MESSAGES, out),
            Message::RelayRequest { peer } => self.relay_requested(now, from, peer, out),
            Message::RelayGrant { peer, slot } => self.relay_granted(now, from, peer, slot, out),
            Message::RelayRefusal { peer } => self.relay_refused(now, from, peer),
            Message::RelayOver => self.relay_over(now, from),
            Message::SeenAt { endpoint } => {
                self.revision += u64::from(self.nat.told(now, from, endpoint));
            }
            Message::WhereAmI => {
                out.extend(self.nat.answer(&from).map(|message| send(from, message)));
            }
            // Not about paths: whoever serves the port knows.
            Message::KeyAsk { .. } | Message::KeyKnown { .. } => {}
        }
    }

    /// Traffic to the node gets no answer: it is worth a look.
    pub fn unanswered(&mut self, now: Instant, key: WgKey) {
        if !self.is_probed(now, &key) {
            self.heat(now, key);
        }
    }

    /// This node's own endpoints on the underlay.
    pub fn set_own_endpoints(&mut self, own: BTreeSet<SocketAddr>) {
        self.revision += u64::from(self.nat.set_own(own));
    }

    /// The node's packets come from there, and through no relay; `translated` when that is none of its own endpoints.
    pub fn appears(&mut self, now: Instant, key: WgKey, at: SocketAddr, translated: bool) {
        if self.members.contains_key(&key) {
            self.revision += u64::from(self.nat.appears(now, key, at, translated));
        }
    }

    /// The node answered this often on a direct path, while a relay is in use.
    pub fn answered_directly(&mut self, now: Instant, key: WgKey, times: u32) {
        let Some(member) = self.members.get_mut(&key) else { return };
        if times > 0 && member.route.is_some() && member.answered_directly(times) {
            member.end_relay(now, true);
            member.hot_until = Some(now + HOT_FOR);
            self.noted.insert(key);
            self.changed();
        }
    }

    /// The node's packets come through a relay, which it has chosen while this node had no reason to.
    pub fn found_behind(&mut self, now: Instant, key: WgKey, via: Via) {
        let Some(member) = self.members.get_mut(&key) else { return };
        if member.route.is_none() && !member.just_over(now) && via.relay != key && via.slot < SLOTS
        {
            member.set_route(now, Some(Route { via, next_refresh: now }));
            self.noted.insert(key);
            self.changed();
        }
    }

    /// Whether a relay to any of these was left so lately that packets of its last moments still lead back to it.
    pub fn just_left_relay<'k>(
        &self,
        now: Instant,
        mut keys: impl Iterator<Item = &'k WgKey>,
    ) -> bool {
        keys.any(|key| self.members.get(key).is_some_and(|member| member.just_over(now)))
    }

    /// This process was kept from running, not the others: what it could not hear is not held against them.
    fn forgive_lateness(&mut self, now: Instant) {
        let gap = now.saturating_duration_since(self.last_tick);
        self.last_tick = now;
        if gap > TICK * 3 {
            self.heard = (self.heard + (gap - TICK)).min(now);
            for member in self.members.values_mut() {
                member.heard = (member.heard + (gap - TICK)).min(now);
            }
        }
    }

    fn look_for_isolation(&mut self, now: Instant) {
        let silence = now.saturating_duration_since(self.heard);
        let isolated = silence >= SUSPECT_AFTER && !self.members.is_empty();
        if self.isolated && !isolated {
            self.votes_from = now + VOTELESS_AFTER_ISOLATION;
        }
        if self.isolated != isolated {
            self.isolated = isolated;
            self.revision += 1;
        }
    }

    fn is_probed(&self, now: Instant, key: &WgKey) -> bool {
        let hot = |member: &Member| {
            member.route.is_some() || member.hot_until.is_some_and(|until| until > now)
        };
        self.watched.contains(key)
            || self.members.get(key).is_some_and(hot)
            || self.votes.of(&self.me, key).is_some_and(|(_, down)| down)
            || self.leases.concern(key)
    }

    fn judge(&mut self, now: Instant, key: WgKey) {
        let Some(member) = self.members.get_mut(&key) else { return };
        let changed = member.judge(now);
        if member.hot_until.is_some() && member.standing != Standing::Up {
            member.hot_until = Some(now + HOT_FOR);
        }
        if changed {
            self.changed();
        }
    }

    /// One node's turn in a tick.
    fn look_at(&mut self, now: Instant, key: WgKey, out: &mut Vec<Action>) {
        let probed = self.is_probed(now, &key);
        let Some(member) = self.members.get_mut(&key) else { return };
        if probed && !member.probed {
            // The silence until now was ours.
            (member.heard, member.next_probe) = (now, now);
        }
        member.probed = probed;
        if probed {
            self.judge(now, key);
            self.relay(now, key, out);
            self.ask(now, key, out);
            self.probe(now, key, out);
        } else {
            self.believe(now, key);
        }
        if self.help(now, key, out) || probed {
            self.noted.insert(key);
        }
    }

    /// What is not probed is as the watchers say.
    fn believe(&mut self, now: Instant, key: WgKey) {
        let alive = |watcher: &WgKey| {
            self.members.get(watcher).is_some_and(|member| member.standing != Standing::Down)
        };
        let down = self.votes.against(&key, alive) >= QUORUM;
        let Some(member) = self.members.get_mut(&key) else { return };
        if member.set(now, if down { Standing::Down } else { Standing::Up }) {
            self.changed();
        }
    }

    /// A standing or a route is not what it was.
    fn changed(&mut self) {
        self.revision += 1;
        let is_down =
            |key: &WgKey| self.members.get(key).is_some_and(|m| m.standing == Standing::Down);
        self.watched = self.rings.subjects(self.me, is_down);
        // Whose vote counts has changed with it.
        self.noted.extend(self.votes.subjects());
    }

    fn probe(&mut self, now: Instant, key: WgKey, out: &mut Vec<Action>) {
        let due = self.members.get_mut(&key).is_some_and(|member| {
            let due = now >= member.next_probe;
            if due {
                // Spread from the start on: members whose turn has come at once are not to stay together.
                let late = now.saturating_duration_since(member.next_probe);
                let pause = member.probe_pause(now);
                member.next_probe = now + pause - late.min(pause / 4);
            } else {
                member.next_probe = member.next_probe.min(now + member.probe_pause(now));
            }
            due
        });
        if due {
            self.echo(now, key, out);
        }
    }

    fn echo(&mut self, now: Instant, key: WgKey, out: &mut Vec<Action>) {
        self.token = self.token.wrapping_add(1);
        let token = self.token;
        let Some(member) = self.members.get_mut(&key) else { return };
        member.probe(now, token);
        out.push(Action::Echo { to: key, token });
        if member.kernel_silent || member.standing == Standing::Suspect {
            out.push(send(key, Message::Ping { token }));
        }
    }

    /// Returns whether it was an answer to something.
    fn answered(&mut self, now: Instant, from: WgKey, token: u32, out: &mut Vec<Action>) -> bool {
        let Some(member) = self.members.get_mut(&from) else { return false };
        let Some((sent, rtt)) = member.echoed(now, token) else { return false };
        self.heard = now;
        let direct = member.route.is_none();
        member.help.retain(|help| {
            let answers = help.since <= sent;
            if answers {
                let sighting = Message::Sighting { subject: from, rtt, direct };
                out.push(send(help.asker, sighting));
            }
            !answers
        });
        true
    }

    fn ponged(&mut self, now: Instant, from: WgKey, token: u32, out: &mut Vec<Action>) {
        if self.answered(now, from, token, out)
            && let Some(member) = self.members.get_mut(&from)
        {
            let silence = now.saturating_duration_since(member.kernel_heard);
            member.kernel_silent = silence > GONE_AFTER * 2;
        }
    }

    /// Asks others about a node that is silent.
    fn ask(&mut self, now: Instant, key: WgKey, out: &mut Vec<Action>) {
        let Some(member) = self.members.get_mut(&key) else { return };
        if member.standing == Standing::Up || now < member.next_ask {
            return;
        }
        let gone_for = now.saturating_duration_since(member.changed);
        member.next_ask = now
            + match member.standing {
                Standing::Suspect => TICK * 2,
                _ => (gone_for / 4).clamp(ASK_AGAIN, ASK_AGAIN_LONGEST),
            };
        for helper in self.some(HELPERS, |candidate, member| {
            *candidate != key && member.standing == Standing::Up && member.route.is_none()
        }) {
            out.push(send(helper, Message::Ask { subject: key }));
        }
    }

    fn asked(&mut self, now: Instant, from: WgKey, subject: WgKey, out: &mut Vec<Action>) {
        if subject != from
            && let Some(member) = self.members.get_mut(&subject)
        {
            member.asked(now, from);
            self.noted.insert(subject);
            self.echo(now, subject, out);
        }
    }

    /// Tries for those that asked, a few times; returns whether there are any.
    fn help(&mut self, now: Instant, key: WgKey, out: &mut Vec<Action>) -> bool {
        let Some(member) = self.members.get_mut(&key) else { return false };
        member.help.retain(|help| now.saturating_duration_since(help.since) < HELP_LASTS);
        let fresh = |help: &Help| now.saturating_duration_since(help.since) >= PROBE_SUSPECT_EVERY;
        let (any, again) = (!member.help.is_empty(), member.help.iter().any(fresh));
        if again {
            self.echo(now, key, out);
        }
        any
    }

    /// Watches a node closely for a while.
    fn heat(&mut self, now: Instant, key: WgKey) {
        if let Some(member) = self.members.get_mut(&key) {
            member.hot_until = Some(now + HOT_FOR);
            self.noted.insert(key);
        }
    }

    /// Probes the nodes that nobody here watches, one after the other; two misses in a row are odd.
    fn sample(&mut self, now: Instant, out: &mut Vec<Action>) {
        while let Some(sample) = self.samples.front().copied()
            && now.saturating_duration_since(sample.sent) >= GONE_AFTER
        {
            self.samples.pop_front();
            let missed =
                self.members.get(&sample.key).is_some_and(|m| m.heard_direct < Some(sample.sent));
            if missed && !self.is_probed(now, &sample.key) {
                if sample.again {
                    self.heat(now, sample.key);
                } else {
                    self.echo(now, sample.key, out);
                    self.samples.push_back(Sample { sent: now, again: true, ..sample });
                }
            }
        }
        if now >= self.next_sample {
            self.next_sample = now + PROBE_OTHERS_EVERY;
            if let Some(key) = self.next_to_sample(now) {
                self.last_sampled = Some(key);
                self.echo(now, key, out);
                self.samples.push_back(Sample { key, sent: now, again: false });
            }
        }
    }

    fn next_to_sample(&self, now: Instant) -> Option<WgKey> {
        use std::ops::Bound::{Excluded, Included, Unbounded};
        if self.watched.len() == self.members.len() {
            return None;
        }
        let last = self.last_sampled.unwrap_or(self.me);
        let behind = self.members.range((Excluded(last), Unbounded));
        let before = self.members.range((Unbounded, Included(last)));
        let mut turn = behind.chain(before);
        let idle = |(key, member): &(&WgKey, &Member)| {
            member.standing == Standing::Up && !self.is_probed(now, key)
        };
        turn.find(idle).map(|(key, _)| *key)
    }

    /// Some members that fit, at random.
    fn some(&mut self, most: usize, fits: impl Fn(&WgKey, &Member) -> bool) -> Vec<WgKey> {
        let fitting = self.members.iter().filter(|(key, member)| fits(key, member));
        let mut keys: Vec<WgKey> = fitting.map(|(key, _)| *key).collect();
        for place in 0..most.min(keys.len()) {
            let other = place + self.below(keys.len() - place);
            keys.swap(place, other);
        }
        keys.truncate(most);
        keys
    }

    fn below(&mut self, bound: usize) -> usize {
        self.random = splitmix(self.random);
        (self.random % bound.max(1) as u64) as usize
    }
}

fn newcomer(now: Instant, key: &WgKey, past: &Past) -> Member {
    let down = past.down.contains(key);
    let mut member = Member::new(now, if down { Standing::Down } else { Standing::Up });
    if down {
        member.hot_until = Some(now + HOT_FOR);
    }
    if let Some(via) = past.routes.get(key) {
        member.set_route(now, Some(Route { via: *via, next_refresh: now }));
    }
    member
}

fn send(to: WgKey, message: Message) -> Action {
    Action::Send { to, message }
}

#[cfg(test)]
mod tests;
