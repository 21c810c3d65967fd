//! `meshctl check encryption`, this node's part: look on all ways out, receive and send canaries.
//!
//! A check is bounded by itself: whatever becomes of who asked for it, captures and sockets end with their time. Those of a
//! killed agent end with it.

mod place;
mod receive;
mod send;
mod sift;
mod watch;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mesh_kernel::capture::LinksError;
use mesh_kernel::{NetNs, Programs};
use mesh_model::Snapshot;
use mesh_model::encryption::{
    Findings, Finish, LONGEST_SECS, MOST_CANARIES, Mark, Sending, Sent, Watch, Watching,
};

use self::place::Place;
use self::receive::Receivers;
use self::watch::Watcher;

/// Checks at the same time: each holds sockets, and copies of all packets of the node.
const AT_ONCE: usize = 2;
/// How long findings are kept for who asks late.
const KEPT: Duration = Duration::from_secs(30);

/// A check that could not be done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CheckError {
    #[error("{0} s is longer than {LONGEST_SECS} s, or nothing")]
    Length(u16),
    #[error("{0} canaries are more than {MOST_CANARIES}: check fewer pairs at once, by --node")]
    TooMany(usize),
    #[error("{AT_ONCE} checks run already")]
    Busy,
    #[error("no such check runs: it is over, or the agent has started anew")]
    Unknown,
    #[error(transparent)]
    Links(#[from] LinksError),
    #[error("capture on {link}")]
    Capture {
        link: String,
        #[source]
        source: io::Error,
    },
    #[error("open sockets for canaries in {place}")]
    Sockets {
        place: String,
        #[source]
        source: io::Error,
    },
    #[error("start a thread")]
    Thread(#[source] io::Error),
}

/// The checks that run on this node.
#[derive(Default)]
pub(crate) struct Checks(Mutex<BTreeMap<Mark, Arc<Check>>>);

struct Check {
    until: Instant,
    place: Place,
    watcher: Watcher,
    receivers: Receivers,
}

impl Checks {
    /// Starts to look, and to receive.
    pub(crate) async fn watch(
        &self,
        asked: &Watch,
        snapshot: &Snapshot,
        programs: Option<Arc<Programs>>,
    ) -> Result<Watching, CheckError> {
        length(asked.secs)?;
        let until = Instant::now() + Duration::from_secs(asked.secs.into());
        let place = place::find(programs, snapshot).await;
        let receivers = Receivers::start(&place, asked.mark, until)?;
        let watcher = Watcher::start(asked.mark, snapshot, until)?;
        let watching = Watching {
            node: snapshot.node.name.clone(),
            links: watcher.links().to_vec(),
            addresses: snapshot.node.addresses.clone(),
            blocks: snapshot.node.blocks.clone(),
            pod: place.pod.clone(),
            receivers: receivers.addresses().to_vec(),
        };
        let check = Arc::new(Check { until, place, watcher, receivers });
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        running.retain(|_, check| check.until + KEPT > Instant::now());
        let busy = running.values().filter(|check| check.until > Instant::now()).count();
        if busy >= AT_ONCE || running.contains_key(&asked.mark) {
            return Err(CheckError::Busy);
        }
        running.insert(asked.mark, check);
        Ok(watching)
    }

    /// Sends canaries, for as long as is asked.
    pub(crate) async fn send(&self, asked: Sending) -> Result<Sent, CheckError> {
        length(asked.secs)?;
        let wanted = asked.canaries.len() + asked.plain.len();
        if wanted > MOST_CANARIES {
            return Err(CheckError::TooMany(wanted));
        }
        let check = self.of(asked.mark).ok_or(CheckError::Unknown)?;
        Ok(send::all(&check.place, asked, check.until).await)
    }

    /// Stops to look, and tells what was seen.
    pub(crate) async fn finish(&self, asked: Finish) -> Result<Findings, CheckError> {
        let check = self.of(asked.mark).ok_or(CheckError::Unknown)?;
        let arrived = check.receivers.stop();
        let ended = Arc::clone(&check);
        let seen = tokio::task::spawn_blocking(move || ended.watcher.stop()).await;
        let findings = seen.unwrap_or_else(|panic| Findings {
            failures: vec![panic.to_string()],
            ..Findings::default()
        });
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&asked.mark);
        Ok(Findings { arrived, ..findings })
    }

    fn of(&self, mark: Mark) -> Option<Arc<Check>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&mark).cloned()
    }
}

fn length(secs: u16) -> Result<(), CheckError> {
    if (1..=LONGEST_SECS).contains(&secs) { Ok(()) } else { Err(CheckError::Length(secs)) }
}

/// The node's own network namespace, as long as this thread is not in another.
fn node() -> NetNs {
    NetNs::current()
}
