//! Who knows the node's next key, where the device cannot tell: the agents ask each other.
//!
//! A question and its answer go through the tunnel, on the port of what is said about paths. "Yes" means that the overlay takes
//! calls by that key, and will after a crash: the configuration was on disk before.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mesh_model::snapshot::WgKey;
use mesh_overlay::paths::Message;

/// Between two questions to one node.
const EVERY: Duration = Duration::from_millis(500);

/// What this node has been told, and what it tells others; cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Proofs(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    next: Option<WgKey>,
    /// Names of the nodes that know it.
    known_by: BTreeSet<WgKey>,
    asked: Option<Instant>,
    /// The keys by which the overlay knows the other nodes.
    in_force: BTreeMap<WgKey, Vec<WgKey>>,
}

impl Proofs {
    /// From now on this key is to be proved; another one, or none, makes all answers void.
    pub(crate) fn seek(&self, next: Option<WgKey>) {
        let mut state = self.lock();
        if state.next != next {
            *state =
                State { next, in_force: std::mem::take(&mut state.in_force), ..State::default() };
        }
    }

    /// Whether the node with this name has said that it knows the next key.
    pub(crate) fn knows(&self, name: &WgKey) -> bool {
        self.lock().known_by.contains(name)
    }

    /// The overlay has taken a configuration with these peers: names, and the keys that they may call by.
    pub(crate) fn in_force(&self, peers: impl Iterator<Item = (WgKey, Vec<WgKey>)>) {
        self.lock().in_force = peers.collect();
    }

    /// The questions that are due, to the nodes among these that have not answered.
    pub(crate) fn questions(
        &self,
        now: Instant,
        names: impl Iterator<Item = WgKey>,
    ) -> Vec<(WgKey, Message)> {
        let mut state = self.lock();
        let Some(key) = state.next else { return vec![] };
        if state.asked.is_some_and(|at| now.saturating_duration_since(at) < EVERY) {
            return vec![];
        }
        state.asked = Some(now);
        let ignorant = names.filter(|name| !state.known_by.contains(name));
        ignorant.map(|name| (name, Message::KeyAsk { key })).collect()
    }

    /// Takes an answer; the answer to a question.
    pub(crate) fn heard(&self, from: &WgKey, message: &Message) -> Option<Message> {
        let mut state = self.lock();
        match message {
            Message::KeyAsk { key } => {
                let known = state.in_force.get(from).is_some_and(|keys| keys.contains(key));
                known.then_some(Message::KeyKnown { key: *key })
            }
            Message::KeyKnown { key } => {
                if state.next == Some(*key) {
                    state.known_by.insert(*from);
                }
                None
            }
            _ => None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_says_yes_once_its_overlay_has_the_key() {
        let [a, b] = [1, 2].map(|n| WgKey([n; 32]));
        let next = WgKey([11; 32]);
        let (asking, asked) = (Proofs::default(), Proofs::default());
        let now = Instant::now();
        assert_eq!(asking.questions(now, [b].into_iter()), []);
        asking.seek(Some(next));
        let question = Message::KeyAsk { key: next };
        assert_eq!(asking.questions(now, [b].into_iter()), [(b, question.clone())]);
        assert_eq!(asking.questions(now, [b].into_iter()), [], "not so soon again");
        assert_eq!(asked.heard(&a, &question), None);
        asked.in_force([(a, vec![next, a])].into_iter());
        assert_eq!(asked.heard(&b, &question), None, "somebody else's");
        let answer = asked.heard(&a, &question).unwrap();
        assert_eq!(asking.heard(&b, &answer), None);
        assert!(asking.knows(&b) && !asking.knows(&a));
        assert_eq!(asking.questions(now + EVERY, [b].into_iter()), [], "it has answered");
        asking.seek(Some(WgKey([12; 32])));
        assert!(!asking.knows(&b), "another key, another answer");
        assert_eq!(asking.heard(&b, &answer), None);
        assert!(!asking.knows(&b), "a late one");
    }
}
