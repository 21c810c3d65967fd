//! Asking the thread that reads to do it now, and waiting until it has.

use std::sync::atomic::{AtomicU64, Ordering};

use mesh_kernel::flows::Bell;
use tokio::sync::watch;

/// What those who ask share with the thread.
pub(super) struct Reading {
    bell: Bell,
    /// How often somebody has asked.
    asked: AtomicU64,
    /// Up to where that is answered.
    answered: watch::Sender<u64>,
}

impl Reading {
    pub(super) fn new(bell: Bell) -> Self {
        Self { bell, asked: AtomicU64::new(0), answered: watch::Sender::new(0) }
    }

    /// Wakes the thread.
    pub(super) fn wake(&self) {
        self.bell.ring();
    }

    /// Waits until the thread has read what is there now, or has ended.
    pub(super) async fn turn(&self) {
        let ticket = self.asked.fetch_add(1, Ordering::AcqRel) + 1;
        self.wake();
        // The sender is ours: it is there.
        let _ = self.answered.subscribe().wait_for(|answered| *answered >= ticket).await;
    }

    /// The thread: who is answered by the look that it takes next.
    pub(super) fn asked(&self) -> u64 {
        self.asked.load(Ordering::Acquire)
    }

    /// The thread: it has looked.
    pub(super) fn answer(&self, asked: u64) {
        self.answered.send_replace(asked);
    }

    /// The thread: it looks no more.
    pub(super) fn end(&self) {
        self.answer(u64::MAX);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn who_asks_is_answered_by_a_look_that_begins_later() {
        let reading = Arc::new(Reading::new(Bell::new().unwrap()));
        // A look that is under way knows nothing of who asks now.
        let under_way = reading.asked();
        let asking = Arc::clone(&reading);
        let mut waiting = tokio::spawn(async move { asking.turn().await });
        while reading.asked() == under_way {
            tokio::task::yield_now().await;
        }
        reading.answer(under_way);
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert!(!waiting.is_finished());
        reading.answer(reading.asked());
        (&mut waiting).await.unwrap();
    }

    #[tokio::test]
    async fn nobody_waits_for_a_thread_that_has_ended() {
        let reading = Reading::new(Bell::new().unwrap());
        reading.end();
        reading.turn().await;
        reading.turn().await;
    }
}
