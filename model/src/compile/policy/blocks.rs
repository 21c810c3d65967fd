//! ipBlocks: which of them an address is in, by the longest range around it.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use k8s_openapi::api::networking::v1::IPBlock;

use super::counted::Counted;

/// The ipBlocks of the policies that apply on this node: every range that one of them names, and the class of its addresses,
/// which is the ipBlocks that they are in.
#[derive(Default)]
pub(super) struct Blocks {
    named: Counted<String>,
    blocks: BTreeMap<String, Block>,
    classes: BTreeMap<IpNet, String>,
    /// Classes of each ipBlock, by its text.
    members: BTreeMap<String, BTreeSet<String>>,
}

/// An ipBlock that makes sense.
pub(super) struct Block {
    text: String,
    range: IpNet,
    except: Vec<IpNet>,
}

/// What changed.
#[derive(Default)]
pub(super) struct Redrawn {
    /// Whether any range means something else.
    pub(super) any: bool,
    /// Classes that had no ranges before, and those that have none any more.
    pub(super) come: Vec<String>,
    pub(super) gone: Vec<String>,
    /// ipBlocks that consist of other classes.
    pub(super) blocks: BTreeSet<String>,
}

impl Block {
    pub(super) fn of(block: &IPBlock) -> Option<Self> {
        let parse = |text: &String| text.parse::<IpNet>().ok().map(|net| net.trunc());
        let range = parse(&block.cidr)?;
        // Without an exception that nobody can read the block would be wider than was meant.
        let except: Option<Vec<IpNet>> = block.except.iter().flatten().map(parse).collect();
        let mut except = except?;
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

    pub(super) fn text(&self) -> &str {
        &self.text
    }
}

impl Blocks {
    /// Somebody names a block.
    pub(super) fn add(&mut self, block: Block) {
        self.named.add(block.text.clone());
        self.blocks.entry(block.text.clone()).or_insert(block);
    }

    /// Somebody names it no more.
    pub(super) fn remove(&mut self, text: &String) {
        self.named.remove(text);
    }

    /// What changed since the last time. Costs nothing while the same blocks are named, and otherwise all of them: they are
    /// those of the node's own policies.
    pub(super) fn settle(&mut self) -> Redrawn {
        let named = self.named.settle();
        if named.come.is_empty() && named.gone.is_empty() {
            return Redrawn::default();
        }
        self.blocks.retain(|text, _| self.named.has(text));
        let (classes, members) = draw(self.blocks.values());
        let classes = std::mem::replace(&mut self.classes, classes);
        let members = std::mem::replace(&mut self.members, members);
        let [before, now] = [&members, &self.members].map(texts);
        let differ = |text: &&String| members.get(*text) != self.members.get(*text);
        Redrawn {
            any: classes != self.classes,
            come: now.difference(&before).map(|class| (*class).clone()).collect(),
            gone: before.difference(&now).map(|class| (*class).clone()).collect(),
            blocks: members.keys().chain(self.members.keys()).filter(differ).cloned().collect(),
        }
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
}

/// The classes that have blocks.
fn texts(members: &BTreeMap<String, BTreeSet<String>>) -> BTreeSet<&String> {
    members.values().flatten().collect()
}

type Drawn = (BTreeMap<IpNet, String>, BTreeMap<String, BTreeSet<String>>);

/// The class of each range, and the classes of each block.
fn draw<'a>(blocks: impl Iterator<Item = &'a Block>) -> Drawn {
    // Where each block begins and where it is interrupted.
    let mut named: BTreeMap<IpNet, (BTreeSet<&str>, BTreeSet<&str>)> = BTreeMap::new();
    for block in blocks {
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
    (classes, members)
}
