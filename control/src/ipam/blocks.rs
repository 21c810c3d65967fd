//! The pod blocks of nodes: one block of each family per node, with one number for both.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh_model::ClusterConfig;

/// A node carries a block that belongs to another node, or lies outside the cluster's ranges.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BlockConflict {
    /// The block overlaps one of `other`.
    #[error("pod block {block} of node {node} is also a block of node {other}")]
    Taken {
        /// The node that asks.
        node: String,
        /// The node that had it before.
        other: String,
        /// The block.
        block: IpNet,
    },
    /// The block is not one of the blocks that the cluster's ranges are cut into.
    #[error("pod block {block} of node {node} is not a block of the cluster's pod ranges")]
    Foreign {
        /// The node that carries it.
        node: String,
        /// The block.
        block: IpNet,
    },
    /// Every block has an owner.
    #[error("no free pod block for node {node}: all {total} blocks are taken")]
    Full {
        /// The node that asks.
        node: String,
        /// How many blocks there are.
        total: u32,
    },
}

/// Which node owns which block number; block `n` of every family belongs to the same node.
///
/// Numbers that were never used come first, in order, then those freed longest ago: traffic and caches
/// that still mean a deleted node meet nobody for as long as possible.
#[derive(Debug)]
pub struct NodeBlocks {
    ranges: Vec<Range>,
    total: u32,
    owners: BTreeMap<u32, String>,
    numbers: BTreeMap<String, BTreeSet<u32>>,
    freed: VecDeque<u32>,
}

#[derive(Debug, Clone, Copy)]
struct Range {
    net: IpNet,
    block_prefix: u8,
}

impl NodeBlocks {
    /// All blocks of the cluster's pod ranges, free. Ranges smaller than a block give none.
    pub fn new(cluster: &ClusterConfig) -> Self {
        let ranges: Vec<Range> = cluster
            .pod_cidrs
            .iter()
            .map(|net| Range {
                net: net.trunc(),
                block_prefix: match net {
                    IpNet::V4(_) => cluster.node_prefix_v4,
                    IpNet::V6(_) => cluster.node_prefix_v6,
                },
            })
            .collect();
        let total = ranges.iter().map(Range::count).min().unwrap_or(0);
        Self {
            ranges,
            total,
            owners: BTreeMap::new(),
            numbers: BTreeMap::new(),
            freed: VecDeque::new(),
        }
    }

    /// Notes the blocks that `node` already carries. Call for all stored nodes before the first [`assign`](Self::assign).
    pub fn observe(&mut self, node: &str, blocks: &[IpNet]) -> Result<(), BlockConflict> {
        let mut result = Ok(());
        for block in blocks {
            let Some(number) = self.ranges.iter().find_map(|range| range.number(block)) else {
                result = Err(BlockConflict::Foreign { node: node.to_owned(), block: *block });
                continue;
            };
            match self.owners.get(&number) {
                Some(other) if other != node => {
                    result = Err(BlockConflict::Taken {
                        node: node.to_owned(),
                        other: other.clone(),
                        block: *block,
                    });
                }
                _ => self.own(number, node),
            }
        }
        result
    }

    /// The blocks of `node`: those it has, or newly assigned ones, in the order of the cluster's ranges.
    pub fn assign(&mut self, node: &str) -> Result<Vec<IpNet>, BlockConflict> {
        let current = self.numbers.get(node).and_then(|numbers| numbers.first().copied());
        let number = match current {
            Some(number) => number,
            None => self
                .pick()
                .ok_or_else(|| BlockConflict::Full { node: node.to_owned(), total: self.total })?,
        };
        self.own(number, node);
        Ok(self.ranges.iter().map(|range| range.block(number)).collect())
    }

