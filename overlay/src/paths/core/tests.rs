use proptest::prelude::*;

use super::*;
use crate::paths::LEASE_LASTS;

const MS: Duration = Duration::from_millis(1);

fn key(n: u8) -> WgKey {
    WgKey([n; 32])
}

/// Node 0 among others that answer every echo at once, but for those in `silent`.
struct Alone {
    now: Instant,
    core: Core,
    silent: BTreeSet<WgKey>,
    sent: Vec<(WgKey, Message)>,
    forwards: Vec<Pair>,
    relay_runs: bool,
}

impl Alone {
    fn new(others: u8) -> Self {
        let now = Instant::now();
        let mut core = Core::new(now, key(0), 1, 7);
        let others: Vec<WgKey> = (1..=others).map(key).collect();
        core.set_members(now, &others, &Past::default());
        Self {
            now,
            core,
            silent: BTreeSet::new(),
            sent: vec![],
            forwards: vec![],
            relay_runs: true,
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += TICK;
            let mut out = vec![];
            self.core.tick(self.now, &mut out);
            self.carry(out);
        }
    }

    fn hear(&mut self, from: WgKey, message: Message) {
        let mut out = vec![];
        self.core.received(self.now, from, message, &mut out);
        self.carry(out);
    }

    fn carry(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Echo { to, token } if !self.silent.contains(&to) => {
                    let mut more = vec![];
                    self.core.echoed(self.now + MS, to, token, &mut more);
                    self.carry(more);
                }
                Action::Echo { .. } => {}
                Action::Send { to, message } => self.sent.push((to, message)),
                Action::Forward(pairs) => {
                    self.forwards = pairs;
                    if self.relay_runs {
                        self.relay_answers();
                    }
                }
            }
        }
    }

    /// The relay worker has what it was told to forward.
    fn relay_answers(&mut self) {
        let (pairs, mut out) = (self.forwards.clone(), vec![]);
        self.core.forwards(&pairs, &mut out);
        self.carry(out);
    }

    fn path(&self, of: WgKey) -> (Standing, Option<WgKey>) {
        let view = self.core.view(self.now);
        let path = view.into_iter().find(|path| path.key == of).unwrap();
        (path.standing, path.via.map(|via| via.relay))
    }

    fn unreachable(others: u8, silent: WgKey) -> Self {
        let mut alone = Self::new(others);
        alone.run(Duration::from_secs(1));
        alone.silent.insert(silent);
        alone.run(GONE_AFTER);
        alone.hear(key(2), Message::Sighting { subject: silent, rtt: MS, direct: true });
        alone.run(TICK * 3);
        assert_eq!(alone.path(silent).0, Standing::Unreachable);
        alone
    }
}

#[test]
fn a_grant_counts_only_where_a_relay_is_needed_and_the_relay_is_heard() {
    let grant = |peer, slot| Message::RelayGrant { peer, slot };
    let mut alone = Alone::unreachable(3, key(1));
    alone.hear(key(9), grant(key(1), 0));
    alone.hear(key(1), grant(key(1), 0));
    alone.hear(key(2), grant(key(1), SLOTS));
    alone.hear(key(2), grant(key(3), 0));
    assert_eq!(alone.path(key(1)).1, None);
    assert_eq!(alone.path(key(3)), (Standing::Up, None), "it needs none");
    let asked = |(to, message): &(WgKey, Message)| {
        *to == key(2) && *message == Message::RelayRequest { peer: key(1) }
    };
    assert!(alone.sent.iter().any(asked), "{:?}", alone.sent);
    alone.hear(key(2), grant(key(1), 3));
    assert_eq!(alone.path(key(1)).1, Some(key(2)));
    // It is silent through the relay too: the relay is given up.
    alone.run(GONE_AFTER * 2);
    assert_eq!(alone.path(key(1)).1, None);
}

#[test]
fn a_relay_that_is_only_starting_is_granted_to_nobody() {
    let mut alone = Alone::new(4);
    alone.relay_runs = false;
    alone.run(Duration::from_secs(1));
    let grants = |alone: &Alone| {
        let is_grant = |(_, m): &&(WgKey, Message)| matches!(m, Message::RelayGrant { .. });
        alone.sent.iter().filter(is_grant).map(|(to, _)| *to).collect::<Vec<_>>()
    };
    for _ in 0..2 {
        alone.hear(key(1), Message::RelayRequest { peer: key(2) });
        alone.run(TICK * 4);
    }
    assert_eq!(alone.forwards.len(), 1, "it is to start");
    assert_eq!(grants(&alone), []);
    alone.relay_answers();
    assert_eq!(grants(&alone), [key(1), key(2)]);
    alone.hear(key(1), Message::RelayRequest { peer: key(2) });
    assert_eq!(grants(&alone).len(), 4, "from then on at once");

    // One that starts too late for those that have asked.
    alone.hear(key(3), Message::RelayRequest { peer: key(4) });
    let late = alone.forwards.clone();
    alone.run(LEASE_LASTS * 2);
    alone.sent.clear();
    alone.core.forwards(&late, &mut vec![]);
    assert_eq!(grants(&alone), []);
}

