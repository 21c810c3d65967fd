//! Which pod runs on which node: filter, score, bind.
//!
//! Owns: [`ClusterState`], the incremental picture of nodes and their use, and the placement over it.
//! Never does: preemption, volumes, other schedulers' pods.

mod driver;
mod fit;
pub(crate) mod quantity;
mod resources;
mod score;
mod state;
pub(crate) mod taints;
mod topology;

pub(crate) use driver::start;
pub(crate) use fit::Selection;
pub use state::{ClusterState, Unschedulable};

#[cfg(test)]
mod tests;
