//! Listening to a control group of version 1 (Linux, cgroup-v1/memory.rst, sections 9 and 10).
//!
//! A listener is told twice: when the group runs out of memory, and when the group is deleted. The messages look the
//! same, and after the group is gone nothing else can be asked. So they are counted: one is the deletion, two or more
//! mean that memory ran out. To know when the deletion has been told, there is a second listener for something that
//! never happens.

use std::fs::File;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Usage that no group reaches.
const NEVER: &str = "4611686018427387904";
/// The kernel tells of a deletion some milliseconds after it.
const LIMIT_MILLIS: u16 = 5_000;

/// Counts how often a group ran out of memory.
pub(super) struct Listener {
    group: PathBuf,
    memory: EventFd,
    messages: AtomicU64,
    deletion: EventFd,
}

impl Listener {
    pub(super) fn new(group: &Path) -> std::io::Result<Self> {
        // The kernel tells the newest listener first, so `deletion` hears of the end when `memory` has.
        let deletion = register(group, "memory.usage_in_bytes", NEVER)?;
        let memory = register(group, "memory.oom_control", "")?;
        Ok(Self { group: group.to_owned(), memory, messages: AtomicU64::new(0), deletion })
    }

    /// Whether memory ran out. Waits until that is certain, some milliseconds after the group is gone. May be asked again.
    pub(super) fn heard(&self) -> bool {
        let messages = self.messages();
        if self.group.exists() {
            return messages > 0;
        }
        let mut end = [PollFd::new(self.deletion.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut end, PollTimeout::from(LIMIT_MILLIS)), Ok(1)) {
            tracing::warn!(group = %self.group.display(), "the kernel did not tell of a deletion");
        }
        self.messages() > 1
    }

    /// All messages so far.
    fn messages(&self) -> u64 {
        let new = self.memory.read().unwrap_or(0);
        self.messages.fetch_add(new, Ordering::Relaxed) + new
    }
}

fn register(group: &Path, file: &str, argument: &str) -> std::io::Result<EventFd> {
    let events = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
    let file = File::open(group.join(file))?;
    let line = format!("{} {} {argument}", events.as_raw_fd(), file.as_raw_fd());
    std::fs::write(group.join("cgroup.event_control"), line)?;
    Ok(events)
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::{Duration, Instant};

    use super::super::{Hierarchy, memory_hierarchy};
    use super::*;

    /// A group of this test's own.
    struct Group(PathBuf);

    impl Group {
        fn new(root: &Path, name: &str) -> std::io::Result<Self> {
            let group = Self(root.join(format!("mesh-oom-{}-{name}", std::process::id())));
            std::fs::create_dir(&group.0)?;
            std::fs::write(group.0.join("memory.limit_in_bytes"), "24M")?;
            Ok(group)
        }

        /// Runs a program in the group that takes so much memory; whether it came through.
        fn take(&self, bytes: &str) -> bool {
            let script = format!(
                "echo $$ > {}/cgroup.procs && exec dd if=/dev/zero of=/dev/null count=1 bs={bytes}",
                self.0.display()
            );
            Command::new("sh").args(["-c", &script]).output().unwrap().status.success()
        }

        /// A group whose last process has just ended stays busy for a moment.
        fn remove(&self) {
            let begun = Instant::now();
            while self.0.exists() && std::fs::remove_dir(&self.0).is_err() {
                assert!(begun.elapsed() < Duration::from_secs(10), "{} stays", self.0.display());
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }

    impl Drop for Group {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir(&self.0);
        }
    }

    #[test]
    fn a_kill_is_known_before_and_after_the_group_is_gone() {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let Some(Hierarchy::V1(root)) = memory_hierarchy(&mounts) else {
            println!("skipped: memory is not accounted in cgroup v1 here");
            return;
        };
        for (name, bytes, killed) in [("eater", "200M", true), ("modest", "1M", false)] {
            let group = match Group::new(&root, name) {
                Ok(group) => group,
                Err(error) => {
                    assert!(std::env::var_os("CI").is_none(), "no control group made: {error}");
                    println!("skipped: no control group made: {error}");
                    return;
                }
            };
            let early = Listener::new(&group.0).unwrap();
            let late = Listener::new(&group.0).unwrap();
            assert_eq!(group.take(bytes), !killed);
            assert_eq!(early.heard(), killed, "{name}, while the group is there");
            group.remove();
            for _ in 0..2 {
                assert_eq!([early.heard(), late.heard()], [killed; 2], "{name}, afterwards");
            }
        }
    }
}
