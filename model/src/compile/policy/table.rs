//! The table that a node enforces, kept entry by entry.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::super::compiler::share;
use super::counted::{Counted, Turnover};
use super::endpoint::Kind;
use super::numbers::Numbers;
use super::rules::{Applied, Other, World};
use super::subjects::Subjects;
use crate::parts::{Element as _, Parts};
use crate::policy::{ANYBODY, OPEN, OTHER_NODE, PodPolicy, PolicySet, Ports, Rule};

/// From so many new kinds of pods on, whole policies are made again. Tests see both ways.
const MANY: usize = if cfg!(test) { 1 } else { 64 };

/// What has a number.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Text {
    /// Other sides: kinds of pods, classes of addresses.
    Other(String),
    /// Policies that apply together.
    Policy(String),
    /// A rule, which is its name.
    Rule(String),
}

impl Text {
    fn as_str(&self) -> &str {
        match self {
            Self::Other(text) | Self::Policy(text) | Self::Rule(text) => text,
        }
    }
}

/// What may be different now.
#[derive(Default)]
pub(super) struct Touched {
    /// Addresses that somebody else has.
    pub(super) addresses: BTreeSet<IpAddr>,
    pub(super) kinds_come: Vec<Arc<Kind>>,
    pub(super) kinds_gone: Vec<Arc<Kind>>,
    /// Namespaces whose labels changed.
    pub(super) namespaces: BTreeSet<String>,
    /// What applies, or did, of which every entry has to be made again.
    pub(super) applied: BTreeSet<String>,
    /// Whether ranges mean something else.
    pub(super) blocks: bool,
    pub(super) classes_come: Vec<String>,
    pub(super) classes_gone: Vec<String>,
}

/// The table and its numbers.
#[derive(Default)]
pub(super) struct Table {
    set: Arc<PolicySet>,
    texts: Counted<Text>,
    numbers: Numbers,
}

impl Table {
    #[cfg(test)]
    pub(super) fn numbered(hash: fn(&str) -> u32) -> Self {
        Self { numbers: Numbers::new(hash), ..Self::default() }
    }

    pub(super) fn set(&self) -> &Arc<PolicySet> {
        &self.set
    }

    /// Something applies that did not. To be followed by [`Table::follow`], as is [`Table::forget`].
    pub(super) fn learn(&mut self, applied: Option<&Applied>) {
        texts(applied).for_each(|text| self.texts.add(text));
    }

    /// Something applies no more.
    pub(super) fn forget(&mut self, applied: Option<&Applied>) {
        texts(applied).for_each(|text| self.texts.remove(&text));
    }

    /// Makes again what was touched.
    pub(super) fn follow(
        &mut self,
        touched: Touched,
        world: World<'_>,
        subjects: &Subjects,
        nodes: &BTreeMap<IpAddr, u32>,
    ) {
        let kind = |kind: &Arc<Kind>| Text::Other(kind.text.clone());
        let class = |class: &String| Text::Other(class.clone());
        let come = touched.kinds_come.iter().map(kind);
        come.chain(touched.classes_come.iter().map(class)).for_each(|text| self.texts.add(text));
        let gone = touched.kinds_gone.iter().map(kind);
        gone.chain(touched.classes_gone.iter().map(class)).for_each(|t| self.texts.remove(&t));
        let turnover = self.texts.settle();
        let mut set = PolicySet::clone(&self.set);
        let moved = self.number(&turnover, &mut set);
        let mut writer = Writer { set: &mut set, numbers: &self.numbers, world, subjects, nodes };
        match (writer.set.active, subjects.is_restricted()) {
            (true, true) if !moved => writer.write(&touched, &turnover),
            (_, true) => writer.write_all(),
            (_, false) => writer.write_nodes(),
        }
        share(&mut self.set, set);
    }

