//! Who decided which field of an object: what server-side apply stands on (Kubernetes API concepts, "Server-Side Apply").
//!
//! Owns: sets of fields and their form on the wire (`fieldsV1`), which lists and maps have owners by element, the merge of what
//! somebody applies, and the list of owners in `metadata.managedFields`. Pure but for the time of an entry, which is given.
//!
//! Owners are kept of objects that somebody has applied, and of no others: what is only created, updated and patched, such as pods
//! and endpoints, carries none and costs nothing. Entry: [`merge::applied`], [`owners::settle`].

pub mod merge;
pub mod owners;
pub mod set;
mod shape;

#[cfg(test)]
mod properties;

pub use owners::{Author, Conflict};
pub use set::Set;
