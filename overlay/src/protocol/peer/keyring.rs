//! The sessions of a peer: the one in use, one that the peer has yet to use, and those whose messages are under way.

use std::sync::Arc;
use std::time::Instant;

use crate::protocol::estate::SessionsEstate;
use crate::protocol::noise::Session;

/// At most four sessions. A session that we answered for is not used before the peer has used it (WG section 5.1).
#[derive(Debug, Default, Clone)]
pub struct Keyring {
    current: Option<Arc<Session>>,
    next: Option<Arc<Session>>,
    /// Two, because sides that call at once leave two sessions, and the peer may still be on the one before them.
    past: [Option<Arc<Session>>; 2],
}

impl Keyring {
    /// Leaves all sessions to a successor: none of them seals any more.
    pub(super) fn leave(&self, left: Instant) -> SessionsEstate {
        let leave = |session: &Option<Arc<Session>>| session.as_ref().map(|s| s.leave(left));
        let [first, second] = &self.past;
        SessionsEstate {
            current: leave(&self.current),
            next: leave(&self.next),
            past: [leave(first), leave(second)],
        }
    }

    /// Goes on with the sessions that another one left.
    pub(super) fn resume(left: Instant, estate: SessionsEstate) -> Self {
        let resume = |session| Session::resume(left, session).map(Arc::new);
        Self {
            current: estate.current.and_then(resume),
            next: estate.next.and_then(resume),
            past: estate.past.map(|session| session.and_then(resume)),
        }
    }

    /// The session to send with.
    pub fn current(&self, now: Instant) -> Option<&Arc<Session>> {
        self.current.as_ref().filter(|session| session.is_alive(now))
    }

    /// The session with the index.
    pub fn find(&self, index: u32) -> Option<&Arc<Session>> {
        self.all().find(|session| session.index() == index)
    }

    /// The peer has answered our call.
    pub(super) fn called(&mut self, session: Session) {
        let (before, waited) = (self.current.replace(Arc::new(session)), self.next.take());
        self.retire(before);
        self.retire(waited);
    }

    /// We have answered the peer's call. A caller that calls in vain replaces nothing that is in use.
    pub(super) fn answered(&mut self, session: Session) {
        self.next = Some(Arc::new(session));
    }

    /// The peer has used a session; returns whether it is the one to be used from now on.
    pub(super) fn confirm(&mut self, session: &Arc<Session>) -> bool {
        session.confirm();
        let waited = self.next.as_ref().is_some_and(|next| Arc::ptr_eq(next, session));
        if waited {
            let before = self.current.take();
            self.current = self.next.take();
            self.retire(before);
        }
        waited
    }

    /// Forgets the keys of sessions that have ended; returns whether there were any.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let mut ended = false;
        for place in [&mut self.current, &mut self.next].into_iter().chain(&mut self.past) {
            if place.as_ref().is_some_and(|session| !session.is_alive(now)) {
                *place = None;
                ended = true;
            }
        }
        ended
    }

    fn retire(&mut self, session: Option<Arc<Session>>) {
        if session.is_some() {
            self.past.swap(0, 1);
            self.past[0] = session;
        }
    }

    fn all(&self) -> impl Iterator<Item = &Arc<Session>> {
        [&self.current, &self.next].into_iter().chain(&self.past).flatten()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::protocol::noise::session::Agreement;

    fn agreement(index: u32) -> Agreement {
        Agreement { caller_key: [1; 32], callee_key: [2; 32], index, remote_index: 0 }
    }

    #[test]
    fn an_answer_counts_only_when_the_peer_uses_it() {
        let now = Instant::now();
        let mut ring = Keyring::default();
        ring.called(Session::as_caller(now, &agreement(1)));
        for index in 2..50 {
            ring.answered(Session::as_callee(now, &agreement(index)));
        }
        assert_eq!(ring.current(now).unwrap().index(), 1, "calls in vain change nothing");
        assert!(ring.find(48).is_none());
        let next = ring.find(49).unwrap().clone();
        assert!(ring.confirm(&next));
        assert!(!ring.confirm(&next), "once");
        assert_eq!(ring.current(now).unwrap().index(), 49);
        assert!(ring.find(1).is_some(), "what is under way can still be opened");
    }

    #[test]
    fn two_calls_at_once_leave_both_sessions() {
        let now = Instant::now();
        let mut ring = Keyring::default();
        ring.called(Session::as_caller(now, &agreement(0)));
        ring.answered(Session::as_callee(now, &agreement(1)));
        ring.called(Session::as_caller(now, &agreement(2)));
        assert_eq!(ring.current(now).unwrap().index(), 2);
        assert!(ring.find(1).is_some(), "the other side may have settled on its own call");
        assert!(ring.find(0).is_some(), "what it sent before is under way");
        ring.called(Session::as_caller(now, &agreement(3)));
        assert!(ring.find(0).is_none() && ring.find(1).is_some());
        assert!(!ring.expire(now));
        let end = now + Duration::from_secs(180);
        assert!(ring.current(end).is_none());
        assert!(ring.expire(end) && ring.find(1).is_none() && ring.find(2).is_none());
    }
}
