//! Which address goes to whom: pure, the clock is an argument.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use mesh_cni::wire::{Owner, Wishes};
use serde::{Deserialize, Serialize};

/// An address that was released rests for so long while others are free: somebody may still be talking to it.
pub const REST_SECS: u64 = 60;
/// Host numbers 0 (network) and 1 (the node itself) are never handed out.
const FIRST_HOST: u128 = 2;

/// Nobody needs more in the time that it takes to get another block.
const MANY_LEFT: u128 = 32;

/// What an owner has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Its addresses, at most one for each family, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// Whether the interface was made. An agent that starts takes back what was not.
    pub committed: bool,
    /// What was asked for beyond addresses.
    #[serde(default, skip_serializing_if = "Wishes::is_none")]
    pub wishes: Wishes,
}

/// No lease was made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    /// The owner has an interface already.
    #[error("the interface exists already")]
    Exists,
    /// Every address of a family is in use.
    #[error("no IP addresses available in {blocks}")]
    Exhausted {
        /// The blocks that are full.
        blocks: String,
    },
    /// An address that was asked for belongs to somebody else.
    #[error("address {0} is in use")]
    InUse(IpAddr),
    /// An address that was asked for is not one that this node hands out.
    #[error("address {0} is not one of this node's")]
    Elsewhere(IpAddr),
    /// The node has no block.
    #[error("the node has no addresses yet")]
    NoBlock,
}

/// The leases of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pool {
    leases: BTreeMap<Owner, Lease>,
    /// Owners by address: the guard against giving one out twice.
    used: HashMap<IpAddr, Owner>,
    /// When addresses were released, in seconds.
    resting: HashMap<IpAddr, u64>,
    /// The host number to try next, by block.
    next: HashMap<IpNet, u128>,
}

/// What an owner had at some time, to return to.
#[derive(Debug)]
pub(super) struct Mark {
    owner: Owner,
    lease: Option<Lease>,
}

impl Pool {
    /// Notes what the owner has.
    pub(super) fn mark(&self, owner: &Owner) -> Mark {
        Mark { owner: owner.clone(), lease: self.leases.get(owner).cloned() }
    }

    /// Gives the owner what it had. Which address is tried next is not taken back.
    pub(super) fn return_to(&mut self, mark: Mark) {
        if let Some(lease) = self.leases.remove(&mark.owner) {
            lease.addresses.iter().for_each(|address| drop(self.used.remove(address)));
        }
        if let Some(lease) = mark.lease {
            self.insert(mark.owner, lease);
        }
    }

    /// Leases an address of each family that `blocks` has. An owner with an uncommitted lease gets the same again.
    pub fn reserve(
        &mut self,
        owner: &Owner,
        blocks: &[IpNet],
        now_secs: u64,
    ) -> Result<Lease, ReserveError> {
        self.reserve_as(owner, blocks, &Wishes::default(), now_secs)
    }

    /// The same, for an owner with wishes: addresses that are asked for are leased, rested or not, or nothing is.
    pub fn reserve_as(
        &mut self,
        owner: &Owner,
        blocks: &[IpNet],
        wishes: &Wishes,
        now_secs: u64,
    ) -> Result<Lease, ReserveError> {
        match self.leases.get_mut(owner) {
            Some(lease) if lease.committed => return Err(ReserveError::Exists),
            Some(lease) if wishes.addresses.iter().all(|a| lease.addresses.contains(a)) => {
                lease.wishes = wishes.clone();
                return Ok(lease.clone());
            }
            Some(_) => drop(self.release(owner, now_secs)),
            None => {}
        }
        self.resting.retain(|_, released| released.saturating_add(REST_SECS) > now_secs);
        let (v4, v6): (Vec<&IpNet>, Vec<&IpNet>) =
            blocks.iter().partition(|block| matches!(block, IpNet::V4(_)));
        let mut picked = vec![];
        for &wanted in &wishes.addresses {
            self.check_wanted(wanted, blocks)?;
        }
        for family in [v4, v6].iter().filter(|family| !family.is_empty()) {
            let wanted = wishes.addresses.iter().find_map(|wanted| {
                Some((**family.iter().find(|block| block.contains(wanted))?, *wanted))
            });
            if let Some(wanted) = wanted {
                picked.push(wanted);
                continue;
            }
            let found = family.iter().find_map(|block| self.fresh(block));
            let address = found.or_else(|| self.rested_longest(family)).ok_or_else(|| {
                let blocks: Vec<String> = family.iter().map(ToString::to_string).collect();
                ReserveError::Exhausted { blocks: blocks.join(", ") }
            })?;
            picked.push(address);
        }
        if picked.is_empty() {
            return Err(ReserveError::NoBlock);
        }
        let lease = Lease {
            addresses: picked.iter().map(|(_, a)| *a).collect(),
            committed: false,
            wishes: wishes.clone(),
        };
        for (block, address) in picked.into_iter().filter(|(_, a)| !wishes.addresses.contains(a)) {
            self.next.insert(block, host_number(&block, address) + 1);
        }
        self.insert(owner.clone(), lease.clone());
        Ok(lease)
    }

