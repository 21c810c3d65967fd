//! The columns of DaemonSets, StatefulSets and the revisions of both.

use serde_json::{Value, json};

use super::cells::{
    Column, age_column, containers, count, number_column, pairs, text_column, wide_column,
};

pub(super) fn daemon_set() -> Vec<Column> {
    vec![
        number_column("Desired", |o, _| json!(count(&o["status"]["desiredNumberScheduled"]))),
        number_column("Current", |o, _| json!(count(&o["status"]["currentNumberScheduled"]))),
        number_column("Ready", |o, _| json!(count(&o["status"]["numberReady"]))),
        number_column("Up-to-date", |o, _| json!(count(&o["status"]["updatedNumberScheduled"]))),
        number_column("Available", |o, _| json!(count(&o["status"]["numberAvailable"]))),
        text_column("Node Selector", |o, _| {
            json!(pairs(&o["spec"]["template"]["spec"]["nodeSelector"]))
        }),
        age_column(),
        wide_column("Containers", |o, _| containers(o, "name")),
        wide_column("Images", |o, _| containers(o, "image")),
        wide_column("Selector", |o, _| json!(pairs(&o["spec"]["selector"]["matchLabels"]))),
    ]
}

pub(super) fn stateful_set() -> Vec<Column> {
    vec![
        text_column("Ready", |o, _| {
            let (ready, wanted) = (&o["status"]["readyReplicas"], &o["spec"]["replicas"]);
            json!(format!("{}/{}", count(ready), count(wanted)))
        }),
        age_column(),
        wide_column("Containers", |o, _| containers(o, "name")),
        wide_column("Images", |o, _| containers(o, "image")),
    ]
}

pub(super) fn revision() -> Vec<Column> {
    vec![
        text_column("Controller", |o, _| json!(controller(o))),
        number_column("Revision", |o, _| json!(count(&o["revision"]))),
        age_column(),
    ]
}

/// The owner that controls the object, as `KIND.GROUP/NAME`.
fn controller(object: &Value) -> String {
    let owners = object["metadata"]["ownerReferences"].as_array().into_iter().flatten();
    let Some(owner) = owners.into_iter().find(|owner| owner["controller"] == true) else {
        return "<none>".to_owned();
    };
    let text = |field: &str| owner[field].as_str().unwrap_or_default();
    let kind = text("kind").to_lowercase();
    match text("apiVersion").split_once('/') {
        Some((group, _)) => format!("{kind}.{group}/{}", text("name")),
        None => format!("{kind}/{}", text("name")),
    }
}
