//! Ordered sets in parts. A copy shares every part with its original until one of both changes it: copying, comparing and
//! telling two apart cost a pointer for each part, and beyond that what differs.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// What a set in parts may hold.
pub trait Element: Copy + Eq {
    /// What tells it from others and orders the set.
    type Key: Copy + Ord;
    /// A part, by something that orders parts as their elements are ordered.
    type Part: Copy + Ord;

    /// Its key.
    fn key(&self) -> Self::Key;

    /// The part where that key belongs.
    fn part(key: &Self::Key) -> Self::Part;
}

/// A set of elements, each key once.
pub struct Parts<T: Element>(BTreeMap<T::Part, Arc<Vec<T>>>);

/// From one set to the next.
#[derive(Debug, PartialEq, Eq)]
pub struct Differences<T> {
    /// Elements whose keys are there no more, ordered.
    pub gone: Vec<T>,
    /// Elements that are new, or another one of their key, ordered.
    pub put: Vec<T>,
}

impl<T: Element> Parts<T> {
    /// The element with that key.
    pub fn get(&self, key: &T::Key) -> Option<&T> {
        let part = self.part(T::part(key));
        place(part, key).ok().map(|at| &part[at])
    }

    /// The elements of a part, ordered.
    pub fn part(&self, part: T::Part) -> &[T] {
        self.0.get(&part).map_or(&[], |elements| elements)
    }

    /// All parts, ordered; none is empty.
    pub fn parts(&self) -> impl Iterator<Item = (T::Part, &[T])> {
        self.0.iter().map(|(name, part)| (*name, part.as_slice()))
    }

    /// All elements, ordered.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.values().flat_map(|part| part.iter())
    }

    /// How many there are. Costs the number of parts.
    pub fn len(&self) -> usize {
        self.0.values().map(|part| part.len()).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds an element, or replaces the one of its key. Costs the size of its part.
    pub fn insert(&mut self, element: T) {
        let key = element.key();
        let part = self.0.entry(T::part(&key)).or_default();
        match place(part, &key) {
            Ok(at) if part[at] == element => {}
            Ok(at) => Arc::make_mut(part)[at] = element,
            Err(at) => Arc::make_mut(part).insert(at, element),
        }
    }

    /// Takes the element of a key out.
    pub fn remove(&mut self, key: &T::Key) {
        let name = T::part(key);
        let Some(part) = self.0.get_mut(&name) else { return };
        if let Ok(at) = place(part, key) {
            Arc::make_mut(part).remove(at);
        }
        if part.is_empty() {
            self.0.remove(&name);
        }
    }

    /// Puts these elements, which are ordered and belong there, in the place of a part.
    pub fn replace_part(&mut self, name: T::Part, elements: Vec<T>) {
        if elements.is_empty() {
            self.0.remove(&name);
        } else if self.part(name) != elements {
            self.0.insert(name, Arc::new(elements));
        }
    }

    /// What has to be done to `before` to get here. Looks into no part that both share.
    pub fn differences(&self, before: &Self) -> Differences<T> {
        let mut found = Differences { gone: vec![], put: vec![] };
        for (name, part) in &self.0 {
            match before.0.get(name) {
                Some(old) if Arc::ptr_eq(old, part) => {}
                Some(old) => found.compare(old, part),
                None => found.put.extend(part.iter().copied()),
            }
        }
        let gone = before.0.iter().filter(|(name, _)| !self.0.contains_key(name));
        found.gone.extend(gone.flat_map(|(_, part)| part.iter().copied()));
        found
    }
}

impl<T: Element> Differences<T> {
    fn compare(&mut self, old: &[T], new: &[T]) {
        let gone = old.iter().filter(|one| place(new, &one.key()).is_err());
        self.gone.extend(gone.copied());
        let put =
            new.iter().filter(|one| place(old, &one.key()).map_or(true, |at| old[at] != **one));
        self.put.extend(put.copied());
    }
}

fn place<T: Element>(part: &[T], key: &T::Key) -> Result<usize, usize> {
    part.binary_search_by(|one| one.key().cmp(key))
}

impl<T: Element> Default for Parts<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: Element> Clone for Parts<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Element> PartialEq for Parts<T> {
    fn eq(&self, other: &Self) -> bool {
        let same = |a: &Arc<Vec<T>>, b: &Arc<Vec<T>>| Arc::ptr_eq(a, b) || a == b;
        self.0.len() == other.0.len()
            && self.0.iter().zip(&other.0).all(|(a, b)| a.0 == b.0 && same(a.1, b.1))
    }
}

