//! `apply`, `get` and `delete`, for people without kubectl.

use anyhow::{Context as _, bail};
use http::Method;
use mesh_model::kinds::{self, Kind};
use serde_json::Value;

use crate::cli::{ApplyArgs, DeleteArgs, GetArgs, Global, Output};
use crate::connect::{ACCEPT_TABLE, Api, ApiFailure};
use crate::manifest::{self, LAST_APPLIED, Object, served_kinds, title};
use crate::output;

const JSON: &str = "application/json";
const MERGE_PATCH: &str = "application/merge-patch+json";

/// `meshctl apply`: all files are read and understood before the first object is sent.
pub(crate) async fn apply(global: &Global, args: ApplyArgs) -> anyhow::Result<()> {
    let objects = read_all(&args.files)?;
    let api = Api::connect(global).await?;
    for object in objects {
        let done = apply_one(&api, &object, args.namespace.as_deref())
            .await
            .with_context(|| format!("apply {}", object.title()))?;
        println!("{} {done}", object.title());
    }
    Ok(())
}

fn read_all(files: &[std::path::PathBuf]) -> anyhow::Result<Vec<Object>> {
    let mut objects = Vec::new();
    for file in files {
        objects.extend(manifest::read(file)?);
    }
    Ok(objects)
}

async fn apply_one(
    api: &Api,
    object: &Object,
    given: Option<&str>,
) -> Result<&'static str, ApiFailure> {
    let namespace = api.namespace(object.namespace.as_deref().or(given)).to_owned();
    let collection = path(object.kind, Some(&namespace), None);
    let single = path(object.kind, Some(&namespace), Some(&object.name));
    let query = "?fieldManager=meshctl&fieldValidation=Strict";
    let desired = with_last_applied(&object.value);
    let send = |value: &Value| value.to_string().into_bytes();
    let live = match api.read(&single).await {
        Ok(live) => live,
        Err(failure) if failure.is_not_found() => {
            let path = format!("{collection}{query}");
            api.call(Method::POST, &path, Some((JSON, send(&desired))), JSON).await?;
            return Ok("created");
        }
        Err(failure) => return Err(failure),
    };
    let last = live["metadata"]["annotations"][LAST_APPLIED].as_str();
    let last = last.and_then(|text| serde_json::from_str(text).ok()).unwrap_or(Value::Null);
    let patch = manifest::patch(&last, &live, &object.value);
    if patch.as_object().is_some_and(serde_json::Map::is_empty) {
        return Ok("unchanged");
    }
    let patch = merge_annotation(patch, &desired);
    let path = format!("{single}{query}");
    api.call(Method::PATCH, &path, Some((MERGE_PATCH, send(&patch))), JSON).await?;
    Ok("configured")
}

/// The manifest with itself in the annotation, as kubectl does it.
fn with_last_applied(value: &Value) -> Value {
    let mut value = value.clone();
    let text = format!("{value}\n");
    value["metadata"]["annotations"][LAST_APPLIED] = Value::String(text);
    value
}

fn merge_annotation(mut patch: Value, desired: &Value) -> Value {
    let text = desired["metadata"]["annotations"][LAST_APPLIED].clone();
    patch["metadata"]["annotations"][LAST_APPLIED] = text;
    patch
}

/// The path of a collection or an object.
fn path(kind: &Kind, namespace: Option<&str>, name: Option<&str>) -> String {
    let mut path = match kind.group {
        "" => format!("/api/{}", kind.version),
        group => format!("/apis/{group}/{}", kind.version),
    };
    if let Some(namespace) = namespace.filter(|_| kind.namespaced) {
        path.push_str(&format!("/namespaces/{namespace}"));
    }
    path.push_str(&format!("/{}", kind.plural));
    if let Some(name) = name {
        path.push_str(&format!("/{name}"));
    }
    path
}

fn kind_named(name: &str) -> anyhow::Result<&'static Kind> {
    let kind = kinds::by_any_name(name);
    kind.with_context(|| format!("{name:?} is not a served kind; served are: {}", served_kinds()))
}

