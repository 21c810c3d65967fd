//! The controllers: each turns what was asked for into what is, object by object.
//!
//! Owns: the tasks that follow the registry and write back to it. A controller is a pure plan (objects in, named
//! steps out) and a thin driver. Nothing acts before every mirror is full, and each failed step is tried again.
//! Never does: HTTP, and anything on a node.

use std::sync::Arc;
use std::time::Duration;

use mesh_model::ClusterConfig;
use tokio::task::JoinSet;

use crate::error::ApiError;
use crate::registry::Registry;
use crate::scheduler;

mod accounts;
mod availability;
mod backoff;
mod capacity;
mod claims;
mod cronjob;
mod daemonset;
mod deployment;
pub(crate) mod disruption;
mod endpoints;
mod garbage;
mod history;
mod ingress;
mod job;
mod kinds;
mod loadbalancer;
mod mirror;
mod namespaces;
mod nodes;
mod owned;
mod ownership;
mod queue;
mod recorder;
mod replicaset;
mod runtime;
mod statefulset;

pub(crate) use queue::WorkQueue;
pub(crate) use recorder::Recorder;
pub(crate) use runtime::{Context, key};

/// How long the controllers wait for what, and what they give to others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// A node that gives no sign of life for so long is lost.
    pub node_grace: Duration,
    /// A pod that says nothing about it stays so long on a node that is lost or not ready.
    pub eviction_patience: Duration,
    /// Events are kept so long.
    pub event_ttl: Duration,
    /// Every object is looked at again after so long, whether or not it changed.
    pub resync: Duration,
    /// The certificate by which pods know the API, PEM.
    pub ca_pem: Arc<str>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            node_grace: Duration::from_secs(40),
            eviction_patience: Duration::from_secs(30),
            event_ttl: Duration::from_secs(3600),
            resync: Duration::from_secs(300),
            ca_pem: Arc::default(),
        }
    }
}

/// The running controllers and the scheduler. They stop when it is dropped.
#[must_use = "the controllers stop when the handle is dropped"]
#[derive(Debug)]
pub struct Handle(JoinSet<()>);

impl Handle {
    /// Stops everything and waits until it stopped.
    pub async fn stop(mut self) {
        self.0.shutdown().await;
    }
}

/// Starts the scheduler and all controllers, inside a tokio runtime.
pub fn start_with(registry: Registry, cluster: ClusterConfig, options: Options) -> Handle {
    let mut root = JoinSet::new();
    root.spawn(async move {
        loop {
            let mut tasks = JoinSet::new();
            match launch(&mut tasks, registry.clone(), cluster.clone(), &options) {
                // None of them ever ends by itself.
                Ok(()) => {
                    if let Some(Err(error)) = tasks.join_next().await {
                        tracing::error!(%error, "a controller task died; starting all again");
                    }
                }
                Err(error) => tracing::error!(%error, "controllers cannot start; will retry"),
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
    Handle(root)
}

fn launch(
    tasks: &mut JoinSet<()>,
    registry: Registry,
    cluster: ClusterConfig,
    options: &Options,
) -> Result<(), ApiError> {
    let (recorder, writer) = Recorder::new(registry.clone());
    let context = Context::new(registry.clone(), cluster, options.clone(), recorder);
    context.mirror(tasks)?;
    let context = std::sync::Arc::new(context);
    let resync = options.resync;
    let (garbage, queue) = garbage::Controller::new(&context, tasks)?;
    runtime::run(tasks, garbage, queue, resync);
    let (nodes, queue) = nodes::Controller::new(context.clone());
    runtime::run(tasks, nodes, queue, resync);
    let (deployments, queue) = deployment::Controller::new(context.clone());
    runtime::run(tasks, deployments, queue, resync);
    let (sets, queue) = replicaset::Controller::new(context.clone());
    runtime::run(tasks, sets, queue, resync);
    let (daemons, queue) = daemonset::Controller::new(context.clone());
    runtime::run(tasks, daemons, queue, resync);
    let (stateful, queue) = statefulset::Controller::new(context.clone());
    runtime::run(tasks, stateful, queue, resync);
    let (cron_jobs, queue) = cronjob::Controller::new(context.clone());
    runtime::run(tasks, cron_jobs, queue, resync);
    let (jobs, queue) = job::Controller::new(context.clone());
    runtime::run(tasks, jobs, queue, resync);
    let (endpoints, queue) = endpoints::Controller::new(context.clone());
    runtime::run(tasks, endpoints, queue, resync);
    let (handwritten, queue) = endpoints::handwritten::Controller::new(context.clone());
    runtime::run(tasks, handwritten, queue, resync);
    let (ingresses, queue) = ingress::Controller::new(context.clone());
    runtime::run(tasks, ingresses, queue, resync);
    let (balancers, queue) = loadbalancer::Controller::new(context.clone());
    runtime::run(tasks, balancers, queue, resync);
    let (capacity, queue) = capacity::Controller::new(context.clone());
    runtime::run(tasks, capacity, queue, resync);
    let (budgets, queue) = disruption::Controller::new(context.clone());
    runtime::run(tasks, budgets, queue, resync);
    let (accounts, queue) = accounts::Controller::new(context.clone(), tasks);
    runtime::run(tasks, accounts, queue, resync);
    let (namespaces, queue) = namespaces::Controller::new(context.clone());
    runtime::run(tasks, namespaces, queue, resync);
    scheduler::start(context, tasks);
    tasks.spawn(writer);
    tasks.spawn(recorder::expire(registry, options.event_ttl));
    tracing::info!("controllers started");
    Ok(())
}
