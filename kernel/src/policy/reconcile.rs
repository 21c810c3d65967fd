//! A mirror of the tables, so that a change costs what changed.

use super::{ObserveError, PolicyTable, Step, StepError, Tables, plan};

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
    pub failed: Vec<(Step, StepError)>,
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
    pub fn reconcile(&mut self, wanted: &Tables) -> Result<Outcome, ObserveError> {
        let present = match self.mirror.take() {
            Some(mirror) => mirror,
            None => self.table.observe()?,
        };
        let steps = plan(wanted, &present);
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
    pub fn refresh(&mut self) -> Result<bool, ObserveError> {
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
