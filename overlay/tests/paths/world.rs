//! Nodes with paths between them, under a clock of our own.
//!
//! ```text
//!   node --- tunnel (loss, delay, blocked directions) --- node
//!     \                                                    /
//!      `--- tunnel --- relay (forwards leased pairs) -----'
//! ```
//!
//! Kernels answer echoes as long as the node lives; agents may be dead on nodes that live.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::time::{Duration, Instant};

use mesh_model::snapshot::WgKey;
use mesh_overlay::paths::{Action, Core, Message, Pair, Past, PathView, Standing, TICK, Via};

/// One way through a tunnel.
const DELAY: Duration = Duration::from_micros(400);
/// Delays differ by this much.
const JITTER_US: u64 = 300;
/// How often a node that uses a relay tries the direct path (the engine does that).
const DIRECT_TRIALS: Duration = Duration::from_secs(4);
/// How long a relay takes to forward what it is told.
const RELAY_STARTS: Duration = Duration::from_millis(50);
/// How often a node looks where the others' packets come from.
const ENDPOINTS_SEEN: Duration = Duration::from_secs(1);

pub(crate) struct World {
    pub(crate) now: Instant,
    pub(crate) start: Instant,
    pub(crate) nodes: Vec<Node>,
    /// Of a thousand datagrams.
    pub(crate) loss_permille: u64,
    /// Directions that carry nothing.
    pub(crate) blocked: BTreeSet<(usize, usize)>,
    /// Datagrams sent by nodes, answers of kernels included.
    pub(crate) datagrams: u64,
    /// Most relays on one way.
    pub(crate) most_relays: usize,
    events: BinaryHeap<Reverse<(Instant, u64, usize)>>,
    pending: BTreeMap<usize, Event>,
    next_event: usize,
    random: u64,
}

pub(crate) struct Node {
    pub(crate) core: Core,
    /// Kernel, overlay and cable.
    pub(crate) alive: bool,
    pub(crate) agent: bool,
    /// Ways that its agent has set, by node.
    forced: BTreeMap<usize, Via>,
    /// Where datagrams of a node came from last.
    learned: BTreeMap<usize, Option<(usize, u8)>>,
    forwards: Vec<Pair>,
    revision: u64,
    /// When the standing of a node changed, as seen from here.
    pub(crate) log: Vec<(Duration, usize, Standing)>,
    seen: BTreeMap<usize, Standing>,
}

enum Event {
    Tick(usize),
    Arrive {
        from: usize,
        to: usize,
        by: Option<(usize, u8)>,
        load: Load,
    },
    TryDirect(usize),
    LookAtEndpoints(usize),
    /// The node's relay has started.
    Forwards(usize, Vec<Pair>),
}

#[derive(Clone)]
enum Load {
    Request(u32),
    Reply(u32),
    Message(Message),
}

pub(crate) fn key(n: usize) -> WgKey {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&(n as u64 + 1).to_be_bytes());
    WgKey(key)
}

fn number(key: WgKey) -> usize {
    u64::from_be_bytes(*key.0.first_chunk().expect("a key has 32 bytes")) as usize - 1
}

impl World {
    pub(crate) fn new(count: usize, seed: u64) -> Self {
        let now = Instant::now();
        let members: Vec<WgKey> = (0..count).map(key).collect();
        let node = |n: usize| {
            let mut core = Core::new(now, key(n), 1, seed ^ n as u64);
            core.set_members(now, &members, &Past::default());
            Node {
                core,
                alive: true,
                agent: true,
                forced: BTreeMap::new(),
                learned: BTreeMap::new(),
                forwards: vec![],
                revision: 0,
                log: vec![],
                seen: BTreeMap::new(),
            }
        };
        let mut world = Self {
            now,
            start: now,
            nodes: (0..count).map(node).collect(),
            loss_permille: 0,
            blocked: BTreeSet::new(),
            datagrams: 0,
            most_relays: 0,
            events: BinaryHeap::new(),
            pending: BTreeMap::new(),
            next_event: 0,
            random: seed,
        };
        for n in 0..count {
            let phase = Duration::from_micros(world.below(50_000));
            world.at(now + phase, Event::Tick(n));
            world.at(now + phase * 20, Event::TryDirect(n));
            world.at(now + phase * 10, Event::LookAtEndpoints(n));
        }
        world
    }

