use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::jiff::Timestamp;
use serde_json::json;

use super::*;

const VERSION: &str = "apps/v1";

fn at(secs: i64) -> Time {
    Time(Timestamp::from_second(secs).unwrap())
}

fn applies(manager: &str, config: &Value, force: bool) -> Author {
    let applies = Applies { fields: applicable(config, None), force };
    Author { manager: Some(manager.to_owned()), applies: Some(applies) }
}

fn updates(manager: &str) -> Author {
    Author { manager: Some(manager.to_owned()), applies: None }
}

/// An object and its owners, as a registry keeps them.
struct Kept {
    object: Value,
    meta: ObjectMeta,
}

impl Kept {
    fn made_by(author: &Author, object: &Value) -> Self {
        let managed_fields = of_new(VERSION, author, at(1));
        Self { object: object.clone(), meta: ObjectMeta { managed_fields, ..Default::default() } }
    }

    fn write(&mut self, author: &Author, object: &Value, secs: i64) -> Result<(), Vec<Conflict>> {
        self.write_part(author, object, None, secs)
    }

    fn write_part(
        &mut self,
        author: &Author,
        object: &Value,
        subresource: Option<&str>,
        secs: i64,
    ) -> Result<(), Vec<Conflict>> {
        let old = State { meta: &self.meta, object: &self.object };
        let new = State { meta: &self.meta, object };
        let owners = settle(VERSION, old, new, author, subresource, &at(secs))?;
        self.meta.managed_fields = owners;
        self.object = object.clone();
        Ok(())
    }

    /// Who has what, in the order of the entries.
    fn owners(&self) -> Vec<(String, Vec<String>)> {
        let owners = Owners::read(self.meta.managed_fields.as_deref()).unwrap();
        let shown = |owner: &Owner| {
            let operation = if owner.applies { "applied" } else { "updated" };
            let part = owner.subresource.as_deref().unwrap_or("all");
            (format!("{} {operation} {part}", owner.name), owner.fields.paths())
        };
        owners.0.iter().map(shown).collect()
    }
}

fn has(owner: &str, paths: &[&str]) -> (String, Vec<String>) {
    (owner.to_owned(), paths.iter().map(|path| (*path).to_owned()).collect())
}

fn web(replicas: u32, image: &str) -> Value {
    json!({"metadata": {"name": "web"}, "spec": {"replicas": replicas, "image": image}})
}

#[test]
fn a_field_of_somebody_else_is_a_conflict_that_force_ends() {
    let one = applies("one", &web(1, "i"), false);
    let mut kept = Kept::made_by(&one, &web(1, "i"));
    assert_eq!(kept.owners(), [has("one applied all", &[".spec.image", ".spec.replicas"])]);
    let config = json!({"spec": {"replicas": 2}});
    let conflicts = kept.write(&applies("two", &config, false), &web(2, "i"), 2).unwrap_err();
    let expected = Conflict { owner: "\"one\"".to_owned(), field: ".spec.replicas".to_owned() };
    assert_eq!(conflicts, [expected]);
    kept.write(&applies("two", &config, true), &web(2, "i"), 3).unwrap();
    assert_eq!(
        kept.owners(),
        [has("one applied all", &[".spec.image"]), has("two applied all", &[".spec.replicas"])]
    );
}

#[test]
fn the_same_value_is_shared_without_a_conflict() {
    let one = applies("one", &web(1, "i"), false);
    let mut kept = Kept::made_by(&one, &web(1, "i"));
    kept.write(&applies("two", &json!({"spec": {"replicas": 1}}), false), &web(1, "i"), 2).unwrap();
    let entries = kept.meta.managed_fields.clone().unwrap();
    let times: Vec<_> = entries.iter().map(|entry| entry.time.clone().unwrap()).collect();
    assert_eq!(times, [at(1), at(2)]);
    kept.write(&one, &web(1, "i"), 9).unwrap();
    assert_eq!(kept.meta.managed_fields, Some(entries), "nothing changed, not even a time");
}

