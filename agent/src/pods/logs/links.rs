//! `/var/log/containers`: a link to the log of each container, under a name that tells pod, namespace, container and identifier.
//! Collectors of logs look there.
//!
//! A link may go when the log that it leads to is gone, and only then: whoever made it, it is of no use to anybody.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use mesh_cri::v1::{Container, ContainerState};

use super::rotate::log_of;
use crate::pods::layout::Layout;
use crate::pods::observed::{LABEL_CONTAINER, PodRef};

const ENDING: &str = ".log";
/// What a file system takes.
const NAME_BYTES: usize = 255;
/// Links are compared with the logs when containers come or go, and in every so many rounds.
const ROUNDS: u32 = 15;

/// Logs by the name of their link.
pub(crate) type Links = BTreeMap<String, PathBuf>;

/// When to look at the links.
#[derive(Debug, Default)]
pub(super) struct Pace {
    before: Links,
    rounds: u32,
}

impl Pace {
    /// Whether it is time.
    pub(super) fn is_due(&mut self, wanted: &Links) -> bool {
        if self.rounds > 0 && self.before == *wanted {
            self.rounds -= 1;
            return false;
        }
        self.rounds = ROUNDS - 1;
        self.before.clone_from(wanted);
        true
    }
}

/// The links of these containers. One that never ran has no log.
pub(super) fn wanted(containers: &[Container], layout: &Layout) -> Links {
    let ran = containers.iter().filter(|c| c.state() != ContainerState::Created);
    ran.filter_map(|container| {
        let pod = PodRef::from_labels(&container.labels)?;
        let name = container.labels.get(LABEL_CONTAINER)?;
        let (directory, attempt) = log_of(container, layout)?;
        let mut link = format!("{}_{}_{name}-{}", pod.name, pod.namespace, container.id);
        link.truncate(link.floor_char_boundary(NAME_BYTES - ENDING.len()));
        Some((link + ENDING, directory.join(format!("{attempt}.log"))))
    })
    .collect()
}

/// Makes the links that are wanted and deletes those to logs, below that directory, that are gone. Blocks.
pub(crate) fn reconcile(directory: &Path, logs: &Path, wanted: &Links) -> io::Result<()> {
    if !wanted.is_empty() {
        std::fs::create_dir_all(directory)?;
    }
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let link = entry?.path();
        let target = std::fs::read_link(&link);
        if target.is_ok_and(|log| log.starts_with(logs) && !log.exists()) {
            std::fs::remove_file(&link)?;
        }
    }
    for (name, log) in wanted.iter().filter(|(_, log)| log.exists()) {
        match symlink(log, directory.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_come_and_go_with_their_logs() {
        let dir = tempfile::tempdir().unwrap();
        let (links, logs) = (dir.path().join("containers"), dir.path().join("pods"));
        let names = || {
            let entries = std::fs::read_dir(&links).unwrap().flatten();
            let mut names: Vec<String> =
                entries.map(|e| e.file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        reconcile(&links, &logs, &Links::new()).unwrap();
        assert!(!links.exists(), "nothing is made for nobody");
        std::fs::create_dir(&logs).unwrap();
        let all: Links = ["a", "b"].map(|name| (format!("{name}.log"), logs.join(name))).into();
        std::fs::write(logs.join("a"), "said").unwrap();
        reconcile(&links, &logs, &all).unwrap();
        reconcile(&links, &logs, &all).unwrap();
        assert_eq!(names(), ["a.log"], "there is no log of the other");
        assert_eq!(std::fs::read_to_string(links.join("a.log")).unwrap(), "said");
        // Others may write there, too.
        std::fs::write(links.join("file.log"), "").unwrap();
        symlink("/nowhere", links.join("theirs.log")).unwrap();
        std::fs::rename(logs.join("a"), logs.join("b")).unwrap();
        reconcile(&links, &logs, &all).unwrap();
        assert_eq!(names(), ["b.log", "file.log", "theirs.log"]);
        reconcile(&links, &logs, &Links::new()).unwrap();
        assert_eq!(names(), ["b.log", "file.log", "theirs.log"], "its log is still there");
    }

    #[test]
    fn links_are_looked_at_when_something_changed_and_now_and_then() {
        let mut pace = Pace::default();
        let some: Links = [("a.log".to_owned(), PathBuf::from("/a"))].into();
        assert!(pace.is_due(&Links::new()) && pace.is_due(&some));
        let due = (0..2 * ROUNDS).filter(|_| pace.is_due(&some)).count();
        assert_eq!(due, 2);
    }

    #[test]
    fn names_are_those_that_collectors_read() {
        let container = |pod: &str, state: ContainerState| Container {
            id: "0123".to_owned(),
            labels: [
                ("io.kubernetes.pod.name", pod),
                ("io.kubernetes.pod.namespace", "shop"),
                ("io.kubernetes.pod.uid", "u"),
                (LABEL_CONTAINER, "c"),
            ]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
            state: state.into(),
            ..Container::default()
        };
        let layout = Layout::at(Path::new("/s"), Path::new("/r"), Path::new("/var/log/pods"));
        let of = |pod: &str, state| wanted(&[container(pod, state)], &layout);
        let log = PathBuf::from("/var/log/pods/shop_web_u/c/0.log");
        let expected = Links::from([("web_shop_c-0123.log".to_owned(), log)]);
        assert_eq!(of("web", ContainerState::Running), expected);
        assert_eq!(of("web", ContainerState::Created), Links::new());
        let long = of(&"x".repeat(253), ContainerState::Exited);
        assert!(long.keys().all(|name| name.len() == 255 && name.ends_with(".log")), "{long:?}");
    }
}
