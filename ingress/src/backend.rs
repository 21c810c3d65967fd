//! Backends: who is chosen, who is left out for a while, and the connections kept to them.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::Instant;

/// One address that serves requests, whatever routes lead to it. Lives as long as a route or a request needs it.
#[derive(Debug)]
pub(crate) struct Backend {
    pub(crate) address: SocketAddr,
    outstanding: AtomicU32,
    /// Connection failures in a row.
    failures: AtomicU32,
    /// Milliseconds since the epoch of the registry.
    ejected_until: AtomicU64,
    /// Idle connections, one list for each thread: a socket stays with the thread that polls it.
    idle: Box<[Mutex<Vec<Idle>>]>,
}

#[derive(Debug)]
struct Idle {
    io: TcpStream,
    since: Instant,
}

impl Backend {
    fn new(address: SocketAddr, threads: usize) -> Self {
        Self {
            address,
            outstanding: AtomicU32::new(0),
            failures: AtomicU32::new(0),
            ejected_until: AtomicU64::new(0),
            idle: (0..threads).map(|_| Mutex::default()).collect(),
        }
    }

    fn with_idle<T>(&self, thread: usize, act: impl FnOnce(&mut Vec<Idle>) -> T) -> T {
        act(&mut self.idle[thread].lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The connection used last that is still open and silent.
    pub(crate) fn take_idle(&self, thread: usize) -> Option<TcpStream> {
        loop {
            let idle = self.with_idle(thread, Vec::pop)?;
            if is_silent(&idle.io) {
                return Some(idle.io);
            }
        }
    }

    /// Keeps a connection for a later request.
    pub(crate) fn keep_idle(&self, thread: usize, io: TcpStream, limit: usize) {
        let since = Instant::now();
        self.with_idle(thread, |list| {
            if list.len() < limit {
                list.push(Idle { io, since });
            }
        });
    }

    /// Closes connections of `thread` that are unused for longer than `limit` or closed by the backend.
    fn sweep(&self, thread: usize, now: Instant, limit: Duration) {
        self.with_idle(thread, |list| {
            list.retain(|idle| now - idle.since < limit && is_silent(&idle.io));
            if list.is_empty() {
                list.shrink_to_fit();
            }
        });
    }

    pub(crate) fn idle_count(&self) -> usize {
        (0..self.idle.len()).map(|thread| self.with_idle(thread, |list| list.len())).sum()
    }

    /// Whether the backend is left out at `now`.
    pub(crate) fn is_ejected(&self, now: Millis) -> bool {
        self.ejected_until.load(Relaxed) > now.0
    }

    /// A connection was made.
    pub(crate) fn succeeded(&self) {
        if self.failures.load(Relaxed) != 0 {
            self.failures.store(0, Relaxed);
            self.ejected_until.store(0, Relaxed);
        }
    }

    /// No connection could be made: leaves the backend out for `base`, doubled with each failure up to eightfold.
    pub(crate) fn failed(&self, now: Millis, base: Duration) {
        // Requests that fail together count once.
        if !self.is_ejected(now) {
            let earlier = self.failures.fetch_add(1, Relaxed);
            let time = base * (1 << earlier.min(3));
            self.ejected_until.store(now.0 + time.as_millis() as u64, Relaxed);
        }
    }
}

/// Whether a connection that carries no request is open and has nothing to say, as it must.
fn is_silent(io: &TcpStream) -> bool {
    let nothing = io.try_read(&mut [0]);
    nothing.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
}

/// Counts a request as outstanding while it lives.
#[derive(Debug)]
pub(crate) struct Lease(pub(crate) Arc<Backend>);

impl Lease {
    pub(crate) fn new(backend: &Arc<Backend>) -> Self {
        backend.outstanding.fetch_add(1, Relaxed);
        Self(Arc::clone(backend))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.outstanding.fetch_sub(1, Relaxed);
    }
}

/// A moment, in milliseconds since the registry was made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Millis(u64);

/// All backends that any route or request refers to.
#[derive(Debug)]
pub(crate) struct Registry {
    backends: Mutex<HashMap<SocketAddr, Weak<Backend>>>,
    threads: usize,
    epoch: Instant,
}

impl Registry {
    pub(crate) fn new(threads: usize) -> Self {
        Self { backends: Mutex::default(), threads, epoch: Instant::now() }
    }

    /// `now` on the clock of ejections.
    pub(crate) fn millis(&self, now: Instant) -> Millis {
        Millis(now.saturating_duration_since(self.epoch).as_millis() as u64)
    }

    /// The backend at `address`, with what is known about it and its connections.
    pub(crate) fn backend(&self, address: SocketAddr) -> Arc<Backend> {
        let mut backends = self.backends.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = backends.get(&address).and_then(Weak::upgrade) {
            return known;
        }
        let backend = Arc::new(Backend::new(address, self.threads));
        backends.insert(address, Arc::downgrade(&backend));
        backend
    }

    /// The backends in use; forgets the others.
    pub(crate) fn all(&self) -> Vec<Arc<Backend>> {
        let mut all = Vec::new();
        let mut backends = self.backends.lock().unwrap_or_else(PoisonError::into_inner);
        backends.retain(|_, backend| backend.upgrade().map(|b| all.push(b)).is_some());
        all
    }

    /// Closes what the connections of `thread` leave behind.
    pub(crate) fn sweep(&self, thread: usize, limit: Duration) {
        let now = Instant::now();
        for backend in self.all() {
            backend.sweep(thread, now, limit);
        }
    }
}

/// Picks a backend: of two at random the one with fewer outstanding requests ("power of two choices").
///
/// Leaves out those in `tried` always, and ejected ones unless all others are: trying is better than refusing.
pub(crate) fn choose<'a>(
    backends: &'a [Arc<Backend>],
    tried: &[SocketAddr],
    now: Millis,
) -> Option<&'a Arc<Backend>> {
    if let [only] = backends {
        return tried.is_empty().then_some(only);
    }
    let fresh = |b: &&Arc<Backend>| !tried.contains(&b.address);
    let healthy = |b: &&Arc<Backend>| fresh(b) && !b.is_ejected(now);
    let load = |b: &Arc<Backend>| b.outstanding.load(Relaxed);
    let (first, second) = two_of(backends)?;
    match (healthy(&first), healthy(&second)) {
        (true, true) => Some(if load(second) < load(first) { second } else { first }),
        // Few are left out, so the walk over all is rare.
        _ => {
            let best = backends.iter().filter(healthy).min_by_key(|b| load(b));
            best.or_else(|| backends.iter().filter(fresh).min_by_key(|b| load(b)))
        }
    }
}

