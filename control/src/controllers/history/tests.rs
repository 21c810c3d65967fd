use k8s_openapi::api::apps::v1::DaemonSet;

use super::*;

fn set(image: &str) -> DaemonSet {
    let mut set: DaemonSet = serde_json::from_value(json!({
        "metadata": {"namespace": "ns", "name": "logs", "uid": "ds", "annotations": {
            LAST_APPLIED: "{}", "kubernetes.io/change-cause": "why"}},
        "spec": {"selector": {"matchLabels": {"app": "logs"}}, "revisionHistoryLimit": 2,
            "template": {"metadata": {"labels": {"app": "logs"}},
                "spec": {"containers": [{"name": "main", "image": image}]}}}}))
    .unwrap();
    set.set_defaults();
    set
}

/// Takes the steps until none is left.
fn settle(set: &DaemonSet, all: &mut Vec<Arc<ControllerRevision>>) {
    loop {
        let steps = plan(set, all);
        if steps.is_empty() {
            return;
        }
        for step in steps {
            let find = |all: &[Arc<ControllerRevision>], name: &str| {
                all.iter().position(|r| objects::name(&r.metadata) == name).unwrap()
            };
            match step {
                Step::Create(made) => all.push(Arc::from(made)),
                Step::Adopt(name) => {
                    let at = find(all, &name);
                    let owners = vec![ownership::reference(set)];
                    Arc::make_mut(&mut all[at]).metadata.owner_references = Some(owners);
                }
                Step::Renumber(name, number) => {
                    let at = find(all, &name);
                    Arc::make_mut(&mut all[at]).revision = number;
                }
            }
        }
    }
}

fn images(set: &DaemonSet, all: &[Arc<ControllerRevision>]) -> Vec<(i64, String)> {
    let image = |revision: &ControllerRevision| {
        template_of(revision).unwrap().spec.unwrap().containers[0].image.clone().unwrap()
    };
    of(set, all).iter().map(|r| (r.revision, image(r))).collect()
}

fn shown(list: &[(i64, &str)]) -> Vec<(i64, String)> {
    list.iter().map(|(number, image)| (*number, (*image).to_owned())).collect()
}

#[test]
fn each_template_is_kept_once_and_the_present_one_is_the_newest() {
    let mut all = Vec::new();
    for image in ["one", "two", "two", "three"] {
        settle(&set(image), &mut all);
    }
    assert_eq!(images(&set("x"), &all), shown(&[(1, "one"), (2, "two"), (3, "three")]));
    settle(&set("one"), &mut all);
    assert_eq!(images(&set("x"), &all), shown(&[(2, "two"), (3, "three"), (4, "one")]));
    let meta = &all[0].metadata;
    let annotations = meta.annotations.clone().unwrap();
    assert_eq!(annotations.keys().collect::<Vec<_>>(), ["kubernetes.io/change-cause"]);
    let labels = meta.labels.clone().unwrap();
    assert_eq!(labels["app"], "logs", "as kubectl selects them");
    assert_eq!(*meta.name.as_ref().unwrap(), format!("logs-{}", labels[DaemonSet::HASH]));
    assert_eq!(all[0].data.as_ref().unwrap().0["spec"]["template"]["$patch"], "replace");
}

#[test]
fn a_template_of_other_defaults_is_the_same() {
    let mut all = Vec::new();
    settle(&set("one"), &mut all);
    let spec = &mut Arc::make_mut(&mut all[0]).data.as_mut().unwrap().0["spec"]["template"]["spec"];
    assert_eq!(spec.as_object_mut().unwrap().remove("dnsPolicy"), Some(json!("ClusterFirst")));
    assert_eq!(plan(&set("one"), &all), []);
}

#[test]
fn revisions_of_nobody_are_taken_over_and_those_of_others_are_not() {
    let mut all = Vec::new();
    settle(&set("one"), &mut all);
    Arc::make_mut(&mut all[0]).metadata.owner_references = None;
    let name = objects::name(&all[0].metadata).to_owned();
    assert_eq!(plan(&set("two"), &all), [Step::Adopt(name)]);
    let mut other = set("one");
    other.metadata.uid = Some("other".to_owned());
    Arc::make_mut(&mut all[0]).metadata.owner_references = Some(vec![ownership::reference(&other)]);
    assert!(matches!(plan(&set("one"), &all)[..], [Step::Create(_)]));
}

#[test]
fn the_oldest_that_no_pod_has_go_first() {
    let mut all = Vec::new();
    for image in ["one", "two", "three", "four", "five"] {
        settle(&set(image), &mut all);
    }
    let set = set("five");
    let own = of(&set, &all);
    let names: Vec<&str> = own.iter().map(|r| objects::name(&r.metadata)).collect();
    assert_eq!(surplus(&set, &own, &BTreeSet::new()), names[..2], "two are kept");
    let used = BTreeSet::from([names[0]]);
    assert_eq!(surplus(&set, &own, &used), [names[1]]);
    assert_eq!(surplus(&set, &own[..2], &BTreeSet::new()), [""; 0]);
}

#[test]
fn another_count_of_collisions_is_another_name() {
    let first = new_revision(&set("one"), 1).unwrap().metadata.name;
    let second = new_revision(&set("one").with_collisions(1), 1).unwrap().metadata.name;
    assert_ne!(first, second);
}
