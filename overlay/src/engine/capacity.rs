//! How many handshakes this machine can afford, measured: a key agreement that takes 50 us on a server takes 1 ms on a
//! small board, and a flood of bogus ones must take only a small part of either's time.

use std::time::{Duration, Instant};

use crate::keys::NodeKey;
use crate::protocol::noise::Tai64n;
use crate::protocol::noise::handshake::{Call, Offer};

/// The part of a second that handshakes of strangers may take before they have to prove their addresses.
const SHARE: Duration = Duration::from_millis(100);

/// Whatever was measured: below, a cluster that restarts would meet cookies; above, a flood would be felt.
const RANGE: std::ops::RangeInclusive<u32> = 100..=2000;

/// Nobody disturbed at least one of them.
const RUNS: usize = 4;

/// Handshakes per second.
pub(crate) fn handshakes(own: &NodeKey) -> u32 {
    let fastest = (0..RUNS).filter_map(|_| cost(own)).min();
    fastest.map_or(*RANGE.start(), affordable)
}

/// What it takes to read one initiation.
fn cost(own: &NodeKey) -> Option<Duration> {
    let caller = NodeKey::from_bytes(rand::random());
    let (_, call) = Offer::make(&caller, &own.public(), &[0; 32], 1, Tai64n([0; 12]))?;
    let begun = Instant::now();
    std::hint::black_box(Call::read(own, &call)?);
    Some(begun.elapsed())
}

fn affordable(cost: Duration) -> u32 {
    let count = SHARE.as_nanos() / cost.as_nanos().max(1);
    u32::try_from(count).unwrap_or(u32::MAX).clamp(*RANGE.start(), *RANGE.end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_machine_affords_fewer() {
        assert_eq!(affordable(Duration::from_micros(100)), 1000);
        assert_eq!(affordable(Duration::from_micros(500)), 200);
        assert_eq!(affordable(Duration::from_millis(50)), 100);
        assert_eq!(affordable(Duration::ZERO), 2000);
    }

    #[test]
    fn the_cost_is_that_of_a_call_that_can_be_read() {
        assert!(cost(&NodeKey::from_bytes([7; 32])).is_some());
    }
}
