//! A pool of numbered things (addresses of a range, ports), each with at most one owner.

use std::collections::BTreeMap;

/// Why a number could not be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The number lies outside the pool.
    OutOfRange,
    /// Somebody else owns it.
    Taken,
}

/// The numbers `first..=last`, handed out in a circle so that a freed number rests as long as possible.
///
/// Numbers below `preferred` are handed out automatically only when all others are taken: they are left
/// for people who ask for a certain number.
#[derive(Debug)]
pub(super) struct Pool {
    first: u32,
    last: u32,
    preferred: u32,
    next: u32,
    used: BTreeMap<u32, String>,
    reserved: BTreeMap<u32, String>,
}

impl Pool {
    /// An empty pool of `first..=last`; `preferred` is where automatic numbers start.
    pub(super) fn new(first: u32, last: u32, preferred: u32) -> Self {
        let preferred = if preferred > last { first } else { preferred.max(first) };
        Self {
            first,
            last,
            preferred,
            next: preferred,
            used: BTreeMap::new(),
            reserved: BTreeMap::new(),
        }
    }

    /// Keeps `number` for `owner` alone, for ever.
    pub(super) fn reserve(&mut self, number: u32, owner: &str) {
        self.reserved.insert(number, owner.to_owned());
    }

    /// Takes `number` for `owner`. Returns whether it is newly taken: `false` when `owner` had it already.
    pub(super) fn take(&mut self, number: u32, owner: &str) -> Result<bool, Refusal> {
        if !(self.first..=self.last).contains(&number) {
            return Err(Refusal::OutOfRange);
        }
        if self.reserved.get(&number).is_some_and(|o| o != owner) {
            return Err(Refusal::Taken);
        }
        match self.used.get(&number) {
            Some(current) if current == owner => Ok(false),
            Some(_) => Err(Refusal::Taken),
            None => {
                self.used.insert(number, owner.to_owned());
                Ok(true)
            }
        }
    }

    /// Takes any free number for `owner`: `None` when the pool is full.
    pub(super) fn take_any(&mut self, owner: &str) -> Option<u32> {
        let free = |n: &u32| !self.used.contains_key(n) && !self.reserved.contains_key(n);
        let start = self.next.clamp(self.preferred, self.last);
        let number = (start..=self.last)
            .chain(self.preferred..start)
            .chain(self.first..self.preferred)
            .find(free)?;
        self.used.insert(number, owner.to_owned());
        self.next = if number >= self.last { self.preferred } else { number + 1 };
        Some(number)
    }

    /// Frees `number` when `owner` has it.
    pub(super) fn free(&mut self, number: u32, owner: &str) {
        if self.used.get(&number).is_some_and(|o| o == owner) {
            self.used.remove(&number);
        }
    }

    /// Continues after the highest number in use: call once, after the stored objects have been loaded.
    pub(super) fn continue_after_highest(&mut self) {
        if let Some((highest, _)) = self.used.last_key_value()
            && *highest >= self.next
        {
            self.next = if *highest >= self.last { self.preferred } else { highest + 1 };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn freed_numbers_rest_until_the_circle_closes() {
        let mut pool = Pool::new(1, 10, 4);
        assert_eq!(pool.take_any("a"), Some(4));
        pool.free(4, "a");
        let next: Vec<_> = (0..6).map(|_| pool.take_any("b").unwrap()).collect();
        assert_eq!(next, [5, 6, 7, 8, 9, 10]);
        assert_eq!(pool.take_any("b"), Some(4), "the freed one comes after the circle closed");
        assert_eq!(pool.take_any("b"), Some(1), "the band for requests is the last resort");
    }

    #[test]
    fn reserved_and_foreign_numbers_are_refused() {
        let mut pool = Pool::new(1, 5, 1);
        pool.reserve(2, "dns");
        assert_eq!(pool.take(2, "a"), Err(Refusal::Taken));
        assert_eq!(pool.take(2, "dns"), Ok(true));
        assert_eq!(pool.take(2, "dns"), Ok(false));
        assert_eq!(pool.take(0, "a"), Err(Refusal::OutOfRange));
        pool.free(2, "a");
        assert_eq!(pool.take(2, "dns"), Ok(false), "only the owner frees");
    }

    proptest! {
        #[test]
        fn a_number_never_has_two_owners(ops in prop::collection::vec((0u8..3, 0u32..12, 0u8..4), 0..200)) {
            let mut pool = Pool::new(1, 10, 3);
            let mut model: BTreeMap<u32, String> = BTreeMap::new();
            for (op, number, owner) in ops {
                let owner = owner.to_string();
                match op {
                    0 => if let Some(n) = pool.take_any(&owner) {
                        prop_assert!((1..=10).contains(&n));
                        prop_assert!(model.insert(n, owner).is_none());
                    } else {
                        prop_assert_eq!(model.len(), 10);
                    },
                    1 => if pool.take(number, &owner) == Ok(true) {
                        prop_assert!(model.insert(number, owner).is_none());
                    },
                    _ => {
                        pool.free(number, &owner);
                        if model.get(&number) == Some(&owner) {
                            model.remove(&number);
                        }
                    }
                }
            }
            prop_assert_eq!(&pool.used, &model);
        }
    }
}
