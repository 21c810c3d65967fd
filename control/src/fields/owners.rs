//! The owners in `metadata.managedFields`, and what a write does to them.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{
    FieldsV1, ManagedFieldsEntry, ObjectMeta, Time,
};
use serde_json::Value;

use super::Set;
use super::set::{Changes, modified};

/// Who writes when nobody else is named: the controllers of this service.
const OURSELVES: &str = "mesh-control";
/// Who has what was there before anybody applied the object.
const BEFORE: &str = "before-first-apply";
/// Who has what `kubectl apply` without `--server-side` said last, and where it said so. kubectl looks for both to change over.
const CLIENT_SIDE: &str = "kubectl-client-side-apply";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
const NOTE: [&str; 3] =
    ["f:metadata", "f:annotations", "f:kubectl.kubernetes.io/last-applied-configuration"];
/// `kubectl apply --server-side` takes over what the same command without the flag applied.
const KUBECTL: &str = "kubectl";

/// Fields that nobody has: they name the object, or are this service's.
const NOBODYS: [&[&str]; 13] = [
    &["f:apiVersion"],
    &["f:kind"],
    &["f:metadata", "f:name"],
    &["f:metadata", "f:namespace"],
    &["f:metadata", "f:uid"],
    &["f:metadata", "f:resourceVersion"],
    &["f:metadata", "f:generation"],
    &["f:metadata", "f:creationTimestamp"],
    &["f:metadata", "f:deletionTimestamp"],
    &["f:metadata", "f:deletionGracePeriodSeconds"],
    &["f:metadata", "f:managedFields"],
    &["f:metadata", "f:selfLink"],
    &["f:metadata", "f:clusterName"],
];
const STATUS: &str = "f:status";

/// Who writes, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Author {
    /// By what name; none for this service itself.
    pub manager: Option<String>,
    /// What is applied; none for a create, update or patch.
    pub applies: Option<Applies>,
}

/// An apply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applies {
    /// The fields that are given, as [`applicable`].
    pub fields: Set,
    /// Whether fields of others are taken over.
    pub force: bool,
}

impl Author {
    fn name(&self) -> &str {
        self.manager.as_deref().unwrap_or(OURSELVES)
    }
}

/// A field that somebody else has and the author would change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// Who, as people read it.
    pub owner: String,
    /// The path of the field.
    pub field: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Owner {
    name: String,
    applies: bool,
    subresource: Option<String>,
    api_version: String,
    time: Option<Time>,
    fields: Set,
}

impl Owner {
    fn read(entry: &ManagedFieldsEntry) -> Option<Self> {
        Some(Self {
            name: entry.manager.clone().unwrap_or_default(),
            applies: match entry.operation.as_deref() {
                Some("Apply") => true,
                Some("Update") => false,
                _ => return None,
            },
            subresource: entry.subresource.clone().filter(|name| !name.is_empty()),
            api_version: entry.api_version.clone().unwrap_or_default(),
            time: entry.time.clone(),
            fields: Set::from_wire(&entry.fields_v1.as_ref()?.0)?,
        })
    }

    fn entry(self) -> ManagedFieldsEntry {
        ManagedFieldsEntry {
            manager: Some(self.name),
            operation: Some(if self.applies { "Apply" } else { "Update" }.to_owned()),
            subresource: self.subresource,
            api_version: Some(self.api_version),
            time: self.time,
            fields_type: Some("FieldsV1".to_owned()),
            fields_v1: Some(FieldsV1(self.fields.to_wire())),
        }
    }

    fn shown(&self) -> String {
        match (self.applies, &self.time) {
            (true, _) => format!("{:?}", self.name),
            (false, None) => format!("{:?} using {}", self.name, self.api_version),
            (false, Some(Time(time))) => {
                format!("{:?} using {} at {time}", self.name, self.api_version)
            }
        }
    }

    /// Changes what it has; an owner of other fields than before has a new time.
    fn set(&mut self, fields: Set, now: &Time) {
        if self.fields != fields {
            self.fields = fields;
            self.time = Some(now.clone());
        }
    }
}

