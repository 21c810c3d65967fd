//! Maps of a node that are full, and what they have no room for: what a node tells by an annotation of its Node, and what people
//! read about it in conditions.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::ObjectKey;

/// Bytes of names that one report has at most, over all maps: every node reads every Node.
const NAMES_BYTES: usize = 16 << 10;
/// Names of objects that a sentence has at most.
const NAMED: usize = 5;

/// The full maps of a node, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Shortages(pub BTreeMap<String, Shortage>);

/// A full map.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Shortage {
    /// How many entries fit.
    pub capacity: u32,
    /// Services that lack something in it.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub services: BTreeSet<ObjectKey>,
    /// NetworkPolicies that lack something in it: what they allow is denied.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub policies: BTreeSet<ObjectKey>,
    /// Number of Services and policies that are not named.
    #[serde(skip_serializing_if = "is_zero")]
    pub more: usize,
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

impl Shortages {
    /// Reads an annotation. Nothing when it makes no sense: whoever can write a Node wrote it.
    pub fn read(annotation: &str) -> Option<Self> {
        let read: Self = serde_json::from_str(annotation).ok()?;
        let is_name = |map: &String| {
            (1..=32).contains(&map.len())
                && map.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_')
        };
        read.0.keys().all(is_name).then_some(read)
    }

    /// The annotation, with as many names as it may have; nothing when no map is full.
    pub fn annotation(&self) -> Option<String> {
        let mut room = NAMES_BYTES;
        let mut take = |names: &BTreeSet<ObjectKey>| -> BTreeSet<ObjectKey> {
            let fits = |key: &&ObjectKey| {
                let needed = key.namespace.len() + key.name.len() + 4;
                room.checked_sub(needed).map(|left| room = left).is_some()
            };
            names.iter().take_while(fits).cloned().collect()
        };
        let bounded = self.0.iter().map(|(map, shortage)| {
            let (services, policies) = (take(&shortage.services), take(&shortage.policies));
            let named = services.len() + policies.len();
            let more = shortage.affected() - named;
            (map.clone(), Shortage { capacity: shortage.capacity, services, policies, more })
        });
        let bounded = Self(bounded.collect());
        let text = || serde_json::to_string(&bounded).expect("names and numbers are JSON");
        (!self.0.is_empty()).then(text)
    }

    /// A sentence for people.
    pub fn message(&self) -> String {
        if self.0.is_empty() {
            return "all maps have room for what belongs into them".to_owned();
        }
        let one = |(map, shortage): (&String, &Shortage)| {
            let capacity = shortage.capacity;
            let whom = shortage.whom();
            format!("map {map} is full ({capacity} entries){whom}; {}", cure(map))
        };
        self.0.iter().map(one).collect::<Vec<_>>().join(". ")
    }
}

impl Shortage {
    fn affected(&self) -> usize {
        self.services.len() + self.policies.len() + self.more
    }

    fn whom(&self) -> String {
        let names = self.services.iter().chain(&self.policies);
        let names: Vec<String> = names.take(NAMED).map(ToString::to_string).collect();
        match self.affected() - names.len() {
            _ if names.is_empty() => String::new(),
            0 => format!(": no room for all of {}", names.join(", ")),
            more => format!(": no room for all of {} and {more} more", names.join(", ")),
        }
    }
}

/// What makes room.
pub fn cure(map: &str) -> String {
    let flag = match map {
        "SERVICES" | "SLOTS" | "MEMBERS" | "EDGE_SERVICES" | "EDGE_TABLES" | "EDGE_BACKENDS" => {
            "--max-backends".to_owned()
        }
        _ => format!("--map-capacity {map}=ENTRIES"),
    };
    format!("raise {flag} of mesh-agent and boot or reset the node")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shortages(services: usize) -> Shortages {
        let names = (0..services).map(|n| ObjectKey::new("default", format!("service-{n:05}")));
        let slots = Shortage { capacity: 1024, services: names.collect(), ..Shortage::default() };
        Shortages(BTreeMap::from([("SLOTS".to_owned(), slots)]))
    }

    #[test]
    fn a_report_comes_back_and_has_a_bounded_size() {
        assert_eq!(shortages(0).0.len(), 1);
        let few = shortages(3);
        assert_eq!(Shortages::read(&few.annotation().unwrap()), Some(few));
        let text = shortages(20_000).annotation().unwrap();
        assert!(text.len() < NAMES_BYTES + 200, "{}", text.len());
        let read = Shortages::read(&text).unwrap();
        let slots = &read.0["SLOTS"];
        assert!(slots.services.len() > 500, "{}", slots.services.len());
        assert_eq!(slots.services.len() + slots.more, 20_000);
        assert_eq!(Shortages::default().annotation(), None);
    }

    #[test]
    fn what_makes_no_sense_is_no_report() {
        for text in ["", "[]", r#"{"slots": {}}"#, r#"{"SLOTS": {"services": ["x"]}}"#] {
            assert_eq!(Shortages::read(text), None, "{text}");
        }
    }

    #[test]
    fn people_read_which_map_who_and_what_helps() {
        let text = shortages(7).message();
        let expected = "map SLOTS is full (1024 entries): no room for all of default/service-00000, \
            default/service-00001, default/service-00002, default/service-00003, default/service-00004 and 2 more; \
            raise --max-backends of mesh-agent and boot or reset the node";
        assert_eq!(text, expected);
        assert!(cure("POLICY_RULES").contains("--map-capacity POLICY_RULES=ENTRIES"));
    }
}
