//! Turns at the runtime: how many sandboxes and containers it starts at the same time, and which of those that wait is next.
//!
//! A pod that has its sandbox goes before those that have nothing yet. Otherwise, of a hundred pods, all sandboxes would be made
//! first, and no pod would be ready before nearly all are.

use tokio::sync::{Semaphore, SemaphorePermit};

/// The runtime's turns, each set of waiters in the order in which they asked.
pub(crate) struct Turns {
    all: Semaphore,
    /// Held by the one sandbox that stands in line with the containers.
    newcomer: Semaphore,
}

/// The right to start something; ends when dropped. None when the agent ends, where nobody waits any more.
pub(crate) type Turn<'t> = Option<SemaphorePermit<'t>>;

impl Turns {
    pub(crate) fn new(at_once: usize) -> Self {
        Self { all: Semaphore::new(at_once), newcomer: Semaphore::new(1) }
    }

    pub(crate) async fn sandbox(&self) -> Turn<'_> {
        let _in_line = self.newcomer.acquire().await.ok()?;
        self.all.acquire().await.ok()
    }

    pub(crate) async fn container(&self) -> Turn<'_> {
        self.all.acquire().await.ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::task::Poll;

    use futures_util::future::{BoxFuture, FutureExt as _};

    use super::*;

    #[tokio::test]
    async fn containers_go_before_the_sandboxes_of_pods_that_have_nothing_yet() {
        let turns = Turns::new(1);
        let order = Mutex::new(vec![]);
        let note = |name| order.lock().unwrap().push(name);
        let busy = turns.container().await;
        let mut waiting: Vec<BoxFuture<'_, ()>> = vec![
            turns.sandbox().map(|turn| drop((turn, note("sandbox 1")))).boxed(),
            turns.sandbox().map(|turn| drop((turn, note("sandbox 2")))).boxed(),
            turns.sandbox().map(|turn| drop((turn, note("sandbox 3")))).boxed(),
            turns.container().map(|turn| drop((turn, note("container 1")))).boxed(),
            turns.container().map(|turn| drop((turn, note("container 2")))).boxed(),
        ];
        for one in &mut waiting {
            assert_eq!(futures_util::poll!(one), Poll::Pending, "the only turn is taken");
        }
        drop(busy);
        futures_util::future::join_all(waiting).await;
        let order = order.into_inner().unwrap();
        assert_eq!(order, ["sandbox 1", "container 1", "container 2", "sandbox 2", "sandbox 3"]);
    }
}
