//! How many replicas each set of a Deployment should have: the arithmetic of rolling and scaling.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// What counts of one ReplicaSet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::controllers) struct Counts {
    /// Replicas that it is told to have.
    pub(in crate::controllers) wanted: i32,
    /// Pods that it has, as far as it reported: not those that are going away.
    pub(in crate::controllers) pods: i32,
    /// Of them, those that are available.
    pub(in crate::controllers) available: i32,
}

impl Counts {
    /// Pods that exist or may appear at any moment.
    fn live(&self) -> i32 {
        self.wanted.max(self.pods)
    }

    /// Available pods that will remain once the set has reached its number.
    fn remaining(&self) -> i32 {
        self.available.min(self.wanted)
    }
}

/// How far a rollout may deviate from the wanted number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::controllers) struct Bounds {
    /// Replicas wanted.
    pub(in crate::controllers) desired: i32,
    /// Never more pods than this.
    pub(in crate::controllers) most: i32,
    /// Never fewer available pods than this, if there are that many.
    pub(in crate::controllers) least: i32,
}

impl Bounds {
    /// From `replicas`, `maxSurge` (rounded up) and `maxUnavailable` (rounded down); never both 0.
    pub(in crate::controllers) fn of(deployment: &Deployment) -> Self {
        let desired = desired(deployment);
        let strategy = deployment.spec.as_ref().and_then(|s| s.strategy.as_ref());
        if strategy.and_then(|s| s.type_.as_deref()) == Some("Recreate") {
            return Self { desired, most: desired, least: desired };
        }
        let rolling = strategy.and_then(|s| s.rolling_update.as_ref());
        let quarter = IntOrString::String("25%".to_owned());
        let surge = rolling.and_then(|r| r.max_surge.as_ref()).unwrap_or(&quarter);
        let unavailable = rolling.and_then(|r| r.max_unavailable.as_ref()).unwrap_or(&quarter);
        let surge = resolve(surge, desired, true);
        let unavailable = match resolve(unavailable, desired, false) {
            0 if surge == 0 => 1,
            n => n.min(desired),
        };
        Self { desired, most: desired.saturating_add(surge), least: (desired - unavailable).max(0) }
    }
}

/// Replicas that the Deployment wants.
pub(in crate::controllers) fn desired(deployment: &Deployment) -> i32 {
    deployment.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1).max(0)
}

/// A number, or a percentage of `of`.
pub(in crate::controllers) fn resolve(value: &IntOrString, of: i32, up: bool) -> i32 {
    let percent = match value {
        IntOrString::Int(n) => return (*n).max(0),
        IntOrString::String(text) => text.trim_end_matches('%').parse::<i64>().unwrap_or(0).max(0),
    };
    let product = percent.saturating_mul(of.into());
    let rounded = if up { product.saturating_add(99) / 100 } else { product / 100 };
    i32::try_from(rounded).unwrap_or(i32::MAX)
}

/// The next numbers of a rolling update: of the new set, and of the old sets (oldest first).
pub(in crate::controllers) fn roll(bounds: Bounds, new: Counts, old: &[Counts]) -> (i32, Vec<i32>) {
    let live: i32 = old.iter().map(Counts::live).sum::<i32>() + new.live();
    let up = (bounds.most - live).clamp(0, (bounds.desired - new.wanted).max(0));
    let new_wanted = new.wanted.min(bounds.desired) + up;

    let wanted: i32 = old.iter().map(|c| c.wanted).sum::<i32>() + new.wanted;
    let missing = new.wanted - new.remaining();
    // Counts every old pod as available: what is allowed on that assumption is allowed in any case.
    let mut allowed = (wanted - bounds.least - missing).max(0);
    let mut result: Vec<i32> = old.iter().map(|c| c.wanted).collect();
    for (wanted, counts) in result.iter_mut().zip(old) {
        let step = (counts.wanted - counts.remaining()).clamp(0, allowed);
        *wanted -= step;
        allowed -= step;
    }
    let available: i32 = old.iter().map(Counts::remaining).sum::<i32>() + new.remaining();
    let mut healthy = (available - bounds.least).clamp(0, allowed);
    for wanted in &mut result {
        let step = (*wanted).clamp(0, healthy);
        *wanted -= step;
        healthy -= step;
    }
    (new_wanted, result)
}

