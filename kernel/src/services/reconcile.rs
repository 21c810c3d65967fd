//! A mirror of the table, so that a change costs what changed.

use std::borrow::Borrow;

use mesh_model::snapshot::Frontend;

use super::{ObserveError, Observed, ServiceTable, Step, StepError, plan};

/// Keeps a [`ServiceTable`] equal to a list of frontends.
pub struct ServiceReconciler<T> {
    table: T,
    mirror: Option<Observed>,
}

/// What a round did.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Map operations carried out.
    pub operations: usize,
    /// Steps that failed; the next round tries again.
    pub failed: Vec<(Step, StepError)>,
}

impl<T: ServiceTable> ServiceReconciler<T> {
    /// Nothing is read yet.
    pub fn new(table: T) -> Self {
        Self { table, mirror: None }
    }

    /// Makes the table hold `frontends`. The first round reads the table, later ones trust the mirror.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn reconcile<F: Borrow<Frontend>>(
        &mut self,
        frontends: &[F],
    ) -> Result<Outcome, ObserveError> {
        let mirror = match self.mirror.take() {
            Some(mirror) => mirror,
            None => self.table.observe()?,
        };
        let plan = plan(frontends, &mirror);
        let applied = self.table.apply(&plan);
        let mirror = self.mirror.insert(mirror);
        for step in &applied.done {
            mirror.apply(step);
        }
        Ok(Outcome { operations: applied.done.len(), failed: applied.failed })
    }

    /// Reads the table and returns whether it differs from the mirror: somebody else wrote to it. The next round repairs it.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn refresh(&mut self) -> Result<bool, ObserveError> {
        let observed = self.table.observe()?;
        let drifted = self.mirror.as_ref().is_some_and(|mirror| *mirror != observed);
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
