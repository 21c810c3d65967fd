//! Numbers for texts: the same text gets the same number on every node and in every run, so that a table changes where its
//! meaning does.
//!
//! A number is a hash of its text. Of two texts that want one number, the first in order has it, and the other one gets the next
//! that is free: so the numbers follow from the set of texts, however it came to be.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::policy::FIRST_FREE;

/// The last number that is handed out; the one behind it has a meaning of its own.
const LAST: u32 = u32::MAX - 1;

/// The numbers of a set of texts.
pub(super) struct Numbers {
    hash: fn(&str) -> u32,
    of: HashMap<Arc<str>, u32>,
    /// Who has a number.
    texts: BTreeMap<u32, Arc<str>>,
}

impl Default for Numbers {
    fn default() -> Self {
        Self::new(fnv)
    }
}

impl Numbers {
    pub(super) fn new(hash: fn(&str) -> u32) -> Self {
        Self { hash, of: HashMap::new(), texts: BTreeMap::new() }
    }

    /// The number of a text of the set; 0 for another one.
    pub(super) fn of(&self, text: &str) -> u32 {
        self.of.get(text).copied().unwrap_or_default()
    }

    /// Adds a text. Returns whether others have new numbers by that.
    pub(super) fn add(&mut self, text: &str) -> bool {
        !self.of.contains_key(text) && self.seat(Arc::from(text))
    }

    /// Takes a text out. Returns whether others have new numbers by that.
    pub(super) fn remove(&mut self, text: &str) -> bool {
        let Some(number) = self.of.remove(text) else { return false };
        self.texts.remove(&number);
        // Those right behind it may have wanted its place: they choose again.
        let (mut behind, mut next) = (vec![], after(number));
        while let Some(text) = self.texts.remove(&next) {
            behind.push((text, next));
            next = after(next);
        }
        let again = behind.clone();
        for (text, _) in again {
            self.of.remove(&text);
            self.seat(text);
        }
        behind.iter().any(|(text, before)| self.of(text) != *before)
    }

    /// Whoever comes first in order has the choice: who sat there goes on from there.
    fn seat(&mut self, mut text: Arc<str>) -> bool {
        let mut number = (self.hash)(&text).clamp(FIRST_FREE, LAST);
        let mut moved = false;
        loop {
            let holder = self.texts.get(&number).cloned();
            if holder.as_ref().is_none_or(|holder| text < *holder) {
                self.texts.insert(number, Arc::clone(&text));
                self.of.insert(text, number);
                let Some(holder) = holder else { return moved };
                (text, moved) = (holder, true);
            }
            number = after(number);
        }
    }
}

fn after(number: u32) -> u32 {
    if number >= LAST { FIRST_FREE } else { number + 1 }
}

/// FNV-1a, 32 bits (draft-eastlake-fnv).
fn fnv(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// A hash with which almost every text meets another one.
#[cfg(test)]
pub(super) fn poor(text: &str) -> u32 {
    LAST - 15 + fnv(text) % 16
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn of<'a>(hash: fn(&str) -> u32, texts: impl IntoIterator<Item = &'a str>) -> Numbers {
        let mut numbers = Numbers::new(hash);
        for text in texts {
            numbers.add(text);
        }
        numbers
    }

    #[test]
    fn numbers_are_distinct_and_depend_on_nothing_else() {
        // Two words with one FNV-1a hash.
        let pair = ["costarring", "liquid"];
        assert_eq!(fnv(pair[0]), fnv(pair[1]));
        let mut numbers = of(fnv, ["liquid", "a"]);
        let before = numbers.of("liquid");
        assert!(numbers.add("costarring"), "the other one has to move");
        assert_eq!((numbers.of("costarring"), numbers.of("liquid")), (before, before + 1));
        assert_eq!(numbers.of("a"), of(fnv, ["b", "a"]).of("a"));
        assert_eq!(numbers.of("missing"), 0);
        assert!(numbers.remove("costarring") && !numbers.remove("a"));
        assert_eq!(numbers.of("liquid"), before);
    }

    proptest! {
        /// Whatever came and went: the numbers are those of the set, and whoever moved was told of.
        #[test]
        fn numbers_follow_from_the_set(changes in proptest::collection::vec(("[a-z]", any::<bool>()), 1..60)) {
            let (mut numbers, mut set) = (Numbers::new(poor), BTreeSet::new());
            for (text, add) in changes {
                let before: BTreeMap<String, u32> = set.iter().map(|t: &String| (t.clone(), numbers.of(t))).collect();
                let moved = if add {
                    set.insert(text.clone());
                    numbers.add(&text)
                } else {
                    set.remove(&text);
                    numbers.remove(&text)
                };
                let anew = of(poor, set.iter().rev().map(String::as_str));
                for text in &set {
                    prop_assert_eq!(numbers.of(text), anew.of(text));
                }
                let others = set.iter().filter_map(|t| Some((before.get(t)?, numbers.of(t))));
                prop_assert_eq!(moved, others.into_iter().any(|(before, now)| *before != now));
                prop_assert_eq!(numbers.of.len(), set.len());
                prop_assert_eq!(numbers.texts.len(), set.len());
            }
        }
    }
}
