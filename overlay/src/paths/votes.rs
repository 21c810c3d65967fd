//! What watchers found, as they told it.

use std::collections::BTreeMap;

use mesh_model::snapshot::WgKey;

/// A watcher's finding about a node. A later number of the same watcher replaces an earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vote {
    /// Who found it.
    pub watcher: WgKey,
    /// About whom.
    pub subject: WgKey,
    /// Grows with each vote of the watcher, also across its restarts.
    pub number: u64,
    /// Whether the subject is down.
    pub down: bool,
}

/// The latest vote of each watcher about each node. Nodes without a vote are up.
#[derive(Debug, Default)]
pub struct Votes {
    by_subject: BTreeMap<WgKey, BTreeMap<WgKey, (u64, bool)>>,
}

impl Votes {
    /// Takes a vote; returns whether it is news.
    pub fn take(&mut self, vote: Vote) -> bool {
        let known = self.by_subject.entry(vote.subject).or_default().entry(vote.watcher);
        let mut news = false;
        let latest = known.or_insert_with(|| {
            news = true;
            (vote.number, vote.down)
        });
        if vote.number > latest.0 {
            *latest = (vote.number, vote.down);
            news = true;
        }
        news
    }

    /// How many watchers, of those that count, hold the node to be down.
    pub fn against(&self, subject: &WgKey, counts: impl Fn(&WgKey) -> bool) -> usize {
        let votes = self.by_subject.get(subject).into_iter().flatten();
        votes.filter(|(watcher, (_, down))| *down && counts(watcher)).count()
    }

    /// The latest vote of one watcher about one node.
    pub fn of(&self, watcher: &WgKey, subject: &WgKey) -> Option<(u64, bool)> {
        self.by_subject.get(subject)?.get(watcher).copied()
    }

    /// Nodes that a watcher holds to be down.
    pub fn held_down_by(&self, watcher: WgKey) -> impl Iterator<Item = WgKey> + '_ {
        let held = self.by_subject.iter();
        held.filter(move |(_, votes)| votes.get(&watcher).is_some_and(|(_, down)| *down))
            .map(|(subject, _)| *subject)
    }

    /// Nodes that somebody has voted about.
    pub fn subjects(&self) -> impl Iterator<Item = WgKey> + '_ {
        self.by_subject.keys().copied()
    }

    /// All votes that say down.
    pub fn down(&self) -> impl Iterator<Item = Vote> + '_ {
        self.by_subject.iter().flat_map(|(subject, votes)| {
            let down = votes.iter().filter(|(_, (_, down))| *down);
            down.map(|(watcher, (number, _))| Vote {
                watcher: *watcher,
                subject: *subject,
                number: *number,
                down: true,
            })
        })
    }

    /// Forgets nodes that are no members any more, as watchers and as watched.
    pub fn keep(&mut self, member: impl Fn(&WgKey) -> bool) {
        self.by_subject.retain(|subject, votes| {
            votes.retain(|watcher, _| member(watcher));
            member(subject) && !votes.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vote(watcher: u8, number: u64, down: bool) -> Vote {
        Vote { watcher: WgKey([watcher; 32]), subject: WgKey([9; 32]), number, down }
    }

    #[test]
    fn the_latest_vote_of_each_watcher_counts() {
        let mut votes = Votes::default();
        let against = |votes: &Votes| votes.against(&WgKey([9; 32]), |_| true);
        assert!(votes.take(vote(1, 5, true)) && votes.take(vote(2, 1, true)));
        assert!(!votes.take(vote(1, 5, true)), "known");
        assert!(!votes.take(vote(1, 4, false)), "late");
        assert_eq!(against(&votes), 2);
        assert_eq!(votes.against(&WgKey([9; 32]), |watcher| *watcher != WgKey([2; 32])), 1);
        assert!(votes.take(vote(1, 6, false)));
        assert_eq!((against(&votes), votes.down().count()), (1, 1));
        votes.keep(|key| *key != WgKey([2; 32]));
        assert_eq!(against(&votes), 0);
    }
}
