//! The thread that looks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mesh_kernel::capture::{self, Capture, LONGEST_PACKET};
use mesh_model::Snapshot;
use mesh_model::encryption::{Findings, Mark};
use mesh_model::wellknown::OVERLAY_DEVICE;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::CheckError;
use super::sift::Sieve;

/// How soon the thread notices that it shall end.
const STEP_MS: u8 = 50;
/// Packets of one link before the next one's turn.
const TURN: usize = 256;
/// What was sent just before the end is still on its way.
const LINGER: Duration = Duration::from_millis(300);

/// Looks on all ways out of the node until its time is over, it is stopped or dropped.
pub(super) struct Watcher {
    links: Vec<String>,
    ends: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<Findings>>>,
}

impl Watcher {
    /// When this returns, nothing passes unseen.
    pub(super) fn start(
        mark: Mark,
        snapshot: &Snapshot,
        until: Instant,
    ) -> Result<Self, CheckError> {
        let overlay = OVERLAY_DEVICE.parse().expect("a constant and valid interface name");
        let captures: Result<Vec<Capture>, CheckError> = capture::ways_out(&overlay)?
            .into_iter()
            .map(|link| {
                let name = link.name.clone();
                Capture::start(link).map_err(|source| CheckError::Capture { link: name, source })
            })
            .collect();
        let captures = captures?;
        let links = captures.iter().map(|capture| capture.link().name.clone()).collect();
        let sieve = Sieve::new(mark, snapshot);
        let ends = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&ends);
        let thread = std::thread::Builder::new().name("encryption".to_owned());
        let look = move || look(captures, sieve, || told.load(Ordering::Relaxed), until);
        let thread = thread.spawn(look).map_err(CheckError::Thread)?;
        Ok(Self { links, ends, thread: Mutex::new(Some(thread)) })
    }

    pub(super) fn links(&self) -> &[String] {
        &self.links
    }

    /// Ends it, after what is still on its way. Blocks for that long.
    pub(super) fn stop(&self) -> Findings {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else {
            return Findings { failures: vec!["stopped twice".to_owned()], ..Findings::default() };
        };
        std::thread::sleep(LINGER);
        self.ends.store(true, Ordering::Relaxed);
        thread.join().unwrap_or_else(|_| Findings {
            failures: vec!["the thread that looks has panicked".to_owned()],
            ..Findings::default()
        })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
    }
}

fn look(
    mut captures: Vec<Capture>,
    mut sieve: Sieve,
    ends: impl Fn() -> bool,
    until: Instant,
) -> Findings {
    let mut buffer = vec![0; LONGEST_PACKET];
    let (mut failures, mut lost_packets) = (vec![], 0);
    while !ends() && Instant::now() < until {
        wait(&captures);
        captures.retain(|capture| match read(capture, &mut sieve, &mut buffer) {
            Ok(()) => true,
            Err(error) => {
                failures.push(format!("{}: {error}", capture.link().name));
                false
            }
        });
    }
    for capture in &captures {
        match capture.lost() {
            Ok(lost) => lost_packets += u64::from(lost),
            Err(error) => failures.push(format!("{}: {error}", capture.link().name)),
        }
    }
    Findings { lost_packets, failures, ..sieve.findings() }
}

fn wait(captures: &[Capture]) {
    let mut ready: Vec<PollFd<'_>> = captures
        .iter()
        .map(|capture| PollFd::new(capture.descriptor(), PollFlags::POLLIN))
        .collect();
    // Whatever it says, all are read next.
    let _ = poll(&mut ready, PollTimeout::from(STEP_MS));
}

fn read(capture: &Capture, sieve: &mut Sieve, buffer: &mut [u8]) -> std::io::Result<()> {
    for _ in 0..TURN {
        let Some(passed) = capture.next(buffer)? else { return Ok(()) };
        sieve.look(&capture.link().name, passed.outgoing, passed.packet);
    }
    Ok(())
}
