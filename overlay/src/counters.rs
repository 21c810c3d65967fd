//! Counters that all threads of the engine write.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::status::{DropReason, Traffic};

/// Drops by reason, and work done, since the engine started. Each is right by itself, not all at one instant.
#[derive(Debug, Default)]
pub struct Counters {
    drops: [AtomicU64; DropReason::ALL.len()],
    device_reads: AtomicU64,
    device_writes: AtomicU64,
    datagrams_sent: AtomicU64,
    datagrams_received: AtomicU64,
    send_calls: AtomicU64,
    receive_calls: AtomicU64,
}

impl Counters {
    /// `packets` were dropped.
    pub fn dropped(&self, reason: DropReason, packets: usize) {
        if packets > 0 {
            self.drops[reason as usize].fetch_add(packets as u64, Relaxed);
        }
    }

    /// The system says that so many were dropped for the reason, in all.
    pub(crate) fn set_dropped(&self, reason: DropReason, packets: usize) {
        self.drops[reason as usize].store(packets as u64, Relaxed);
    }

    /// Packets were read from the device.
    pub(crate) fn read(&self, reads: usize) {
        self.device_reads.fetch_add(reads as u64, Relaxed);
    }

    /// Packets were written to the device.
    pub(crate) fn wrote(&self, writes: usize) {
        self.device_writes.fetch_add(writes as u64, Relaxed);
    }

    /// One system call sent datagrams.
    pub(crate) fn sent(&self, datagrams: usize) {
        self.send_calls.fetch_add(1, Relaxed);
        self.datagrams_sent.fetch_add(datagrams as u64, Relaxed);
    }

    /// One system call received datagrams.
    pub(crate) fn received(&self, datagrams: usize) {
        self.receive_calls.fetch_add(1, Relaxed);
        self.datagrams_received.fetch_add(datagrams as u64, Relaxed);
    }

    /// Drops that happened, by reason.
    pub fn drops(&self) -> BTreeMap<DropReason, u64> {
        let counted = DropReason::ALL.into_iter().zip(&self.drops);
        counted.map(|(reason, n)| (reason, n.load(Relaxed))).filter(|&(_, n)| n > 0).collect()
    }

    /// Work done.
    pub fn traffic(&self) -> Traffic {
        Traffic {
            device_reads: self.device_reads.load(Relaxed),
            device_writes: self.device_writes.load(Relaxed),
            datagrams_sent: self.datagrams_sent.load(Relaxed),
            datagrams_received: self.datagrams_received.load(Relaxed),
            send_calls: self.send_calls.load(Relaxed),
            receive_calls: self.receive_calls.load(Relaxed),
        }
    }
}
