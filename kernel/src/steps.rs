//! What comes of steps that use netlink, sysctls, maps and programs together: those of [`node`](crate::node) and
//! [`edge`](crate::edge).

use crate::bpf::{AttachError, MapError};
use crate::netlink::NetlinkError;
use crate::node::NftError;
use crate::sysctl::SysctlError;

/// What came of a plan.
#[derive(Debug)]
pub struct Applied<S> {
    /// Number of steps that were carried out.
    pub done: usize,
    /// Steps that failed.
    pub failed: Vec<(S, StepError)>,
}

impl<S> Default for Applied<S> {
    fn default() -> Self {
        Self { done: 0, failed: Vec::new() }
    }
}

impl<S> Applied<S> {
    /// The maps that had no room for a step.
    pub fn full_maps(&self) -> impl Iterator<Item = &'static str> {
        self.failed.iter().filter_map(|(_, error)| match error {
            StepError::Map(error) => error.full(),
            _ => None,
        })
    }
}

/// The kernel could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The node's network namespace cannot be entered.
    #[error("enter the node's network namespace")]
    Namespace(#[source] std::io::Error),
    /// A netlink request failed.
    #[error("netlink request")]
    Netlink(#[from] NetlinkError),
    /// A sysctl could not be written.
    #[error("write a sysctl")]
    Sysctl(#[from] SysctlError),
    /// A map could not be read or written.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The TC program could not be attached.
    #[error("attach the TC program")]
    Program(#[from] AttachError),
    /// nft failed.
    #[error("run nft")]
    Nft(#[from] NftError),
}
