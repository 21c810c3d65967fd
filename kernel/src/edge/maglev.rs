//! Maglev tables (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", section 3.4).

use std::net::SocketAddr;

use mesh_abi::edge::TABLE_SIZE;

/// Which of the backends, which must be sorted, each place stands for: a function of their addresses and of nothing else.
/// Places are shared out evenly, and a backend that comes or goes moves few of the others. Empty without backends.
pub fn table(backends: &[SocketAddr]) -> Vec<usize> {
    if backends.is_empty() {
        return Vec::new();
    }
    let mut walks: Vec<Walk> = backends.iter().map(Walk::new).collect();
    let mut table = vec![usize::MAX; TABLE_SIZE];
    let mut filled = 0;
    while filled < TABLE_SIZE {
        for (number, walk) in walks.iter_mut().enumerate().take(TABLE_SIZE - filled) {
            // The step and the size have no common factor, so the walk comes by every place.
            while table[walk.at] != usize::MAX {
                walk.go_on();
            }
            table[walk.at] = number;
            filled += 1;
        }
    }
    table
}

/// The order in which a backend wants places.
struct Walk {
    at: usize,
    step: usize,
}

impl Walk {
    fn new(backend: &SocketAddr) -> Self {
        let name = backend.to_string();
        let below = |hash: u64, limit: usize| (hash % limit as u64) as usize;
        Self {
            at: below(hash(0xcbf2_9ce4_8422_2325, &name), TABLE_SIZE),
            step: below(hash(0x6c62_272e_07bb_0142, &name), TABLE_SIZE - 1) + 1,
        }
    }

    fn go_on(&mut self) {
        self.at = (self.at + self.step) % TABLE_SIZE;
    }
}

/// FNV-1a, stirred at the end. Part of the protocol between nodes: never change it.
fn hash(seed: u64, text: &str) -> u64 {
    let sum =
        text.bytes().fold(seed, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let sum = (sum ^ sum >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    sum ^ sum >> 33
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backends(count: u16) -> Vec<SocketAddr> {
        let mut all: Vec<SocketAddr> =
            (0..count).map(|n| SocketAddr::from(([10, 244, 1, n as u8], 8080))).collect();
        all.sort();
        all
    }

    #[test]
    fn places_are_shared_out_evenly() {
        for count in [1, 2, 3, 10, 100] {
            let table = table(&backends(count));
            assert_eq!(table.len(), TABLE_SIZE);
            let mut shares = vec![0_usize; usize::from(count)];
            table.iter().for_each(|number| shares[*number] += 1);
            let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
            assert!(most - least <= 1, "{count} backends: {least} to {most}");
        }
        assert_eq!(table(&[]), Vec::<usize>::new());
    }

    #[test]
    fn a_backend_that_goes_moves_few_others() {
        let before = backends(10);
        let after: Vec<SocketAddr> = before.iter().copied().filter(|b| *b != before[4]).collect();
        let (old, new) = (table(&before), table(&after));
        let moved = (0..TABLE_SIZE)
            .filter(|place| before[old[*place]] != before[4])
            .filter(|place| before[old[*place]] != after[new[*place]])
            .count();
        assert!(moved < TABLE_SIZE / 10, "{moved} of {TABLE_SIZE} moved without need");
    }

    #[test]
    fn all_versions_agree_on_the_table() {
        let table = table(&backends(3));
        assert_eq!(table[..12], [2, 2, 2, 0, 0, 1, 1, 1, 1, 2, 2, 2]);
    }
}
