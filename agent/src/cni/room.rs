//! Another block of addresses, before the last one is full: the node asks for it on its Node object.

use std::time::Duration;

use tokio::sync::watch;

use super::Cni;

const LOOK_EVERY: Duration = Duration::from_secs(1);

impl Cni {
    /// Keeps `wanted` at the number of blocks of each family that the node needs, for ever. It is set when one more than it
    /// has is needed for the first time, and never taken back.
    pub(crate) async fn watch_room(&self, wanted: watch::Sender<Option<usize>>) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = self.0.exhausted.notified() => {}
            }
            let blocks = self.0.readiness.borrow().blocks.clone();
            let of_family = |v4: bool| blocks.iter().filter(|b| b.addr().is_ipv4() == v4).count();
            let more = of_family(true).max(of_family(false)) + 1;
            let full = self.0.ledger.ask(move |pool| pool.is_nearly_full(&blocks)).await;
            if !full.unwrap_or(false) {
                continue;
            }
            let asked = wanted.send_if_modified(|wanted| {
                let new = Some(more) > *wanted;
                *wanted = (*wanted).max(Some(more));
                new
            });
            if asked {
                tracing::info!(blocks = more, "few addresses are left, asking for another block");
            }
        }
    }
}
