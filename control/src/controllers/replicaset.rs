//! ReplicaSets: keep a number of pods of one template alive.

pub(super) mod plan;
