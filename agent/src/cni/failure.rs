//! The one table from what went wrong to what containerd is told.

use mesh_cni::wire::{Code, Failure};
use mesh_kernel::pods::{AttachError, DetachError, ListError};

use super::ledger::LedgerError;
use super::pool::ReserveError;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    #[error(transparent)]
    Ledger(LedgerError),
    #[error(transparent)]
    Attach(AttachError),
    #[error(transparent)]
    Detach(DetachError),
    #[error(transparent)]
    List(ListError),
}

impl From<Trouble> for Failure {
    fn from(trouble: Trouble) -> Self {
        let code = match &trouble {
            Trouble::Ledger(LedgerError::Reserve(ReserveError::Exists))
            | Trouble::Attach(AttachError::Exists(_)) => Code::Exists,
            Trouble::Ledger(LedgerError::Reserve(ReserveError::Elsewhere(_))) => Code::Config,
            Trouble::Attach(AttachError::PortTaken { .. }) => Code::TryAgain,
            Trouble::Ledger(LedgerError::Reserve(_) | LedgerError::Ended) => Code::TryAgain,
            Trouble::Ledger(LedgerError::Journal(_)) => Code::Io,
            Trouble::Ledger(LedgerError::NoLease(_) | LedgerError::Conflict { .. }) => Code::Kernel,
            Trouble::Attach(AttachError::Namespace { .. }) => Code::Namespace,
            Trouble::Attach(_) | Trouble::Detach(_) | Trouble::List(_) => Code::Kernel,
        };
        Self::new(code, trouble.to_string(), causes(&trouble))
    }
}

/// The chain of causes below an error, in one line.
fn causes(error: &dyn std::error::Error) -> String {
    let mut causes = vec![];
    let mut next = error.source();
    while let Some(cause) = next {
        causes.push(cause.to_string());
        next = cause.source();
    }
    causes.join(": ")
}
