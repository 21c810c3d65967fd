//! A mirror of the table, so that a change costs what changed.

use std::borrow::Borrow;

use mesh_model::snapshot::Frontend;

use super::plan::{next_id, plan_changes, plan_within};
use super::{FrontendKey, Gone, Observed, Plan, ServiceTable, Step, StepError, Unfit};
use crate::bpf::MapError;

/// How often a round is planned again because what it deleted has made room for more of it.
const AGAIN: usize = 2;

/// Keeps a [`ServiceTable`] equal to a list of frontends.
pub struct ServiceReconciler<T> {
    table: T,
    mirror: Option<Observed>,
    /// A service number that was never used, nor any above it.
    next_id: u32,
}

/// What a round did.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Map operations carried out.
    pub operations: usize,
    /// Steps that failed; the next round has to be a full one.
    pub failed: Vec<(Step, StepError)>,
    /// Backends that are gone.
    pub gone: Vec<Gone>,
    /// Frontends that are not as they should be, because maps have no room; the next round has to be a full one.
    pub unfit: Vec<Unfit>,
}

impl<T: ServiceTable> ServiceReconciler<T> {
    /// Nothing is read yet.
    pub fn new(table: T) -> Self {
        Self { table, mirror: None, next_id: 1 }
    }

    /// Makes the table hold `frontends`. The first round reads the table, later ones trust the mirror.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn reconcile<F: Borrow<Frontend>>(&mut self, frontends: &[F]) -> Result<Outcome, MapError> {
        let mut total = Outcome::default();
        for left in (0..=AGAIN).rev() {
            let mirror = match self.mirror.take() {
                Some(mirror) => mirror,
                None => self.table.observe()?,
            };
            let plan = plan_within(frontends, &mirror, self.table.room());
            self.next_id = self.next_id.max(next_id(&mirror));
            let again = left > 0 && !plan.unfit.is_empty() && plan.frees();
            let outcome = self.carry_out(plan, mirror);
            total.operations += outcome.operations;
            total.gone.extend(outcome.gone);
            (total.failed, total.unfit) = (outcome.failed, outcome.unfit);
            if !again {
                break;
            }
        }
        Ok(total)
    }

    /// Makes the table follow where only these frontends have changed, and these have gone, since the last round, which was
    /// complete. Costs what changed. Before the first round nothing is known, and nothing is done.
    pub fn reconcile_changes<F: Borrow<Frontend>>(
        &mut self,
        changed: &[F],
        removed: &[FrontendKey],
    ) -> Outcome {
        let Some(mirror) = self.mirror.take() else { return Outcome::default() };
        let plan = plan_changes(changed, removed, &mirror, self.next_id, self.table.room());
        self.carry_out(plan, mirror)
    }

    fn carry_out(&mut self, plan: Plan, mirror: Observed) -> Outcome {
        let applied = self.table.apply(&plan);
        let mirror = self.mirror.insert(mirror);
        mirror.apply_all(&applied.done);
        let highest = applied.done.iter().map(Step::service).max();
        self.next_id = self.next_id.max(highest.map_or(0, |id| id.saturating_add(1)));
        self.table.holds(mirror);
        Outcome {
            operations: applied.done.len(),
            failed: applied.failed,
            gone: plan.gone,
            unfit: plan.unfit,
        }
    }

    /// Reads the table and returns whether it differs from the mirror: somebody else wrote to it. The next round repairs it.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn refresh(&mut self) -> Result<bool, MapError> {
        let observed = self.table.observe()?;
        let drifted = self.mirror.as_ref().is_some_and(|mirror| *mirror != observed);
        self.table.holds(&observed);
        self.mirror = Some(observed);
        Ok(drifted)
    }

    /// What the table holds, as far as is known.
    pub fn mirror(&self) -> Option<&Observed> {
        self.mirror.as_ref()
    }

    /// The table.
    pub fn table(&self) -> &T {
        &self.table
    }
}

impl<T> std::fmt::Debug for ServiceReconciler<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let entries = self.mirror.as_ref().map(|mirror| mirror.entries.len());
        f.debug_struct("ServiceReconciler").field("entries", &entries).finish_non_exhaustive()
    }
}
