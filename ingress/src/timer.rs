//! One timer for a connection's whole life, touched only when a deadline comes nearer or has passed.

use std::future::Future as _;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::time::{Instant, Sleep};

/// Waits for deadlines that mostly move away before they are reached.
#[derive(Default)]
pub(crate) struct Timer {
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Timer {
    /// Ready when `deadline` has passed. Each call may name another deadline.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, deadline: Instant) -> Poll<()> {
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if deadline < sleep.deadline() {
            sleep.as_mut().reset(deadline);
        }
        loop {
            ready!(sleep.as_mut().poll(cx));
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(deadline);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_last_deadline_counts() {
        let start = Instant::now();
        let mut timer = Timer::default();
        poll_fn(|cx| {
            assert!(timer.poll(cx, start + Duration::from_secs(10)).is_pending());
            assert!(timer.poll(cx, start + Duration::from_secs(2)).is_pending());
            Poll::Ready(())
        })
        .await;
        poll_fn(|cx| timer.poll(cx, start + Duration::from_secs(30))).await;
        assert_eq!(start.elapsed().as_secs(), 30);
        poll_fn(|cx| timer.poll(cx, start + Duration::from_secs(31))).await;
        assert_eq!(start.elapsed().as_secs(), 31);
    }
}
