//! A mirror of the tables, so that a change costs what changed.

use std::collections::BTreeMap;

use mesh_model::policy::PolicySet;
use mesh_model::snapshot::Protocol;

use super::{Place, PolicyTable, Step, Tables, Touched, plan};
use crate::bpf::MapError;

/// Keeps a [`PolicyTable`] as it should be.
pub struct PolicyReconciler<T> {
    table: T,
    mirror: Option<Tables>,
}

/// What a round did.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Map operations carried out.
    pub operations: usize,
    /// Steps that failed; the next round tries again.
    pub failed: Vec<(Step, MapError)>,
}

impl<T: PolicyTable> PolicyReconciler<T> {
    /// Nothing is read yet.
    pub fn new(table: T) -> Self {
        Self { table, mirror: None }
    }

    /// Makes the tables hold what is wanted. A rule that cannot be written leaves its packets denied; a pod whose policies cannot
    /// be written is denied everything once enforcement begins.
    ///
    /// # Errors
    /// When the tables cannot be read.
    pub fn reconcile(&mut self, wanted: &Tables) -> Result<Outcome, MapError> {
        let (present, found) = match self.mirror.take() {
            Some(mirror) => (mirror, false),
            None => (self.table.observe()?, true),
        };
        let mut steps = plan(wanted, &present);
        // Whoever wrote them may have been killed after it had taken a permission away, and before it said so.
        if found && present.active && wanted.active && !steps.contains(&Step::NextGeneration) {
            steps.push(Step::NextGeneration);
        }
        self.mirror = Some(present);
        Ok(self.carry_out(steps))
    }

    /// The same where only touched entries may differ from what the last round made, which was complete.
    ///
    /// # Errors
    /// When the tables are not known and cannot be read.
    pub fn reconcile_touched(
        &mut self,
        touched: &Touched,
        set: &PolicySet,
        places: &BTreeMap<u32, Place>,
        host_ports: &[(Protocol, u16)],
    ) -> Result<Outcome, MapError> {
        let wanted = Tables::wanted(&touched.part(set), places, host_ports);
        let present = match self.mirror.take() {
            Some(mirror) => mirror,
            None => self.table.observe()?,
        };
        let steps = plan(&wanted, &touched.of(&present));
        self.mirror = Some(present);
        Ok(self.carry_out(steps))
    }

    /// Carries out steps that follow from what only the caller knows, such as where a new pod is.
    pub fn carry_out(&mut self, steps: impl IntoIterator<Item = Step>) -> Outcome {
        let mut outcome = Outcome::default();
        for step in steps {
            match self.table.apply(&step) {
                Ok(()) => {
                    outcome.operations += 1;
                    if let Some(mirror) = &mut self.mirror {
                        mirror.apply(&step);
                    }
                }
                Err(error) => outcome.failed.push((step, error)),
            }
        }
        if let Some(mirror) = &self.mirror {
            self.table.holds(mirror);
        }
        outcome
    }

    /// Reads the tables and returns whether they differ from the mirror: somebody else wrote to them. The next round repairs it.
    ///
    /// # Errors
    /// When the tables cannot be read.
    pub fn refresh(&mut self) -> Result<bool, MapError> {
        let observed = self.table.observe()?;
        // Entries of pods go with their interfaces.
        let but_pods = |tables: &Tables| {
            let Tables { active, pods: _, identities, blocks, rules, host_ports } = tables.clone();
            (active, identities, blocks, rules, host_ports)
        };
        let same = |mirror: &Tables| but_pods(mirror) == but_pods(&observed);
        let drifted = self.mirror.as_ref().is_some_and(|mirror| !same(mirror));
        self.table.holds(&observed);
        self.mirror = Some(observed);
        Ok(drifted)
    }

    /// The table.
    pub fn table(&self) -> &T {
        &self.table
    }
}

