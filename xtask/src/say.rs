//! Progress for people, on standard error; standard output is for data.

use std::sync::OnceLock;
use std::time::Instant;

static START: OnceLock<Instant> = OnceLock::new();

/// One line about what happens now, with the seconds since the first one.
pub(crate) fn step(what: &str) {
    let start = START.get_or_init(Instant::now);
    eprintln!("[{:>4} s] {what}", start.elapsed().as_secs());
}
