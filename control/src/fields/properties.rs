//! What holds for every object, owner and order of elements.

use proptest::prelude::*;
use proptest::sample::subsequence;
use serde_json::{Map, Value, json};

use super::merge::applied;
use super::set::{Changes, Set, modified};

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

fn maps() -> impl Strategy<Value = Value> {
    let fields = subsequence(&NAMES[..], 0..=3).prop_shuffle();
    (fields, 0..3u8).prop_map(|(names, value)| {
        names.into_iter().map(|name| (name.to_owned(), json!(value.to_string()))).collect()
    })
}

fn elements() -> impl Strategy<Value = Value> {
    let names = subsequence(&NAMES[..], 0..=4).prop_shuffle();
    (names, maps(), 0..3u8).prop_map(|(names, env, image)| {
        let env: Vec<Value> = env.as_object().into_iter().flatten().map(named).collect();
        let element = |name| json!({"name": name, "image": image, "args": [image], "env": env});
        names.into_iter().map(element).collect()
    })
}

fn named((name, value): (&String, &Value)) -> Value {
    json!({"name": name, "value": value})
}

/// Some of what a Deployment has: a map, a scalar, an atomic map, a list with keys in a list with keys, a set.
fn objects() -> impl Strategy<Value = Value> {
    let values = subsequence(vec!["x/y", "x/z"], 0..=2).prop_shuffle();
    let parts = (maps(), 0..3u8, maps(), elements(), values);
    (parts, subsequence(vec![0, 1, 2, 3, 4], 0..=5)).prop_map(|(parts, given)| {
        let (labels, replicas, selector, containers, finalizers) = parts;
        let (mut meta, mut spec) = (Map::new(), Map::new());
        for part in given {
            match part {
                0 => drop(meta.insert("labels".to_owned(), labels.clone())),
                1 => drop(spec.insert("replicas".to_owned(), json!(replicas))),
                2 => drop(spec.insert("selector".to_owned(), selector.clone())),
                3 => drop(spec.insert("containers".to_owned(), containers.clone())),
                _ => drop(meta.insert("finalizers".to_owned(), json!(finalizers))),
            }
        }
        json!({"metadata": meta, "spec": spec})
    })
}

fn apply(live: &Value, config: &Value, last: &Set, others: &Set) -> Value {
    let mut owned = Set::of(config);
    owned.add(others);
    applied(live, config, last, &owned).unwrap()
}

proptest! {
    #[test]
    fn the_form_on_the_wire_says_it_all(object in objects()) {
        let set = Set::of(&object);
        prop_assert_eq!(Set::from_wire(&set.to_wire()), Some(set.clone()));
        prop_assert_eq!(Changes::between(&object, &object), Changes::default());
        prop_assert!(set.without(&set).is_empty() && set.common(&set) == set);
    }

    #[test]
    fn what_is_applied_is_there_and_applying_it_again_changes_nothing(
        live in objects(), config in objects(), last in objects(),
    ) {
        let nobody = Set::default();
        let once = apply(&live, &config, &Set::of(&last), &nobody);
        let after = Set::of(&once);
        let lost = Set::of(&config).without(&after);
        prop_assert!(lost.paths().iter().all(|path| is_filled(&after, path)), "{}", once);
        prop_assert!(modified(&config, &once).is_empty(), "{}", once);
        let again = apply(&once, &config, &Set::of(&config), &nobody);
        prop_assert_eq!(again, once);
    }

    #[test]
    fn what_others_have_stays_and_what_nobody_has_any_more_goes(
        live in objects(), config in objects(), theirs in objects(), last in objects(),
    ) {
        let live = apply(&live, &theirs, &Set::default(), &Set::default());
        let live = apply(&live, &last, &Set::default(), &Set::of(&theirs));
        let (theirs, last) = (Set::of(&theirs).common(&Set::of(&live)), Set::of(&last));
        let result = apply(&live, &config, &last, &theirs);
        let (after, given) = (Set::of(&result), Set::of(&config));
        let lost = theirs.without(&after).without(&given);
        prop_assert!(lost.paths().iter().all(|path| is_filled(&after, path)), "{:?}", lost);
        let left = last.without(&given).without(&theirs).common(&after);
        prop_assert!(left.is_empty(), "{:?}", left);
    }
}

/// What is empty is a field by itself, until something is in it.
fn is_filled(set: &Set, path: &str) -> bool {
    set.paths().iter().any(|other| other.len() > path.len() && other.starts_with(path))
}
