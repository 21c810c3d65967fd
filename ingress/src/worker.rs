//! The proxy as a worker process of the agent.

use std::io;
use std::sync::Arc;

use mesh_model::snapshot::L7Config;
use mesh_worker::descriptors::InheritError;
use mesh_worker::server::ServeError;
use mesh_worker::{Control, Descriptors, Handler, privileges};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

use crate::listen::{BindError, Listeners};
use crate::options::{Limits, WorkerOptions};
use crate::proxy::{Proxy, StartError};
use crate::status::Status;

/// The worker ended other than by a signal.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The agent left something else than it said.
    #[error(transparent)]
    Inherit(#[from] InheritError),
    /// An address is taken or not ours.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Privileges could not be given up.
    #[error("drop privileges")]
    Privileges(#[source] io::Error),
    /// The proxy did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The control socket cannot be served.
    #[error(transparent)]
    Control(#[from] ServeError),
    /// Signals cannot be waited for.
    #[error("wait for signals")]
    Signal(#[source] io::Error),
}

struct Worker(Proxy);

impl Handler for Worker {
    type Config = L7Config;
    type Status = Status;

    async fn apply(&self, config: L7Config) -> Result<(), String> {
        self.0.apply(&config);
        Ok(())
    }

    async fn status(&self) -> Status {
        self.0.status()
    }
}

/// Descriptors that are not connections: sockets, files, runtimes.
const OTHER_DESCRIPTORS: u64 = 256;

/// Takes as many descriptors as the system allows; returns how many that are.
fn raise_descriptor_limit() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    }
}

/// Each client may need a second descriptor for its backend.
fn fit_connections(limits: &mut Limits, descriptors: u64) {
    let fit = descriptors.saturating_sub(OTHER_DESCRIPTORS).max(64) / 2;
    let fit = usize::try_from(fit).unwrap_or(usize::MAX);
    if fit < limits.connections {
        tracing::warn!(
            descriptors,
            connections = fit,
            "fewer connections than asked for: raise the limit of open files"
        );
        limits.connections = fit;
    }
}

/// Runs the worker until SIGTERM or SIGINT, then lets requests end for the drain time.
///
/// Takes over its sockets or binds them, then gives up all privileges of the calling thread and of the threads that
/// serve, which it makes afterwards. Call it on a current-thread runtime: threads that exist already keep what they
/// have.
pub async fn run(options: WorkerOptions) -> Result<(), RunError> {
    let WorkerOptions { control_socket, state_file, http, https, mut proxy } = options;
    let (mut inherited, mut kept) = (Descriptors::inherited()?, Descriptors::default());
    let listeners = Listeners::take(&http, &https, proxy.threads, &mut inherited, &mut kept)?;
    // Sockets of addresses that are served no longer.
    drop(inherited);
    let sockets = 2 * kept.iter().count() as u64;
    fit_connections(&mut proxy.limits, raise_descriptor_limit().saturating_sub(sockets));
    privileges::drop_all_but(&[]).map_err(RunError::Privileges)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signal)?;
    let worker = Arc::new(Worker(Proxy::start(listeners, proxy)?));
    let control = Control::new(control_socket, state_file, kept);
    control.restore(&*worker).await;
    let (http, https) = (worker.0.http(), worker.0.https());
    tracing::info!(?http, ?https, "proxy started");
    let mut serving = std::pin::pin!(control.serve(Arc::clone(&worker)));
    tokio::select! {
        ended = &mut serving => ended?,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("proxy drains");
    control.release();
    // The control socket stays open meanwhile: the agent may ask how far it is.
    tokio::select! {
        _ = &mut serving => {}
        () = worker.0.drain() => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_fit_the_descriptors() {
        let mut limits = Limits::default();
        fit_connections(&mut limits, 1 << 20);
        assert_eq!(limits.connections, Limits::default().connections);
        fit_connections(&mut limits, 1024);
        assert_eq!(limits.connections, 384);
        fit_connections(&mut limits, 10);
        assert_eq!(limits.connections, 32);
    }
}
