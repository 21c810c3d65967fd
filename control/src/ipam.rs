//! Address assignment: pod blocks of nodes, ClusterIPs and node ports of Services.
//!
//! Owns: which block, address or port belongs to whom, in memory; the stored objects are the truth, and
//! [`NodeBlocks`] and [`ServiceAddresses`] are filled from them at start.
//! Never does: I/O. Callers write the objects; nothing is assigned twice while a write is under way.

mod blocks;
mod families;
mod pool;
mod services;

pub use blocks::{BlockConflict, NodeBlocks};
pub use services::{Reservation, ServiceAddresses};

/// A field of an object that cannot be honoured.
///
/// `message` starts with the Kubernetes error type (`Invalid value: ...`), so `{field}: {message}` reads
/// like one cause of a 422 `Status`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct FieldError {
    /// Path of the field, such as `spec.clusterIPs[0]`.
    pub field: String,
    /// What is wrong with its value.
    pub message: String,
}

impl FieldError {
    fn invalid(field: impl Into<String>, value: impl std::fmt::Debug, detail: &str) -> Self {
        Self { field: field.into(), message: format!("Invalid value: {value:?}: {detail}") }
    }

    fn duplicate(field: impl Into<String>, value: impl std::fmt::Debug) -> Self {
        Self { field: field.into(), message: format!("Duplicate value: {value:?}") }
    }

    fn forbidden(field: impl Into<String>, detail: &str) -> Self {
        Self { field: field.into(), message: format!("Forbidden: {detail}") }
    }

    fn internal(field: impl Into<String>, detail: &str) -> Self {
        Self { field: field.into(), message: format!("Internal error: {detail}") }
    }
}