    /// The blocks of `node`, after it was given more until it has `count` of each family; fewer when there are no more. The order
    /// is that of assignment, so that what it had comes first.
    pub fn assign_up_to(&mut self, node: &str, count: usize) -> Result<Vec<IpNet>, BlockConflict> {
        self.assign(node)?;
        while self.count(node) < count {
            let Some(number) = self.pick() else { break };
            self.own(number, node);
        }
        let numbers = self.numbers.get(node).into_iter().flatten();
        Ok(numbers.flat_map(|n| self.ranges.iter().map(|range| range.block(*n))).collect())
    }

    /// How many blocks of each family the node has.
    pub fn count(&self, node: &str) -> usize {
        self.numbers.get(node).map_or(0, BTreeSet::len)
    }

    /// Frees all blocks of a deleted node.
    pub fn release(&mut self, node: &str) {
        for number in self.numbers.remove(node).unwrap_or_default() {
            self.owners.remove(&number);
            self.freed.push_back(number);
        }
    }

    fn own(&mut self, number: u32, node: &str) {
        self.freed.retain(|n| *n != number);
        self.owners.insert(number, node.to_owned());
        self.numbers.entry(node.to_owned()).or_default().insert(number);
    }

    fn pick(&mut self) -> Option<u32> {
        let freed: BTreeSet<u32> = self.freed.iter().copied().collect();
        (0..self.total)
            .find(|n| !self.owners.contains_key(n) && !freed.contains(n))
            .or_else(|| self.freed.pop_front())
    }
}

impl Range {
    fn count(&self) -> u32 {
        match self.block_prefix.checked_sub(self.net.prefix_len()) {
            Some(bits) if self.block_prefix <= self.net.max_prefix_len() => 1 << bits.min(24),
            _ => 0,
        }
    }

    fn block(&self, number: u32) -> IpNet {
        let shift = self.net.max_prefix_len() - self.block_prefix;
        let offset = u128::from(number).checked_shl(shift.into()).unwrap_or(0);
        let address: IpAddr = match self.net.network() {
            IpAddr::V4(a) => Ipv4Addr::from((u128::from(u32::from(a)) + offset) as u32).into(),
            IpAddr::V6(a) => Ipv6Addr::from(u128::from(a) + offset).into(),
        };
        match address {
            IpAddr::V4(a) => Ipv4Net::new(a, self.block_prefix).map(IpNet::V4),
            IpAddr::V6(a) => Ipv6Net::new(a, self.block_prefix).map(IpNet::V6),
        }
        .expect("a block prefix is at most the length of its family's addresses")
    }

