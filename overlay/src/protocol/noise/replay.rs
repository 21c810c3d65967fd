//! Which messages of a session have been seen (WG section 5.4.6), as a ring of bits (RFC 6479).

/// Bits per word of the ring.
const WORD: u64 = 64;

/// Words of the ring.
const WORDS: u64 = 128;

/// Length of the ring.
const RING_BYTES: usize = (WORDS * WORD / 8) as usize;

/// How far a message may come behind the newest one. Wide, because threads seal and open side by side.
pub const WINDOW: u64 = (WORDS - 1) * WORD;

/// Messages seen. A word of the ring is cleared when the window moves into it.
#[derive(Debug, Clone)]
pub struct Window {
    /// The highest counter seen, plus one.
    next: u64,
    ring: [u64; WORDS as usize],
}

impl Default for Window {
    fn default() -> Self {
        Self { next: 0, ring: [0; WORDS as usize] }
    }
}

impl Window {
    /// Takes note of an authentic message; false when it was seen before, or is too old to know.
    pub fn accept(&mut self, counter: u64) -> bool {
        if counter == u64::MAX || counter.saturating_add(WINDOW) < self.next {
            return false;
        }
        if counter >= self.next {
            self.advance_to(counter);
        }
        let (place, bit) = ((counter / WORD % WORDS) as usize, 1 << (counter % WORD));
        let fresh = self.ring[place] & bit == 0;
        self.ring[place] |= bit;
        fresh
    }

    /// The highest number seen plus one, and the ring as bytes.
    pub fn leave(&self) -> (u64, [u8; RING_BYTES]) {
        let mut bytes = [0; RING_BYTES];
        for (place, word) in bytes.chunks_exact_mut(8).zip(self.ring) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        (self.next, bytes)
    }

    /// What another one [left](Self::leave).
    pub fn resume(next: u64, ring: &[u8; RING_BYTES]) -> Self {
        let mut words = ring.chunks_exact(8);
        let mut word = || words.next().and_then(|bytes| bytes.try_into().ok());
        Self { next, ring: std::array::from_fn(|_| u64::from_le_bytes(word().unwrap_or_default())) }
    }

    fn advance_to(&mut self, counter: u64) {
        // The word of the highest counter so far is in use; those after it, up to the new one, start empty.
        let used = self.next.checked_sub(1).map_or(0, |last| last / WORD);
        let moved = (counter / WORD - used).min(WORDS);
        for step in 1..=moved {
            self.ring[((used + step) % WORDS) as usize] = 0;
        }
        self.next = counter + 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_counter_once_within_the_window() {
        let mut window = Window::default();
        for counter in [0, 5, 3, WINDOW, WINDOW + 70] {
            assert!(window.accept(counter), "{counter}");
            assert!(!window.accept(counter), "{counter} again");
        }
        assert!(!window.accept(1), "too old");
        assert!(window.accept(71), "just within");
        assert!(window.accept(WINDOW * 9));
        assert!(!window.accept(WINDOW + 71));
        assert!(!window.accept(u64::MAX));
        assert!(window.accept(u64::MAX - 1));
        assert!(!window.accept(WINDOW * 9));
    }

    proptest! {
        #[test]
        fn as_a_set_would_say(
            steps in prop::collection::vec((0u64..4, 0u64..20_000, 0u64..300), 1..400),
            handed_over in 0usize..400,
        ) {
            let (mut window, mut seen, mut newest) = (Window::default(), HashSet::new(), 0);
            for (step, (kind, far, near)) in steps.into_iter().enumerate() {
                if step == handed_over {
                    let (next, ring) = window.leave();
                    window = Window::resume(next, &ring);
                }
                let counter = match kind {
                    0 => newest + near,
                    1 => newest + far,
                    2 => newest.saturating_sub(near),
                    _ => newest.saturating_sub(far),
                };
                let known = newest < counter + WINDOW;
                let accepted = window.accept(counter);
                if counter + WINDOW > newest {
                    prop_assert_eq!(accepted, seen.insert(counter), "{} of {}", counter, newest);
                } else if !known {
                    prop_assert!(!accepted, "{} of {}", counter, newest);
                }
                newest = newest.max(counter);
            }
        }
    }
}
