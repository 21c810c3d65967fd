//! Reads what the runtime has of a pod.

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
/// Of all containers of a pod together (Kubernetes, "Determine the Reason for Pod Failure"); each has an equal share.
const POD_MESSAGES: u64 = 12 << 10;

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
        let or_log = policy == Some("FallbackToLogsOnError");
        last_words(&mut instance, pod, &context.layout, or_log, longest_message(spec));
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

/// How long the last words of each of the pod's containers may be.
fn longest_message(spec: Option<&PodSpec>) -> u64 {
    let containers = spec.map_or(1, |spec| {
        let init = spec.init_containers.iter().flatten().count();
        spec.containers.len() + init + spec.ephemeral_containers.iter().flatten().count()
    });
    (POD_MESSAGES / containers.max(1) as u64).min(MAX_MESSAGE)
}

/// What the container wrote to its termination log is the message of its end; of one that failed without a word it
/// may be the end of its log.
fn last_words(instance: &mut Instance, pod: &PodRef, layout: &Layout, or_log: bool, longest: u64) {
    let State::Exited(exit) = &mut instance.state else { return };
    let path = layout.termination(&pod.uid, &instance.name, instance.attempt);
    // What cannot be read is not said. Of a long message the end counts: there programs say what went wrong.
    let mut text = logs::last_bytes(&path, longest).unwrap_or_default();
    if text.is_empty() && or_log && exit.code != 0 {
        let log = layout.logs(pod).join(&instance.name).join(format!("{}.log", instance.attempt));
        text = logs::last_text(&log, LOG_MESSAGE.min(longest as usize)).unwrap_or_default();
    }
    if !text.is_empty() {
        exit.message = String::from_utf8_lossy(&text).into_owned();
    }
    // A byte that is no UTF-8 became three, and the runtime has words of its own.
    let surplus = exit.message.len().saturating_sub(longest as usize);
    exit.message.drain(..exit.message.ceil_char_boundary(surplus));
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use jiff::Timestamp;

    use super::*;

    #[test]
    fn of_long_last_words_the_end_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let layout = Layout::at(&at("state"), &at("run"), &at("log"));
        let pod =
            PodRef { namespace: "shop".to_owned(), name: "web".to_owned(), uid: "u".to_owned() };
        let message = |file: &Path, said: &[u8], code: i32| {
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, said).unwrap();
            let now = Timestamp::UNIX_EPOCH;
            let mut run = Instance {
                id: "0123".to_owned(),
                sandbox: "s".to_owned(),
                name: "c".to_owned(),
                attempt: 2,
                created_at: now,
                state: State::Exited(Exit {
                    started_at: now,
                    finished_at: now,
                    code,
                    reason: "Error".to_owned(),
                    message: "the runtime's".to_owned(),
                }),
                image_id: String::new(),
                hash: String::new(),
                delay_secs: 0,
            };
            last_words(&mut run, &pod, &layout, true, longest_message(None));
            run.exit().map(|exit| exit.message.clone()).unwrap()
        };
        let file = layout.termination("u", "c", 2);
        let trace = format!("Traceback:\n{}ValueError: no such table", "  at x\n".repeat(1000));
        let kept = message(&file, trace.as_bytes(), 1);
        assert!(kept.ends_with("ValueError: no such table"), "{}", &kept[..80]);
        assert_eq!(kept.len(), 4096);
        assert_eq!(message(&file, b"no table", 1), "no table");
        let noise = message(&file, &[0xff; 4096], 1);
        assert!((4090..=4096).contains(&noise.len()), "as it is told: {}", noise.len());
        // Without a word, a failed container's log speaks for it.
        message(&file, b"", 1);
        let log = layout.logs(&pod).join("c/2.log");
        assert_eq!(
            message(&log, b"2026-01-01T00:00:00Z stderr F no such table\n", 1),
            "no such table\n"
        );
        assert_eq!(message(&file, b"", 0), "the runtime's");
    }

    #[test]
    fn many_containers_share_what_a_pod_may_say() {
        let longest = |containers: usize, init: usize| {
            let named = |n: usize| Container { name: format!("c{n}"), ..Container::default() };
            let spec = PodSpec {
                containers: (0..containers).map(named).collect(),
                init_containers: Some((0..init).map(named).collect()),
                ..PodSpec::default()
            };
            longest_message(Some(&spec))
        };
        let all = [longest(1, 0), longest(2, 1), longest(2, 2), longest(10, 2)];
        assert_eq!(all, [4096, 4096, 3072, 1024]);
    }
}
