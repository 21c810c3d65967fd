//! Masquerading in an nftables table of our own, replaced as a whole in one transaction.

mod generation;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};

use ipnet::{IpNet, IpSubnets, Ipv4Subnets, Ipv6Subnets};
use serde_json::Value;

use crate::IfName;

/// The table; everything in it is ours.
pub const TABLE: &str = "inet mesh";
/// Comment on each rule of ours: a table without them is not as we wrote it.
const MARK: &str = "mesh: pods leaving the cluster";

/// Whose source address is hidden, and where not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Masquerade {
    /// Sources: this node's pod blocks.
    pub sources: BTreeSet<IpNet>,
    /// Destinations where the source stays: all pods, and what people name.
    pub inside: BTreeSet<IpNet>,
}

impl Masquerade {
    /// One that is the same as another whenever both mean the same: ranges are as few as possible.
    pub fn new(
        sources: impl IntoIterator<Item = IpNet>,
        inside: impl IntoIterator<Item = IpNet>,
    ) -> Self {
        Self { sources: fewest(sources), inside: fewest(inside) }
    }

    /// Lets the source stay towards these ranges, too.
    pub fn keep_source_towards(&mut self, ranges: &[IpNet]) {
        self.inside = fewest(self.inside.iter().chain(ranges).copied());
    }
}

/// The same addresses in as few ranges as possible. nft joins ranges in its own way: only so can its answer be compared.
fn fewest(nets: impl IntoIterator<Item = IpNet>) -> BTreeSet<IpNet> {
    IpNet::aggregate(&nets.into_iter().collect()).into_iter().collect()
}

/// nft failed.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// It could not be run.
    #[error("start nft (package nftables)")]
    Start(#[source] io::Error),
    /// It refused.
    #[error("nft refused: {0}")]
    Refused(String),
    /// Its answer is not what it should be.
    #[error("decode what nft says")]
    Decode(#[from] serde_json::Error),
}

/// What there is of our table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) exists: bool,
    /// What it does, if it is as we wrote it.
    pub(super) masquerade: Option<Masquerade>,
}

/// Reads the table. That takes a process, so it is not read again while the kernel says that no rules have changed.
#[derive(Debug, Default)]
pub(super) struct Reader {
    /// What was read last, and the number of the rules before that.
    last: Mutex<Option<(u32, Table)>>,
}

impl Reader {
    /// What there is, in the calling thread's namespace, which has to be the same each time.
    pub(super) fn observe(&self) -> Result<Table, NftError> {
        // Where the number cannot be had, the table is read.
        self.observe_at(generation::now().ok(), read)
    }

    fn observe_at(
        &self,
        generation: Option<u32>,
        read: impl FnOnce() -> Result<Table, NftError>,
    ) -> Result<Table, NftError> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(now), Some((then, table))) = (generation, &*last)
            && now == *then
        {
            return Ok(table.clone());
        }
        let table = read()?;
        *last = generation.map(|generation| (generation, table.clone()));
        Ok(table)
    }
}

fn read() -> Result<Table, NftError> {
    let output = run(&["-j", "list", "table", "inet", "mesh"], "")?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        if text.contains("No such file or directory") {
            return Ok(Table::default());
        }
        return Err(refused(&output));
    }
    Ok(Table { exists: true, masquerade: parse(&serde_json::from_slice(&output.stdout)?) })
}

/// Replaces the table. In the calling thread's namespace.
pub(super) fn replace(masquerade: &Masquerade, overlay: &IfName) -> Result<(), NftError> {
    checked(&ruleset(masquerade, overlay))
}

/// Deletes the table. In the calling thread's namespace.
pub(super) fn delete() -> Result<(), NftError> {
    checked(&format!("add table {TABLE}\ndelete table {TABLE}\n"))
}

fn checked(script: &str) -> Result<(), NftError> {
    let output = run(&["-f", "-"], script)?;
    if output.status.success() { Ok(()) } else { Err(refused(&output)) }
}

fn refused(output: &Output) -> NftError {
    NftError::Refused(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

fn run(arguments: &[&str], input: &str) -> Result<Output, NftError> {
    let mut command = Command::new("nft");
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(NftError::Start)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A short script: nft reads it before it writes anything. When it ended early, its own words say why.
        let _ = stdin.write_all(input.as_bytes());
    }
    child.wait_with_output().map_err(NftError::Start)
}

/// "add" before "delete" makes deleting succeed when there is no table; the transaction is applied as a whole.
fn ruleset(masquerade: &Masquerade, overlay: &IfName) -> String {
    let mut sets = String::new();
    let mut rules = String::new();
    for (family, v4) in [("4", true), ("6", false)] {
        set(&mut sets, "sources", family, of_family(&masquerade.sources, v4));
        set(&mut sets, "inside", family, of_family(&masquerade.inside, v4));
        let ip = if v4 { "ip" } else { "ip6" };
        let _ = writeln!(
            rules,
            "    {ip} saddr @sources{family} {ip} daddr != @inside{family} oifname != \"{overlay}\" \
             masquerade fully-random comment \"{MARK}\""
        );
    }
    format!(
        "add table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n{sets}  chain postrouting {{\n    \
         type nat hook postrouting priority srcnat; policy accept;\n{rules}  }}\n}}\n"
    )
}

fn of_family(nets: &BTreeSet<IpNet>, v4: bool) -> impl Iterator<Item = &IpNet> {
    nets.iter().filter(move |net| net.addr().is_ipv4() == v4)
}

fn set<'a>(out: &mut String, name: &str, family: &str, nets: impl Iterator<Item = &'a IpNet>) {
    let elements: Vec<String> = nets.map(ToString::to_string).collect();
    let elements = match elements.join(", ") {
        none if none.is_empty() => String::new(),
        some => format!(" elements = {{ {some} }};"),
    };
    let _ = writeln!(
        out,
        "  set {name}{family} {{ type ipv{family}_addr; flags interval; auto-merge;{elements} }}"
    );
}

