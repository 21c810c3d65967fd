//! From weights to places in a list: a backend of twice the weight stands there twice as often.

/// Places per backend that a list has at most, on the average, however finely its weights differ.
const PLACES: u32 = 16;
/// Places that even a short list may have.
const LEAST: u32 = 256;

/// How often each backend stands in the list, in the order of `weights`.
///
/// The exact proportion where it takes few places (all alike: once each), else the nearest that fits; nobody who has a weight
/// gets no place. A weight of 0 counts as 1.
pub(super) fn places(weights: &[u16]) -> Vec<u32> {
    let weights = || weights.iter().map(|weight| u32::from(*weight).max(1));
    let Some(divisor) = weights().reduce(gcd) else { return vec![] };
    let total: u32 = weights().map(|weight| weight / divisor).sum();
    let backends = u32::try_from(weights().len()).expect("a list in memory is shorter");
    let room = backends.saturating_mul(PLACES).max(LEAST);
    let place = |weight: u32| {
        if total <= room {
            return weight / divisor;
        }
        let scaled = u64::from(weight / divisor) * u64::from(room) + u64::from(total / 2);
        u32::try_from(scaled / u64::from(total)).expect("at most the room").max(1)
    };
    weights().map(place).collect()
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_weights_take_one_place_each_and_others_their_exact_share() {
        assert_eq!(places(&[]), [0; 0]);
        assert_eq!(places(&[100, 100, 100]), [1, 1, 1]);
        assert_eq!(places(&[100, 10]), [10, 1]);
        assert_eq!(places(&[100, 100, 33]), [100, 100, 33]);
        assert_eq!(places(&[0, 2]), [1, 2]);
    }

    #[test]
    fn a_list_is_bounded_and_its_shares_stay_near() {
        let mut weights = vec![1000; 200];
        weights[0] = 999;
        weights[1] = 1;
        let places = places(&weights);
        let total: u32 = places.iter().sum();
        assert!(total <= 200 * PLACES + 200, "{total}");
        assert_eq!((places[0], places[1], places[2]), (16, 1, 16));
    }
}
