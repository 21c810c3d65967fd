//! StatefulSets: names that stay, one pod for each of them at any time.

use std::collections::{BTreeMap, HashSet};

use futures_util::StreamExt as _;
use k8s_openapi::api::apps::v1::{ControllerRevision, StatefulSet};
use k8s_openapi::api::core::v1::{Node, Pod};
use mesh_control::registry::{Event, Part, WriteOptions};
use serde_json::{Value, json};

use super::harness::{Cluster, object};

fn named(name: &str, replicas: i32, spec: Value) -> StatefulSet {
    let mut set = json!({
        "metadata": {"namespace": "default", "name": name},
        "spec": {"replicas": replicas, "serviceName": name, "revisionHistoryLimit": 1,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}},
                "spec": {"containers": [{"name": "main", "image": "one"}]}}},
    });
    json_patch::merge(&mut set["spec"], &spec);
    object(set)
}

/// As `kubectl rollout status` decides.
fn is_rolled_out(cluster: &Cluster, name: &str) -> bool {
    let set: StatefulSet = cluster.get(name).unwrap();
    let wanted = set.spec.as_ref().unwrap().replicas;
    let status = set.status.unwrap_or_default();
    status.observed_generation >= set.metadata.generation
        && status.ready_replicas == wanted
        && Some(status.replicas) == wanted
        && status.update_revision == status.current_revision
}

async fn rolled_out(cluster: &Cluster, name: &str) {
    cluster.eventually("rolled out", || is_rolled_out(cluster, name)).await;
}

async fn edit(cluster: &Cluster, name: &str, change: impl Fn(&mut StatefulSet)) {
    cluster.edit::<StatefulSet>(name, change).await;
}

async fn set_image(cluster: &Cluster, name: &str, image: &str) {
    edit(cluster, name, |set| {
        let template = &mut set.spec.as_mut().unwrap().template;
        template.spec.as_mut().unwrap().containers[0].image = Some(image.to_owned());
    })
    .await;
}

fn images(cluster: &Cluster) -> BTreeMap<String, String> {
    let image = |pod: Pod| {
        let image = pod.spec.unwrap().containers[0].image.clone();
        (pod.metadata.name.unwrap(), image.unwrap())
    };
    cluster.active_pods().into_iter().map(image).collect()
}