    pub(crate) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(Reverse((at, ..))) = self.events.peek()
            && *at <= end
        {
            let Some(Reverse((at, _, id))) = self.events.pop() else { break };
            self.now = at;
            if let Some(event) = self.pending.remove(&id) {
                self.happen(event);
            }
        }
        self.now = end;
    }

    /// Runs until it is so; returns how long that took.
    pub(crate) fn until(
        &mut self,
        limit: Duration,
        so: impl Fn(&Self) -> bool,
    ) -> Option<Duration> {
        let start = self.now;
        while !so(self) {
            if self.now - start > limit {
                return None;
            }
            self.run(Duration::from_millis(10));
        }
        Some(self.now - start)
    }

    pub(crate) fn path(&self, from: usize, to: usize) -> PathView {
        let view = self.nodes[from].core.view(self.now);
        view.into_iter().find(|path| path.key == key(to)).expect("another member")
    }

    pub(crate) fn standing(&self, from: usize, to: usize) -> Standing {
        self.path(from, to).standing
    }

    /// Starts a node's agent anew.
    pub(crate) fn restart_agent(&mut self, n: usize) {
        let members: Vec<WgKey> = (0..self.nodes.len()).map(key).collect();
        let mut core = Core::new(self.now, key(n), 1, self.random);
        let forced = self.nodes[n].forced.iter();
        let past = Past {
            down: BTreeSet::new(),
            routes: forced.map(|(to, via)| (key(*to), *via)).collect(),
            outside: BTreeMap::new(),
        };
        core.set_members(self.now, &members, &past);
        core.adopt_leases(self.now, &self.nodes[n].forwards);
        self.nodes[n].core = core;
        self.nodes[n].agent = true;
    }

    pub(crate) fn block(&mut self, a: usize, b: usize, both: bool) {
        self.blocked.insert((a, b));
        if both {
            self.blocked.insert((b, a));
        }
    }

    /// Every change that the log of a node shows, of all nodes: (who, when, about whom, what).
    pub(crate) fn changes(&self) -> impl Iterator<Item = (usize, Duration, usize, Standing)> + '_ {
        self.nodes.iter().enumerate().flat_map(|(n, node)| {
            node.log.iter().map(move |(at, about, standing)| (n, *at, *about, *standing))
        })
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        // xorshift64*: any sequence will do that is the same each time.
        self.random = self.random.max(1);
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound.max(1)
    }

    fn at(&mut self, when: Instant, event: Event) {
        self.next_event += 1;
        self.pending.insert(self.next_event, event);
        self.events.push(Reverse((when, self.next_event as u64, self.next_event)));
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Tick(n) => {
                self.at(self.now + TICK, Event::Tick(n));
                self.call(n, |core, now, out| core.tick(now, out));
            }
            Event::TryDirect(n) => {
                self.at(self.now + DIRECT_TRIALS, Event::TryDirect(n));
                for to in self.nodes[n].forced.keys().copied().collect::<Vec<_>>() {
                    if self.hop(n, to) && self.hop(to, n) && self.nodes[to].alive {
                        self.call(n, |core, now, _| core.answered_directly(now, key(to), 1));
                    }
                }
            }
            Event::LookAtEndpoints(n) => {
                self.at(self.now + ENDPOINTS_SEEN, Event::LookAtEndpoints(n));
                for (of, by) in self.nodes[n].learned.clone() {
                    if let (Some((relay, slot)), false) =
                        (by, self.nodes[n].forced.contains_key(&of))
                    {
                        let via = Via { relay: key(relay), slot };
                        self.call(n, |core, now, _| core.found_behind(now, key(of), via));
                    }
                }
            }
            Event::Forwards(n, pairs) => {
                self.call(n, |core, _, out| core.forwards(&pairs, out));
            }
            Event::Arrive { from, to, by, load } => {
                self.nodes[to].learned.insert(from, by);
                match load {
                    Load::Request(token) => self.transmit(to, from, Load::Reply(token)),
                    Load::Reply(token) => {
                        self.call(to, |core, now, out| core.echoed(now, key(from), token, out));
                    }
                    Load::Message(message) => {
                        let datagram = message.encode();
                        let message = Message::decode(&datagram).expect("what was encoded");
                        self.call(to, |core, now, out| {
                            core.received(now, key(from), message, out);
                        });
                    }
                }
            }
        }
    }

    fn call(&mut self, n: usize, call: impl FnOnce(&mut Core, Instant, &mut Vec<Action>)) {
        if !self.nodes[n].alive || !self.nodes[n].agent {
            return;
        }
        let mut out = vec![];
        let now = self.now;
        call(&mut self.nodes[n].core, now, &mut out);
        self.note(n);
        for action in out {
            match action {
                Action::Echo { to, token } => self.transmit(n, number(to), Load::Request(token)),
                Action::Send { to, message } => {
                    self.transmit(n, number(to), Load::Message(message));
                }
                Action::Forward(pairs) => {
                    self.at(self.now + RELAY_STARTS, Event::Forwards(n, pairs.clone()));
                    self.nodes[n].forwards = pairs;
                }
            }
        }
    }

    /// Puts the node's routes in force and writes down what changed.
    fn note(&mut self, n: usize) {
        let (now, start) = (self.now, self.start);
        let node = &mut self.nodes[n];
        if node.revision == node.core.revision() {
            return;
        }
        node.revision = node.core.revision();
        let view = node.core.view(now);
        node.forced = view.iter().filter_map(|path| Some((number(path.key), path.via?))).collect();
        for path in view {
            let about = number(path.key);
            if node.seen.insert(about, path.standing).unwrap_or(Standing::Up) != path.standing {
                node.log.push((now - start, about, path.standing));
            }
        }
    }

    fn transmit(&mut self, from: usize, to: usize, load: Load) {
        if !self.nodes[from].alive {
            return;
        }
        self.datagrams += 1;
        let forced = self.nodes[from].forced.get(&to).map(|via| (number(via.relay), via.slot));
        let by = forced.or_else(|| self.nodes[from].learned.get(&to).copied().flatten());
        let Some((relay, slot)) = by else {
            if self.hop(from, to) {
                self.arrive(from, to, None, load);
            }
            return;
        };
        self.most_relays = self.most_relays.max(1);
        let pairs = &self.nodes[relay].forwards;
        let other = pairs.iter().find_map(|pair| match (number(pair.a), number(pair.b)) {
            (a, b) if pair.slot == slot && a == from => Some(b),
            (a, b) if pair.slot == slot && b == from => Some(a),
            _ => None,
        });
        // The relay forwards to the overlay port of a node, which is where the way ends.
        if other == Some(to) && self.hop(from, relay) && self.hop(relay, to) {
            self.arrive(from, to, by, load);
        }
    }

    fn hop(&mut self, from: usize, to: usize) -> bool {
        let lost = self.below(1000) < self.loss_permille;
        let (a, b) = (&self.nodes[from], &self.nodes[to]);
        !lost && a.alive && b.alive && !self.blocked.contains(&(from, to))
    }

    fn arrive(&mut self, from: usize, to: usize, by: Option<(usize, u8)>, load: Load) {
        let delay = DELAY + Duration::from_micros(self.below(JITTER_US));
        self.at(self.now + delay, Event::Arrive { from, to, by, load });
    }
}
