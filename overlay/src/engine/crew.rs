//! The threads of an engine: started, and known to have ended.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::failure::{EngineFailure, Failure};

/// How long threads take at most that were told to stop. They wait for nothing but each other and a socket that is full.
const FINISHED_BY: Duration = Duration::from_secs(1);

/// Threads that have not ended. Each has a sender and sends nothing: when the last has ended, the channel is closed.
pub(super) struct Crew {
    alive: Mutex<Option<Sender<()>>>,
    ended: Mutex<Receiver<()>>,
}

impl Default for Crew {
    fn default() -> Self {
        let (alive, ended) = channel();
        Self { alive: Mutex::new(Some(alive)), ended: Mutex::new(ended) }
    }
}

impl Crew {
    /// Starts a thread that ends when told to; when it ends for another reason, the engine has failed.
    pub(super) fn spawn(
        &self,
        failure: &Arc<Failure>,
        name: String,
        body: impl FnOnce() -> Result<(), EngineFailure> + Send + 'static,
    ) -> io::Result<()> {
        let alive = self.alive.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let alive = alive.ok_or(io::ErrorKind::BrokenPipe)?;
        let (failure, thread) = (Arc::clone(failure), name.clone());
        let run = move || {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            match result {
                Ok(Ok(())) => {}
                Ok(Err(error)) => failure.report(error),
                Err(_) => failure.report(EngineFailure::Panicked { thread }),
            }
            // The body, with all that it held, is gone before.
            drop(alive);
        };
        // The stacks hold no buffers; the default of 2 MiB would only be address space.
        thread::Builder::new().name(name).stack_size(256 << 10).spawn(run).map(drop)
    }

    /// Waits until all have ended; false when they take too long. No other one can be started.
    pub(super) fn finish(&self) -> bool {
        self.alive.lock().unwrap_or_else(PoisonError::into_inner).take();
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        !matches!(ended.recv_timeout(FINISHED_BY), Err(RecvTimeoutError::Timeout))
    }
}
