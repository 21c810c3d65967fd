use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn at(secs: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + secs).unwrap()
}

fn deployment(replicas: i32, image: &str, patch: Value) -> Deployment {
    let mut value = json!({
        "metadata": {"namespace": "default", "name": "web", "uid": "d", "generation": 1,
            "annotations": {"kubernetes.io/change-cause": "why"}},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "c", "image": image}]}}},
    });
    json_patch::merge(&mut value, &patch);
    serde_json::from_value(value).unwrap()
}

fn with_image(deployment: &Deployment, image: &str) -> Deployment {
    let mut deployment = deployment.clone();
    let spec = deployment.spec.as_mut().unwrap();
    spec.template.spec.as_mut().unwrap().containers[0].image = Some(image.to_owned());
    deployment
}

/// The sets of one Deployment and their pods, advanced by hand.
struct World {
    deployment: Deployment,
    sets: BTreeMap<String, ReplicaSet>,
    now: i64,
}

impl World {
    fn new(deployment: Deployment) -> Self {
        Self { deployment, sets: BTreeMap::new(), now: 0 }
    }

    fn plan(&self) -> Plan {
        let sets: Vec<_> = self.sets.values().cloned().map(Arc::new).collect();
        let running = |set: &ReplicaSet| usize::try_from(status::pods(set)).unwrap();
        plan(&self.deployment, &sets, running, at(self.now))
    }

    /// Plans and applies; returns the steps as text.
    fn step(&mut self) -> Vec<String> {
        let plan = self.plan();
        let text = plan.steps.iter().map(ToString::to_string).collect();
        self.deployment.status = Some(plan.status);
        self.now += 1;
        let bounds = Bounds::of(&self.deployment);
        for step in plan.steps {
            match step {
                Step::Create(set) => {
                    let mut set = *set;
                    set.metadata.uid = set.metadata.name.clone();
                    set.metadata.creation_timestamp =
                        Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(self.now)));
                    self.sets.insert(name(&set), set);
                }
                Step::Scale(name, _, to) => {
                    let set = self.sets.get_mut(&name).unwrap();
                    set.spec.as_mut().unwrap().replicas = Some(to);
                    note(set, bounds);
                }
                Step::Note(name) => note(self.sets.get_mut(&name).unwrap(), bounds),
                Step::Annotate(name, annotations) => {
                    self.sets.get_mut(&name).unwrap().metadata.annotations = Some(annotations);
                }
                Step::Adopt(name) => {
                    let owner = revision::owner_reference(&self.deployment);
                    self.sets.get_mut(&name).unwrap().metadata.owner_references = Some(vec![owner]);
                }
                Step::Delete(name) => {
                    self.sets.remove(&name);
                }
                Step::Revision(revision) => {
                    let annotations = self.deployment.metadata.annotations.get_or_insert_default();
                    annotations.insert(revision::REVISION.to_owned(), revision.to_string());
                }
            }
        }
        text
    }

    /// Lets each set report what it is told to have, all available.
    fn settle_pods(&mut self) {
        for set in self.sets.values_mut() {
            let n = wanted(set);
            set_status(set, n, n);
        }
    }

    fn roll_out(&mut self) {
        for _ in 0..50 {
            self.step();
            self.settle_pods();
        }
        assert_eq!(self.step(), Vec::<String>::new(), "nothing left to do");
    }

    fn sizes(&self) -> Vec<i32> {
        let mut sets: Vec<_> = self.sets.values().collect();
        sets.sort_by_key(|s| revision::revision(&s.metadata));
        sets.into_iter().map(wanted).collect()
    }

    fn revision(&self) -> i64 {
        revision::revision(&self.deployment.metadata)
    }

    fn condition(&self, type_: &str) -> (String, String) {
        let status = self.deployment.status.clone().unwrap_or_default();
        let found = status.conditions.into_iter().flatten().find(|c| c.type_ == type_);
        found.map(|c| (c.status, c.reason.unwrap_or_default())).unwrap_or_default()
    }
}

fn set_status(set: &mut ReplicaSet, pods: i32, available: i32) {
    set.status = Some(k8s_openapi::api::apps::v1::ReplicaSetStatus {
        replicas: pods,
        ready_replicas: Some(available),
        available_replicas: Some(available),
        observed_generation: set.metadata.generation,
        ..Default::default()
    });
}

