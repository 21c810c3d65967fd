//! The proxy as a worker process of the agent.

use std::io;
use std::sync::Arc;

use mesh_model::snapshot::L7Config;
use mesh_worker::server::ServeError;
use mesh_worker::{Handler, privileges};
use tokio::signal::unix::{SignalKind, signal};

use crate::listen::{BindError, Listeners};
use crate::options::WorkerOptions;
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

/// Runs the worker until SIGTERM or SIGINT, then lets requests end for the drain time.
///
/// Binds first, then gives up all privileges of the calling thread and of the threads that serve, which it makes
/// afterwards. Call it on a current-thread runtime: threads that exist already keep what they have.
pub async fn run(options: WorkerOptions) -> Result<(), RunError> {
    let listeners = Listeners::bind(&options.http, &options.https, options.proxy.threads)?;
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
