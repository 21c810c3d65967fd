//! The pod runner against a real containerd and runc.
#![allow(clippy::unwrap_used, reason = "a failed step of a test ends it")]
#![forbid(unsafe_code)]

mod accounts;
mod api;
mod debug;
mod evictions;
mod failures;
mod hooks;
mod image;
mod jobs;
mod life;
mod logs;
mod machine;
mod memory;
mod restarts;
mod rig;
mod settings;
mod statics;
mod usage;