    fn check_wanted(&self, wanted: IpAddr, blocks: &[IpNet]) -> Result<(), ReserveError> {
        let block = blocks.iter().find(|block| block.contains(&wanted));
        let block = block.ok_or(ReserveError::Elsewhere(wanted))?;
        if !(FIRST_HOST..=last_host(block)).contains(&host_number(block, wanted)) {
            return Err(ReserveError::Elsewhere(wanted));
        }
        if self.used.contains_key(&wanted) { Err(ReserveError::InUse(wanted)) } else { Ok(()) }
    }

    /// Marks a lease as in use. False when there is none.
    pub fn commit(&mut self, owner: &Owner) -> bool {
        match self.leases.get_mut(owner) {
            Some(lease) => {
                lease.committed = true;
                true
            }
            None => false,
        }
    }

    /// Marks a lease as no longer in use; nothing when there was none. Its addresses stay reserved.
    pub fn retire(&mut self, owner: &Owner) -> Option<Lease> {
        let lease = self.leases.get_mut(owner)?;
        lease.committed = false;
        Some(lease.clone())
    }

    /// Ends a lease; nothing when there was none.
    pub fn release(&mut self, owner: &Owner, now_secs: u64) -> Option<Lease> {
        let lease = self.leases.remove(owner)?;
        for address in &lease.addresses {
            self.used.remove(address);
            self.resting.insert(*address, now_secs);
        }
        Some(lease)
    }

    /// Puts back a lease that an interface proves. Refused, with the other's name, when an address is somebody else's.
    pub fn adopt(&mut self, owner: Owner, lease: Lease) -> Result<(), Owner> {
        let taken = lease.addresses.iter().find_map(|a| self.used.get(a).filter(|o| **o != owner));
        if let Some(other) = taken {
            return Err(other.clone());
        }
        self.release(&owner, 0);
        self.insert(owner, lease);
        Ok(())
    }

    /// The owner's lease.
    pub fn lease(&self, owner: &Owner) -> Option<&Lease> {
        self.leases.get(owner)
    }

    /// All leases, by owner.
    pub fn leases(&self) -> &BTreeMap<Owner, Lease> {
        &self.leases
    }

    /// Whether so few addresses of a family are left that the node should have another block.
    pub fn is_nearly_full(&self, blocks: &[IpNet]) -> bool {
        [true, false].into_iter().any(|v4| {
            let family = || blocks.iter().filter(|block| block.addr().is_ipv4() == v4);
            let size = |block: &IpNet| (last_host(block) + 1).saturating_sub(FIRST_HOST);
            let all: u128 = family().map(size).fold(0, u128::saturating_add);
            let used = self.used.keys().filter(|a| family().any(|block| block.contains(*a)));
            let free = all.saturating_sub(used.count() as u128);
            family().next().is_some() && free < (all / 16).clamp(1, MANY_LEFT)
        })
    }

    /// Whether a new owner would get addresses.
    pub fn has_room(&self, blocks: &[IpNet], now_secs: u64) -> Result<(), ReserveError> {
        let nobody = Owner { container: String::new(), interface: String::new() };
        self.clone().reserve(&nobody, blocks, now_secs).map(drop)
    }

