//! Whether the caller may do something: SelfSubjectAccessReview of `authorization.k8s.io/v1`. Programs for people, such as k9s and
//! Lens, ask before they show a kind of objects or offer to do something, and so does `kubectl auth can-i`. With `--list` that asks for
//! all that the caller may do: SelfSubjectRulesReview.
//!
//! The answer is what a request would meet: the question is taken apart into requests, and each is asked of the same rules.

use axum::body::Body;
use axum::response::Response;
use http::{Request, StatusCode};
use k8s_openapi::api::authorization::v1::{
    NonResourceAttributes, ResourceAttributes, SelfSubjectAccessReview, SubjectAccessReviewStatus,
};
use mesh_model::kinds::{KINDS, Kind};

use super::caller::{Access, Caller, Verb};
use super::{Api, respond, streams, tokens};
use crate::error::ApiError;

mod rules;

/// The API group.
pub(crate) const GROUP: &str = "authorization.k8s.io";
/// Its version.
pub(crate) const VERSION: &str = "v1";
/// What is asked and not stored: resource and kind.
pub(crate) const REVIEWS: [(&str, &str); 2] = [
    ("selfsubjectaccessreviews", "SelfSubjectAccessReview"),
    ("selfsubjectrulesreviews", "SelfSubjectRulesReview"),
];

/// Stands for every group, resource or verb.
const ALL: &str = "*";
/// Reviews that anybody may ask for who is somebody: group and resource.
const OPEN: [(&str, &str); 3] = [
    (tokens::GROUP, "selfsubjectreviews"),
    (GROUP, "selfsubjectaccessreviews"),
    (GROUP, "selfsubjectrulesreviews"),
];
/// Paths that anybody may read who is somebody, with all below them.
const OPEN_PATHS: [&str; 7] =
    ["/api", "/apis", "/healthz", "/livez", "/openapi", "/readyz", "/version"];

impl Api {
    /// POST of a review.
    pub(super) async fn review_access(
        &self,
        caller: &Caller,
        resource: &str,
        request: Request<Body>,
    ) -> Result<Response, ApiError> {
        let raw = tokens::posted(GROUP, &REVIEWS, resource, request).await?;
        if resource == "selfsubjectrulesreviews" {
            return self.review_rules(caller, &raw);
        }
        let mut review: SelfSubjectAccessReview = tokens::parsed(&raw, "SelfSubjectAccessReview")?;
        let spec = &review.spec;
        let judged = match (&spec.resource_attributes, &spec.non_resource_attributes) {
            (Some(asked), None) => {
                review_resource(caller, asked, |access| self.judge(caller, access))
            }
            (None, Some(asked)) => review_path(caller, asked),
            _ => {
                let text = "spec: exactly one of nonResourceAttributes or resourceAttributes must be specified";
                return Err(ApiError::BadRequest(text.to_owned()));
            }
        };
        review.status = Some(SubjectAccessReviewStatus {
            allowed: judged.is_ok(),
            reason: judged.err(),
            ..SubjectAccessReviewStatus::default()
        });
        Ok(respond::json(StatusCode::CREATED, &review))
    }
}

fn text(field: &Option<String>) -> &str {
    field.as_deref().unwrap_or_default()
}

fn filled(field: &Option<String>) -> Option<&str> {
    field.as_deref().filter(|text| !text.is_empty())
}

/// Whether the caller may do all that the question means; else what not.
fn review_resource(
    caller: &Caller,
    asked: &ResourceAttributes,
    judge: impl Fn(Access<'_>) -> Result<(), String>,
) -> Result<(), String> {
    let (group, resource, verb) = (text(&asked.group), text(&asked.resource), text(&asked.verb));
    let is_open = OPEN.contains(&(group, resource)) && verb == "create";
    if is_open || caller.is_admin() {
        return Ok(());
    }
    let meant = meant(asked);
    if meant.is_empty() {
        let user = &caller.user;
        return Err(format!(
            "User \"{user}\" cannot {verb} resource \"{resource}\" in API group \"{group}\""
        ));
    }
    meant.into_iter().try_for_each(judge)
}

/// The requests that the question means; none when it is about something that only administrators reach, or that is not served.
fn meant(asked: &ResourceAttributes) -> Vec<Access<'_>> {
    let (sub, verb, ns) = (filled(&asked.subresource), text(&asked.verb), filled(&asked.namespace));
    let is = |pattern: &str, value: &str| pattern == ALL || pattern == value;
    // All of a namespace is what belongs to it.
    let is_there = |kind: &Kind| kind.namespaced || ns.is_none() || text(&asked.resource) != ALL;
    let kinds = KINDS.iter().filter(|kind| {
        is(text(&asked.group), kind.group) && is(text(&asked.resource), kind.plural)
    });
    let kinds = kinds.filter(|kind| is_there(kind));
    let request = |kind: &'static Kind, verb: &Verb| Access {
        verb: *verb,
        kind,
        ns: ns.filter(|_| kind.namespaced),
        name: filled(&asked.name),
        sub,
        pod_node: None,
        no_grace: false,
    };
    kinds.flat_map(|kind| verbs(verb, sub).iter().map(move |verb| request(kind, verb))).collect()
}

