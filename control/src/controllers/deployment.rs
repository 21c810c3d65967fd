//! Deployments: roll from one template to the next by scaling ReplicaSets.

pub(super) mod numbers;
pub(super) mod plan;
pub(super) mod revision;
mod status;
