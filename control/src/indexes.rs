//! Sets of completion indexes, as the status of an Indexed Job has them: `1,3-5,7`. Pure.

use std::fmt;

/// Ranges that neither touch nor overlap, in order; both ends belong to a range.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Indexes(Vec<(u32, u32)>);

impl Indexes {
    /// What a text lists in ascending order; `None` when it is no such list.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut all = Self::default();
        let mut before: Option<u32> = None;
        for part in text.split(',').filter(|_| !text.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last || before.is_some_and(|before| before >= first) {
                return None;
            }
            before = Some(last);
            all.append(first, last);
        }
        Some(all)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> u32 {
        self.0.iter().map(|(first, last)| last - first + 1).sum()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn contains(&self, index: u32) -> bool {
        let after = self.0.partition_point(|(first, _)| *first <= index);
        after > 0 && self.0[after - 1].1 >= index
    }

    pub(crate) fn insert(&mut self, index: u32) {
        if self.contains(index) {
            return;
        }
        let at = self.0.partition_point(|(first, _)| *first <= index);
        let joins_left = at > 0 && self.0[at - 1].1 + 1 == index;
        let joins_right = self.0.get(at).is_some_and(|(first, _)| *first == index + 1);
        match (joins_left, joins_right) {
            (true, true) => {
                self.0[at - 1].1 = self.0[at].1;
                self.0.remove(at);
            }
            (true, false) => self.0[at - 1].1 = index,
            (false, true) => self.0[at].0 = index,
            (false, false) => self.0.insert(at, (index, index)),
        }
    }

    /// Drops those from `end` on.
    pub(crate) fn truncate(&mut self, end: u32) {
        self.0.retain(|(first, _)| *first < end);
        if let Some((_, last)) = self.0.last_mut() {
            *last = (*last).min(end.saturating_sub(1));
        }
    }

    /// The largest.
    pub(crate) fn last(&self) -> Option<u32> {
        self.0.last().map(|(_, last)| *last)
    }

    /// How many of them are in `other`, too.
    pub(crate) fn common(&self, other: &Self) -> u32 {
        let mut count = 0;
        let mut rest = other.0.iter().peekable();
        for (first, last) in &self.0 {
            while let Some((from, to)) = rest.peek() {
                if from > last {
                    break;
                }
                let (from, end) = (*from.max(first), *to.min(last));
                count += (end + 1).saturating_sub(from);
                if to > last {
                    break;
                }
                rest.next();
            }
        }
        count
    }

    /// Those below `end` that are not in the set, in order.
    pub(crate) fn missing(&self, end: u32) -> impl Iterator<Item = u32> + '_ {
        let starts = std::iter::once(0).chain(self.0.iter().map(|(_, last)| last + 1));
        let ends = self.0.iter().map(|(first, _)| *first).chain(std::iter::once(u32::MAX));
        starts.zip(ends).flat_map(move |(from, to)| from..to.min(end))
    }

    fn append(&mut self, first: u32, last: u32) {
        match self.0.last_mut() {
            Some(before) if before.1 + 1 == first => before.1 = last,
            _ => self.0.push((first, last)),
        }
    }
}

impl fmt::Display for Indexes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (first, last)) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            match last - first {
                0 => write!(f, "{comma}{first}")?,
                1 => write!(f, "{comma}{first},{last}")?,
                _ => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

fn number(text: &str) -> Option<u32> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|number| plain && *number < u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn texts_are_those_of_kubernetes() {
        for text in ["", "0", "1,3-5,7", "0,1,3", "2-4,6,7"] {
            assert_eq!(Indexes::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Indexes::parse("0,1,2").unwrap().to_string(), "0-2");
        for bad in [",", "1,", "a", "3-1", "3,3", "5,1", "+1", "1-2-3", "-1"] {
            assert_eq!(Indexes::parse(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_set_of_ranges_is_a_set(
            a in proptest::collection::vec(0..40_u32, 0..40),
            b in proptest::collection::vec(0..40_u32, 0..40),
            end in 0..45_u32,
        ) {
            let of = |list: &[u32]| {
                let mut set = Indexes::default();
                list.iter().for_each(|index| set.insert(*index));
                set
            };
            let plain = |list: &[u32]| list.iter().copied().collect::<BTreeSet<u32>>();
            let (mut set, other) = (of(&a), of(&b));
            prop_assert_eq!(set.len() as usize, plain(&a).len());
            prop_assert_eq!(set.last(), a.iter().max().copied());
            prop_assert_eq!(Indexes::parse(&set.to_string()), Some(set.clone()));
            prop_assert_eq!(set.common(&other) as usize, plain(&a).intersection(&plain(&b)).count());
            let missing: Vec<u32> = (0..end).filter(|index| !a.contains(index)).collect();
            prop_assert_eq!(set.missing(end).collect::<Vec<_>>(), missing);
            set.truncate(end);
            prop_assert!((0..45).all(|index| set.contains(index) == (index < end && a.contains(&index))));
            prop_assert!(end > 0 || set.is_empty());
        }
    }
}
