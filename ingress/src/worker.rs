//! The proxy as a worker process of the agent.

use std::io;
use std::sync::Arc;

use mesh_model::snapshot::L7Config;
use mesh_worker::server::ServeError;
use mesh_worker::{Handler, privileges};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

use crate::listen::{BindError, Listeners};
use crate::options::{Limits, WorkerOptions};
use crate::proxy::{Proxy, StartError};
use crate::status::Status;

/// The worker ended other than by a signal.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
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
/// Binds first, then gives up all privileges of the calling thread and of the threads that serve, which it makes
/// afterwards. Call it on a current-thread runtime: threads that exist already keep what they have.
pub async fn run(options: WorkerOptions) -> Result<(), RunError> {
    let mut options = options;
    let listeners = Listeners::bind(&options.http, &options.https, options.proxy.threads)?;
    fit_connections(&mut options.proxy.limits, raise_descriptor_limit());
    privileges::drop_all_but(&[]).map_err(RunError::Privileges)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signal)?;
    let worker = Arc::new(Worker(Proxy::start(listeners, options.proxy)?));
    mesh_worker::restore(&options.state_file, &*worker).await;
    let (http, https) = (worker.0.http(), worker.0.https());
    tracing::info!(?http, ?https, "proxy started");
    let control =
        mesh_worker::serve(&options.control_socket, &options.state_file, Arc::clone(&worker));
    let mut control = std::pin::pin!(control);
    tokio::select! {
        ended = &mut control => ended?,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("proxy drains");
    // The control socket stays open meanwhile: the agent may ask how far it is.
    tokio::select! {
        _ = &mut control => {}
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