    /// Numbers what came, and takes out of the set what goes with its number. Returns whether anybody else has a new number.
    fn number(&mut self, turnover: &Turnover<Text>, set: &mut PolicySet) -> bool {
        let mut moved = false;
        for text in &turnover.come {
            moved |= self.numbers.add(text.as_str());
        }
        let mut others = BTreeSet::new();
        for text in &turnover.gone {
            let number = self.numbers.of(text.as_str());
            match text {
                Text::Policy(_) => set.rules.replace_part(number, vec![]),
                Text::Other(_) => drop(others.insert(number)),
                Text::Rule(_) => {}
            }
            set.names.remove(&number);
        }
        forget_others(&mut set.rules, &others);
        for text in &turnover.gone {
            moved |= self.numbers.remove(text.as_str());
        }
        moved
    }
}

fn texts(applied: Option<&Applied>) -> impl Iterator<Item = Text> {
    let own = applied.map(|applied| Text::Policy(applied.text.clone()));
    let rules = applied.into_iter().flat_map(|applied| applied.rule_names());
    own.into_iter().chain(rules.map(Text::Rule))
}

/// Takes out what is allowed to those who are there no more.
fn forget_others(rules: &mut Parts<Rule>, gone: &BTreeSet<u32>) {
    let has =
        |part: &[Rule], who: &u32| part.binary_search_by(|rule| rule.identity.cmp(who)).is_ok();
    let parts = rules.parts().filter(|(_, part)| gone.iter().any(|who| has(part, who)));
    let left = |part: &[Rule]| -> Vec<Rule> {
        part.iter().filter(|rule| !gone.contains(&rule.identity)).copied().collect()
    };
    let changed: Vec<(u32, Vec<Rule>)> = parts.map(|(name, part)| (name, left(part))).collect();
    changed.into_iter().for_each(|(name, part)| rules.replace_part(name, part));
}

/// Writes the set.
struct Writer<'a> {
    set: &'a mut PolicySet,
    numbers: &'a Numbers,
    world: World<'a>,
    subjects: &'a Subjects,
    nodes: &'a BTreeMap<IpAddr, u32>,
}