/// `meshctl get`.
pub(crate) async fn show(global: &Global, args: GetArgs) -> anyhow::Result<()> {
    let kind = kind_named(&args.kind)?;
    let api = Api::connect(global).await?;
    let namespace = (!args.all_namespaces).then(|| api.namespace(args.namespace.as_deref()));
    if args.name.is_some() && args.all_namespaces && kind.namespaced {
        bail!("--all-namespaces does not go with a name");
    }
    let mut path = path(kind, namespace, args.name.as_deref());
    if let Some(selector) = &args.selector {
        path.push_str(&format!("?labelSelector={}", encode(selector)));
    }
    let as_table = matches!(global.output, Output::Table | Output::Wide);
    let accept = if as_table { ACCEPT_TABLE } else { JSON };
    let mut value = api.call(Method::GET, &path, None, accept).await?;
    hide_owners(&mut value);
    match global.output {
        Output::Json => output::json(&value)?,
        Output::Yaml => print!("{}", serde_saphyr::to_string(&value).context("write YAML")?),
        Output::Name => print_names(kind, &value),
        Output::Table | Output::Wide => {
            print_table(&value, args.all_namespaces && kind.namespaced, global.output);
        }
    }
    Ok(())
}

/// Owners of fields are for programs that apply, not for people; `kubectl get --show-managed-fields` has them.
fn hide_owners(value: &mut Value) {
    if let Some(Value::Array(items)) = value.get_mut("items") {
        items.iter_mut().for_each(hide_owners);
    }
    if let Some(Value::Object(metadata)) = value.get_mut("metadata") {
        metadata.remove("managedFields");
    }
}

/// Percent-encoding of what a query must not hold (RFC 3986, section 3.4).
fn encode(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~/,".contains(&b);
    text.bytes()
        .map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") })
        .collect()
}

fn print_names(kind: &Kind, value: &Value) {
    let name = |v: &Value| v["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    match value["items"].as_array() {
        Some(items) => items.iter().for_each(|item| println!("{}", title(kind, &name(item)))),
        None => println!("{}", title(kind, &name(value))),
    }
}

fn print_table(table: &Value, with_namespace: bool, output: Output) {
    let array = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let columns = array(&table["columnDefinitions"]);
    let shown: Vec<usize> = (0..columns.len())
        .filter(|i| output == Output::Wide || columns[*i]["priority"].as_i64().unwrap_or(0) == 0)
        .collect();
    let heading = |i: &usize| columns[*i]["name"].as_str().unwrap_or_default().to_uppercase();
    let mut headings: Vec<String> = shown.iter().map(heading).collect();
    if with_namespace {
        headings.insert(0, "NAMESPACE".to_owned());
    }
    let rows: Vec<Vec<String>> = array(&table["rows"])
        .iter()
        .map(|row| {
            let mut cells: Vec<String> = shown.iter().map(|i| cell(&row["cells"][*i])).collect();
            if with_namespace {
                cells.insert(0, cell(&row["object"]["metadata"]["namespace"]));
            }
            cells
        })
        .collect();
    if rows.is_empty() {
        eprintln!("No resources found.");
        return;
    }
    output::table(&headings.iter().map(String::as_str).collect::<Vec<_>>(), &rows);
}

fn cell(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// `meshctl delete`.
pub(crate) async fn delete(global: &Global, args: DeleteArgs) -> anyhow::Result<()> {
    let mut targets: Vec<(&'static Kind, Option<String>, String)> = Vec::new();
    for object in read_all(&args.files)? {
        targets.push((object.kind, object.namespace, object.name));
    }
    if let Some(kind) = &args.kind {
        let kind = kind_named(kind)?;
        targets.extend(args.names.iter().map(|name| (kind, None, name.clone())));
    }
    let api = Api::connect(global).await?;
    for (kind, namespace, name) in targets {
        let namespace =
            api.namespace(namespace.as_deref().or(args.namespace.as_deref())).to_owned();
        let path = path(kind, Some(&namespace), Some(&name));
        match api.call(Method::DELETE, &path, None, JSON).await {
            Ok(_) => println!("{} deleted", title(kind, &name)),
            Err(failure) if failure.is_not_found() && args.ignore_not_found => {}
            Err(failure) => {
                return Err(failure).with_context(|| format!("delete {}", title(kind, &name)));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_follow_the_kind() {
        let of = |name: &str| kinds::by_any_name(name).unwrap();
        assert_eq!(path(of("po"), Some("a"), Some("b")), "/api/v1/namespaces/a/pods/b");
        assert_eq!(path(of("deploy"), None, None), "/apis/apps/v1/deployments");
        assert_eq!(path(of("no"), Some("a"), Some("n")), "/api/v1/nodes/n");
        assert_eq!(encode("a in (b,c)"), "a%20in%20%28b,c%29");
    }
}
