//! Reads what the runtime has of a pod.

use std::io::Read as _;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, PodSpec};
use mesh_cri::{CallError, Client};

use super::layout::Layout;
use super::logs;
use super::observed::{self, Exit, Instance, Observed, PodRef, Sandbox, State};
use super::oom::{OOM_KILLED, Oom};
use super::ops::{Context, find_container};

/// Last words of a container that are kept.
const MAX_MESSAGE: u64 = 4096;
/// The same, when they are taken from its log.
const LOG_MESSAGE: usize = 2048;

/// The pod's sandboxes and containers. What `before` has of something that did not change is taken from there, so
/// that a look at an unchanged pod costs two calls.
pub(crate) async fn observe(
    context: &Context,
    pod: &PodRef,
    before: &Observed,
    spec: Option<&PodSpec>,
) -> Result<Observed, CallError> {
    let client = &context.client;
    let listed = client.list_sandboxes(pod.labels()).await?;
    let mut sandboxes = Vec::with_capacity(listed.len());
    for entry in &listed {
        let known = before.sandboxes.iter().find(|s| s.id == entry.id && !s.ips.is_empty());
        let ips = match known {
            Some(known) => known.ips.clone(),
            None => match addresses(client, &entry.id).await {
                Ok(ips) => ips,
                // Deleted since it was listed.
                Err(error) if error.is_not_found() => continue,
                Err(error) => return Err(error),
            },
        };
        sandboxes.push(observed::sandbox(entry, ips));
    }
    let listed = client.list_containers(pod.labels()).await?;
    let mut instances = Vec::with_capacity(listed.len());
    for entry in &listed {
        if let Some(known) = unchanged(before, entry) {
            instances.push(known.clone());
            continue;
        }
        let status = match client.container_status(&entry.id).await {
            Ok(status) => status,
            Err(error) if error.is_not_found() => continue,
            Err(error) => return Err(error),
        };
        let mut instance = observed::instance(entry, &status);
        if instance.is_running() {
            context.oom.adopt(&instance.id);
        }
        cause_of_end(&mut instance, pod, &context.oom).await;
        let wanted = spec.and_then(|s| find_container(s, &instance.name));
        let policy = wanted.as_deref().and_then(|c| c.termination_message_policy.as_deref());
        last_words(&mut instance, pod, &context.layout, policy == Some("FallbackToLogsOnError"));
        if let Some(limit) = wanted.as_deref().and_then(memory_limit) {
            name_the_limit(&mut instance, limit);
        }
        instances.push(instance);
    }
    let observed = Observed::new(sandboxes, instances);
    for gone in before.instances.iter().filter(|run| !observed.has(&run.id)) {
        context.oom.forget(&pod.uid, gone);
        // The message is in the status of the run; a container that crashes for weeks must not leave a file each time.
        let _ =
            std::fs::remove_file(context.layout.termination(&pod.uid, &gone.name, gone.attempt));
    }
    Ok(observed)
}

/// The runtime may not know why a container failed.
async fn cause_of_end(instance: &mut Instance, pod: &PodRef, oom: &Oom) {
    let unexplained = |exit: &Exit| exit.code != 0 && exit.reason != OOM_KILLED;
    if instance.exit().is_some_and(unexplained)
        && oom.has_killed(&pod.uid, instance).await
        && let State::Exited(exit) = &mut instance.state
    {
        exit.reason = OOM_KILLED.to_owned();
    }
}

fn unchanged<'a>(before: &'a Observed, entry: &mesh_cri::v1::Container) -> Option<&'a Instance> {
    use mesh_cri::v1::ContainerState;
    let known = before.instances.iter().find(|i| i.id == entry.id)?;
    let same = matches!(
        (&known.state, entry.state()),
        (State::Running { .. }, ContainerState::Running)
            | (State::Exited(_), ContainerState::Exited)
    );
    same.then_some(known)
}

async fn addresses(client: &Client, sandbox: &str) -> Result<Vec<IpAddr>, CallError> {
    let network = client.sandbox_status(sandbox).await?.network.unwrap_or_default();
    let more = network.additional_ips.iter().map(|ip| ip.ip.as_str());
    Ok(std::iter::once(network.ip.as_str()).chain(more).filter_map(|ip| ip.parse().ok()).collect())
}

fn memory_limit(container: &Container) -> Option<&str> {
    let limits = container.resources.as_ref()?.limits.as_ref()?;
    limits.get("memory").map(|limit| limit.0.as_str())
}

/// A container that is killed has no last words of its own.
fn name_the_limit(instance: &mut Instance, limit: &str) {
    if let State::Exited(exit) = &mut instance.state
        && exit.reason == OOM_KILLED
        && exit.message.is_empty()
    {
        exit.message = format!("killed at its memory limit of {limit}");
    }
}

/// What the container wrote to its termination log is the message of its end; of one that failed without a word it
/// may be the end of its log.
fn last_words(instance: &mut Instance, pod: &PodRef, layout: &Layout, or_log: bool) {
    let State::Exited(exit) = &mut instance.state else { return };
    let path = layout.termination(&pod.uid, &instance.name, instance.attempt);
    let mut text = Vec::new();
    if let Ok(file) = std::fs::File::open(path) {
        // What cannot be read is not said.
        let _ = file.take(MAX_MESSAGE).read_to_end(&mut text);
    }
    if text.is_empty() && or_log && exit.code != 0 {
        let log = layout.logs(pod).join(&instance.name).join(format!("{}.log", instance.attempt));
        text = logs::last_text(&log, LOG_MESSAGE).unwrap_or_default();
    }
    if !text.is_empty() {
        exit.message = String::from_utf8_lossy(&text).into_owned();
    }
}

/// All pods that the runtime has something of, and what tells that one of them changed.
pub(crate) async fn survey(
    client: &Client,
) -> Result<std::collections::BTreeMap<PodRef, Vec<(String, i32)>>, CallError> {
    let sandboxes = client.list_sandboxes(observed::owned()).await?;
    let containers = client.list_containers(observed::owned()).await?;
    Ok(observed::fingerprints(&sandboxes, &containers))
}

/// The pod's addresses: those of its sandbox, or the node's own.
pub(crate) fn pod_ips(
    sandbox: Option<&Sandbox>,
    host_network: bool,
    host: &[IpAddr],
) -> Vec<IpAddr> {
    match sandbox {
        None => Vec::new(),
        Some(_) if host_network => host.to_vec(),
        Some(sandbox) => sandbox.ips.clone(),
    }
}