#[test]
fn a_relay_takes_only_pairs_that_it_hears_itself() {
    let mut alone = Alone::new(4);
    alone.run(Duration::from_secs(1));
    alone.hear(key(1), Message::RelayRequest { peer: key(2) });
    let pair = Pair { a: key(1), b: key(2), slot: 0 };
    assert_eq!(alone.forwards, [pair]);
    let granted = |to, peer| (to, Message::RelayGrant { peer, slot: 0 });
    assert!(alone.sent.contains(&granted(key(1), key(2))));
    assert!(alone.sent.contains(&granted(key(2), key(1))));

    let mut alone = Alone::unreachable(4, key(1));
    alone.hear(key(2), Message::RelayGrant { peer: key(1), slot: 0 });
    for peer in [key(1), key(3), key(7)] {
        // A node behind a relay, the asker itself, and a stranger.
        alone.hear(key(3), Message::RelayRequest { peer });
        alone.run(TICK * 8);
        assert!(alone.sent.contains(&(key(3), Message::RelayRefusal { peer })), "{peer}");
    }
    assert_eq!(alone.forwards, []);
}

#[test]
fn a_node_found_behind_a_relay_is_answered_through_it() {
    let mut alone = Alone::new(3);
    alone.run(Duration::from_secs(1));
    let via = Via { relay: key(2), slot: 1 };
    alone.core.found_behind(alone.now, key(1), Via { relay: key(1), ..via });
    assert_eq!(alone.path(key(1)), (Standing::Up, None), "no relay to itself");
    alone.core.found_behind(alone.now, key(1), via);
    assert_eq!(alone.path(key(1)), (Standing::Up, Some(key(2))));
    alone.run(Duration::from_secs(1));
    assert!(alone.sent.contains(&(key(2), Message::RelayRequest { peer: key(1) })), "kept alive");
    alone.core.answered_directly(alone.now, key(1), 1);
    assert_eq!(alone.path(key(1)), (Standing::Up, None));
}

#[test]
fn an_agent_answers_where_a_kernel_does_not() {
    let mut alone = Alone::new(2);
    alone.run(Duration::from_secs(1));
    alone.silent.insert(key(1));
    for _ in 0..60 {
        alone.run(TICK);
        for (to, message) in std::mem::take(&mut alone.sent) {
            if let (true, Message::Ping { token }) = (to == key(1), message) {
                alone.hear(key(1), Message::Pong { token });
            }
        }
        assert!(alone.path(key(1)).0.serves());
    }
    assert_eq!(alone.path(key(1)).0, Standing::Up);
    alone.run(GONE_AFTER * 2);
    assert_eq!(alone.path(key(1)).0, Standing::Down, "neither does any more");
}

fn any_message() -> impl Strategy<Value = Message> {
    let member = || (0u8..8).prop_map(key);
    let vote = (member(), member(), any::<u64>(), any::<bool>())
        .prop_map(|(watcher, subject, number, down)| Vote { watcher, subject, number, down });
    prop_oneof![
        any::<u32>().prop_map(|token| Message::Ping { token }),
        any::<u32>().prop_map(|token| Message::Pong { token }),
        member().prop_map(|subject| Message::Ask { subject }),
        (member(), any::<bool>()).prop_map(|(subject, direct)| Message::Sighting {
            subject,
            rtt: MS,
            direct
        }),
        prop::collection::vec(vote, 0..4).prop_map(Message::Votes),
        Just(Message::Sync),
        Just(Message::RelayOver),
        member().prop_map(|peer| Message::RelayRequest { peer }),
        (member(), any::<u8>()).prop_map(|(peer, slot)| Message::RelayGrant { peer, slot }),
        member().prop_map(|peer| Message::RelayRefusal { peer }),
    ]
}

proptest! {
    /// What a node measures outweighs what it is told: no message takes down or diverts what answers.
    #[test]
    fn no_word_outweighs_an_echo(
        words in prop::collection::vec((0u8..8, any_message(), 0u32..100), 0..60)
    ) {
        let mut alone = Alone::new(6);
        alone.run(Duration::from_secs(1));
        for (from, message, pause) in words {
            alone.hear(key(from), message);
            alone.run(pause * MS);
            for n in 1..=6 {
                prop_assert_eq!(alone.path(key(n)), (Standing::Up, None));
            }
        }
    }
}
