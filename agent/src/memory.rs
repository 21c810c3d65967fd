//! The agent's own memory.

use std::time::Duration;

use mesh_worker::memory::give_back;

/// A start is over after some seconds; on a slow machine, or in a large cluster, after some more. Later it costs milliseconds a minute.
const FIRST: Duration = Duration::from_secs(4);
const LAST: Duration = Duration::from_secs(60);

/// Gives back what is free, again and again, for ever: to start takes three times what there is to keep (the kernel's types,
/// programs, whole lists of the API), and so does each new list.
pub(crate) async fn keep_small() {
    let mut pause = FIRST;
    loop {
        tokio::time::sleep(pause).await;
        // A thread of the runtime is not to wait for it; that it panics is not possible.
        let _ = tokio::task::spawn_blocking(give_back).await;
        pause = (pause * 2).min(LAST);
    }
}
