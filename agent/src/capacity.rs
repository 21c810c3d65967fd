//! How much the maps hold, and what is told when that is not enough.
//!
//! The concerns say on the board what has no room. From there it goes into an annotation and a condition of the Node, which
//! `register.rs` writes, and into Events about the Node and about NetworkPolicies, which have no status of their own. The control
//! service makes conditions of Services of the annotations of all nodes.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Api, PostParams};
use mesh_kernel::Programs;
use mesh_kernel::bpf::sized_maps;
use mesh_kernel::services::map_capacities;
use mesh_model::shortage::{Shortage, Shortages, cure};
use mesh_model::{NodeName, ObjectKey};
use tokio::sync::watch;

use crate::board::{Board, Standing};
use crate::errors::chain;

/// Who fills maps. Before all of them have looked, nobody knows that what was told before is over.
const CONCERNS: [&str; 4] = ["node", "services", "edge", "policy"];
const COMPONENT: &str = "mesh-agent";
/// Objects without a namespace have their events here, as everywhere.
const NAMESPACE: &str = "default";
const RETRY: Duration = Duration::from_secs(5);
/// Between two looks: what fills up one after the other is one report.
const PAUSE: Duration = Duration::from_secs(1);
/// Most policies that are told of at a time.
const POLICIES: usize = 32;
/// Most bytes of an object's name in the name of an Event about it.
const NAME_BYTES: usize = 200;

const FEWEST_ENTRIES: u32 = 64;
const MOST_ENTRIES: u32 = 1 << 24;

/// A capacity that cannot be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InvalidCapacity {
    #[error("expected MAP=ENTRIES with {FEWEST_ENTRIES} to {MOST_ENTRIES} entries")]
    Form,
    #[error("there is no such map, or its size is fixed")]
    Map,
}

/// Capacities of the maps for so many backends, and those that are given as `MAP=ENTRIES`; the others have what is built in. The
/// error comes with what is wrong.
pub(crate) fn chosen(
    max_backends: Option<u32>,
    given: &[String],
) -> Result<BTreeMap<&'static str, u32>, (String, InvalidCapacity)> {
    let mut capacities = max_backends.map(map_capacities).unwrap_or_default();
    for text in given {
        let (map, entries) = one(text).map_err(|why| (text.clone(), why))?;
        capacities.insert(map, entries);
    }
    Ok(capacities)
}

fn one(text: &str) -> Result<(&'static str, u32), InvalidCapacity> {
    let (name, entries) = text.split_once('=').ok_or(InvalidCapacity::Form)?;
    let entries = entries.parse().map_err(|_| InvalidCapacity::Form)?;
    if !(FEWEST_ENTRIES..=MOST_ENTRIES).contains(&entries) {
        return Err(InvalidCapacity::Form);
    }
    let (map, _) = sized_maps().find(|(map, _)| *map == name).ok_or(InvalidCapacity::Map)?;
    Ok((map, entries))
}