/// What nft's JSON says, if it is a table of ours.
fn parse(listing: &Value) -> Option<Masquerade> {
    let objects = listing.get("nftables")?.as_array()?;
    let rules = objects.iter().filter_map(|object| object.get("rule"));
    let (ours, others): (Vec<&Value>, Vec<&Value>) =
        rules.partition(|rule| rule.get("comment").and_then(Value::as_str) == Some(MARK));
    if ours.len() != 2 || !others.is_empty() {
        return None;
    }
    let (mut sources, mut inside) = (Vec::new(), Vec::new());
    for set in objects.iter().filter_map(|object| object.get("set")) {
        let target = match set.get("name")?.as_str()? {
            "sources4" | "sources6" => &mut sources,
            "inside4" | "inside6" => &mut inside,
            _ => return None,
        };
        for element in set.get("elem").and_then(Value::as_array).into_iter().flatten() {
            target.extend(element_nets(element)?);
        }
    }
    Some(Masquerade::new(sources, inside))
}

/// An element: `{"prefix": {"addr": "10.0.0.0", "len": 8}}`, `{"range": ["10.0.0.0", "10.0.2.255"]}` or a plain address.
fn element_nets(element: &Value) -> Option<Vec<IpNet>> {
    let address = |value: &Value| value.as_str()?.parse::<IpAddr>().ok();
    if let Some(range) = element.get("range") {
        let nets: IpSubnets = match (address(range.get(0)?)?, address(range.get(1)?)?) {
            (IpAddr::V4(first), IpAddr::V4(last)) => Ipv4Subnets::new(first, last, 0).into(),
            (IpAddr::V6(first), IpAddr::V6(last)) => Ipv6Subnets::new(first, last, 0).into(),
            _ => return None,
        };
        return Some(nets.collect());
    }
    let Some(prefix) = element.get("prefix") else {
        return Some(vec![address(element)?.into()]);
    };
    let length = u8::try_from(prefix.get("len")?.as_u64()?).ok()?;
    Some(vec![IpNet::new(address(prefix.get("addr")?)?, length).ok()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_replaced_in_one_transaction() {
        let masquerade = Masquerade {
            sources: ["10.244.1.0/24".parse().unwrap()].into(),
            inside: ["10.244.0.0/16".parse().unwrap(), "fd10:244::/56".parse().unwrap()].into(),
        };
        let text = ruleset(&masquerade, &"mesh-wg".parse().unwrap());
        assert!(text.starts_with("add table inet mesh\ndelete table inet mesh\ntable inet mesh {"));
        assert!(text.contains("set sources4 { type ipv4_addr; flags interval; auto-merge; elements = { 10.244.1.0/24 }; }"));
        assert!(text.contains("set sources6 { type ipv6_addr; flags interval; auto-merge; }"));
    }

    #[test]
    fn ranges_that_are_joined_are_the_same_as_before() {
        let nets = |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect::<Vec<_>>();
        let mut wanted = Masquerade::new([], nets(&["10.244.0.0/16"]));
        wanted.keep_source_towards(&nets(&[
            "10.1.0.0/24",
            "10.1.1.0/24",
            "10.1.2.0/24",
            "10.244.9.0/24",
        ]));
        assert_eq!(
            wanted.inside,
            nets(&["10.1.0.0/23", "10.1.2.0/24", "10.244.0.0/16"]).into_iter().collect()
        );
        let rule = serde_json::json!({"rule": {"comment": MARK}});
        let elements = serde_json::json!([
            {"range": ["10.1.0.0", "10.1.2.255"]}, {"prefix": {"addr": "10.244.0.0", "len": 16}}
        ]);
        let set = serde_json::json!({"set": {"name": "inside4", "elem": elements}});
        let listing = serde_json::json!({"nftables": [set, rule, rule]});
        assert_eq!(parse(&listing), Some(wanted));
    }

    #[test]
    fn a_table_without_our_rules_is_not_ours() {
        let listing = serde_json::json!({"nftables": [{"table": {"name": "mesh"}}]});
        assert_eq!(parse(&listing), None);
    }

    #[test]
    fn the_table_is_read_when_rules_have_changed_and_only_then() {
        let reader = Reader::default();
        let reads = std::cell::Cell::new(0);
        let observe = |generation: Option<u32>, exists: bool| {
            let read = || {
                reads.set(reads.get() + 1);
                Ok(Table { exists, masquerade: None })
            };
            (reader.observe_at(generation, read).unwrap().exists, reads.get())
        };
        assert_eq!(observe(Some(7), false), (false, 1));
        assert_eq!(observe(Some(7), true), (false, 1));
        assert_eq!(observe(Some(8), true), (true, 2));
        assert_eq!(observe(None, false), (false, 3), "not known whether it has changed");
        assert_eq!(observe(None, true), (true, 4));
        assert_eq!(observe(Some(8), true), (true, 5), "nor what there was before");
        let failing = reader.observe_at(Some(9), || Err(NftError::Refused("no".to_owned())));
        assert!(failing.is_err());
        assert_eq!(observe(Some(9), false), (false, 6), "a failure is not remembered");
    }
}