/// What a verb of Kubernetes is to the rules here.
fn verbs(name: &str, sub: Option<&str>) -> &'static [Verb] {
    match name {
        // To reach into a container is more than reading, whatever the method.
        "get" | "create" | ALL if sub.is_some_and(streams::is_stream) => &[Verb::Create],
        _ if sub.is_some_and(streams::is_stream) => &[],
        "get" | "list" | "watch" => &[Verb::Read],
        "create" => &[Verb::Create],
        "update" | "patch" => &[Verb::Update],
        "delete" => &[Verb::Delete],
        "deletecollection" => &[Verb::DeleteCollection],
        ALL => &[Verb::Read, Verb::Create, Verb::Update, Verb::Delete, Verb::DeleteCollection],
        _ => &[],
    }
}

/// The same of a path that is not about objects.
fn review_path(caller: &Caller, asked: &NonResourceAttributes) -> Result<(), String> {
    let (path, verb) = (text(&asked.path), text(&asked.verb));
    let is_open = OPEN_PATHS.iter().any(|open| {
        let rest = path.strip_prefix(open);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    });
    let is_open = matches!(verb, "get" | "head") && (path == "/" || is_open);
    if is_open || caller.is_admin() {
        return Ok(());
    }
    Err(format!("User \"{}\" cannot {verb} path \"{path}\"", caller.user))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::caller::{Account, Role};

    pub(super) fn account(role: Role) -> Caller {
        let account =
            Account { namespace: "shop".to_owned(), uid: "u".to_owned(), role, pod: None };
        Caller {
            user: "system:serviceaccount:shop:web".to_owned(),
            groups: vec![],
            account: Some(account),
        }
    }

    /// `VERB GROUP/RESOURCE[/SUBRESOURCE] [NAMESPACE]`
    fn may(role: Role, question: &str) -> Result<(), String> {
        let mut words = question.split(' ');
        let verb = words.next().unwrap();
        let mut parts = words.next().unwrap().split('/');
        let mut part = || parts.next().map(str::to_owned);
        let asked = ResourceAttributes {
            verb: Some(verb.to_owned()),
            group: part(),
            resource: part(),
            subresource: part(),
            namespace: Some(words.next().unwrap_or_default().to_owned()),
            ..ResourceAttributes::default()
        };
        let caller = account(role);
        review_resource(&caller, &asked, |access| caller.may(&access))
    }

    #[test]
    fn the_answer_is_what_a_request_would_meet() {
        for (question, allowed) in [
            ("list /pods shop", [true, true, true]),
            ("watch apps/deployments shop", [true, true, true]),
            ("list /pods", [false, false, true]),
            ("list /nodes", [false, false, true]),
            // A namespace means nothing to what belongs to none.
            ("list /nodes shop", [false, false, true]),
            ("list /secrets shop", [false, true, false]),
            ("patch /pods shop", [false, true, false]),
            ("delete /pods other", [false, false, false]),
            ("get /pods/log shop", [true, true, true]),
            // kubectl begins an exec by GET, and it is more than reading all the same.
            ("get /pods/exec shop", [false, true, false]),
            ("create /pods/exec shop", [false, true, false]),
            ("list /pods/exec shop", [false, false, false]),
            ("create /serviceaccounts/token shop", [false, false, false]),
            // All verbs, all resources: Secrets and ServiceAccounts are among them.
            ("* /pods shop", [false, true, false]),
            ("get */* shop", [false, true, false]),
            ("* */* shop", [false, false, false]),
            ("list metrics.k8s.io/pods shop", [false, false, false]),
            ("list batch/jobs shop", [true, true, true]),
            ("create batch/cronjobs shop", [false, true, false]),
            ("update batch/jobs/status shop", [false, false, false]),
            ("list batch/frobs shop", [false, false, false]),
            ("impersonate /users", [false, false, false]),
            ("create authorization.k8s.io/selfsubjectaccessreviews", [true, true, true]),
        ] {
            let roles = [Role::View, Role::Edit, Role::ClusterView];
            let found = roles.map(|role| may(role, question).is_ok());
            assert_eq!(found, allowed, "{question}");
        }
        let why = may(Role::None, "list /pods shop").unwrap_err();
        assert!(why.contains("cannot get resource \"pods\""), "{why}");
    }

    #[test]
    fn what_is_served_may_be_read_by_anybody() {
        let may = |verb: &str, path: &str| {
            let asked =
                NonResourceAttributes { path: Some(path.to_owned()), verb: Some(verb.to_owned()) };
            review_path(&account(Role::None), &asked).is_ok()
        };
        for path in ["/", "/api", "/apis/apps/v1", "/openapi/v3", "/healthz", "/version"] {
            assert!(may("get", path), "{path}");
        }
        assert!(!may("get", "/metrics") && !may("get", "/apiserver") && !may("post", "/api"));
    }
}