#[test]
fn the_first_set_is_created_at_full_size() {
    let mut world = World::new(deployment(3, "a", json!({})));
    let steps = world.step();
    assert!(steps[0].starts_with("create replica set web-"), "{steps:?}");
    assert_eq!(steps[1], "set revision 1");
    assert_eq!(world.condition("Progressing"), ("True".into(), "NewReplicaSetCreated".into()));
    assert_eq!(world.condition("Available"), ("False".into(), "MinimumReplicasUnavailable".into()));
    let set = world.sets.values().next().unwrap();
    let hash = &set.metadata.labels.as_ref().unwrap()["pod-template-hash"];
    assert_eq!(name(set), format!("web-{hash}"));
    let spec = set.spec.as_ref().unwrap();
    assert_eq!(spec.selector.match_labels.as_ref().unwrap()["pod-template-hash"], *hash);
    let annotations = set.metadata.annotations.as_ref().unwrap();
    assert_eq!(annotations["kubernetes.io/change-cause"], "why");
    assert_eq!(annotations["deployment.kubernetes.io/revision"], "1");
    assert_eq!(annotations["deployment.kubernetes.io/max-replicas"], "4");
    world.roll_out();
    assert_eq!(world.condition("Progressing"), ("True".into(), "NewReplicaSetAvailable".into()));
    assert_eq!(world.condition("Available"), ("True".into(), "MinimumReplicasAvailable".into()));
    let status = world.deployment.status.unwrap();
    assert_eq!((status.replicas, status.updated_replicas), (Some(3), Some(3)));
    assert_eq!((status.available_replicas, status.unavailable_replicas), (Some(3), Some(0)));
}

#[test]
fn a_new_template_rolls_and_an_old_one_rolls_back_with_a_new_revision() {
    let mut world = World::new(deployment(4, "a", json!({})));
    world.roll_out();
    world.deployment = with_image(&world.deployment, "b");
    world.roll_out();
    assert_eq!((world.sizes(), world.revision()), (vec![0, 4], 2));
    world.deployment = with_image(&world.deployment, "a");
    world.roll_out();
    assert_eq!((world.sizes(), world.revision()), (vec![0, 4], 3));
    let back = world.sets.values().find(|s| wanted(s) == 4).unwrap();
    let annotations = back.metadata.annotations.as_ref().unwrap();
    assert_eq!(annotations["deployment.kubernetes.io/revision-history"], "1");
    assert_eq!(world.sets.len(), 2);
}

#[test]
fn scaling_changes_the_present_set_only() {
    let mut world = World::new(deployment(1, "a", json!({})));
    world.roll_out();
    for replicas in [5, 2, 0, 3] {
        world.deployment.spec.as_mut().unwrap().replicas = Some(replicas);
        world.roll_out();
        assert_eq!(world.sizes(), [replicas]);
    }
    assert_eq!(world.revision(), 1);
}

#[test]
fn recreate_waits_until_the_old_pods_are_gone() {
    let recreate = json!({"spec": {"strategy": {"type": "Recreate"}}});
    let mut world = World::new(deployment(2, "a", recreate));
    world.roll_out();
    world.deployment = with_image(&world.deployment, "b");
    assert_eq!(world.step().len(), 1, "scaled down");
    assert_eq!(world.step(), Vec::<String>::new(), "its pods still run");
    world.settle_pods();
    let sets: Vec<_> = world.sets.values().cloned().map(Arc::new).collect();
    assert_eq!(plan(&world.deployment, &sets, |_| 1, at(100)).steps, [], "one is going away");
    assert!(world.step()[0].starts_with("create replica set"));
    world.roll_out();
    assert_eq!(world.sizes(), [0, 2]);
}

#[test]
fn a_paused_deployment_scales_but_does_not_roll() {
    let mut world = World::new(deployment(2, "a", json!({})));
    world.roll_out();
    world.deployment = with_image(&world.deployment, "b");
    world.deployment.spec.as_mut().unwrap().paused = Some(true);
    world.deployment.spec.as_mut().unwrap().replicas = Some(3);
    world.roll_out();
    assert_eq!((world.sizes(), world.revision()), (vec![3], 1));
    assert_eq!(world.condition("Progressing"), ("Unknown".into(), "DeploymentPaused".into()));
    world.deployment.spec.as_mut().unwrap().paused = None;
    world.step();
    assert_eq!(world.sets.len(), 2);
    world.roll_out();
    assert_eq!(world.condition("Progressing").1, "NewReplicaSetAvailable");
}

