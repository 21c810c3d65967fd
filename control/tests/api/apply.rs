//! Server-side apply: whoever applies an object decides the fields that they give, and no others.

use http::Method;
use serde_json::{Value, json};

use super::support::*;

impl Control {
    async fn apply(&self, path: &str, query: &str, config: &Value) -> Answer {
        let path = format!("{path}?{query}");
        self.patch(&path, APPLY, config.clone()).await
    }
}

/// A manifest as one writes it: without what is defaulted.
fn web(replicas: Option<u32>, image: &str, env: &[&str]) -> Value {
    let env: Vec<Value> = env.iter().map(|name| json!({"name": name, "value": "1"})).collect();
    let mut web = deployment("web");
    let spec = web["spec"].as_object_mut().unwrap();
    spec.remove("replicas");
    if let Some(replicas) = replicas {
        spec.insert("replicas".to_owned(), replicas.into());
    }
    web["spec"]["template"]["spec"]["containers"][0]["image"] = json!(image);
    web["spec"]["template"]["spec"]["containers"][0]["env"] = json!(env);
    web
}

fn names(list: &Value) -> Vec<&str> {
    let names = list.as_array().into_iter().flatten().map(|item| item["name"].as_str());
    names.map(Option::unwrap).collect()
}

/// Who has which fields, by name and operation.
fn owners(object: &Value) -> Vec<String> {
    let entries = object["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
    let shown = |entry: &Value| {
        let part = entry["subresource"].as_str().unwrap_or("all");
        let text = |field: &str| entry[field].as_str().unwrap().to_owned();
        assert_eq!(entry["fieldsType"], "FieldsV1");
        format!("{} {} {part}", text("manager"), text("operation"))
    };
    entries.iter().map(shown).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_applied_is_made_changed_and_dropped() {
    let control = Control::start().await;
    let path = format!("{DEPLOYMENTS}/web");
    let made = control.apply(&path, "fieldManager=one", &web(Some(0), "i:1", &["A", "B"])).await;
    assert_eq!(made.code, 201, "{}", made.body);
    assert_eq!(owners(&made.body), ["one Apply all"]);
    let fields = &made.body["metadata"]["managedFields"][0]["fieldsV1"];
    assert!(fields["f:metadata"].is_null() && fields["f:spec"]["f:strategy"].is_null(), "{fields}");
    let container =
        &fields["f:spec"]["f:template"]["f:spec"]["f:containers"]["k:{\"name\":\"main\"}"];
    assert_eq!(container["f:env"]["k:{\"name\":\"A\"}"]["f:value"], json!({}));

    let again = control.apply(&path, "fieldManager=one", &web(Some(0), "i:1", &["A", "B"])).await;
    assert_eq!(again.code, 200);
    let version = |answer: &Answer| answer.body["metadata"]["generation"].clone();
    assert_eq!(version(&again), 1);

    let changed = control.apply(&path, "fieldManager=one", &web(Some(0), "i:2", &["B"])).await;
    let container = &changed.body["spec"]["template"]["spec"]["containers"][0];
    assert_eq!((changed.code, &container["image"]), (200, &json!("i:2")));
    assert_eq!(names(&container["env"]), ["B"]);
    assert_eq!(version(&changed), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_owners_share_an_object_and_their_conflicts_are_named() {
    let control = Control::start().await;
    let path = format!("{DEPLOYMENTS}/web");
    control.apply(&path, "fieldManager=one", &web(Some(0), "i:1", &["A"])).await;
    let side = |image: &str, replicas: u32| {
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "labels": {"by": "two"}},
            "spec": {"replicas": replicas, "template": {"spec": {"containers": [{"name": "side", "image": image}]}}}})
    };
    let refused = control.apply(&path, "fieldManager=two", &side("s:1", 2)).await;
    assert_eq!((refused.code, &refused.body["reason"]), (409, &json!("Conflict")));
    let cause = &refused.body["details"]["causes"][0];
    assert_eq!(
        (&cause["field"], &cause["reason"], &cause["message"]),
        (&json!(".spec.replicas"), &json!("FieldManagerConflict"), &json!("conflict with \"one\""))
    );
    assert_eq!(
        refused.body["message"],
        "Apply failed with 1 conflict: conflict with \"one\": .spec.replicas"
    );
    let forced = control.apply(&path, "fieldManager=two&force=true", &side("s:1", 2)).await;
    assert_eq!((forced.code, &forced.body["spec"]["replicas"]), (200, &json!(2)));
    let containers =
        |answer: &Answer| names(&answer.body["spec"]["template"]["spec"]["containers"]).join(" ");
    assert_eq!(containers(&forced), "main side");
    // The first one no longer says how many; the second one's number stays, and so does its container.
    let one = control.apply(&path, "fieldManager=one", &web(None, "i:1", &["A"])).await;
    assert_eq!((one.code, &one.body["spec"]["replicas"]), (200, &json!(2)));
    assert_eq!(containers(&one), "main side");
    // What the second one lets go of goes, with what was defaulted in it.
    let bare = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {"replicas": 2}});
    let two = control.apply(&path, "fieldManager=two", &bare).await;
    assert_eq!(containers(&two), "main");
    assert!(two.body["metadata"]["labels"].is_null());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_writes_take_what_they_change() {
    let control = Control::start().await;
    let path = format!("{DEPLOYMENTS}/web");
    control.apply(&path, "fieldManager=one", &web(Some(0), "i:1", &["A"])).await;
    let patch = json!({"spec": {"replicas": 3}});
    let scaled = control.patch(&format!("{path}?fieldManager=scaler"), MERGE, patch).await;
    assert!(owners(&scaled.body).contains(&"scaler Update all".to_owned()), "{}", scaled.body);
    let refused = control.apply(&path, "fieldManager=one", &web(Some(0), "i:1", &["A"])).await;
    assert_eq!(refused.code, 409);
    assert!(refused.body["message"].as_str().unwrap().contains("\"scaler\" using apps/v1 at "));
    let given_up = control.apply(&path, "fieldManager=one", &web(None, "i:1", &["A"])).await;
    assert_eq!((given_up.code, &given_up.body["spec"]["replicas"]), (200, &json!(3)));

    let status = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {"replicas": 9}, "status": {"collisionCount": 7}});
    let applied = control.apply(&format!("{path}/status"), "fieldManager=eye", &status).await;
    assert_eq!(applied.body["status"]["collisionCount"], 7, "{}", applied.body);
    assert_eq!(applied.body["spec"]["replicas"], 3);
    assert!(owners(&applied.body).contains(&"eye Apply status".to_owned()), "{}", applied.body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_made_without_an_owner_is_applied_too() {
    let control = Control::start().await;
    let path = format!("{MAPS}/a");
    let made = control.create(MAPS, config_map("a", "1")).await;
    assert!(made["metadata"]["managedFields"].is_null(), "only what is applied has owners");
    let mut config = config_map("a", "1");
    config["data"]["l"] = json!("2");
    let applied = control.apply(&path, "fieldManager=one", &config).await;
    assert_eq!(applied.code, 200, "{}", applied.body);
    assert_eq!(owners(&applied.body), ["one Apply all", "before-first-apply Update all"]);
    config["data"]["k"] = json!("2");
    let refused = control.apply(&path, "fieldManager=one", &config).await;
    assert!(refused.body["message"].as_str().unwrap().contains("before-first-apply"));
    let reset = json!({"metadata": {"managedFields": [{}]}});
    let reset = control.patch(&path, MERGE, reset).await;
    assert!(reset.body["metadata"]["managedFields"].is_null(), "{}", reset.body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubectl_finds_noted_what_it_applied_last() {
    let control = Control::start().await;
    let path = format!("{MAPS}/a");
    let note = "kubectl.kubernetes.io/last-applied-configuration";
    let mut made = config_map("a", "1");
    made["metadata"]["annotations"] = json!({note: config_map("a", "1").to_string()});
    control.create(MAPS, made).await;
    let noted = |answer: &Answer| {
        let text = answer.body["metadata"]["annotations"][note].as_str().unwrap().to_owned();
        serde_json::from_str::<Value>(&text).unwrap()["data"]["k"].clone()
    };
    // What it applied itself it may change, and the note with it, whose owner has another name.
    let second = control.apply(&path, "fieldManager=kubectl", &config_map("a", "2")).await;
    assert_eq!((second.code, noted(&second)), (200, json!("2")), "{}", second.body);
    assert!(owners(&second.body).contains(&"kubectl-client-side-apply Update all".to_owned()));
    let third = control.apply(&path, "fieldManager=kubectl", &config_map("a", "3")).await;
    assert_eq!((third.code, noted(&third)), (200, json!("3")), "{}", third.body);
    let other = control.apply(&path, "fieldManager=x&force=true", &config_map("a", "4")).await;
    assert_eq!((other.code, noted(&other)), (200, json!("3")), "it is kubectl's");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_keep_their_addresses_and_ports_of_both_protocols() {
    let control = Control::start().await;
    let path = "/api/v1/namespaces/default/services/dns";
    let service = |ports: Value| {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "dns"},
            "spec": {"type": "NodePort", "selector": {"app": "dns"}, "ports": ports}})
    };
    let both = json!([{"name": "tcp", "port": 53}, {"name": "udp", "port": 53, "protocol": "UDP"}]);
    let made = control.apply(path, "fieldManager=one", &service(both.clone())).await.body;
    let again = control.apply(path, "fieldManager=one", &service(both)).await.body;
    assert_eq!((&again["spec"], &again["metadata"]), (&made["spec"], &made["metadata"]));
    let udp = json!([{"name": "udp", "port": 53, "protocol": "UDP"}]);
    let less = control.apply(path, "fieldManager=one", &service(udp)).await.body;
    assert_eq!(less["spec"]["ports"], json!([made["spec"]["ports"][1]]));
    assert_eq!(less["spec"]["clusterIP"], made["spec"]["clusterIP"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn applies_that_make_no_sense_are_refused_and_dry_ones_not_kept() {
    let control = Control::start().await;
    let path = format!("{MAPS}/a");
    let good = config_map("a", "1");
    let with = |change: &dyn Fn(&mut Value)| {
        let mut config = good.clone();
        change(&mut config);
        config
    };
    let before = control.registry.revision();
    for (query, config, code, says) in [
        ("", good.clone(), 422, "fieldManager: Required value"),
        ("fieldManager=x&force=perhaps", good.clone(), 400, "must be true or false"),
        ("fieldManager=x", json!([]), 400, "one object"),
        ("fieldManager=x", json!({"metadata": {"name": "a"}}), 400, "needs apiVersion and kind"),
        ("fieldManager=x", with(&|c| c["metadata"]["name"] = json!("b")), 400, "does not match"),
        ("fieldManager=x", with(&|c| c["kind"] = json!("Secret")), 400, "expected kind"),
        ("fieldManager=x", with(&|c| c["metadata"]["managedFields"] = json!([{}])), 400, "nil"),
        ("fieldManager=x", with(&|c| c["metadata"]["uid"] = json!("u")), 409, "metadata.uid"),
        ("fieldManager=x&fieldValidation=Strict", with(&|c| c["frob"] = json!(1)), 400, "frob"),
    ] {
        let refused = control.apply(&path, query, &config).await;
        let message = refused.body["message"].as_str().unwrap_or_default();
        assert!(
            refused.code == code && message.contains(says),
            "{query} {config}: {}",
            refused.body
        );
    }
    let scale = json!({"apiVersion": "autoscaling/v1", "kind": "Scale", "spec": {"replicas": 1}});
    let scale = control.apply(&format!("{DEPLOYMENTS}/w/scale"), "fieldManager=x", &scale).await;
    assert_eq!(scale.code, 415);
    let dry = control.apply(&path, "fieldManager=x&dryRun=All", &good).await;
    assert_eq!((dry.code, control.get(&path).await.code), (201, 404));
    assert_eq!(control.registry.revision(), before);
    let yaml = b"apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {k: 'y'}\n".to_vec();
    let query = format!("{path}?fieldManager=x");
    let made = send(&control.client, Method::PATCH, &query, APPLY, yaml).await;
    assert_eq!((made.code, &made.body["data"]["k"]), (201, &json!("y")));
}