/// What happened to pods since a revision: `+` created, `-` deletion asked for, `x` gone.
async fn story(cluster: &Cluster, from: u64) -> Vec<String> {
    let end: Pod = object(json!({"metadata": {"namespace": "default", "name": "end"},
        "spec": {"schedulerName": "nobody", "containers": [{"name": "main", "image": "x"}]}}));
    cluster.registry.create(&end).await.unwrap();
    let mut events = cluster.registry.watch::<Pod>(from);
    let (mut seen, mut going) = (Vec::new(), HashSet::new());
    loop {
        let (mark, pod) = match events.next().await.unwrap() {
            Event::Added(pod) if pod.metadata.name == end.metadata.name => break,
            Event::Added(pod) => ("+", pod),
            Event::Modified(pod) => {
                let is_going = pod.metadata.deletion_timestamp.is_some();
                if !is_going || !going.insert(pod.metadata.uid.clone()) {
                    continue;
                }
                ("-", pod)
            }
            Event::Deleted(pod) => ("x", pod),
            Event::Gone => panic!("the watch ended"),
        };
        seen.push(format!("{mark}{}", pod.metadata.name.unwrap()));
    }
    cluster.delete::<Pod>("end", "Background").await;
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_come_in_order_are_updated_from_the_end_and_leave_from_there() {
    let cluster = Cluster::start().await;
    let _nodes = cluster.nodes(2).await;
    let begun = cluster.registry.revision();
    cluster.registry.create(&named("db", 3, json!({}))).await.unwrap();
    rolled_out(&cluster, "db").await;
    assert_eq!(story(&cluster, begun).await, ["+db-0", "+db-1", "+db-2"]);
    let pod: Pod = cluster.get("db-1").unwrap();
    let spec = pod.spec.unwrap();
    assert_eq!((spec.hostname.as_deref(), spec.subdomain.as_deref()), (Some("db-1"), Some("db")));

    let begun = cluster.registry.revision();
    set_image(&cluster, "db", "two").await;
    rolled_out(&cluster, "db").await;
    let one = |n: i32| [format!("-db-{n}"), format!("xdb-{n}"), format!("+db-{n}")];
    let expected: Vec<String> = [one(2), one(1), one(0)].concat();
    assert_eq!(story(&cluster, begun).await, expected);

    let begun = cluster.registry.revision();
    edit(&cluster, "db", |set| set.spec.as_mut().unwrap().replicas = Some(1)).await;
    cluster.eventually("one is left", || cluster.list::<Pod>().len() == 1).await;
    assert_eq!(story(&cluster, begun).await, ["-db-2", "xdb-2", "-db-1", "xdb-1"]);

    // Back to the first template, which becomes the third; the limit keeps one old one.
    set_image(&cluster, "db", "one").await;
    rolled_out(&cluster, "db").await;
    let numbers = || {
        let mut all: Vec<i64> =
            cluster.list::<ControllerRevision>().iter().map(|r| r.revision).collect();
        all.sort_unstable();
        all
    };
    assert_eq!(numbers(), [2, 3]);
    set_image(&cluster, "db", "three").await;
    rolled_out(&cluster, "db").await;
    cluster.eventually("one old one is kept", || numbers() == [3, 4]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_holds_an_update_and_gives_the_template_before_to_who_is_made_again() {
    let cluster = Cluster::start().await;
    let _nodes = cluster.nodes(2).await;
    let held = json!({"podManagementPolicy": "Parallel",
        "updateStrategy": {"rollingUpdate": {"partition": 2}}});
    cluster.registry.create(&named("db", 3, held)).await.unwrap();
    rolled_out(&cluster, "db").await;
    set_image(&cluster, "db", "two").await;
    let expected = |last: [&str; 3]| -> BTreeMap<String, String> {
        last.iter().enumerate().map(|(n, i)| (format!("db-{n}"), (*i).to_owned())).collect()
    };
    let all_serve = || cluster.ready_pods().len() == 3;
    cluster
        .eventually("one is new", || {
            images(&cluster) == expected(["one", "one", "two"]) && all_serve()
        })
        .await;
    // A pod that failed comes back under its name, before the partition as it was.
    let failed: Pod = cluster.get("db-0").unwrap();
    let mut status = failed.clone();
    status.metadata.resource_version = None;
    status.status.as_mut().unwrap().phase = Some("Failed".to_owned());
    cluster.registry.update_status(&status).await.unwrap();
    cluster
        .eventually("another one", || {
            let pod: Option<Pod> = cluster.get("db-0");
            pod.is_some_and(|pod| pod.metadata.uid != failed.metadata.uid) && all_serve()
        })
        .await;
    assert_eq!(images(&cluster), expected(["one", "one", "two"]));
    edit(&cluster, "db", |set| {
        let strategy = set.spec.as_mut().unwrap().update_strategy.as_mut().unwrap();
        strategy.rolling_update.as_mut().unwrap().partition = Some(0);
    })
    .await;
    rolled_out(&cluster, "db").await;
    assert_eq!(images(&cluster), expected(["two", "two", "two"]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_on_a_node_that_is_away_is_not_made_again_until_somebody_says_that_it_is_gone() {
    let cluster = Cluster::start().await;
    let nodes = cluster.nodes(2).await;
    cluster.registry.create(&named("db", 1, json!({}))).await.unwrap();
    rolled_out(&cluster, "db").await;
    let first: Pod = cluster.get("db-0").unwrap();
    let home = first.spec.as_ref().unwrap().node_name.clone().unwrap();
    nodes.iter().find(|node| node.name == home).unwrap().kill();
    let is_leaving = || cluster.get::<Pod>("db-0").unwrap().metadata.deletion_timestamp.is_some();
    cluster.eventually("it has to leave", is_leaving).await;
    // What comes later in the queue has come.
    cluster.registry.create(&named("probe", 1, json!({}))).await.unwrap();
    rolled_out(&cluster, "probe").await;
    assert_eq!(cluster.get::<Pod>("db-0").unwrap().metadata.uid, first.metadata.uid);
    let out = json!({"key": "node.kubernetes.io/out-of-service", "effect": "NoExecute"});
    let options = WriteOptions::default();
    let tainted = |node: &Node| {
        let mut node = node.clone();
        let taints = node.spec.get_or_insert_default().taints.get_or_insert_default();
        taints.push(serde_json::from_value(out.clone()).unwrap());
        Ok(node)
    };
    cluster.registry.modify(None, &home, Part::Main, &options, tainted).await.unwrap();
    rolled_out(&cluster, "db").await;
    let second: Pod = cluster.get("db-0").unwrap();
    assert_ne!(second.metadata.uid, first.metadata.uid);
    assert_ne!(second.spec.unwrap().node_name, Some(home));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarts_in_the_middle_give_no_name_twice_and_orphans_are_taken_over() {
    let mut cluster = Cluster::start().await;
    let _nodes = cluster.nodes(2).await;
    cluster.registry.create(&named("db", 4, json!({}))).await.unwrap();
    rolled_out(&cluster, "db").await;
    let begun = cluster.registry.revision();
    set_image(&cluster, "db", "two").await;
    for _ in 0..4 {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        cluster.stop_controllers().await;
        cluster.start_controllers();
    }
    rolled_out(&cluster, "db").await;
    let made = story(&cluster, begun).await;
    assert_eq!(made.iter().filter(|step| step.starts_with('+')).count(), 4, "{made:?}");

    let counts = || (cluster.list::<ControllerRevision>().len(), cluster.list::<Pod>().len());
    let before = images(&cluster);
    cluster.delete::<StatefulSet>("db", "Orphan").await;
    cluster.eventually("it is gone", || cluster.get::<StatefulSet>("db").is_none()).await;
    let is_free = |pod: &Pod| pod.metadata.owner_references.is_none();
    cluster.eventually("free pods", || cluster.list::<Pod>().iter().all(is_free)).await;
    let begun = cluster.registry.revision();
    let mut again = named("db", 4, json!({}));
    again.spec.as_mut().unwrap().template.spec.as_mut().unwrap().containers[0].image =
        Some("two".to_owned());
    cluster.registry.create(&again).await.unwrap();
    rolled_out(&cluster, "db").await;
    assert_eq!(images(&cluster), before);
    assert_eq!(story(&cluster, begun).await, [""; 0], "none is made again");
    cluster.delete::<StatefulSet>("db", "Foreground").await;
    cluster.eventually("all gone", || counts() == (0, 0)).await;
    cluster.eventually("after them", || cluster.get::<StatefulSet>("db").is_none()).await;
}
