//! The probes that this node was told of, and what its programs have told about them.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mesh_kernel::Programs;
use mesh_kernel::flows::FlowError;
use mesh_kernel::traces::{Event, Hook, Mark, Traces};
use mesh_model::trace::TraceMark;

use crate::errors::chain;
use crate::flows::Follow;

/// A mark that nobody has asked about ends by itself.
const LASTS: Duration = Duration::from_secs(30);
/// Probes at a time.
const PROBES: usize = 32;
/// Events of one probe that are kept: the first ones tell where it went.
const EVENTS: usize = 512;

/// A probe cannot be marked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MarkError {
    #[error("a probe has one or two ends")]
    Ends,
    #[error("{PROBES} probes are being traced already")]
    TooMany,
    #[error("the eBPF programs are not loaded: see `meshctl check`")]
    NoPrograms,
    #[error("the programs cannot be told")]
    Programs(#[from] FlowError),
}

/// The probes; cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Marks(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// Present while there are probes.
    reader: Option<Traces>,
    probes: Vec<Probe>,
}

struct Probe {
    mark: TraceMark,
    /// All by which the programs know it.
    known_by: Vec<Mark>,
    events: Vec<Event>,
    until: Instant,
    /// Drops of the kernel are told for as long as this is held.
    _follow: Follow,
}

impl Marks {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes away what an agent has left that was killed meanwhile.
    pub(crate) fn forget(&self, programs: &Programs) {
        if let Err(error) = Traces::open(programs) {
            tracing::warn!(error = chain(&error), "probes cannot be traced");
        }
    }

    /// From now on the programs tell what they decide about the probe.
    pub(crate) fn begin(
        &self,
        programs: &Arc<Programs>,
        mark: TraceMark,
        follow: Follow,
    ) -> Result<(), MarkError> {
        if !(1..=2).contains(&mark.ends.len()) {
            return Err(MarkError::Ends);
        }
        let mut state = self.state();
        state.expire(Instant::now());
        if state.probes.len() == PROBES {
            return Err(MarkError::TooMany);
        }
        if state.reader.is_none() {
            state.reader = Some(Traces::open(programs)?);
        }
        let protocol = mark.protocol.number();
        let known_by: Vec<Mark> = mark.ends.iter().map(|end| Mark::End(*end, protocol)).collect();
        let until = Instant::now() + LASTS;
        state.probes.push(Probe { mark, known_by, events: vec![], until, _follow: follow });
        if let Err(error) = state.mark_last() {
            let last = state.probes.len() - 1;
            state.remove(last);
            return Err(error.into());
        }
        drop(state);
        let marks = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(LASTS + Duration::from_secs(1)).await;
            marks.state().expire(Instant::now());
        });
        Ok(())
    }

    /// The probe's socket, on the node that it leaves: the hooks know it by that. A probe that was not marked has none.
    pub(super) fn add_socket(&self, own: Option<SocketAddr>, cookie: u64) {
        let mut state = self.state();
        let State { reader, probes } = &mut *state;
        let (Some(reader), Some(own)) = (reader, own) else { return };
        let is_it = |probe: &&mut Probe| probe.mark.ends.iter().any(|e| e.port() == own.port());
        let Some(probe) = probes.iter_mut().find(is_it) else { return };
        let mark = Mark::Socket(cookie);
        match reader.mark(mark) {
            Ok(()) => probe.known_by.push(mark),
            Err(error) => tracing::warn!(%error, "the choice of a backend is not traced"),
        }
    }

    /// The backend that the socket hook has chosen for the probe with this port.
    pub(super) fn chosen(&self, own: Option<SocketAddr>) -> Option<SocketAddr> {
        let mut state = self.state();
        state.read();
        let port = own?.port();
        let is_it = |probe: &&Probe| probe.mark.ends.iter().any(|end| end.port() == port);
        let probe = state.probes.iter().find(is_it)?;
        probe.events.iter().filter(|event| event.hook == Hook::Socket).find_map(|e| e.chosen)
    }

    /// What the programs have told about the probe. Its mark is taken away.
    pub(super) fn collect(&self, mark: &TraceMark) -> Vec<Event> {
        let mut state = self.state();
        state.read();
        let Some(place) = state.probes.iter().position(|probe| probe.mark == *mark) else {
            return vec![];
        };
        let probe = state.remove(place);
        probe.events
    }
}

impl State {
    /// Tells the programs of the newest probe.
    fn mark_last(&self) -> Result<(), FlowError> {
        let (Some(reader), Some(probe)) = (&self.reader, self.probes.last()) else { return Ok(()) };
        probe.known_by.iter().try_for_each(|mark| reader.mark(*mark))
    }

    /// Gives each event to its probe.
    fn read(&mut self) {
        let Self { reader, probes } = self;
        let Some(reader) = reader else { return };
        while let Some(event) = reader.next_event() {
            let marks = event.marks();
            let is_of = |probe: &&mut Probe| probe.known_by.iter().any(|m| marks.contains(m));
            if let Some(probe) = probes.iter_mut().find(is_of)
                && probe.events.len() < EVENTS
            {
                probe.events.push(event);
            }
        }
    }

    fn expire(&mut self, now: Instant) {
        while let Some(place) = self.probes.iter().position(|probe| probe.until <= now) {
            self.remove(place);
        }
    }

    fn remove(&mut self, place: usize) -> Probe {
        let probe = self.probes.remove(place);
        if let Some(reader) = &self.reader {
            for mark in &probe.known_by {
                if let Err(error) = reader.unmark(*mark) {
                    tracing::warn!(%error, "a mark stays until the next probe");
                }
            }
        }
        if self.probes.is_empty() {
            self.reader = None;
        }
        probe
    }
}
