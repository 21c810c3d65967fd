use std::time::Duration;

use futures_util::TryStreamExt as _;
use http::Request;
use http_body_util::BodyExt as _;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio_util::io::StreamReader;

use super::support::*;

/// No event takes so long unless it does not come at all.
const LIMIT: Duration = Duration::from_secs(20);

pub(crate) struct Events(Lines<Box<dyn tokio::io::AsyncBufRead + Unpin + Send>>);

impl Events {
    pub(crate) async fn of(control: &Control, path: &str, accept: &str) -> Self {
        let request =
            Request::builder().uri(path).header("accept", accept).body(Body::empty()).unwrap();
        let response = control.client.send(request).await.unwrap();
        assert_eq!(response.status(), 200);
        let stream = response.into_body().into_data_stream().map_err(std::io::Error::other);
        let reader: Box<dyn tokio::io::AsyncBufRead + Unpin + Send> =
            Box::new(BufReader::new(StreamReader::new(Box::pin(stream))));
        Self(reader.lines())
    }

    /// The next event; `None` at the end of the watch.
    pub(crate) async fn next(&mut self) -> Option<Value> {
        let line = tokio::time::timeout(LIMIT, self.0.next_line()).await.expect("an event in time");
        line.unwrap().map(|line| serde_json::from_str(&line).unwrap())
    }

    pub(crate) async fn expect(&mut self, type_: &str, name: &str) -> Value {
        let event = self.next().await.expect("an event");
        let found = (event["type"].as_str(), event["object"]["metadata"]["name"].as_str());
        assert_eq!(found, (Some(type_), Some(name)), "{event}");
        event["object"].clone()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn objects_come_and_go_as_the_selector_sees_it() {
    let control = Control::start().await;
    let version = control.registry.revision();
    let path = format!("{MAPS}?watch=1&labelSelector=app%3Dweb&resourceVersion={version}");
    let mut events = Events::of(&control, &path, JSON).await;
    let path = format!("{MAPS}/a");
    control.create(MAPS, config_map("other", "1")).await;
    control.create(MAPS, config_map("a", "1")).await;
    let label = async |value: Value| {
        control.patch(&path, MERGE, json!({"metadata": {"labels": {"app": value}}})).await.body
    };
    label(json!("web")).await;
    events.expect("ADDED", "a").await;
    control.patch(&path, MERGE, json!({"data": {"k": "2"}})).await;
    events.expect("MODIFIED", "a").await;
    let left = label(json!("db")).await;
    let gone = events.expect("DELETED", "a").await;
    assert_eq!(gone["metadata"]["resourceVersion"], left["metadata"]["resourceVersion"]);
    assert_eq!(gone["metadata"]["labels"]["app"], "web", "as the watcher knew it");
    label(json!("web")).await;
    events.expect("ADDED", "a").await;
    control.delete(&path).await;
    events.expect("DELETED", "a").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_from_nowhere_starts_with_what_there_is() {
    let control = Control::start().await;
    control.create(MAPS, config_map("a", "1")).await;
    for version in ["", "0"] {
        let path = format!("{MAPS}?watch=true&resourceVersion={version}");
        Events::of(&control, &path, JSON).await.expect("ADDED", "a").await;
    }
    let path = format!(
        "{MAPS}?watch=true&sendInitialEvents=true&allowWatchBookmarks=true\
         &resourceVersionMatch=NotOlderThan&resourceVersion="
    );
    let mut events = Events::of(&control, &path, JSON).await;
    events.expect("ADDED", "a").await;
    events.expect("ADDED", "kube-root-ca.crt").await;
    let mark = events.next().await.unwrap();
    assert_eq!(mark["type"], "BOOKMARK");
    assert_eq!(mark["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    control.create(MAPS, config_map("b", "1")).await;
    events.expect("ADDED", "b").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_ends_in_time_with_a_bookmark_of_where_it_was() {
    let control = Control::start().await;
    let version = control.registry.revision();
    let path = format!(
        "{MAPS}?watch=true&allowWatchBookmarks=true&timeoutSeconds=1&resourceVersion={version}"
    );
    let mut events = Events::of(&control, &path, JSON).await;
    // Another kind moves the revision on.
    control.create("/api/v1/namespaces", json!({"metadata": {"name": "team"}})).await;
    let mark = events.next().await.unwrap();
    assert_eq!((&mark["type"], &mark["object"]["kind"]), (&json!("BOOKMARK"), &json!("ConfigMap")));
    let reached: u64 =
        mark["object"]["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
    assert!(reached > version);
    assert_eq!(events.next().await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_revision_is_gone_and_the_future_too() {
    let control = Control::start().await;
    let old = control.registry.revision();
    control.create(MAPS, config_map("a", "1")).await;
    control.registry.compact(control.registry.revision());
    for version in [old, control.registry.revision() + 100] {
        let path = format!("{MAPS}?watch=true&resourceVersion={version}");
        let mut events = Events::of(&control, &path, JSON).await;
        let error = events.next().await.unwrap();
        assert_eq!((&error["type"], &error["object"]["code"]), (&json!("ERROR"), &json!(410)));
        assert_eq!(events.next().await, None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_sees_its_pods_and_people_see_rows() {
    let control = Control::start().await;
    let version = control.registry.revision();
    let path =
        format!("/api/v1/pods?watch=1&fieldSelector=spec.nodeName%3Dn1&resourceVersion={version}");
    let mut node = Events::of(&control, &path, JSON).await;
    let mut people =
        Events::of(&control, &format!("{PODS}?watch=1&resourceVersion={version}"), TABLE).await;
    control.create(PODS, pod("p", None)).await;
    let row = people.next().await.unwrap();
    assert_eq!((&row["type"], &row["object"]["kind"]), (&json!("ADDED"), &json!("Table")));
    assert_eq!(row["object"]["rows"][0]["cells"][0], "p");
    let binding = json!({"target": {"kind": "Node", "name": "n1"}});
    assert_eq!(control.post(&format!("{PODS}/p/binding"), binding).await.code, 201);
    let seen = node.expect("ADDED", "p").await;
    assert_eq!(seen["spec"]["nodeName"], "n1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopping_ends_watches() {
    let control = Control::start().await;
    let mut events = Events::of(&control, &format!("{MAPS}?watch=1"), JSON).await;
    events.expect("ADDED", "kube-root-ca.crt").await;
    control.create(MAPS, config_map("a", "1")).await;
    events.expect("ADDED", "a").await;
    control.stop().await;
    assert_eq!(events.next().await, None);
}
