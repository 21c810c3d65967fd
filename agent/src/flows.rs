//! What connections there are on this node: read from the programs, remembered for a while, told to who asks.
//!
//! Reading costs a copy for each event, and no wake-up: the thread that reads looks from time to time, rarely when nobody follows, and
//! at once for who asks. Names are looked up for those only that are told, and by what was known when an event
//! happened: an address that has another pod by now keeps the name it had.

mod names;
mod reading;
mod report;
mod serve;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mesh_kernel::flows::{Event, FlowError, FlowReader, Settings, Tally, monotonic};
use mesh_kernel::pods::{LinuxPodNetwork, PodNetwork as _};
use mesh_kernel::{NetNs, Programs};
use mesh_model::NodeName;
use tokio::sync::{broadcast, oneshot, watch};

use crate::board::Board;
use crate::errors::chain;
use crate::observe::Desired;
use names::Names;
use reading::Reading;
pub(crate) use report::wall_offset;
pub(crate) use serve::Follow;

/// How late a follower may see an event.
const FOLLOWED: Duration = Duration::from_millis(100);
/// How often events are read when nobody follows. Who asks for what is remembered does not wait for it.
const QUIET: Duration = Duration::from_secs(1);
/// Events that are read in one go: a little more than the ring holds.
const BATCH: usize = 8192;
/// Batches that a slow follower may be behind.
const BEHIND: usize = 32;
const RETRY: Duration = Duration::from_secs(10);

/// The node's flows; cheap to clone.
#[derive(Clone)]
pub(crate) struct Flows(Arc<Shared>);

struct Shared {
    node: NodeName,
    /// Events that are remembered. None: they are read only while somebody follows.
    kept: usize,
    history: Mutex<History>,
    names: Mutex<Names>,
    feed: broadcast::Sender<Arc<Batch>>,
    followers: watch::Sender<usize>,
    /// The thread that reads, while there is one.
    reading: Mutex<Option<Arc<Reading>>>,
}

#[derive(Default)]
struct History {
    events: VecDeque<Event>,
    /// Number of the next event.
    next: u64,
    tally: Tally,
    lacking: Vec<String>,
    /// The kernel's names of its reasons to drop packets.
    reasons: Arc<BTreeMap<u32, String>>,
    programs: Option<Arc<Programs>>,
}

/// Events in a row.
struct Batch {
    /// Number of the first one.
    first: u64,
    events: Vec<Event>,
}