#[test]
fn an_update_takes_what_it_changes() {
    let one = applies("one", &web(1, "i"), false);
    let mut kept = Kept::made_by(&one, &web(1, "i"));
    kept.write(&updates("scaler"), &web(5, "i"), 2).unwrap();
    let mut with_status = web(5, "i");
    with_status["status"] = json!({"ready": 5});
    kept.write_part(&updates("mesh-control"), &with_status, Some("status"), 3).unwrap();
    assert_eq!(
        kept.owners(),
        [
            has("one applied all", &[".spec.image"]),
            has("scaler updated all", &[".spec.replicas"]),
            has("mesh-control updated status", &[".status.ready"]),
        ]
    );
    let conflicts = kept.write(&one, &web(1, "i"), 4).unwrap_err();
    assert_eq!(conflicts[0].owner, "\"scaler\" using apps/v1 at 1970-01-01T00:00:02Z");
    // What is gone nobody has.
    kept.write(&updates("editor"), &json!({"spec": {"replicas": 5}}), 5).unwrap();
    assert_eq!(kept.owners(), [has("scaler updated all", &[".spec.replicas"])]);
}

fn of_client_side(replicas: u32) -> (Value, ObjectMeta) {
    let config = web(1, "i").to_string();
    let object = json!({
        "metadata": {"name": "web", "annotations": {LAST_APPLIED: config}},
        "spec": {"replicas": replicas, "image": "i", "paused": false}, "status": {"ready": 1}});
    let deployment = json!({"metadata": object["metadata"]});
    let deployment: Deployment = serde_json::from_value(deployment).unwrap();
    (object, deployment.metadata)
}

#[test]
fn what_was_there_before_has_owners_too() {
    let (object, meta) = of_client_side(1);
    let annotation = format!(".metadata.annotations.{LAST_APPLIED}");
    let mut kept = Kept { object: object.clone(), meta };
    let mut changed = object.clone();
    changed["spec"]["paused"] = json!(true);
    let config = json!({"spec": {"paused": true}});
    let refused = kept.write(&applies("helm", &config, false), &changed, 1).unwrap_err();
    assert_eq!(refused[0].owner, "\"before-first-apply\" using apps/v1");
    kept.write(&applies("helm", &config, true), &changed, 1).unwrap();
    assert_eq!(
        kept.owners(),
        [
            has("helm applied all", &[".spec.paused"]),
            has("before-first-apply updated status", &[".status.ready"]),
            has(
                "kubectl-client-side-apply updated all",
                &[&annotation, ".spec.image", ".spec.replicas"]
            ),
        ]
    );
}

#[test]
fn kubectl_takes_over_what_it_applied_on_the_client_s_side() {
    let config = json!({"spec": {"replicas": 3}});
    // As kubectl left it, or as somebody changed it since.
    for (manager, replicas, may) in
        [("kubectl", 1, true), ("kubectl", 7, false), ("helm", 1, false)]
    {
        let (object, meta) = of_client_side(replicas);
        let mut changed = object.clone();
        changed["spec"]["replicas"] = json!(3);
        let outcome = Kept { object, meta }.write(&applies(manager, &config, false), &changed, 1);
        assert_eq!(outcome.is_ok(), may, "{manager} {replicas}: {outcome:?}");
    }
}

#[test]
fn a_client_may_rewrite_the_owners_and_reset_them() {
    let one = applies("one", &web(1, "i"), false);
    let Kept { object, meta: old } = Kept::made_by(&one, &web(1, "i"));
    let mut given = old.clone();
    given.managed_fields.as_mut().unwrap()[0].manager = Some("renamed".to_owned());
    let settled = |given: &ObjectMeta| {
        let from = State { meta: &old, object: &object };
        let to = State { meta: given, object: &object };
        settle(VERSION, from, to, &updates("x"), None, &at(2)).unwrap()
    };
    assert_eq!(settled(&given), given.managed_fields);
    given.managed_fields.as_mut().unwrap()[0].operation = Some("Nonsense".to_owned());
    assert_eq!(settled(&given), old.managed_fields);
    given.managed_fields = Some(vec![]);
    assert_eq!(settled(&given), old.managed_fields);
    given.managed_fields = Some(vec![ManagedFieldsEntry::default()]);
    assert_eq!(settled(&given), None);
}
