//! What differs between two ordered lists.

use std::cmp::Ordering;
use std::sync::Arc;

/// What a list lost, and what is new or different in it.
pub(crate) struct Differences<'a, K, T> {
    pub(crate) gone: Vec<K>,
    pub(crate) put: Vec<&'a T>,
}

/// Compares lists that are ordered by `key` and name none twice. What lies at the same address is not looked at.
pub(crate) fn of_lists<'a, T: PartialEq, K: Ord>(
    old: &[Arc<T>],
    new: &'a [Arc<T>],
    key: impl Fn(&T) -> K,
) -> Differences<'a, K, Arc<T>> {
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    let mut differences = Differences { gone: vec![], put: vec![] };
    loop {
        let order = match (old.peek(), new.peek()) {
            (None, None) => return differences,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(a), Some(b)) if Arc::ptr_eq(a, b) => {
                old.next();
                new.next();
                continue;
            }
            (Some(a), Some(b)) => key(a).cmp(&key(b)),
        };
        let before = if order.is_le() { old.next() } else { None };
        let after = if order.is_ge() { new.next() } else { None };
        match (before, after) {
            (Some(before), None) => differences.gone.push(key(before)),
            (Some(before), Some(after)) if **before == **after => {}
            (_, after) => differences.put.extend(after),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_new_and_different_elements_are_named_and_no_others() {
        let list = |all: &[(u8, &'static str)]| -> Vec<Arc<(u8, &'static str)>> {
            all.iter().copied().map(Arc::new).collect()
        };
        let old = list(&[(1, "a"), (2, "b"), (4, "d"), (5, "e")]);
        let mut new = list(&[(0, "z"), (2, "b"), (4, "x"), (6, "f")]);
        let Differences { gone, put } = of_lists(&old, &new, |one| one.0);
        assert_eq!(gone, [1, 5]);
        assert_eq!(put.iter().map(|one| one.0).collect::<Vec<_>>(), [0, 4, 6]);
        new.clone_from(&old);
        let Differences { gone, put } = of_lists(&old, &new, |one| one.0);
        assert!(gone.is_empty() && put.is_empty());
    }
}
