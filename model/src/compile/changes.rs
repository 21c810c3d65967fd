//! What changed between two lists of shared objects.

use std::sync::Arc;

/// Objects that a list lost and gained. One that was changed is in both.
pub(super) struct Changes<T> {
    pub(super) gone: Vec<Arc<T>>,
    pub(super) come: Vec<Arc<T>>,
}

impl<T> Changes<T> {
    pub(super) fn any(&self) -> bool {
        !self.gone.is_empty() || !self.come.is_empty()
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<T>> {
        self.gone.iter().chain(&self.come)
    }
}

/// Makes `known` the list `now`, and tells what that changed. Objects are told apart by their addresses: nothing is read of those
/// that stay, and `known` keeps the old ones alive until they have been compared, so that no address is used twice.
pub(super) fn follow<T>(known: &mut Vec<Arc<T>>, now: &[Arc<T>]) -> Changes<T> {
    let both = known.len().min(now.len());
    // Caches list mostly in the same order: only the places that differ have to be compared with each other.
    let moved = |list: &[Arc<T>], other: &[Arc<T>]| -> Vec<Arc<T>> {
        let places = list.iter().enumerate();
        let moved = places.filter(|(i, one)| *i >= both || !Arc::ptr_eq(one, &other[*i]));
        let mut moved: Vec<Arc<T>> = moved.map(|(_, one)| Arc::clone(one)).collect();
        moved.sort_by_key(Arc::as_ptr);
        moved
    };
    let (before, after) = (moved(known, now), moved(now, known));
    if before.is_empty() && after.is_empty() {
        return Changes { gone: before, come: after };
    }
    now.clone_into(known);
    let lacks = |list: &[Arc<T>], one: &Arc<T>| {
        list.binary_search_by_key(&Arc::as_ptr(one), Arc::as_ptr).is_err()
    };
    Changes {
        gone: before.iter().filter(|one| lacks(&after, one)).cloned().collect(),
        come: after.iter().filter(|one| lacks(&before, one)).cloned().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_objects_are_found_wherever_they_are() {
        let [a, b, c, d] = ["a", "b", "c", "d"].map(Arc::new);
        let mut known = vec![];
        let mut change = |now: &[&Arc<&'static str>]| {
            let now: Vec<_> = now.iter().map(|one| Arc::clone(one)).collect();
            let Changes { mut gone, mut come } = follow(&mut known, &now);
            assert!(known.iter().zip(&now).all(|(a, b)| Arc::ptr_eq(a, b)));
            assert_eq!(known.len(), now.len());
            gone.sort();
            come.sort();
            let names = |list: Vec<Arc<&'static str>>| list.iter().map(|s| **s).collect::<String>();
            (names(gone), names(come))
        };
        let told = |gone: &str, come: &str| (gone.to_owned(), come.to_owned());
        assert_eq!(change(&[&a, &b, &c]), told("", "abc"));
        assert_eq!(change(&[&a, &b, &c]), told("", ""));
        assert_eq!(change(&[&c, &a, &b]), told("", ""), "another order");
        assert_eq!(change(&[&c, &b]), told("a", ""));
        assert_eq!(change(&[&d, &c, &b, &a]), told("", "ad"));
        let other = Arc::new("a");
        assert_eq!(change(&[&d, &c, &b, &other]), told("a", "a"), "another object of that name");
    }
}