impl Writer<'_> {
    /// Where nothing is restricted, nodes are known and nothing else.
    fn write_nodes(&mut self) {
        let identities = self.nodes.iter().map(|(address, who)| (*address, *who)).collect();
        *self.set = PolicySet { identities, ..PolicySet::default() };
    }

    fn write_all(&mut self) {
        let pods = self.world.crowd.addresses();
        let pods = pods.map(|(address, kind)| (address, self.numbers.of(&kind.text)));
        let nodes = self.nodes.iter().map(|(address, who)| (*address, *who));
        let identities = pods.chain(nodes).collect();
        *self.set = PolicySet { active: true, identities, ..PolicySet::default() };
        self.write_blocks();
        self.write_pods();
        for applied in self.subjects.applied() {
            self.write_policy(applied);
            self.name(&Text::Policy(applied.text.clone()));
            applied.rule_names().for_each(|rule| self.name(&Text::Rule(rule)));
        }
    }

    fn write(&mut self, touched: &Touched, turnover: &Turnover<Text>) {
        for address in &touched.addresses {
            self.write_address(*address);
        }
        if touched.blocks {
            self.write_blocks();
        }
        self.write_pods();
        turnover.come.iter().for_each(|text| self.name(text));
        let (come, relabelled) = (&touched.kinds_come, &touched.namespaces);
        let kinds = relabelled.iter().flat_map(|name| self.world.crowd.kinds(name));
        let moved: BTreeSet<u32> = kinds.map(|kind| self.numbers.of(&kind.text)).collect();
        for applied in self.subjects.applied() {
            if touched.applied.contains(&applied.text) || come.len() > MANY {
                self.write_policy(applied);
                continue;
            }
            if !moved.is_empty() && applied.looks_at_namespaces() {
                self.write_namespaces(applied, relabelled, &moved);
            }
            come.iter().for_each(|kind| self.write_kind(applied, kind));
        }
    }

    fn write_address(&mut self, address: IpAddr) {
        let pod = || Some(self.numbers.of(&self.world.crowd.at(&address)?.text));
        match self.nodes.get(&address).copied().or_else(pod) {
            Some(who) => self.set.identities.insert((address, who)),
            None => self.set.identities.remove(&address),
        }
    }

    fn write_blocks(&mut self) {
        let classes = self.world.blocks.classes();
        self.set.blocks = classes.map(|(net, class)| (net, self.numbers.of(class))).collect();
    }

    /// The node's own pods: they are few.
    fn write_pods(&mut self) {
        let policy = |text: Option<&str>| text.map_or(OPEN, |text| self.numbers.of(text));
        let identity = |kind: &Kind| self.numbers.of(&kind.text);
        let pods = self.subjects.iter().map(|pod| {
            let found = PodPolicy {
                identity: self.world.crowd.own(pod.key).map_or(0, identity),
                ingress: policy(pod.ingress),
                egress: policy(pod.egress),
            };
            (pod.key.clone(), found)
        });
        self.set.pods = pods.collect();
    }

    fn name(&mut self, text: &Text) {
        let name = match text {
            Text::Other(_) => None,
            Text::Policy(text) => self.subjects.get(text).map(|applied| applied.name.clone()),
            Text::Rule(name) => Some(name.clone()),
        };
        self.set.names.extend(name.map(|name| (self.numbers.of(text.as_str()), name)));
    }

    /// All entries of a policy.
    fn write_policy(&mut self, applied: &Applied) {
        let policy = self.numbers.of(&applied.text);
        let others = applied.others(self.world).into_iter();
        let rules = others.flat_map(|other| self.entries(applied, policy, other));
        let mut rules: Vec<Rule> = rules.collect();
        rules.sort_unstable_by_key(|rule| rule.key());
        self.set.rules.replace_part(policy, rules);
    }

    /// The entries of a policy for the pods of some namespaces, whose numbers are in `moved`.
    fn write_namespaces(
        &mut self,
        applied: &Applied,
        namespaces: &BTreeSet<String>,
        moved: &BTreeSet<u32>,
    ) {
        let policy = self.numbers.of(&applied.text);
        let kinds = namespaces.iter().flat_map(|name| applied.kinds(name, self.world));
        let fresh = kinds.flat_map(|kind| self.entries(applied, policy, Other::Pods(kind)));
        let part = self.set.rules.part(policy).iter();
        let kept = part.filter(|rule| !moved.contains(&rule.identity)).copied();
        let mut rules: Vec<Rule> = kept.chain(fresh).collect();
        rules.sort_unstable_by_key(|rule| rule.key());
        self.set.rules.replace_part(policy, rules);
    }

    /// The entries of a policy for one kind of pods.
    fn write_kind(&mut self, applied: &Applied, kind: &Kind) {
        let [policy, who] = [&applied.text, &kind.text].map(|text| self.numbers.of(text));
        let entries = self.entries(applied, policy, Other::Pods(kind));
        let part = self.set.rules.part(policy);
        let from = part.partition_point(|rule| rule.identity < who);
        let to = part.partition_point(|rule| rule.identity <= who);
        if part[from..to] != entries {
            let part = [&part[..from], &entries, &part[to..]].concat();
            self.set.rules.replace_part(policy, part);
        }
    }

    /// The entries of a policy for one other side, ordered.
    fn entries(&self, applied: &Applied, policy: u32, other: Other<'_>) -> Vec<Rule> {
        let identity = match other {
            Other::Everybody => ANYBODY,
            Other::Nodes => OTHER_NODE,
            Other::Pods(kind) => self.numbers.of(&kind.text),
            Other::Class(class) => self.numbers.of(class),
        };
        let mut allowed = applied.allowed(other, self.world);
        let isolation = applied.lets_in(other);
        if let Some(rule) = &isolation {
            allowed.entry(Ports::Everything).or_insert(rule);
        }
        let rule = |(ports, rule)| Rule { policy, identity, ports, number: self.numbers.of(rule) };
        allowed.into_iter().map(rule).collect()
    }
}
