//! Masquerading in an nftables table of our own, replaced as a whole in one transaction.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::{Command, Output, Stdio};

use ipnet::IpNet;
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
    /// Destinations where the source stays: all pods.
    pub inside: BTreeSet<IpNet>,
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

/// Whether the table exists, and what it does if it is as we wrote it. In the calling thread's namespace.
pub(super) fn observe() -> Result<(bool, Option<Masquerade>), NftError> {
    let output = run(&["-j", "list", "table", "inet", "mesh"], "")?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        if text.contains("No such file or directory") {
            return Ok((false, None));
        }
        return Err(refused(&output));
    }
    Ok((true, parse(&serde_json::from_slice(&output.stdout)?)))
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
    let mut found = Masquerade { sources: BTreeSet::new(), inside: BTreeSet::new() };
    for set in objects.iter().filter_map(|object| object.get("set")) {
        let target = match set.get("name")?.as_str()? {
            "sources4" | "sources6" => &mut found.sources,
            "inside4" | "inside6" => &mut found.inside,
            _ => return None,
        };
        for element in set.get("elem").and_then(Value::as_array).into_iter().flatten() {
            target.insert(element_net(element)?);
        }
    }
    Some(found)
}

/// An element: `{"prefix": {"addr": "10.0.0.0", "len": 8}}` or a plain address.
fn element_net(element: &Value) -> Option<IpNet> {
    let Some(prefix) = element.get("prefix") else {
        return element.as_str()?.parse::<std::net::IpAddr>().ok().map(IpNet::from);
    };
    let length = u8::try_from(prefix.get("len")?.as_u64()?).ok()?;
    IpNet::new(prefix.get("addr")?.as_str()?.parse().ok()?, length).ok()
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
    fn a_table_without_our_rules_is_not_ours() {
        let listing = serde_json::json!({"nftables": [{"table": {"name": "mesh"}}]});
        assert_eq!(parse(&listing), None);
    }
}
