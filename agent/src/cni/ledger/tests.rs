use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::Mutex;

use proptest::prelude::*;

use super::*;

/// A disk that takes a given number of bytes more and then fails, in the middle of a write.
#[derive(Clone, Default)]
struct Disk(Arc<Mutex<(Vec<u8>, usize)>>);

impl Disk {
    fn allow(&self, bytes: usize) {
        self.0.lock().unwrap().1 = bytes;
    }
}

impl Storage for Disk {
    fn read(&mut self) -> io::Result<Vec<u8>> {
        Ok(self.0.lock().unwrap().0.clone())
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        let fits = bytes.len().min(disk.1);
        disk.1 -= fits;
        disk.0.extend_from_slice(&bytes[..fits]);
        if fits == bytes.len() { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) }
    }

    fn replace(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        if disk.1 < bytes.len() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        disk.1 -= bytes.len();
        disk.0 = bytes.to_vec();
        Ok(())
    }
}

fn owner(n: u8) -> Owner {
    Owner { container: format!("c{n}"), interface: "eth0".into() }
}

fn open(disk: &Disk, boot: &str) -> Ledger {
    Ledger::open(Box::new(disk.clone()), boot).unwrap().0
}

fn blocks() -> Arc<[IpNet]> {
    vec!["10.0.0.0/28".parse().unwrap(), "fd00::/64".parse().unwrap()].into()
}

fn assert_no_address_twice(pool: &Pool) {
    let mut seen = HashSet::new();
    for address in pool.leases().values().flat_map(|lease| &lease.addresses) {
        assert!(seen.insert(*address), "{address} given out twice");
    }
}

#[derive(Debug, Clone)]
enum Op {
    Add(u8),
    Del(u8),
    /// Limit the disk, go on, then start again from what is on it.
    Crash(usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        5 => (0..20u8).prop_map(Op::Add),
        4 => (0..20u8).prop_map(Op::Del),
        1 => (0..400usize).prop_map(Op::Crash),
    ];
    proptest::collection::vec(op, 1..80)
}

proptest! {
    /// Whatever happens and whenever the disk fails or the process dies: what was acknowledged is still there,
    /// and no address has two owners.
    #[test]
    fn acknowledged_leases_survive_a_crash_at_any_byte(ops in ops()) {
        let disk = Disk::default();
        disk.allow(usize::MAX);
        let mut ledger = open(&disk, "boot");
        let mut acknowledged: BTreeMap<u8, Vec<IpAddr>> = BTreeMap::new();
        for op in ops {
            match op {
                Op::Add(n) => {
                    let reserved = ledger.change(&[Change::Reserve(owner(n), blocks(), Wishes::default())], 0).remove(0);
                    if let Ok(Some(lease)) = reserved
                        && ledger.change(&[Change::Commit(owner(n))], 0).remove(0).is_ok()
                    {
                        acknowledged.insert(n, lease.addresses);
                    }
                }
                Op::Del(n) => {
                    if ledger.change(&[Change::Release(owner(n))], 0).remove(0).is_ok() {
                        acknowledged.remove(&n);
                    } else {
                        // The interface is gone, the lease may be on disk or not: both are safe.
                        acknowledged.remove(&n);
                    }
                }
                Op::Crash(bytes) => {
                    disk.allow(bytes);
                    for n in 20..24 {
                        let _ = ledger.change(&[Change::Reserve(owner(n), blocks(), Wishes::default())], 0);
                        let _ = ledger.change(&[Change::Commit(owner(n))], 0);
                        let _ = ledger.change(&[Change::Release(owner(n))], 0);
                    }
                    disk.allow(usize::MAX);
                    ledger = open(&disk, "boot");
                }
            }
            assert_no_address_twice(ledger.pool());
            for (n, addresses) in &acknowledged {
                let lease = ledger.pool().lease(&owner(*n));
                prop_assert_eq!(lease.map(|l| &l.addresses), Some(addresses));
            }
        }
    }
}

#[test]
fn a_failed_write_changes_nothing_and_the_next_one_repairs_the_file() {
    let disk = Disk::default();
    disk.allow(usize::MAX);
    let mut ledger = open(&disk, "boot");
    ledger.change(
        &[Change::Reserve(owner(1), blocks(), Wishes::default()), Change::Commit(owner(1))],
        0,
    );
    disk.allow(10);
    let failed =
        ledger.change(&[Change::Reserve(owner(2), blocks(), Wishes::default())], 0).remove(0);
    assert!(matches!(failed, Err(LedgerError::Journal(_))));
    assert!(ledger.pool().lease(&owner(2)).is_none());
    disk.allow(usize::MAX);
    ledger.change(&[Change::Reserve(owner(3), blocks(), Wishes::default())], 0).remove(0).unwrap();
    let again = open(&disk, "boot");
    assert_eq!(again.pool().leases().len(), 2);
    assert!(again.pool().lease(&owner(1)).unwrap().committed);
    assert!(!again.pool().lease(&owner(3)).unwrap().committed);
}

#[test]
fn a_reboot_frees_everything_and_damage_is_counted() {
    let disk = Disk::default();
    disk.allow(usize::MAX);
    let mut ledger = open(&disk, "boot-1");
    ledger.change(
        &[Change::Reserve(owner(1), blocks(), Wishes::default()), Change::Commit(owner(1))],
        0,
    );
    disk.0.lock().unwrap().0.extend_from_slice(b"garbage\n{\"half\":");
    let (same, damaged) = Ledger::open(Box::new(disk.clone()), "boot-1").unwrap();
    assert_eq!((same.pool().leases().len(), damaged), (1, 1));
    assert!(open(&disk, "boot-2").pool().leases().is_empty());
}

#[test]
fn the_journal_stays_small() {
    let disk = Disk::default();
    disk.allow(usize::MAX);
    let mut ledger = open(&disk, "boot");
    for n in 0..6000u64 {
        ledger.change(&[Change::Reserve(owner(1), blocks(), Wishes::default())], n * 100);
        ledger.change(&[Change::Commit(owner(1)), Change::Release(owner(1))], n * 100);
    }
    let lines = disk.0.lock().unwrap().0.iter().filter(|b| **b == b'\n').count();
    assert!(lines <= 1100, "{lines} lines");
}

#[tokio::test]
async fn callers_at_the_same_time_get_different_addresses() {
    let disk = Disk::default();
    disk.allow(usize::MAX);
    let handle = LedgerHandle::start(open(&disk, "boot")).unwrap();
    let blocks: Arc<[IpNet]> = vec!["10.0.0.0/24".parse().unwrap()].into();
    let calls = (0..100).map(|n| {
        let (handle, blocks) = (handle.clone(), Arc::clone(&blocks));
        tokio::spawn(async move {
            handle.change(Change::Reserve(owner(n), blocks, Wishes::default())).await
        })
    });
    let mut seen = HashSet::new();
    for call in calls.collect::<Vec<_>>() {
        seen.insert(call.await.unwrap().unwrap().unwrap().addresses[0]);
    }
    assert_eq!(seen.len(), 100);
    assert_eq!(handle.ask(|pool| pool.leases().len()).await.unwrap(), 100);
}
