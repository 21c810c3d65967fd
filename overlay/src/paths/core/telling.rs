//! Votes: casting this node's own, and passing on what is known.

use std::collections::BTreeSet;
use std::time::Instant;

use mesh_model::snapshot::WgKey;

use super::super::member::Standing;
use super::super::message::{MAX_VOTES, Message};
use super::super::votes::Vote;
use super::super::{GOSSIP_EVERY, VOTE_REPEAT_EVERY, VOTE_REPEATS};
use super::{Action, Core, send};

/// Members that are asked what is down when this process starts.
const SYNC_WITH: usize = 3;
/// Messages in answer to [`Message::Sync`].
pub(super) const SYNC_MESSAGES: usize = 8;

impl Core {
    /// Casts this node's vote about what it watches, when it has changed.
    pub(super) fn vote(&mut self, now: Instant) {
        if self.isolated || now < self.votes_from {
            return;
        }
        let held: BTreeSet<WgKey> = self.votes.held_down_by(self.me).collect();
        let subjects: Vec<WgKey> = self.watched.union(&held).copied().collect();
        for subject in subjects {
            let Some(member) = self.members.get(&subject) else { continue };
            let down = member.standing == Standing::Down;
            if down != held.contains(&subject) {
                self.number += 1;
                let vote = Vote { watcher: self.me, subject, number: self.number, down };
                self.votes.take(vote);
                self.announcing.retain(|(old, ..)| old.subject != subject);
                self.announcing.push((vote, VOTE_REPEATS, now));
            }
        }
    }

    /// Tells everybody this node's new votes.
    pub(super) fn announce(&mut self, now: Instant, out: &mut Vec<Action>) {
        let mut due = vec![];
        for (vote, left, next) in &mut self.announcing {
            if *next <= now && due.len() < MAX_VOTES {
                due.push(*vote);
                *left -= 1;
                *next = now + VOTE_REPEAT_EVERY;
            }
        }
        self.announcing.retain(|(_, left, _)| *left > 0);
        if due.is_empty() {
            return;
        }
        let hears = self.members.iter().filter(|(_, m)| m.standing != Standing::Down);
        out.extend(hears.map(|(key, _)| send(*key, Message::Votes(due.clone()))));
    }

    pub(super) fn told(&mut self, from: WgKey, votes: Vec<Vote>, out: &mut Vec<Action>) {
        let mut newer = vec![];
        for vote in votes {
            let known = |key: &WgKey| *key == self.me || self.members.contains_key(key);
            if !known(&vote.watcher) || !known(&vote.subject) {
                continue;
            }
            if vote.watcher == self.me {
                // Cast by an earlier process of this node: from now on it is this one's to take back.
                self.number = self.number.max(vote.number);
            }
            self.noted.insert(vote.subject);
            if !self.votes.take(vote)
                && let Some((number, down)) = self.votes.of(&vote.watcher, &vote.subject)
                && number > vote.number
            {
                newer.push(Vote { number, down, ..vote });
            }
        }
        if !newer.is_empty() {
            out.push(send(from, Message::Votes(newer)));
        }
    }

    /// Tells one node all that is down, from a random place on when it is too much.
    pub(super) fn tell(&mut self, to: WgKey, messages: usize, out: &mut Vec<Action>) {
        let mut down: Vec<Vote> = self.votes.down().collect();
        if down.len() > MAX_VOTES * messages {
            let start = self.below(down.len());
            down.rotate_left(start);
        }
        let parts = down.chunks(MAX_VOTES).take(messages);
        out.extend(parts.map(|part| send(to, Message::Votes(part.to_vec()))));
    }

    pub(super) fn gossip(&mut self, now: Instant, out: &mut Vec<Action>) {
        if now >= self.next_gossip {
            self.next_gossip = now + GOSSIP_EVERY;
            for to in self.some(1, |_, member| member.standing == Standing::Up) {
                self.tell(to, 1, out);
            }
        }
    }

    /// Asks what is down when there is somebody to ask for the first time.
    pub(super) fn greet(&mut self, out: &mut Vec<Action>) {
        if !self.synced && !self.members.is_empty() {
            self.synced = true;
            for to in self.some(SYNC_WITH, |_, member| member.standing == Standing::Up) {
                out.push(send(to, Message::Sync));
            }
        }
    }
}