impl Flows {
    /// Remembers `kept` events once [`run`](Self::run) runs.
    pub(crate) fn new(node: NodeName, kept: usize) -> Self {
        Self(Arc::new(Shared {
            node,
            kept,
            history: Mutex::default(),
            names: Mutex::default(),
            feed: broadcast::Sender::new(BEHIND),
            followers: watch::Sender::new(0),
            reading: Mutex::default(),
        }))
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.0.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        self.0.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reading(&self) -> MutexGuard<'_, Option<Arc<Reading>>> {
        self.0.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all that has been told so far is remembered.
    async fn catch_up(&self) {
        let reading = self.reading().clone();
        if let Some(reading) = reading {
            reading.turn().await;
        }
    }

    /// The kernel's name of one of its reasons to drop a packet.
    pub(crate) fn kernel_reason(&self, number: u32) -> String {
        let name = self.history().reasons.get(&number).cloned();
        name.unwrap_or_else(|| number.to_string())
    }

    /// The programs tell for as long as the result is held.
    pub(crate) fn follow(&self) -> Follow {
        Follow::new(self, true)
    }

    /// Events of the programs, as counted by them.
    pub(crate) fn tally(&self) -> Tally {
        self.history().tally
    }

    /// Reads for ever.
    pub(crate) async fn run(
        self,
        programs: Arc<Programs>,
        mut desired: watch::Receiver<Option<Desired>>,
        board: Board,
    ) {
        let mut followers = self.0.followers.subscribe();
        loop {
            if self.0.kept == 0 && followers.wait_for(|n| *n > 0).await.is_err() {
                return;
            }
            match self.read(&programs, &mut desired, &board).await {
                Ok(()) => {}
                Err(error) => {
                    let error = chain(&error);
                    tracing::warn!(error, "flows not read, trying again");
                    board.failed("flows", vec![error]);
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Reads until nobody wants it any more.
    async fn read(
        &self,
        programs: &Arc<Programs>,
        desired: &mut watch::Receiver<Option<Desired>>,
        board: &Board,
    ) -> Result<(), ReadError> {
        let opening = Arc::clone(programs);
        let open = move || FlowReader::open(&opening, &NetNs::current(), Settings::default());
        let reader = tokio::task::spawn_blocking(open).await??;
        {
            let mut history = self.history();
            history.reasons = Arc::new(reader.kernel_reasons().clone());
            history.lacking = reader.lacking().to_vec();
            history.programs = Some(Arc::clone(programs));
        }
        for lacking in reader.lacking() {
            tracing::warn!(lacking, "flows are incomplete");
        }
        board.done("flows");
        self.learn(programs, desired).await;
        let (flows, (ended, mut end)) = (self.clone(), oneshot::channel());
        let thread = std::thread::Builder::new().name("flows".to_owned());
        // Nobody waits any more when the agent ends.
        let work = move || ended.send(flows.drain(reader)).unwrap_or_default();
        thread.spawn(work).map_err(ReadError::Thread)?;
        loop {
            tokio::select! {
                end = &mut end => return end.map_err(|_| ReadError::Ends)?,
                changed = desired.changed() => {
                    changed.map_err(|_| ReadError::Ends)?;
                    self.learn(programs, desired).await;
                }
            }
        }
    }

    /// Reads on a thread of its own, which sleeps most of the time, until nobody wants it any more.
    fn drain(&self, mut reader: FlowReader) -> Result<(), ReadError> {
        let followers = self.0.followers.subscribe();
        let reading = Arc::new(Reading::new(reader.bell()));
        *self.reading() = Some(Arc::clone(&reading));
        let _ended = Ended(self, &reading);
        loop {
            let followed = *followers.borrow() > 0;
            if self.0.kept == 0 && !followed {
                return Ok(());
            }
            reader.wait(if followed { FOLLOWED } else { QUIET })?;
            let asked = reading.asked();
            self.add(take(&mut reader));
            self.history().tally = reader.tally()?;
            reading.answer(asked);
        }
    }

    fn add(&self, events: Vec<Event>) {
        if events.is_empty() {
            return;
        }
        // Under the lock, so that who subscribes under it misses nothing and sees nothing twice.
        let mut history = self.history();
        let first = history.next;
        history.next += events.len() as u64;
        history.events.extend(&events);
        let excess = history.events.len().saturating_sub(self.0.kept);
        history.events.drain(..excess);
        // Nobody follows: nobody misses it.
        let _ = self.0.feed.send(Arc::new(Batch { first, events }));
    }

    /// Who has which address now.
    async fn learn(
        &self,
        programs: &Arc<Programs>,
        desired: &mut watch::Receiver<Option<Desired>>,
    ) {
        let snapshot = desired.borrow_and_update().as_ref().map(|d| Arc::clone(&d.snapshot));
        let Some(snapshot) = snapshot else { return };
        if self.names().knows_pods_of(&snapshot) {
            return self.names().learn(monotonic(), &snapshot, std::iter::empty());
        }
        let network = LinuxPodNetwork::new(NetNs::current(), Arc::clone(programs));
        let ports = tokio::task::spawn_blocking(move || network.list().unwrap_or_default()).await;
        let owners = ports.unwrap_or_default().into_iter().map(|port| port.owner);
        self.names().learn(monotonic(), &snapshot, owners);
    }
}

/// Nobody reads any more: nobody is to wait for it.
struct Ended<'a>(&'a Flows, &'a Reading);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        *self.0.reading() = None;
        self.1.end();
    }
}

/// What is there.
fn take(reader: &mut FlowReader) -> Vec<Event> {
    std::iter::from_fn(|| reader.next_event()).take(BATCH).collect()
}

/// Reading has ended.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error(transparent)]
    Flows(#[from] FlowError),
    #[error("start a thread")]
    Thread(#[source] std::io::Error),
    #[error("a task of the agent ended")]
    Task(#[from] tokio::task::JoinError),
    #[error("the agent ends")]
    Ends,
}

#[cfg(test)]
mod tests {
    use super::report::tests::event;
    use super::*;

    #[test]
    fn so_many_are_remembered_and_no_more() {
        let flows = Flows::new("a".parse().unwrap(), 3);
        let mut follower = flows.0.feed.subscribe();
        for i in 0..3_u64 {
            let at = Duration::from_secs(i);
            flows.add(vec![Event { at, ..event() }, Event { socket: 1, at, ..event() }]);
        }
        flows.add(vec![]);
        let history = flows.history();
        let kept: Vec<u64> = history.events.iter().map(|e| e.at.as_secs()).collect();
        assert_eq!((kept, history.next), (vec![1, 2, 2], 6));
        let firsts: Vec<u64> = (0..3).map(|_| follower.try_recv().unwrap().first).collect();
        assert_eq!(firsts, [0, 2, 4]);
    }
}