/// All owners of an object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Owners(Vec<Owner>);

impl Owners {
    fn read(entries: Option<&[ManagedFieldsEntry]>) -> Option<Self> {
        entries.unwrap_or_default().iter().map(Owner::read).collect::<Option<Vec<_>>>().map(Self)
    }

    /// Those of an object that is about to be applied: without any, what is there belongs to who was there before.
    pub fn before_apply(api_version: &str, meta: &ObjectMeta, object: &Value) -> Self {
        match Self::read(meta.managed_fields.as_deref()) {
            Some(owners) if !owners.0.is_empty() => owners,
            _ => Self::first(api_version, meta, object),
        }
    }

    fn first(api_version: &str, meta: &ObjectMeta, object: &Value) -> Self {
        let mut rest = owned(object);
        let client_side = last_applied(meta).map(|config| {
            let mut set = owned(&config).common(&rest);
            set.insert(&NOTE);
            set
        });
        rest = rest.without(&client_side.clone().unwrap_or_default());
        let status = rest.split_off(STATUS);
        let owner = |name: &str, subresource: Option<&str>, fields| Owner {
            name: name.to_owned(),
            applies: false,
            subresource: subresource.map(str::to_owned),
            api_version: api_version.to_owned(),
            time: meta.creation_timestamp.clone(),
            fields,
        };
        let mut owners = vec![
            owner(BEFORE, None, rest),
            owner(BEFORE, Some("status"), status),
            owner(CLIENT_SIDE, None, client_side.unwrap_or_default()),
        ];
        owners.retain(|owner| !owner.fields.is_empty());
        Self(owners)
    }

    /// What an author applied last, and what all others have.
    pub fn split(&self, author: &Author, subresource: Option<&str>) -> (Set, Set) {
        let (mut last, mut others) = (Set::default(), Set::default());
        for owner in &self.0 {
            let own = owner.applies
                && owner.name == author.name()
                && owner.subresource.as_deref() == subresource;
            if own { &mut last } else { &mut others }.add(&owner.fields);
        }
        (last, others)
    }

    fn own(&mut self, author: &Author, subresource: Option<&str>, api_version: &str) -> usize {
        let applies = author.applies.is_some();
        let found = self.0.iter().position(|owner| {
            owner.applies == applies
                && owner.name == author.name()
                && owner.subresource.as_deref() == subresource
        });
        found.unwrap_or_else(|| {
            self.0.push(Owner {
                name: author.name().to_owned(),
                applies,
                subresource: subresource.map(str::to_owned),
                api_version: api_version.to_owned(),
                time: None,
                fields: Set::default(),
            });
            self.0.len() - 1
        })
    }

    fn conflicts(&self, own: usize, written: &Set) -> Vec<(&Owner, Set)> {
        let others = self.0.iter().enumerate().filter(|(at, _)| *at != own);
        let conflicts = others.map(|(_, owner)| (owner, owner.fields.common(written)));
        conflicts.filter(|(_, fields)| !fields.is_empty()).collect()
    }

    fn entries(mut self) -> Option<Vec<ManagedFieldsEntry>> {
        self.0.retain(|owner| !owner.fields.is_empty());
        // Who applies first, as clients are used to.
        self.0.sort_by_key(|owner| !owner.applies);
        (!self.0.is_empty()).then(|| self.0.into_iter().map(Owner::entry).collect())
    }
}

/// The fields of an object that somebody can have.
fn owned(object: &Value) -> Set {
    let mut nobodys = Set::default();
    for path in NOBODYS {
        nobodys.insert(path);
    }
    Set::of(object).without(&nobodys)
}

/// The fields that an apply decides: of the object without its status, or of the status alone.
pub fn applicable(config: &Value, subresource: Option<&str>) -> Set {
    let mut fields = owned(config);
    let status = fields.split_off(STATUS);
    if subresource == Some("status") { status } else { fields }
}

/// The owners of an object that is made.
pub fn of_new(api_version: &str, author: &Author, now: Time) -> Option<Vec<ManagedFieldsEntry>> {
    let applies = author.applies.as_ref()?;
    let mut owners = Owners::default();
    let own = owners.own(author, None, api_version);
    owners.0[own].set(applies.fields.clone(), &now);
    owners.entries()
}