/// Keeps `told` as the board says, and tells people by Events. Never returns.
pub(crate) async fn announce(
    client: kube::Client,
    node: NodeName,
    board: Board,
    programs: Arc<OnceLock<Arc<Programs>>>,
    told: watch::Sender<Option<Shortages>>,
) {
    let mut standings = board.subscribe();
    let mut announced = Shortages::default();
    loop {
        let full = found(&standings.borrow_and_update(), |map| {
            programs.get()?.capacities().get(map).copied()
        });
        if let Some(full) = full {
            told.send_if_modified(|told| {
                let changed = told.as_ref() != Some(&full);
                *told = Some(full.clone());
                changed
            });
            let events = events(&node, &announced, &full, Timestamp::now());
            if let Err(error) = record(&client, events).await {
                tracing::debug!(error = chain(&error), "event not recorded, trying again");
                tokio::time::sleep(RETRY).await;
                continue;
            }
            announced = full;
        }
        if standings.changed().await.is_err() {
            return;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn record(client: &kube::Client, events: Vec<Event>) -> Result<(), kube::Error> {
    for event in events {
        let namespace = event.involved_object.namespace.as_deref().unwrap_or(NAMESPACE);
        let api: Api<Event> = Api::namespaced(client.clone(), namespace);
        match api.create(&PostParams::default(), &event).await {
            // Its namespace is going, and the policy with it.
            Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404) => {}
            other => drop(other?),
        }
    }
    Ok(())
}

/// What has no room on this node; nothing before everybody has looked.
fn found(
    standings: &BTreeMap<&'static str, Standing>,
    capacity: impl Fn(&str) -> Option<u32>,
) -> Option<Shortages> {
    let mut shortages = Shortages::default();
    for concern in CONCERNS {
        for (map, lacking) in standings.get(concern)?.full.as_ref()? {
            let shortage = Shortage {
                capacity: capacity(map).unwrap_or_default(),
                services: lacking.services.clone(),
                policies: lacking.policies.clone(),
                more: 0,
            };
            shortages.0.insert((*map).to_owned(), shortage);
        }
    }
    Some(shortages)
}

/// What people have to hear that they have not heard.
fn events(node: &NodeName, before: &Shortages, now: &Shortages, at: Timestamp) -> Vec<Event> {
    let mut events = vec![];
    if !before.0.keys().eq(now.0.keys()) {
        let about = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(node.to_string()),
            uid: Some(node.to_string()),
            ..ObjectReference::default()
        };
        let reason = if now.0.is_empty() { "MapsFit" } else { "MapsFull" };
        events.push(event(node, about, reason, now.message(), at));
    }
    let heard = |map: &str, policy: &ObjectKey| {
        before.0.get(map).is_some_and(|shortage| shortage.policies.contains(policy))
    };
    let lacking = now.0.iter().flat_map(|(map, shortage)| {
        let new = shortage.policies.iter().filter(|policy| !heard(map, policy));
        new.map(move |policy| (map, shortage, policy))
    });
    events.extend(lacking.take(POLICIES).map(|(map, Shortage { capacity, .. }, policy)| {
        let message = format!(
            "map {map} of node {node} is full ({capacity} entries): some of what the policy allows is denied there; {}",
            cure(map)
        );
        event(node, policy_reference(policy), "MapFull", message, at)
    }));
    events
}

fn policy_reference(policy: &ObjectKey) -> ObjectReference {
    ObjectReference {
        api_version: Some("networking.k8s.io/v1".to_owned()),
        kind: Some("NetworkPolicy".to_owned()),
        namespace: Some(policy.namespace.clone()),
        name: Some(policy.name.clone()),
        ..ObjectReference::default()
    }
}

fn event(
    node: &NodeName,
    about: ObjectReference,
    reason: &str,
    message: String,
    now: Timestamp,
) -> Event {
    let time = Some(Time(now));
    let name = about.name.as_deref().unwrap_or_default();
    let begin: String = name.chars().take(NAME_BYTES).collect();
    Event {
        metadata: ObjectMeta {
            // As client libraries name events: unique without asking. Two maps may lack room for one policy at the same time, on
            // several nodes.
            name: Some(format!(
                "{}.{:x}.{:x}",
                begin.trim_end_matches(['.', '-']),
                now.as_nanosecond(),
                distinction(node, &message)
            )),
            namespace: Some(about.namespace.clone().unwrap_or_else(|| NAMESPACE.to_owned())),
            ..ObjectMeta::default()
        },
        type_: Some(if reason == "MapsFit" { "Normal" } else { "Warning" }.to_owned()),
        involved_object: about,
        reason: Some(reason.to_owned()),
        message: Some(message),
        count: Some(1),
        first_timestamp: time.clone(),
        last_timestamp: time,
        source: Some(EventSource {
            component: Some(COMPONENT.to_owned()),
            host: Some(node.to_string()),
        }),
        reporting_component: Some(COMPONENT.to_owned()),
        reporting_instance: Some(node.to_string()),
        ..Event::default()
    }
}

fn distinction(node: &NodeName, message: &str) -> u64 {
    use std::hash::{DefaultHasher, Hash as _, Hasher as _};
    let mut hasher = DefaultHasher::new();
    (node.as_str(), message).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::{FullMaps, Lacking};

    fn node() -> NodeName {
        "n1".parse().unwrap()
    }

    fn full(services: &[&str], policies: &[&str]) -> FullMaps {
        let keys = |names: &[&str]| names.iter().map(|name| ObjectKey::new("x", *name)).collect();
        let lacking = Lacking { services: keys(services), policies: keys(policies) };
        FullMaps::from([("POLICY_RULES", lacking)])
    }

    #[test]
    fn nothing_is_known_before_everybody_has_looked() {
        let board = Board::default();
        let known = || found(&board.subscribe().borrow(), |_| Some(7));
        for concern in CONCERNS {
            assert_eq!(known(), None);
            board.found_full(concern, FullMaps::new());
        }
        assert_eq!(known(), Some(Shortages::default()));
        board.found_full("policy", full(&[], &["p"]));
        board.done("policy");
        let shortage = &known().unwrap().0["POLICY_RULES"];
        assert_eq!((shortage.capacity, shortage.policies.len()), (7, 1));
    }

    #[test]
    fn what_begins_and_what_ends_is_told_once() {
        let told = |before: &FullMaps, now: &FullMaps| {
            let of = |full: &FullMaps| {
                let board = Board::default();
                CONCERNS.iter().for_each(|concern| board.found_full(concern, FullMaps::new()));
                board.found_full("policy", full.clone());
                found(&board.subscribe().borrow(), |_| Some(7)).unwrap()
            };
            let events = events(&node(), &of(before), &of(now), Timestamp::UNIX_EPOCH);
            let words = |event: Event| {
                let about = event.involved_object;
                let (kind, name) = (about.kind.unwrap(), about.name.unwrap());
                format!("{} {kind} {name}", event.reason.unwrap())
            };
            events.into_iter().map(words).collect::<Vec<_>>()
        };
        let (none, one, two) = (FullMaps::new(), full(&[], &["p"]), full(&["s"], &["p", "q"]));
        assert_eq!(told(&none, &none), [""; 0]);
        assert_eq!(told(&none, &one), ["MapsFull Node n1", "MapFull NetworkPolicy p"]);
        assert_eq!(told(&one, &one), [""; 0]);
        assert_eq!(told(&one, &two), ["MapFull NetworkPolicy q"]);
        assert_eq!(told(&two, &none), ["MapsFit Node n1"]);
    }

    #[test]
    fn capacities_are_those_of_the_object_unless_somebody_asks() {
        let chosen = |backends, given: &[&str]| {
            let given: Vec<String> = given.iter().map(|text| (*text).to_owned()).collect();
            chosen(backends, &given)
        };
        assert!(chosen(None, &[]).unwrap().is_empty());
        let some = chosen(Some(1 << 20), &["POLICY_RULES=1000000", "SLOTS=4096"]).unwrap();
        assert_eq!((some["MEMBERS"], some["EDGE_BACKENDS"]), (1 << 20, 1 << 20));
        assert_eq!((some["POLICY_RULES"], some["SLOTS"]), (1_000_000, 4096));
        for wrong in ["SLOTS", "SLOTS=", "SLOTS=63", "SLOTS=16777217", "slots=64", "NODE=64"] {
            assert_eq!(chosen(None, &[wrong]).unwrap_err().0, wrong);
        }
    }
}
