//! How soon a worker that died is started again.

use std::time::Duration;

/// A worker that lived so long had been well.
const WELL: Duration = Duration::from_secs(10);
/// So many deaths in quick succession are bad luck; more are a worker that cannot live.
const FREE: u32 = 3;
const FIRST_DELAY: Duration = Duration::from_millis(50);
const LONGEST_DELAY: Duration = Duration::from_secs(5);

/// Counts deaths in quick succession.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    quick: u32,
}

impl Pace {
    /// The pause after a death, from how long the dead one had lived.
    pub(crate) fn pause(&mut self, lived: Duration) -> Duration {
        self.quick = if lived >= WELL { 0 } else { self.quick.saturating_add(1) };
        match self.quick.checked_sub(FREE + 1) {
            None => Duration::ZERO,
            Some(n) => (FIRST_DELAY * 2u32.saturating_pow(n.min(16))).min(LONGEST_DELAY),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_deaths_cost_nothing_and_the_next_ones_ever_more() {
        let mut pace = Pace::default();
        let mut die = |lived| pace.pause(Duration::from_secs(lived)).as_millis();
        assert_eq!([die(0), die(1), die(9)], [0, 0, 0]);
        assert_eq!([die(0), die(0), die(0)], [50, 100, 200]);
        assert_eq!((0..40).map(|_| die(0)).last(), Some(5000));
        assert_eq!(die(10), 0, "it had been well");
        assert_eq!(die(0), 0);
    }
}
