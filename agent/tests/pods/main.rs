//! Pods with a real containerd and runc: the runner, and the network as other users of CNI have it.
#![allow(clippy::unwrap_used, reason = "a failed step of a test ends it")]
#![forbid(unsafe_code)]

mod accounts;
mod answers;
mod api;
mod containerd;
mod debug;
mod ends;
mod evictions;
mod failures;
mod hooks;
mod image;
mod jobs;
mod leftovers;
mod life;
mod logs;
mod machine;
mod memory;
mod network;
mod probes;
mod pulls;
mod registry;
mod restarts;
mod rig;
mod settings;
mod statics;
mod streams;
mod usage;
