//! Numbers for texts: the same text gets the same number on every node and in every run, so that a table changes where its
//! meaning does.

use std::collections::BTreeMap;

use crate::policy::FIRST_FREE;

/// The last number that is handed out; the one behind it has a meaning of its own.
const LAST: u32 = u32::MAX - 1;

/// The numbers of a set of texts.
pub(super) struct Numbers(BTreeMap<String, u32>);

impl Numbers {
    /// A hash of each text; of two texts with one hash, the later in order gets the next number that is free.
    pub(super) fn assign<'a>(texts: impl Iterator<Item = &'a str>) -> Self {
        let mut numbers: BTreeMap<String, u32> = texts.map(|text| (text.to_owned(), 0)).collect();
        let mut taken = std::collections::BTreeSet::new();
        for (text, number) in &mut numbers {
            *number = hash(text).clamp(FIRST_FREE, LAST);
            while !taken.insert(*number) {
                *number = if *number == LAST { FIRST_FREE } else { *number + 1 };
            }
        }
        Self(numbers)
    }

    /// The number of a text of the set; 0 for another one.
    pub(super) fn of(&self, text: &str) -> u32 {
        self.0.get(text).copied().unwrap_or_default()
    }
}

/// FNV-1a, 32 bits (draft-eastlake-fnv).
fn hash(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_distinct_and_depend_on_nothing_else() {
        // Two words with one FNV-1a hash.
        let pair = ["costarring", "liquid"];
        assert_eq!(hash(pair[0]), hash(pair[1]));
        let numbers = Numbers::assign(pair.into_iter().chain(["a"]));
        assert_eq!(numbers.of("liquid"), numbers.of("costarring") + 1);
        assert_eq!(numbers.of("a"), Numbers::assign(["b", "a"].into_iter()).of("a"));
        assert_eq!(numbers.of("missing"), 0);
    }
}
