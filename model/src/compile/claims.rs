//! Who has an address: of several that claim one, the first by kind and name.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use crate::ObjectKey;
use crate::snapshot::{EdgeService, Frontend, FrontendKind, Protocol};

/// From so many changes on the lists are put in order anew.
const MANY: usize = 64;

type Address = (IpAddr, Protocol, u16);
type Rank<'a> = (FrontendKind, &'a ObjectKey);

/// What claims an address and port.
pub(super) trait Claim: PartialEq {
    fn address(&self) -> Address;
    /// The lowest wins.
    fn rank(&self) -> Rank<'_>;
}

impl Claim for Frontend {
    fn address(&self) -> Address {
        (self.vip, self.protocol, self.port)
    }

    fn rank(&self) -> Rank<'_> {
        (self.kind, &self.service)
    }
}

impl Claim for EdgeService {
    fn address(&self) -> Address {
        (self.vip, self.protocol, self.port)
    }

    fn rank(&self) -> Rank<'_> {
        (self.kind, &self.service)
    }
}

/// The claims of one service, ordered, one for each address; those that are as before, at their old place in memory.
pub(super) fn of_service<T: Claim>(mut claims: Vec<T>, before: &[Arc<T>]) -> Vec<Arc<T>> {
    claims.sort_by(|a, b| (a.address(), a.rank()).cmp(&(b.address(), b.rank())));
    claims.dedup_by(|b, a| a.address() == b.address());
    let shared = |claim: T| {
        let found = before.binary_search_by_key(&claim.address(), |old| old.address());
        let old = found.ok().map(|i| &before[i]).filter(|old| ***old == claim);
        old.map_or_else(|| Arc::new(claim), Arc::clone)
    };
    claims.into_iter().map(shared).collect()
}

/// All claims, and who wins.
pub(super) struct Claims<T> {
    /// By address, then rank.
    all: Vec<Arc<T>>,
    winners: Arc<Vec<Arc<T>>>,
}

impl<T> Default for Claims<T> {
    fn default() -> Self {
        Self { all: vec![], winners: Arc::default() }
    }
}

impl<T: Claim> Claims<T> {
    /// One for each address, ordered.
    pub(super) fn winners(&self) -> &Arc<Vec<Arc<T>>> {
        &self.winners
    }

    /// Takes claims back and makes others; those that are in both lists stay.
    pub(super) fn change(&mut self, gone: &[Arc<T>], come: &[Arc<T>]) {
        if gone.len() + come.len() > MANY {
            return self.change_many(gone, come);
        }
        let stays = |one: &Arc<T>, others: &[Arc<T>]| others.iter().any(|o| Arc::ptr_eq(o, one));
        for old in gone.iter().filter(|one| !stays(one, come)) {
            if let Ok(place) = self.place(old) {
                self.all.remove(place);
            }
            self.decide(old.address());
        }
        for new in come.iter().filter(|one| !stays(one, gone)) {
            match self.place(new) {
                Ok(place) => self.all[place] = Arc::clone(new),
                Err(place) => self.all.insert(place, Arc::clone(new)),
            }
            self.decide(new.address());
        }
    }

    fn change_many(&mut self, gone: &[Arc<T>], come: &[Arc<T>]) {
        let gone: HashSet<*const T> = gone.iter().map(Arc::as_ptr).collect();
        self.all.retain(|one| !gone.contains(&Arc::as_ptr(one)));
        self.all.extend(come.iter().cloned());
        self.all.sort_by(|a, b| (a.address(), a.rank()).cmp(&(b.address(), b.rank())));
        let mut winners = self.all.clone();
        winners.dedup_by(|b, a| a.address() == b.address());
        self.winners = Arc::new(winners);
    }

    fn place(&self, claim: &T) -> Result<usize, usize> {
        let wanted = (claim.address(), claim.rank());
        self.all.binary_search_by(|one| (one.address(), one.rank()).cmp(&wanted))
    }

    /// Gives an address to the first of those that claim it now.
    fn decide(&mut self, address: Address) {
        let first = self.all.partition_point(|one| one.address() < address);
        let winner = self.all.get(first).filter(|one| one.address() == address);
        let holder = self.winners.binary_search_by_key(&address, |one| one.address());
        match (holder, winner) {
            (Ok(place), Some(winner)) if Arc::ptr_eq(&self.winners[place], winner) => {}
            (Ok(place), Some(winner)) => {
                Arc::make_mut(&mut self.winners)[place] = Arc::clone(winner);
            }
            (Err(place), Some(winner)) => {
                Arc::make_mut(&mut self.winners).insert(place, Arc::clone(winner));
            }
            (Ok(place), None) => drop(Arc::make_mut(&mut self.winners).remove(place)),
            (Err(_), None) => {}
        }
    }
}
