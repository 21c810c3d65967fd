//! Keeps container logs from filling the disk, with the kubelet's limits.
//!
//! A log that has grown is put aside as `0.log.TIME`, and the runtime is told to begin a new one. There is no state
//! but the files: after a crash between the two steps the log is missing, and the runtime is told again.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use mesh_cri::v1::{Container, ContainerState};

use super::links::{self, Links, Pace};
use crate::pods::layout::Layout;
use crate::pods::observed::{self, LABEL_CONTAINER, PodRef};
use crate::pods::ops::Context;

/// How often logs are looked at.
const PERIOD: Duration = Duration::from_secs(2);
/// Files of one run, the one that is written included.
const FILES: usize = 5;

/// Looks after the logs of this node's containers until it is cancelled.
pub(crate) async fn run(context: Arc<Context>) {
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut pace = Pace::default();
    loop {
        ticks.tick().await;
        // A runtime that does not answer is reported by those who need it more.
        let Ok(containers) = context.client.list_containers(observed::owned()).await else {
            continue;
        };
        for (log, id) in grown(&containers, &context).await {
            if let Err(error) = rotate(&context, &log, &id).await {
                let path = log.display();
                tracing::warn!(%path, %error, "log not rotated, will retry");
            }
        }
        let wanted = links::wanted(&containers, &context.layout);
        if pace.is_due(&wanted) {
            link(&context.layout, wanted).await;
        }
    }
}

async fn link(layout: &Layout, wanted: Links) {
    let (directory, logs) = (layout.log_links(), layout.log_root().to_owned());
    let linked = tokio::task::spawn_blocking(move || links::reconcile(&directory, &logs, &wanted));
    if let Ok(Err(error)) = linked.await {
        let path = layout.log_links();
        tracing::warn!(path = %path.display(), %error, "logs not linked, will retry");
    }
}

/// Logs of running containers that are too long or missing, with their containers; deletes those of runs that the runtime
/// no longer has.
async fn grown(containers: &[Container], context: &Context) -> Vec<(PathBuf, String)> {
    let mut running = Vec::new();
    // The oldest run that is still there, of each container's directory.
    let mut oldest: BTreeMap<PathBuf, u32> = BTreeMap::new();
    for container in containers {
        let Some((directory, attempt)) = log_of(container, &context.layout) else { continue };
        if container.state() == ContainerState::Running {
            running.push((directory.join(format!("{attempt}.log")), container.id.clone()));
        }
        let entry = oldest.entry(directory).or_insert(attempt);
        *entry = attempt.min(*entry);
    }
    let limit = context.options.log_max_bytes;
    let looked = tokio::task::spawn_blocking(move || {
        for (directory, attempt) in oldest {
            delete(&directory, |name| attempt_of(name).is_some_and(|of| of < attempt));
        }
        running.retain(|(log, _)| match std::fs::metadata(log) {
            Ok(log) => log.len() > limit,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        });
        running
    });
    looked.await.unwrap_or_default()
}

/// Directory and attempt of a container's log.
pub(super) fn log_of(container: &Container, layout: &Layout) -> Option<(PathBuf, u32)> {
    let pod = PodRef::from_labels(&container.labels)?;
    let directory = layout.logs(&pod).join(container.labels.get(LABEL_CONTAINER)?);
    Some((directory, observed::attempt(container)))
}

async fn rotate(context: &Context, log: &Path, id: &str) -> io::Result<()> {
    let aside =
        PathBuf::from(format!("{}.{}", log.display(), Timestamp::now().strftime("%Y%m%d-%H%M%S")));
    match tokio::fs::try_exists(&aside).await {
        // Twice in one second: the next time is soon enough.
        Ok(true) => return Ok(()),
        Ok(false) => {}
        Err(error) => return Err(error),
    }
    match tokio::fs::rename(log, &aside).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if let Err(error) = context.client.reopen_log(id).await {
        // The runtime writes on into the old file, which so keeps its name. Nothing is there when it has begun a new one.
        let _ = rename_back(&aside, log).await;
        return Err(io::Error::other(error));
    }
    let log = log.to_owned();
    let done = tokio::task::spawn_blocking(move || delete_surplus(&log)).await;
    done.map_err(io::Error::other)
}

async fn rename_back(aside: &Path, log: &Path) -> io::Result<()> {
    if tokio::fs::try_exists(log).await? { Ok(()) } else { tokio::fs::rename(aside, log).await }
}

fn delete_surplus(log: &Path) {
    let Some(directory) = log.parent() else { return };
    let mut aside = put_aside(log);
    aside.truncate(aside.len().saturating_sub(FILES - 1));
    delete(directory, |name| aside.iter().any(|surplus| surplus.ends_with(name)));
}

/// What was put aside of a log, the oldest first. Blocks.
pub(super) fn put_aside(log: &Path) -> Vec<PathBuf> {
    let (Some(directory), Some(name)) = (log.parent(), log.file_name()) else { return Vec::new() };
    let prefix = format!("{}.", name.to_string_lossy());
    let aside = names(directory).filter(|name| name.starts_with(&prefix));
    let mut aside: Vec<PathBuf> = aside.map(|name| directory.join(name)).collect();
    aside.sort();
    aside
}

fn delete(directory: &Path, which: impl Fn(&str) -> bool) {
    for name in names(directory).filter(|name| which(name)) {
        if let Err(error) = std::fs::remove_file(directory.join(&name)) {
            let directory = directory.display();
            tracing::warn!(%directory, name, %error, "old log not deleted, will retry");
        }
    }
}

fn names(directory: &Path) -> impl Iterator<Item = String> + use<> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

/// The run that a file belongs to: `3.log` and `3.log.20260101-000000`.
fn attempt_of(name: &str) -> Option<u32> {
    let (attempt, rest) = name.split_once('.')?;
    (rest == "log" || rest.starts_with("log.")).then(|| attempt.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_belong_to_runs() {
        assert_eq!(attempt_of("3.log"), Some(3));
        assert_eq!(attempt_of("12.log.20260101-000000"), Some(12));
        for other in ["log", "x.log", "3.logs", "3.txt", "notes", ".log"] {
            assert_eq!(attempt_of(other), None, "{other}");
        }
    }

    #[test]
    fn the_newest_files_stay() {
        let directory = tempfile::tempdir().unwrap();
        let all =
            ["0.log", "0.log.1", "0.log.2", "0.log.3", "0.log.4", "0.log.5", "0.log.6", "10.log"];
        for name in all {
            std::fs::write(directory.path().join(name), "").unwrap();
        }
        delete_surplus(&directory.path().join("0.log"));
        let mut left: Vec<String> = names(directory.path()).collect();
        left.sort();
        assert_eq!(left, ["0.log", "0.log.3", "0.log.4", "0.log.5", "0.log.6", "10.log"]);
        delete(directory.path(), |name| attempt_of(name).is_some_and(|of| of < 10));
        assert_eq!(names(directory.path()).collect::<Vec<_>>(), ["10.log"]);
    }
}