impl<T: Element> Eq for Parts<T> {}

impl<T: Element + fmt::Debug> fmt::Debug for Parts<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// Of several with one key, the last counts.
impl<T: Element> FromIterator<T> for Parts<T> {
    fn from_iter<I: IntoIterator<Item = T>>(elements: I) -> Self {
        let all: BTreeMap<T::Key, T> = elements.into_iter().map(|one| (one.key(), one)).collect();
        let mut parts: BTreeMap<T::Part, Vec<T>> = BTreeMap::new();
        for (key, one) in all {
            parts.entry(T::part(&key)).or_default().push(one);
        }
        Self(parts.into_iter().map(|(name, part)| (name, Arc::new(part))).collect())
    }
}

impl<T: Element> From<Vec<T>> for Parts<T> {
    fn from(elements: Vec<T>) -> Self {
        elements.into_iter().collect()
    }
}

impl<T: Element, const N: usize> From<[T; N]> for Parts<T> {
    fn from(elements: [T; N]) -> Self {
        elements.into_iter().collect()
    }
}

/// On disk a list of its elements.
pub(crate) mod list {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::{Element, Parts};

    pub(crate) fn serialize<T: Element + Serialize, S: Serializer>(
        parts: &Parts<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(parts.iter())
    }

    pub(crate) fn deserialize<'de, T: Element + Deserialize<'de>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Parts<T>, D::Error> {
        Vec::<T>::deserialize(deserializer).map(Parts::from)
    }
}

/// On disk a map.
pub(crate) mod map {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::{Element, Parts};

    pub(crate) fn serialize<K, V, S: Serializer>(
        parts: &Parts<(K, V)>,
        serializer: S,
    ) -> Result<S::Ok, S::Error>
    where
        (K, V): Element,
        K: Serialize,
        V: Serialize,
    {
        serializer.collect_map(parts.iter().map(|(key, value)| (key, value)))
    }

    pub(crate) fn deserialize<'de, K, V, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Parts<(K, V)>, D::Error>
    where
        (K, V): Element,
        K: Deserialize<'de> + Ord,
        V: Deserialize<'de>,
    {
        Ok(BTreeMap::<K, V>::deserialize(deserializer)?.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A key and a value; ten keys to a part.
    impl Element for (u8, u8) {
        type Key = u8;
        type Part = u8;

        fn key(&self) -> u8 {
            self.0
        }

        fn part(key: &u8) -> u8 {
            key / 10
        }
    }

    fn elements() -> impl Strategy<Value = BTreeMap<u8, u8>> {
        proptest::collection::btree_map(0..40_u8, 0..3_u8, 0..20)
    }

    proptest! {
        /// A set in parts is the map that it was made like, however it got there.
        #[test]
        fn differences_lead_from_one_to_the_other(before in elements(), after in elements()) {
            let before: Parts<(u8, u8)> = before.into_iter().collect();
            let (mut set, wanted) = (before.clone(), after.clone().into_iter().collect());
            let Differences { gone, put } = Parts::differences(&wanted, &before);
            for one in gone {
                prop_assert!(!after.contains_key(&one.0) && before.get(&one.0) == Some(&one));
                set.remove(&one.0);
            }
            for one in put {
                prop_assert!(before.get(&one.0) != Some(&one));
                set.insert(one);
            }
            prop_assert_eq!(&set, &wanted);
            prop_assert_eq!(set.len(), after.len());
            prop_assert_eq!(set.is_empty(), after.is_empty());
            prop_assert!(set.iter().copied().eq(after));
        }
    }

    #[test]
    fn what_does_not_change_is_shared() {
        let first: Parts<(u8, u8)> = [(1, 0), (2, 0), (11, 0), (21, 0)].into();
        let mut second = first.clone();
        second.insert((2, 0));
        second.replace_part(1, vec![(11, 0)]);
        second.insert((22, 0));
        let shared = |part: u8| Arc::ptr_eq(&first.0[&part], &second.0[&part]);
        assert_eq!([0, 1, 2].map(shared), [true, true, false]);
        second.replace_part(0, vec![]);
        assert_eq!(second.part(0), []);
        assert_eq!(second.part(2), [(21, 0), (22, 0)]);
        let Differences { gone, put } = second.differences(&first);
        assert_eq!((gone, put), (vec![(1, 0), (2, 0)], vec![(22, 0)]));
    }
}