impl<T> std::fmt::Debug for PolicyReconciler<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rules = self.mirror.as_ref().map(|mirror| mirror.rules.len());
        f.debug_struct("PolicyReconciler").field("rules", &rules).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use mesh_model::ObjectKey;
    use mesh_model::policy::{PodPolicy, Ports, Rule};
    use proptest::prelude::*;

    use super::super::FakePolicyTable;
    use super::*;

    /// Three pods here; addresses, rules and ranges of few numbers, so that sets have much in common.
    fn set() -> impl Strategy<Value = PolicySet> {
        let few = || proptest::collection::vec((0..12_u32, 100..103_u32), 0..8);
        let pods = proptest::collection::vec(0..3_u32, 0..3);
        (proptest::bool::weighted(0.9), pods, few(), few(), few()).prop_map(
            |(active, pods, identities, rules, blocks)| {
                let pod = |(n, who): (usize, u32)| {
                    let policy = PodPolicy { identity: 100 + who, ingress: 200 + who, egress: 0 };
                    (ObjectKey::new("x", n.to_string()), policy)
                };
                let rule = |(n, number): (u32, u32)| {
                    let ports = Ports::of(Protocol::Tcp);
                    Rule { policy: 200 + n / 4, identity: 100 + n % 4, ports, number }
                };
                PolicySet {
                    active,
                    pods: pods.into_iter().enumerate().map(pod).collect(),
                    identities: identities.into_iter().map(|(n, who)| (address(n), who)).collect(),
                    rules: rules.into_iter().map(rule).collect(),
                    blocks: blocks.into_iter().map(|(n, who)| (address(n).into(), who)).collect(),
                    ..PolicySet::default()
                }
            },
        )
    }

    fn address(n: u32) -> IpAddr {
        // Two parts of the identities.
        IpAddr::from([10, 244, u8::try_from(n % 2).unwrap(), u8::try_from(n).unwrap()])
    }

    /// Where pods are: some have addresses that the set knows, too.
    fn places() -> impl Strategy<Value = BTreeMap<u32, Place>> {
        let place = (0..3_u32, 0..12_u32).prop_map(|(pod, at)| Place {
            pod: Some(ObjectKey::new("x", pod.to_string())),
            addresses: vec![address(at)],
        });
        proptest::collection::btree_map(1..4_u32, place, 0..3)
    }

    /// However far an agent gets before it is killed: when the next one is done, nobody goes on under a verdict that was given
    /// before the last permission went.
    #[test]
    fn what_a_killed_agent_forbade_is_asked_about_again() {
        let rules = |numbers: &[u32]| {
            let ports = Ports::of(Protocol::Tcp);
            let rule = |n: &u32| Rule { policy: 200, identity: *n, ports, number: 300 };
            PolicySet {
                active: true,
                rules: numbers.iter().map(rule).collect(),
                ..PolicySet::default()
            }
        };
        let tables = |numbers| Tables::wanted(&rules(numbers), &BTreeMap::new(), &[]);
        let (before, wanted) = (tables(&[100, 101, 102]), tables(&[100]));
        let steps = plan(&wanted, &before);
        assert_eq!(steps.len(), 3, "two rules and the generation");
        for done in 0..=steps.len() {
            let table = FakePolicyTable::new();
            let mut first = PolicyReconciler::new(table);
            first.reconcile(&before).unwrap();
            first.carry_out(steps[..done].iter().copied());
            first.table().steps();
            let mut next = PolicyReconciler::new(first.table);
            assert!(next.reconcile(&wanted).unwrap().failed.is_empty());
            let last = next.table().steps().pop();
            assert_eq!(last, Some(Step::NextGeneration), "killed after {done} steps");
            assert_eq!(next.table().tables(), wanted);
        }
    }

    proptest! {
        /// Looking at what was touched finds what looking at everything finds.
        #[test]
        fn touched_entries_are_all_that_differ(
            rounds in proptest::collection::vec((set(), places()), 2..6),
        ) {
            let mut reconciler = PolicyReconciler::new(FakePolicyTable::new());
            let mut before: Option<(PolicySet, BTreeMap<u32, Place>)> = None;
            for (set, places) in rounds {
                let wanted = Tables::wanted(&set, &places, &[]);
                let expected = plan(&wanted, &reconciler.table().tables());
                match &before {
                    Some((old, were)) if old.active == set.active => {
                        let mut touched = Touched::between(old, &set);
                        let all = were.values().chain(places.values());
                        touched.add_addresses(all.flat_map(|place| &place.addresses));
                        let done = reconciler.reconcile_touched(&touched, &set, &places, &[]);
                        prop_assert!(done.unwrap().failed.is_empty());
                    }
                    _ => drop(reconciler.reconcile(&wanted).unwrap()),
                }
                prop_assert_eq!(reconciler.table().steps(), expected);
                prop_assert_eq!(reconciler.table().tables(), wanted);
                before = Some((set, places));
            }
        }
    }
}
