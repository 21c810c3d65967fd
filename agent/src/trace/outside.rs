//! A probe that comes in to this node as if a client outside had sent it.

use std::net::SocketAddr;
use std::sync::Arc;

use mesh_kernel::edge::{EnterError, Entered as Went, Probe, enter};
use mesh_kernel::{NetNs, Programs};
use mesh_model::Snapshot;
use mesh_model::trace::{Entered, OutsideQuery, OutsideReport};

/// A probe could not come in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OutsideError {
    #[error("the eBPF programs are not loaded: see `meshctl check`")]
    NoPrograms,
    #[error("the probe cannot come in")]
    Enter(#[from] EnterError),
    #[error("the probe was given up")]
    GivenUp,
}

/// Lets it come in, and tells how it went on.
pub(crate) async fn run(
    query: OutsideQuery,
    snapshot: &Snapshot,
    programs: Option<Arc<Programs>>,
) -> Result<OutsideReport, OutsideError> {
    let programs = programs.ok_or(OutsideError::NoPrograms)?;
    let OutsideQuery { source, destination, protocol } = query;
    let probe = Probe { source, destination, protocol };
    let went = tokio::task::spawn_blocking(move || enter(&NetNs::current(), &programs, &probe));
    let entered = match went.await.map_err(|_| OutsideError::GivenUp)?? {
        Went::ToPod => Entered::ToPod,
        Went::ToNode => Entered::ToNode,
        Went::ToStack => Entered::ToStack,
        Went::Ended => Entered::Ended,
    };
    let asked = |s: &&Arc<mesh_model::snapshot::EdgeService>| {
        SocketAddr::new(s.vip, s.port) == destination && s.protocol == protocol
    };
    let service = snapshot.edge.services.iter().find(asked);
    let backends = service.iter().flat_map(|s| &s.backends);
    Ok(OutsideReport {
        node: snapshot.node.name.clone(),
        service: service.map(|service| service.service.clone()),
        backends: backends.map(|b| SocketAddr::new(b.address, b.port)).collect(),
        entered,
    })
}