/// A state of an object.
#[derive(Debug, Clone, Copy)]
pub struct State<'a> {
    /// Its metadata.
    pub meta: &'a ObjectMeta,
    /// All of it.
    pub object: &'a Value,
}

/// The owners after a write. `new.meta` has them as the writer gave them, which counts where it makes sense: kubectl changes them so.
///
/// # Errors
/// Fields of others that an apply without force would change.
pub fn settle(
    api_version: &str,
    old: State<'_>,
    new: State<'_>,
    author: &Author,
    subresource: Option<&str>,
    now: &Time,
) -> Result<Option<Vec<ManagedFieldsEntry>>, Vec<Conflict>> {
    let given = new.meta.managed_fields.as_deref().filter(|entries| !entries.is_empty());
    if given.is_some_and(is_reset) && author.applies.is_none() {
        return Ok(None);
    }
    let mut owners = match given.and_then(|entries| Owners::read(Some(entries))) {
        Some(owners) if author.applies.is_none() => owners,
        _ => Owners::before_apply(api_version, old.meta, old.object),
    };
    let changes = Changes::between(old.object, new.object);
    let mut nobodys = Set::default();
    NOBODYS.iter().for_each(|path| nobodys.insert(path));
    if author.applies.is_some() && author.name() == KUBECTL {
        // Its own note, which it lets another name have: see `note`.
        nobodys.insert(&NOTE);
    }
    let (written, removed) = (changes.written.without(&nobodys), changes.removed);
    let own = owners.own(author, subresource, api_version);
    if author.applies.as_ref().is_some_and(|applies| !applies.force) {
        refuse_conflicts(&owners.conflicts(own, &written), author, old)?;
    }
    let mut gone = written.clone();
    gone.add(&removed);
    for (at, owner) in owners.0.iter_mut().enumerate() {
        let fields = match &author.applies {
            Some(applies) if at == own => applies.fields.clone(),
            None if at == own => {
                let mut fields = owner.fields.without(&removed);
                fields.add(&written);
                fields
            }
            _ => owner.fields.without(&gone),
        };
        owner.set(fields, now);
    }
    Ok(owners.entries())
}

/// One entry without anything: nobody is to be an owner any more.
fn is_reset(entries: &[ManagedFieldsEntry]) -> bool {
    matches!(entries, [only] if *only == ManagedFieldsEntry::default())
}

fn refuse_conflicts(
    conflicts: &[(&Owner, Set)],
    author: &Author,
    old: State<'_>,
) -> Result<(), Vec<Conflict>> {
    let mut taken = Set::default();
    if author.name() == KUBECTL
        && let Some(config) = last_applied(old.meta)
    {
        taken = Set::of(&config).without(&modified(&config, old.object));
    }
    if conflicts.iter().all(|(_, fields)| fields.without(&taken).is_empty()) {
        return Ok(());
    }
    let of_owner = |(owner, fields): &(&Owner, Set)| {
        let owner = owner.shown();
        let conflict = |field| Conflict { owner: owner.clone(), field };
        fields.paths().into_iter().map(conflict).collect::<Vec<_>>()
    };
    Err(conflicts.iter().flat_map(of_owner).collect())
}

/// Where kubectl has noted what it applied on the client's side, it is told here what it applies now: it may go back one day, and
/// then drops what it finds there and no longer applies.
pub fn note(author: &Author, object: &mut Value, config: &Value) {
    if author.name() == KUBECTL
        && let Some(annotations) = object["metadata"].get_mut("annotations")
        && let Some(note) = annotations.get_mut(LAST_APPLIED)
    {
        *note = Value::from(format!("{config}\n"));
    }
}

/// What `kubectl apply` said last, as it noted on the object.
fn last_applied(meta: &ObjectMeta) -> Option<Value> {
    let text = meta.annotations.as_ref()?.get(LAST_APPLIED)?;
    serde_json::from_str(text).ok()
}

#[cfg(test)]
mod tests;
