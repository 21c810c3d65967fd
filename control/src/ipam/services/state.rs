//! The pools behind the assigner: one per service range, one per transport protocol.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::super::families::Family;
use super::super::pool::{Pool, Refusal};
use super::Item;

#[derive(Debug)]
pub(super) struct State {
    pub(super) ranges: Vec<AddressRange>,
    pub(super) node_ports: (u16, u16),
    pub(super) ports: [Pool; 3],
}

#[derive(Debug)]
pub(super) struct AddressRange {
    pub(super) net: IpNet,
    pub(super) pool: Pool,
}

impl State {
    pub(super) fn families(&self) -> Vec<Family> {
        let mut families = Vec::new();
        for range in &self.ranges {
            if !families.contains(&range.family()) {
                families.push(range.family());
            }
        }
        families
    }

    pub(super) fn take(&mut self, item: Item, owner: &str) -> Result<bool, Refusal> {
        match item {
            Item::Address(address) => {
                let found =
                    self.ranges.iter_mut().find_map(|r| Some((r.number(address)?, &mut r.pool)));
                let (number, pool) = found.ok_or(Refusal::OutOfRange)?;
                pool.take(number, owner)
            }
            Item::Port(protocol, port) => self.ports[protocol as usize].take(port.into(), owner),
        }
    }

    pub(super) fn free(&mut self, item: Item, owner: &str) {
        match item {
            Item::Address(address) => {
                for range in &mut self.ranges {
                    if let Some(number) = range.number(address) {
                        range.pool.free(number, owner);
                    }
                }
            }
            Item::Port(protocol, port) => self.ports[protocol as usize].free(port.into(), owner),
        }
    }
}

impl AddressRange {
    /// More than this many addresses of one range are never used: it bounds the memory of a huge IPv6 range.
    const MAX_BITS: u8 = 20;

    pub(super) fn new(net: &IpNet) -> Self {
        let bits = (net.max_prefix_len() - net.prefix_len()).min(Self::MAX_BITS);
        let size = 1_u32 << bits;
        // The network address is never used; nor is what old IPv4 stacks take for a broadcast.
        let last = if net.addr().is_ipv4() { size.saturating_sub(2) } else { size - 1 };
        let band = if size > 32 { (size / 16).clamp(16, 256) } else { 1 };
        Self { net: net.trunc(), pool: Pool::new(1, last, band) }
    }

    pub(super) fn family(&self) -> Family {
        Family::of(self.net.addr())
    }

    pub(super) fn number(&self, address: IpAddr) -> Option<u32> {
        if !self.net.contains(&address) {
            return None;
        }
        match (self.net.network(), address) {
            (IpAddr::V4(n), IpAddr::V4(a)) => Some(u32::from(a) - u32::from(n)),
            (IpAddr::V6(n), IpAddr::V6(a)) => u32::try_from(u128::from(a) - u128::from(n)).ok(),
            _ => None,
        }
    }

    pub(super) fn address(&self, number: u32) -> IpAddr {
        match self.net.network() {
            IpAddr::V4(n) => Ipv4Addr::from(u32::from(n) + number).into(),
            IpAddr::V6(n) => Ipv6Addr::from(u128::from(n) + u128::from(number)).into(),
        }
    }
}
