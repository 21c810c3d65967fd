//! How much the service maps hold, and an event when it is not enough.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Api, PostParams};
use mesh_kernel::services::map_capacities;
use mesh_model::NodeName;

use crate::board::Board;
use crate::errors::chain;

/// The concern that fails when a map is full.
const SERVICES: &str = "services";
const COMPONENT: &str = "mesh-agent";
/// Objects without a namespace have their events here, as everywhere.
const NAMESPACE: &str = "default";
const RETRY: Duration = Duration::from_secs(5);

/// Capacities of the service maps for so many backends; those that are built in without a number.
pub(crate) fn of_maps(max_backends: Option<u32>) -> BTreeMap<&'static str, u32> {
    max_backends.map(map_capacities).unwrap_or_default()
}

/// Tells the operator by an event on the Node when a service map is full, and when all fits again. Never returns.
pub(crate) async fn announce(client: kube::Client, node: NodeName, board: Board) {
    let events: Api<Event> = Api::namespaced(client, NAMESPACE);
    let mut standings = board.subscribe();
    let mut told = None;
    loop {
        standings.borrow_and_update();
        let full = fullness(&board.standing(SERVICES).failures);
        // That all fits is news only after it did not.
        if full != told {
            let event = event(&node, full.as_deref(), Timestamp::now());
            match events.create(&PostParams::default(), &event).await {
                Ok(_) => told = full,
                Err(error) => {
                    tracing::debug!(error = chain(&error), "event not recorded, trying again");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            }
        }
        if standings.changed().await.is_err() {
            return;
        }
    }
}

/// Which map is full, if that is what fails.
fn fullness(failures: &[String]) -> Option<String> {
    let tail = |failure: &String| Some(failure[failure.find("map ")?..].to_owned());
    failures.iter().find(|failure| failure.ends_with(" is full")).and_then(tail)
}

fn event(node: &NodeName, full: Option<&str>, now: Timestamp) -> Event {
    let message = full.map_or_else(
        || "all services fit into their maps again".to_owned(),
        |map| format!("{map}: some services lack endpoints on this node; see --max-backends"),
    );
    let time = Some(Time(now));
    Event {
        metadata: ObjectMeta {
            // As client libraries name events: unique without asking.
            name: Some(format!("{node}.{:x}", now.as_nanosecond())),
            namespace: Some(NAMESPACE.to_owned()),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(node.to_string()),
            uid: Some(node.to_string()),
            ..ObjectReference::default()
        },
        reason: Some(if full.is_some() { "ServiceMapFull" } else { "ServiceMapFits" }.to_owned()),
        message: Some(message),
        type_: Some(if full.is_some() { "Warning" } else { "Normal" }.to_owned()),
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

#[cfg(test)]
mod tests {
    use mesh_kernel::services::StepError;

    use super::*;

    #[test]
    fn a_full_map_is_recognised_by_what_the_reconciler_says() {
        let full = chain(&StepError::Full { map: "SLOTS" });
        let failures = ["something else".to_owned(), format!("PutSlot {{ .. }}: {full}")];
        assert_eq!(fullness(&failures).as_deref(), Some("map SLOTS is full"));
        assert_eq!(fullness(&failures[..1]), None);
        let event = event(&"n1".parse().unwrap(), Some("map SLOTS is full"), Timestamp::UNIX_EPOCH);
        assert_eq!(event.type_.as_deref(), Some("Warning"));
        assert!(event.message.unwrap().starts_with("map SLOTS is full: "));
        assert_eq!(event.metadata.name.as_deref(), Some("n1.0"));
    }

    #[test]
    fn capacities_are_those_of_the_object_unless_somebody_asks() {
        assert!(of_maps(None).is_empty());
        assert_eq!(of_maps(Some(1 << 20))["SLOTS"], 1 << 20);
    }
}