    fn number(&self, block: &IpNet) -> Option<u32> {
        if !self.net.contains(block) || block.prefix_len() != self.block_prefix {
            return None;
        }
        let shift = self.net.max_prefix_len() - self.block_prefix;
        let offset = match (self.net.network(), block.network()) {
            (IpAddr::V4(n), IpAddr::V4(b)) => u128::from(u32::from(b) - u32::from(n)),
            (IpAddr::V6(n), IpAddr::V6(b)) => u128::from(b) - u128::from(n),
            _ => return None,
        };
        u32::try_from(offset.checked_shr(shift.into()).unwrap_or(0)).ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|t| t.parse().unwrap()).collect()
    }

    #[test]
    fn nodes_get_the_same_number_in_both_families() {
        let mut blocks = NodeBlocks::new(&ClusterConfig::default());
        assert_eq!(blocks.assign("a").unwrap(), nets(&["10.244.0.0/24", "fd10:244::/64"]));
        assert_eq!(blocks.assign("b").unwrap(), nets(&["10.244.1.0/24", "fd10:244:0:1::/64"]));
        assert_eq!(blocks.assign("a").unwrap(), nets(&["10.244.0.0/24", "fd10:244::/64"]));
    }

    #[test]
    fn a_node_that_fills_its_block_gets_another_and_keeps_the_first() {
        let cluster = ClusterConfig {
            pod_cidrs: nets(&["10.0.0.0/22", "fd00::/62"]),
            ..ClusterConfig::default()
        };
        let mut blocks = NodeBlocks::new(&cluster);
        let first = blocks.assign("a").unwrap();
        blocks.assign("b").unwrap();
        let two = blocks.assign_up_to("a", 2).unwrap();
        assert_eq!(two, [first, nets(&["10.0.2.0/24", "fd00:0:0:2::/64"])].concat());
        assert_eq!(blocks.assign_up_to("a", 2).unwrap(), two, "asked again");
        assert_eq!(blocks.assign_up_to("a", 1).unwrap(), two, "nothing is taken away");
        assert_eq!(blocks.assign_up_to("a", 9).unwrap().len(), 6, "all that there were");
        assert!(blocks.assign("c").is_err());
        blocks.release("a");
        assert!(blocks.assign("c").is_ok());
    }

    #[test]
    fn a_freed_block_is_the_last_to_be_used_again() {
        let cluster =
            ClusterConfig { pod_cidrs: nets(&["10.0.0.0/22"]), ..ClusterConfig::default() };
        let mut blocks = NodeBlocks::new(&cluster);
        for node in ["a", "b", "c"] {
            blocks.assign(node).unwrap();
        }
        blocks.release("b");
        blocks.release("a");
        assert_eq!(blocks.assign("d").unwrap(), nets(&["10.0.3.0/24"]));
        assert_eq!(blocks.assign("e").unwrap(), nets(&["10.0.1.0/24"]));
        assert_eq!(blocks.assign("f").unwrap(), nets(&["10.0.0.0/24"]));
        assert!(matches!(blocks.assign("g"), Err(BlockConflict::Full { total: 4, .. })));
    }

    #[test]
    fn restart_reads_the_nodes_first_and_reports_what_is_wrong() {
        let mut blocks = NodeBlocks::new(&ClusterConfig::default());
        blocks.observe("a", &nets(&["10.244.0.0/24", "fd10:244::/64"])).unwrap();
        let taken = blocks.observe("b", &nets(&["10.244.0.0/24"]));
        assert!(matches!(taken, Err(BlockConflict::Taken { ref other, .. }) if other == "a"));
        let foreign = blocks.observe("c", &nets(&["192.168.0.0/24"]));
        assert!(matches!(foreign, Err(BlockConflict::Foreign { .. })));
        assert_eq!(blocks.assign("b").unwrap()[0].to_string(), "10.244.1.0/24");
    }

    #[test]
    fn ranges_smaller_than_a_block_give_none() {
        let cluster =
            ClusterConfig { pod_cidrs: nets(&["10.0.0.0/25"]), ..ClusterConfig::default() };
        assert!(NodeBlocks::new(&cluster).assign("a").is_err());
    }

    proptest! {
        #[test]
        fn no_two_nodes_ever_share_a_block(ops in prop::collection::vec((any::<bool>(), 0u8..20), 0..200)) {
            let cluster = ClusterConfig {
                pod_cidrs: nets(&["10.0.0.0/20", "fd00::/60"]), ..ClusterConfig::default()
            };
            let mut blocks = NodeBlocks::new(&cluster);
            let mut held: BTreeMap<String, Vec<IpNet>> = BTreeMap::new();
            for (add, node) in ops {
                let node = node.to_string();
                if add {
                    match blocks.assign(&node) {
                        Ok(nets) => { held.insert(node, nets); }
                        Err(_) => prop_assert_eq!(held.len(), 16),
                    }
                } else {
                    blocks.release(&node);
                    held.remove(&node);
                }
                let all: BTreeSet<IpNet> = held.values().flatten().copied().collect();
                prop_assert_eq!(all.len(), held.len() * 2);
                // A restart that reads the nodes gives everybody the same again.
                let mut again = NodeBlocks::new(&cluster);
                for (node, nets) in &held {
                    again.observe(node, nets).unwrap();
                }
                for (node, nets) in &held {
                    prop_assert_eq!(&again.assign(node).unwrap(), nets);
                }
            }
        }
    }
}