fn two_of(backends: &[Arc<Backend>]) -> Option<(&Arc<Backend>, &Arc<Backend>)> {
    let count = u32::try_from(backends.len()).ok().filter(|count| *count > 1)?;
    let random: u64 = rand::random();
    let first = scaled(random as u32, count);
    let second = (first + 1 + scaled((random >> 32) as u32, count - 1)) % count;
    Some((&backends[first as usize], &backends[second as usize]))
}

/// A random number below `count` from one of 32 bits.
fn scaled(random: u32, count: u32) -> u32 {
    ((u64::from(random) * u64::from(count)) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backends(registry: &Registry, count: u16) -> Vec<Arc<Backend>> {
        (1..=count).map(|port| registry.backend(([127, 0, 0, 1], port).into())).collect()
    }

    #[tokio::test]
    async fn two_different_backends_are_compared() {
        let registry = Registry::new(1);
        let all = backends(&registry, 3);
        let mut seen = std::collections::HashSet::new();
        for _ in 0..1000 {
            let (a, b) = two_of(&all).unwrap();
            assert_ne!(a.address, b.address);
            seen.insert((a.address, b.address));
        }
        assert_eq!(seen.len(), 6, "each ordered pair occurs");
    }

    #[tokio::test]
    async fn load_evens_out() {
        let registry = Registry::new(1);
        let all = backends(&registry, 4);
        let now = registry.millis(Instant::now());
        let leases: Vec<_> =
            (0..400).map(|_| Lease::new(choose(&all, &[], now).unwrap())).collect();
        for backend in &all {
            let load = backend.outstanding.load(Relaxed);
            assert!((90..=110).contains(&load), "{load} of 400 on one of four");
        }
        drop(leases);
        assert!(all.iter().all(|b| b.outstanding.load(Relaxed) == 0));
    }

    #[tokio::test]
    async fn ejected_backends_are_the_last_resort() {
        let registry = Registry::new(1);
        let all = backends(&registry, 3);
        let (now, base) = (Millis(1000), Duration::from_secs(3));
        all[0].failed(now, base);
        all[1].failed(now, base);
        for _ in 0..50 {
            assert_eq!(choose(&all, &[], now).unwrap().address, all[2].address);
        }
        assert!(choose(&all, &[all[2].address], now).is_some());
        let everybody: Vec<_> = all.iter().map(|b| b.address).collect();
        assert!(choose(&all, &everybody, now).is_none());
        assert!(!all[0].is_ejected(Millis(4000)));
        all[0].failed(Millis(4000), base);
        assert!(all[0].is_ejected(Millis(9999)), "twice as long the second time");
        all[0].succeeded();
        assert!(!all[0].is_ejected(Millis(4001)));
    }

    #[tokio::test]
    async fn a_backend_is_one_object_while_somebody_needs_it() {
        let registry = Registry::new(1);
        let first = registry.backend(([127, 0, 0, 1], 1).into());
        first.failed(Millis(0), Duration::from_secs(60));
        assert!(Arc::ptr_eq(&first, &registry.backend(first.address)));
        drop(first);
        assert!(registry.all().is_empty());
    }
}