    fn insert(&mut self, owner: Owner, lease: Lease) {
        for address in &lease.addresses {
            self.used.insert(*address, owner.clone());
            self.resting.remove(address);
        }
        self.leases.insert(owner, lease);
    }

    /// The next address of the block that is neither in use nor resting.
    fn fresh(&self, block: &IpNet) -> Option<(IpNet, IpAddr)> {
        let last = last_host(block);
        let span = last.checked_sub(FIRST_HOST)?.saturating_add(1);
        let start = self.next.get(block).copied().unwrap_or(FIRST_HOST);
        let start = if start > last { FIRST_HOST } else { start };
        // Among one candidate more than there are addresses that cannot be taken, one can.
        let tries = span.min((self.used.len() + self.resting.len()) as u128 + 1);
        (0..tries)
            .map(|i| address_at(block, FIRST_HOST + (start - FIRST_HOST + i) % span))
            .find(|a| !self.used.contains_key(a) && !self.resting.contains_key(a))
            .map(|address| (*block, address))
    }

    fn rested_longest(&self, blocks: &[&IpNet]) -> Option<(IpNet, IpAddr)> {
        let candidates = self.resting.iter().filter_map(|(address, released)| {
            let block = blocks.iter().find(|block| block.contains(address))?;
            let host = host_number(block, *address);
            (FIRST_HOST..=last_host(block))
                .contains(&host)
                .then_some((*released, *address, **block))
        });
        candidates.min().map(|(_, address, block)| (block, address))
    }
}

/// The highest host number that may be handed out: in IPv4 the last address is for broadcasts.
fn last_host(block: &IpNet) -> u128 {
    let bits = u32::from(block.max_prefix_len() - block.prefix_len());
    let all = if bits >= 128 { u128::MAX } else { (1u128 << bits) - 1 };
    if matches!(block, IpNet::V4(_)) { all.saturating_sub(1) } else { all }
}

fn address_at(block: &IpNet, host: u128) -> IpAddr {
    match block.network() {
        IpAddr::V4(a) => {
            let host = u32::try_from(host).expect("a host number of an IPv4 block");
            Ipv4Addr::from(u32::from(a) + host).into()
        }
        IpAddr::V6(a) => Ipv6Addr::from(u128::from(a) + host).into(),
    }
}

