//! ipBlocks: which of them an address is in, by the longest range around it.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use k8s_openapi::api::networking::v1::IPBlock;

/// Every range that some ipBlock names, and the class of its addresses: the ipBlocks that they are in.
pub(super) struct Blocks {
    classes: BTreeMap<IpNet, String>,
    /// Classes of each ipBlock, by its text.
    members: BTreeMap<String, BTreeSet<String>>,
}

/// An ipBlock that makes sense.
struct Block {
    text: String,
    range: IpNet,
    except: Vec<IpNet>,
}

impl Block {
    fn of(block: &IPBlock) -> Option<Self> {
        let parse = |text: &String| text.parse::<IpNet>().ok().map(|net| net.trunc());
        let range = parse(&block.cidr)?;
        let mut except: Vec<IpNet> = block.except.iter().flatten().filter_map(parse).collect();
        except.sort_unstable();
        let text = match except.as_slice() {
            [] => format!("addresses in {range}"),
            some => {
                let all: Vec<String> = some.iter().map(ToString::to_string).collect();
                format!("addresses in {range} except {}", all.join(","))
            }
        };
        Some(Self { text, range, except })
    }
}

impl Blocks {
    pub(super) fn of<'a>(blocks: impl Iterator<Item = &'a IPBlock>) -> Self {
        let blocks: BTreeMap<String, Block> =
            blocks.filter_map(Block::of).map(|block| (block.text.clone(), block)).collect();
        // Where each block begins and where it is interrupted.
        let mut named: BTreeMap<IpNet, (BTreeSet<&str>, BTreeSet<&str>)> = BTreeMap::new();
        for block in blocks.values() {
            named.entry(block.range).or_default().0.insert(&block.text);
            for hole in &block.except {
                named.entry(*hole).or_default().1.insert(&block.text);
            }
        }
        let mut classes = BTreeMap::new();
        let mut members: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for range in named.keys() {
            let around = (0..=range.prefix_len())
                .filter_map(|length| IpNet::new(range.addr(), length).ok())
                .filter_map(|net| named.get(&net.trunc()));
            let mut inside: BTreeSet<&str> = BTreeSet::new();
            let mut outside: BTreeSet<&str> = BTreeSet::new();
            for (begin, interrupted) in around {
                inside.extend(begin);
                outside.extend(interrupted);
            }
            let inside: Vec<&str> = inside.difference(&outside).copied().collect();
            let class = inside.join(" and ");
            for text in inside {
                members.entry(text.to_owned()).or_default().insert(class.clone());
            }
            classes.insert(*range, class);
        }
        Self { classes, members }
    }

    /// The classes whose addresses are in the block.
    pub(super) fn containing(&self, block: &IPBlock) -> impl Iterator<Item = &str> {
        let text = Block::of(block).map(|block| block.text);
        let members = text.and_then(|text| self.members.get(&text));
        members.into_iter().flatten().map(String::as_str)
    }

    /// Ranges and their classes. A class without blocks is an empty text.
    pub(super) fn classes(&self) -> impl Iterator<Item = (IpNet, &str)> {
        self.classes.iter().map(|(net, class)| (*net, class.as_str()))
    }

    /// The classes that have blocks.
    pub(super) fn texts(&self) -> impl Iterator<Item = &str> {
        self.members.values().flatten().map(String::as_str)
    }
}