#[test]
fn a_rollout_that_stands_still_times_out_and_recovers() {
    let deadline = json!({"spec": {"progressDeadlineSeconds": 60}});
    let mut world = World::new(deployment(2, "a", deadline));
    world.roll_out();
    world.deployment = with_image(&world.deployment, "broken");
    world.step();
    let until = world.plan().look_again.unwrap();
    assert!(until > at(world.now) && until <= at(world.now + 60));
    world.now += 61;
    world.step();
    assert_eq!(world.condition("Progressing"), ("False".into(), "ProgressDeadlineExceeded".into()));
    assert_eq!(world.condition("Available").0, "True", "the old pods still serve");
    assert_eq!(world.plan().look_again, None);
    world.deployment = with_image(&world.deployment, "a");
    world.roll_out();
    assert_eq!(world.condition("Progressing").1, "NewReplicaSetAvailable");
}

#[test]
fn history_is_limited() {
    let mut world = World::new(deployment(1, "a", json!({"spec": {"revisionHistoryLimit": 1}})));
    for image in ["a", "b", "c", "d"] {
        world.deployment = with_image(&world.deployment, image);
        world.roll_out();
    }
    assert_eq!((world.sizes(), world.revision()), (vec![0, 1], 4));
}

#[test]
fn orphans_are_adopted_and_foreign_sets_left_alone() {
    let mut world = World::new(deployment(2, "a", json!({})));
    world.roll_out();
    let set = world.sets.values_mut().next().unwrap();
    set.metadata.owner_references = None;
    let name = name(set);
    let mut foreign = set.clone();
    foreign.metadata.name = Some("foreign".to_owned());
    foreign.metadata.owner_references = Some(vec![
        serde_json::from_value(json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": "x", "uid": "x", "controller": true}))
            .unwrap(),
    ]);
    world.sets.insert("foreign".to_owned(), foreign);
    assert_eq!(world.step(), [format!("adopt replica set {name}")]);
    assert_eq!(world.step(), Vec::<String>::new());
    world.deployment.metadata.deletion_timestamp =
        Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(0)));
    world.sets.clear();
    assert_eq!(world.step(), Vec::<String>::new(), "a deleted one creates nothing");
}

#[test]
fn defaults_that_the_api_adds_to_the_set_do_not_start_a_rollout() {
    let mut world = World::new(deployment(1, "a", json!({})));
    world.step();
    for set in world.sets.values_mut() {
        let template = set.spec.as_mut().unwrap().template.as_mut().unwrap();
        template.spec.as_mut().unwrap().restart_policy = Some("Always".to_owned());
    }
    world.roll_out();
    assert_eq!(world.sets.len(), 1);
}

proptest! {
    /// Pods start and stop late and in any order: the number of pods never exceeds the surge, and the
    /// available ones never fall below the minimum by what the plan does.
    #[test]
    fn rollouts_stay_within_their_bounds(
        replicas in 1i32..7, surge in 0i32..3, unavailable in 0i32..3,
        schedule in prop::collection::vec((0u8..3, any::<bool>()), 150),
    ) {
        let strategy = json!({"spec": {"strategy": {"rollingUpdate":
            {"maxSurge": surge, "maxUnavailable": unavailable}}}});
        let mut world = World::new(deployment(replicas, "a", strategy));
        world.roll_out();
        world.deployment = with_image(&world.deployment, "b");
        let bounds = Bounds::of(&world.deployment);
        // What really is, as opposed to what was reported: (pods, available) per set.
        let mut real: BTreeMap<String, (i32, i32)> = BTreeMap::new();
        for (name, set) in &world.sets {
            real.insert(name.clone(), (wanted(set), wanted(set)));
        }
        for (what, report) in schedule {
            match what {
                0 => { world.step(); }
                1 => for (name, set) in &world.sets {
                    // The set's controller: creates at once, deletes the unavailable first.
                    let (pods, available) = real.entry(name.clone()).or_default();
                    *pods = wanted(set);
                    *available = (*available).min(*pods);
                },
                _ => for (pods, available) in real.values_mut() {
                    *available = (*available + 1).min(*pods);
                },
            }
            if report {
                for (name, set) in &mut world.sets {
                    let (pods, available) = real.get(name).copied().unwrap_or_default();
                    set_status(set, pods, available);
                }
            }
            let pods: i32 = real.values().map(|(pods, _)| pods).sum();
            let available: i32 = real.values().map(|(_, available)| available).sum();
            prop_assert!(pods <= bounds.most, "{} pods of at most {}", pods, bounds.most);
            prop_assert!(available >= bounds.least, "{} available of {}", available, bounds.least);
        }
        world.roll_out();
        prop_assert_eq!(world.sizes(), vec![0, replicas]);
    }
}