fn host_number(block: &IpNet, address: IpAddr) -> u128 {
    match (block.network(), address) {
        (IpAddr::V4(n), IpAddr::V4(a)) => u128::from(u32::from(a).wrapping_sub(u32::from(n))),
        (IpAddr::V6(n), IpAddr::V6(a)) => u128::from(a).wrapping_sub(u128::from(n)),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(n: usize) -> Owner {
        Owner { container: format!("c{n}"), interface: "eth0".into() }
    }

    fn blocks(list: &[&str]) -> Vec<IpNet> {
        list.iter().map(|b| b.parse().unwrap()).collect()
    }

    #[test]
    fn reserved_addresses_are_never_handed_out() {
        let (mut pool, blocks) = (Pool::default(), blocks(&["10.0.0.0/29", "fd00::/64"]));
        let mut seen = vec![];
        for n in 0..5 {
            seen.push(pool.reserve(&owner(n), &blocks, 0).unwrap().addresses[0].to_string());
        }
        assert_eq!(seen, ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"]);
        let full = pool.reserve(&owner(5), &blocks, 0).unwrap_err();
        assert!(full.to_string().contains("no IP addresses available"), "{full}");
        assert_eq!(pool.leases().len(), 5);
        assert_eq!(pool.has_room(&blocks, 0), Err(full));
    }

    #[test]
    fn released_addresses_rest_while_others_are_free() {
        let (mut pool, blocks) = (Pool::default(), blocks(&["10.0.0.0/29"]));
        let first = pool.reserve(&owner(0), &blocks, 100).unwrap();
        pool.release(&owner(0), 100);
        for n in 1..5 {
            assert_ne!(pool.reserve(&owner(n), &blocks, 110).unwrap(), first);
        }
        assert_eq!(
            pool.reserve(&owner(5), &blocks, 110).unwrap(),
            first,
            "the last one, tired or not"
        );
    }

    #[test]
    fn a_second_block_serves_when_the_first_is_full() {
        let (mut pool, blocks) = (Pool::default(), blocks(&["10.0.0.0/30", "10.1.0.0/30"]));
        let pick = |pool: &mut Pool, n| pool.reserve(&owner(n), &blocks, 0).unwrap().addresses;
        assert_eq!(pick(&mut pool, 0)[0].to_string(), "10.0.0.2");
        assert_eq!(pick(&mut pool, 1)[0].to_string(), "10.1.0.2");
        assert!(pool.reserve(&owner(2), &blocks, 0).is_err());
        for tiny in ["10.0.0.0/31", "10.0.0.0/32", "fd00::/128", "fd00::/127"] {
            let block = [tiny.parse().unwrap()];
            assert!(Pool::default().reserve(&owner(0), &block, 0).is_err(), "{tiny}");
        }
        assert!(Pool::default().reserve(&owner(0), &["::/0".parse().unwrap()], 0).is_ok());
    }

    #[test]
    fn addresses_that_are_asked_for_are_given_or_refused() {
        let (mut pool, blocks) = (Pool::default(), blocks(&["10.0.0.0/29", "fd00::/64"]));
        let wish =
            |text: &str| Wishes { addresses: vec![text.parse().unwrap()], ..Wishes::default() };
        let lease = pool.reserve_as(&owner(0), &blocks, &wish("10.0.0.4"), 0).unwrap();
        assert_eq!(lease.addresses[0].to_string(), "10.0.0.4");
        assert_eq!(lease.addresses.len(), 2, "the other family as usual");
        for (text, refused) in [
            ("10.0.0.4", ReserveError::InUse("10.0.0.4".parse().unwrap())),
            ("10.0.1.4", ReserveError::Elsewhere("10.0.1.4".parse().unwrap())),
            ("10.0.0.1", ReserveError::Elsewhere("10.0.0.1".parse().unwrap())),
            ("10.0.0.7", ReserveError::Elsewhere("10.0.0.7".parse().unwrap())),
        ] {
            assert_eq!(pool.reserve_as(&owner(1), &blocks, &wish(text), 0), Err(refused));
        }
        assert_eq!(pool.leases().len(), 1);
        for n in 2..6 {
            let other = pool.reserve(&owner(n), &blocks, 0).unwrap();
            assert_ne!(other.addresses[0], lease.addresses[0]);
        }
        assert!(pool.reserve(&owner(6), &blocks, 0).is_err(), "it was one of the five");
        pool.release(&owner(0), 0);
        assert!(pool.reserve_as(&owner(7), &blocks, &wish("10.0.0.4"), 1).is_ok(), "also unrested");
    }

    #[test]
    fn another_block_is_asked_for_before_the_last_address_is_gone() {
        let (mut pool, one) = (Pool::default(), blocks(&["10.0.0.0/26", "fd00::/64"]));
        let mut asked = 0;
        for n in 0..61 {
            asked += usize::from(pool.is_nearly_full(&one));
            pool.reserve(&owner(n), &one, 0).unwrap();
        }
        assert_eq!(asked, 2, "61 addresses; with two left, and with one");
        assert!(pool.is_nearly_full(&one));
        assert!(!pool.is_nearly_full(&blocks(&["10.0.0.0/26", "10.0.1.0/26", "fd00::/64"])));
        assert!(!pool.is_nearly_full(&[]), "a node without blocks gets its first unasked");
    }

    #[test]
    fn an_owner_has_one_lease() {
        let (mut pool, blocks) = (Pool::default(), blocks(&["10.0.0.0/24"]));
        let lease = pool.reserve(&owner(0), &blocks, 0).unwrap();
        assert_eq!(pool.reserve(&owner(0), &blocks, 0).unwrap(), lease, "tried again");
        assert!(pool.commit(&owner(0)));
        assert_eq!(pool.reserve(&owner(0), &blocks, 0), Err(ReserveError::Exists));
        assert_eq!(pool.adopt(owner(1), lease), Err(owner(0)));
        assert!(!pool.commit(&owner(1)));
    }
}
