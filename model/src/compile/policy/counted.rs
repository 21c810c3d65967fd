//! What somebody has, counted; and what came or went by that.

use std::borrow::Borrow;
use std::collections::BTreeMap;

/// How many have each thing.
pub(super) struct Counted<T> {
    held: BTreeMap<T, usize>,
    /// Whether it was there at the last settlement, of what may have come or gone since.
    touched: BTreeMap<T, bool>,
}

/// What nobody had before, and what nobody has any more; ordered.
pub(super) struct Turnover<T> {
    pub(super) come: Vec<T>,
    pub(super) gone: Vec<T>,
}

impl<T> Default for Counted<T> {
    fn default() -> Self {
        Self { held: BTreeMap::new(), touched: BTreeMap::new() }
    }
}

impl<T: Ord + Clone> Counted<T> {
    pub(super) fn has<Q: Ord + ?Sized>(&self, thing: &Q) -> bool
    where
        T: Borrow<Q>,
    {
        self.held.contains_key(thing)
    }

    /// Somebody has it, too.
    pub(super) fn add(&mut self, thing: T) {
        if let Some(count) = self.held.get_mut(&thing) {
            *count += 1;
            return;
        }
        self.touched.entry(thing.clone()).or_insert(false);
        self.held.insert(thing, 1);
    }

    /// Somebody who had it has it no more.
    pub(super) fn remove(&mut self, thing: &T) {
        match self.held.get_mut(thing) {
            Some(count) if *count > 1 => *count -= 1,
            Some(_) => {
                self.held.remove(thing);
                self.touched.entry(thing.clone()).or_insert(true);
            }
            None => {}
        }
    }

    /// What came and went since the last time.
    pub(super) fn settle(&mut self) -> Turnover<T> {
        let mut turnover = Turnover { come: vec![], gone: vec![] };
        for (thing, before) in std::mem::take(&mut self.touched) {
            match (before, self.held.contains_key(&thing)) {
                (false, true) => turnover.come.push(thing),
                (true, false) => turnover.gone.push(thing),
                _ => {}
            }
        }
        turnover
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_and_comes_back_has_neither_come_nor_gone() {
        let mut words: Counted<String> = Counted::default();
        let mut settle = |change: &dyn Fn(&mut Counted<String>)| {
            change(&mut words);
            let Turnover { come, gone } = words.settle();
            (come.join(" "), gone.join(" "), words.has("a"))
        };
        let told = |come: &str, gone: &str, a| (come.to_owned(), gone.to_owned(), a);
        let (a, b) = ("a".to_owned(), "b".to_owned());
        let begin = settle(&|words| [&a, &a, &b].into_iter().for_each(|w| words.add(w.clone())));
        assert_eq!(begin, told("a b", "", true));
        assert_eq!(settle(&|words| words.remove(&a)), told("", "", true));
        assert_eq!(settle(&|words| words.remove(&a)), told("", "a", false));
        let both = |words: &mut Counted<String>| {
            words.remove(&b);
            words.add(a.clone());
            words.add(b.clone());
            words.remove(&a);
        };
        assert_eq!(settle(&both), told("", "", false));
    }
}
