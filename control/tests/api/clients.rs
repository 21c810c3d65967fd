use std::time::Duration;

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt as _, reflector, watcher};
use serde_json::json;

use super::access::join;
use super::support::*;

/// Nothing here takes so long unless it never comes.
const LIMIT: Duration = Duration::from_secs(20);

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let waiting = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LIMIT, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_registers_and_gets_its_blocks() {
    let control = Control::start().await;
    let member = join(&control, "n1", &["192.0.2.1".parse().unwrap()]).await;
    let nodes: Api<Node> = Api::all(member.client.clone());
    let node = serde_json::from_value(json!({"metadata": {"name": "n1"}})).unwrap();
    nodes.create(&PostParams::default(), &node).await.unwrap();
    let patch = json!({"metadata": {"annotations": {"mesh.dev/overlay": "user"}}});
    nodes.patch("n1", &PatchParams::default(), &Patch::Merge(patch)).await.unwrap();
    let waiting = async {
        loop {
            let node = nodes.get("n1").await.unwrap();
            if let Some(blocks) = node.spec.and_then(|s| s.pod_cidrs) {
                break blocks;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let blocks = tokio::time::timeout(LIMIT, waiting).await.unwrap();
    assert_eq!(blocks, ["10.244.0.0/24", "fd10:244::/64"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reflector_follows_through_pages_and_compaction() {
    let control = Control::start().await;
    for i in 0..25 {
        control.create(MAPS, config_map(&format!("m{i}"), "1")).await;
    }
    let api: Api<ConfigMap> = Api::namespaced(control.client.clone(), "default");
    for config in
        [watcher::Config::default().page_size(10), watcher::Config::default().streaming_lists()]
    {
        let (reader, writer) = reflector::store();
        let stream = reflector(writer, watcher(api.clone(), config)).default_backoff();
        let task = tokio::spawn(stream.for_each(|_| async {}));
        until("the first list", || reader.state().len() >= 25).await;
        let before = reader.state().len();
        control.create(MAPS, config_map("late", "1")).await;
        until("a new object", || reader.state().len() == before + 1).await;
        control.delete(&format!("{MAPS}/late")).await;
        until("a deletion", || reader.state().len() == before).await;
        task.abort();
    }
}