/// A set that takes part in proportional scaling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::controllers) struct Share {
    /// Replicas now.
    pub(in crate::controllers) wanted: i32,
    /// The most that the Deployment was allowed when the set was scaled last.
    pub(in crate::controllers) most_then: i32,
}

/// Shares a change of the Deployment's size among sets in the middle of a rollout, each by its size.
///
/// `shares` is ordered by who gets the remainder first.
pub(in crate::controllers) fn share(bounds: Bounds, shares: &[Share]) -> Vec<i32> {
    let allowed = if bounds.desired > 0 { bounds.most } else { 0 };
    let total: i32 = shares.iter().map(|s| s.wanted).sum();
    let change = allowed - total;
    let mut added = 0;
    let mut result = Vec::with_capacity(shares.len());
    for share in shares {
        let mut part = proportion(*share, allowed);
        let left = change - added;
        part = if change > 0 { part.clamp(0, left) } else { part.clamp(left, 0) };
        added += part;
        result.push((share.wanted + part).max(0));
    }
    let leftover = change - added;
    if let Some(first) = result.first_mut() {
        *first = (*first + leftover).max(0);
    }
    result
}

/// How much a set should change so that its part of the whole stays the same.
fn proportion(share: Share, allowed: i32) -> i32 {
    if allowed == 0 {
        return -share.wanted;
    }
    let then = i64::from(if share.most_then > 0 { share.most_then } else { allowed });
    let scaled = (i64::from(share.wanted) * i64::from(allowed) * 2 + then) / (2 * then);
    i32::try_from(scaled).unwrap_or(i32::MAX) - share.wanted
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn bounds(replicas: i32, strategy: Value) -> Bounds {
        let deployment: Deployment = serde_json::from_value(json!({"spec": {
            "replicas": replicas, "strategy": strategy,
            "selector": {}, "template": {"spec": {"containers": []}}}}))
        .unwrap();
        Bounds::of(&deployment)
    }

    fn rolling(surge: Value, unavailable: Value) -> Value {
        json!({"rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}})
    }

    #[test]
    fn percentages_round_in_favour_of_progress_and_never_to_a_standstill() {
        let b = |b: Bounds| (b.least, b.most);
        assert_eq!(b(bounds(10, json!({}))), (8, 13));
        assert_eq!(b(bounds(1, json!({}))), (1, 2));
        assert_eq!(b(bounds(5, rolling(json!(0), json!(0)))), (4, 5));
        assert_eq!(b(bounds(5, rolling(json!(0), json!("10%")))), (4, 5));
        assert_eq!(b(bounds(5, rolling(json!(2), json!(9)))), (0, 7));
        assert_eq!(b(bounds(3, rolling(json!("100%"), json!("100%")))), (0, 6));
        assert_eq!(b(bounds(4, json!({"type": "Recreate"}))), (4, 4));
        assert_eq!(b(bounds(0, json!({}))), (0, 0));
    }

    fn healthy(n: i32) -> Counts {
        Counts { wanted: n, pods: n, available: n }
    }

    #[test]
    fn a_rollout_goes_up_by_the_surge_and_down_by_what_is_available() {
        let b = Bounds { desired: 3, most: 4, least: 3 };
        assert_eq!(roll(b, Counts::default(), &[healthy(3)]), (1, vec![3]));
        assert_eq!(
            roll(b, Counts { wanted: 1, pods: 1, available: 0 }, &[healthy(3)]),
            (1, vec![3])
        );
        assert_eq!(roll(b, healthy(1), &[healthy(3)]), (1, vec![2]));
        let leaving = Counts { wanted: 2, pods: 3, available: 3 };
        assert_eq!(roll(b, healthy(1), &[leaving]), (1, vec![2]), "waits for the pod to go");
        assert_eq!(roll(b, healthy(1), &[healthy(2)]), (2, vec![2]));
        assert_eq!(roll(b, healthy(3), &[healthy(1)]), (3, vec![0]));
        assert_eq!(roll(b, healthy(5), &[]), (3, vec![]));
    }

    #[test]
    fn broken_old_pods_go_first() {
        let b = Bounds { desired: 3, most: 4, least: 3 };
        let broken = Counts { wanted: 3, pods: 3, available: 0 };
        assert_eq!(roll(b, Counts { wanted: 1, pods: 1, available: 0 }, &[broken]), (1, vec![3]));
        assert_eq!(roll(b, healthy(1), &[broken]), (1, vec![2]));
        let b = Bounds { desired: 3, most: 4, least: 2 };
        assert_eq!(roll(b, Counts { wanted: 1, pods: 1, available: 0 }, &[broken]), (1, vec![2]));
    }

    #[test]
    fn scaling_in_the_middle_of_a_rollout_keeps_the_proportions() {
        let at = |wanted, most_then| Share { wanted, most_then };
        let b = Bounds { desired: 20, most: 25, least: 15 };
        assert_eq!(share(b, &[at(8, 13), at(5, 13)]), [15, 10]);
        let b = Bounds { desired: 5, most: 7, least: 4 };
        assert_eq!(share(b, &[at(8, 13), at(5, 13)]).iter().sum::<i32>(), 7);
        let b = Bounds { desired: 0, most: 0, least: 0 };
        assert_eq!(share(b, &[at(8, 13), at(5, 13)]), [0, 0]);
    }

    fn counts() -> impl Strategy<Value = Counts> {
        (0i32..8, 0i32..8, 0i32..8).prop_map(|(wanted, pods, available)| Counts {
            wanted,
            pods,
            available: available.min(pods),
        })
    }

    proptest! {
        #[test]
        fn no_step_breaks_a_bound(
            desired in 0i32..10, surge in 0i32..4, unavailable in 0i32..4,
            new in counts(), old in prop::collection::vec(counts(), 0..4),
        ) {
            let b = Bounds { desired, most: desired + surge, least: (desired - unavailable).max(0) };
            let (new_wanted, old_wanted) = roll(b, new, &old);
            prop_assert!(new_wanted <= desired && new_wanted >= 0);
            // More pods only while they fit.
            if new_wanted > new.wanted {
                let live: i32 = old.iter().map(Counts::live).sum::<i32>() + new.live();
                prop_assert!(live + (new_wanted - new.wanted) <= b.most);
            }
            // Fewer old pods only while enough would remain even if all old ones were healthy and
            // the broken ones go first.
            let before: i32 = old.iter().map(|c| c.wanted).sum();
            let after: i32 = old_wanted.iter().sum();
            prop_assert!(after <= before && old_wanted.iter().all(|n| *n >= 0));
            if after < before {
                prop_assert!(after + new.remaining() >= b.least);
            }
            let broken: i32 = old.iter().map(|c| c.wanted - c.remaining()).sum();
            let removed_healthy = (before - after - broken).max(0);
            let available: i32 = old.iter().map(Counts::remaining).sum::<i32>() + new.remaining();
            if removed_healthy > 0 {
                prop_assert!(available - removed_healthy >= b.least);
            }
        }

        #[test]
        fn a_rollout_with_healthy_pods_ends(
            desired in 0i32..10, surge in 0i32..4, unavailable in 0i32..4, old in 0i32..12,
        ) {
            prop_assume!(surge + unavailable > 0);
            let b = Bounds { desired, most: desired + surge, least: (desired - unavailable).max(0) };
            let (mut new, mut old) = (0, old);
            for _ in 0..200 {
                let (n, o) = roll(b, healthy(new), &[healthy(old)]);
                (new, old) = (n, o[0]);
            }
            prop_assert_eq!((new, old), (desired, 0));
        }

        #[test]
        fn shares_add_up(
            desired in 0i32..50, surge in 0i32..10,
            sets in prop::collection::vec((1i32..20, 0i32..60), 1..5),
        ) {
            let b = Bounds { desired, most: desired + surge, least: 0 };
            let shares: Vec<_> =
                sets.iter().map(|(wanted, most_then)| Share { wanted: *wanted, most_then: *most_then }).collect();
            let result = share(b, &shares);
            let allowed = if desired > 0 { b.most } else { 0 };
            prop_assert!(result.iter().all(|n| *n >= 0));
            let before: i32 = shares.iter().map(|s| s.wanted).sum();
            let after: i32 = result.iter().sum();
            if before <= allowed {
                prop_assert_eq!(after, allowed);
            } else {
                prop_assert!(after <= before && after >= allowed);
            }
        }
    }
}
