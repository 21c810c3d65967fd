//! All that the caller may do in a namespace. Each verb of all that is served is asked of the same rules as a request.

use std::collections::BTreeMap;

use axum::response::Response;
use http::StatusCode;
use k8s_openapi::api::authorization::v1::{
    NonResourceRule, ResourceAttributes, ResourceRule, SelfSubjectRulesReview,
    SubjectRulesReviewStatus,
};
use mesh_model::kinds::{KINDS, Kind};

use super::{ALL, OPEN, OPEN_PATHS, filled, review_resource};
use crate::api::body::Raw;
use crate::api::caller::{Access, Caller};
use crate::api::{Api, respond, tokens};
use crate::discovery;
use crate::error::ApiError;

impl Api {
    /// POST of a SelfSubjectRulesReview.
    pub(super) fn review_rules(&self, caller: &Caller, raw: &Raw) -> Result<Response, ApiError> {
        let mut review: SelfSubjectRulesReview = tokens::parsed(raw, "SelfSubjectRulesReview")?;
        let Some(ns) = filled(&review.spec.namespace) else {
            return Err(ApiError::BadRequest("no namespace on request".to_owned()));
        };
        review.status = Some(rules(caller, ns, |access| self.judge(caller, access)));
        Ok(respond::json(StatusCode::CREATED, &review))
    }
}

fn rules(
    caller: &Caller,
    ns: &str,
    judge: impl Fn(Access<'_>) -> Result<(), String>,
) -> SubjectRulesReviewStatus {
    if caller.is_admin() {
        return SubjectRulesReviewStatus {
            resource_rules: vec![rule(ALL, vec![ALL.to_owned()], &[ALL])],
            non_resource_rules: vec![paths(vec![ALL.to_owned()], ALL)],
            ..SubjectRulesReviewStatus::default()
        };
    }
    let may = |kind: &Kind, sub: Option<&str>, verb: &str| {
        let asked = ResourceAttributes {
            group: Some(kind.group.to_owned()),
            resource: Some(kind.plural.to_owned()),
            subresource: sub.map(str::to_owned),
            verb: Some(verb.to_owned()),
            namespace: Some(ns.to_owned()),
            ..ResourceAttributes::default()
        };
        review_resource(caller, &asked, &judge).is_ok()
    };
    let mut found: BTreeMap<(&str, Vec<&str>), Vec<String>> = BTreeMap::new();
    for kind in KINDS {
        for (sub, verbs) in discovery::verbs(kind) {
            let allowed: Vec<&str> =
                verbs.iter().copied().filter(|verb| may(kind, sub, verb)).collect();
            let resource = match sub {
                Some(sub) => format!("{}/{sub}", kind.plural),
                None => kind.plural.to_owned(),
            };
            found.entry((kind.group, allowed)).or_default().push(resource);
        }
    }
    found.retain(|(_, verbs), _| !verbs.is_empty());
    for (group, review) in OPEN {
        found.entry((group, vec!["create"])).or_default().push(review.to_owned());
    }
    let open = OPEN_PATHS.iter().flat_map(|path| [(*path).to_owned(), format!("{path}/*")]);
    // A node may write what has its own name.
    let by_name = caller.node().is_some();
    SubjectRulesReviewStatus {
        resource_rules: found.into_iter().map(|((g, verbs), r)| rule(g, r, &verbs)).collect(),
        non_resource_rules: vec![paths(open.chain(["/".to_owned()]).collect(), "get")],
        incomplete: by_name,
        evaluation_error: by_name.then(|| "what a node may do depends on names".to_owned()),
    }
}

fn rule(group: &str, resources: Vec<String>, verbs: &[&str]) -> ResourceRule {
    ResourceRule {
        api_groups: Some(vec![group.to_owned()]),
        resources: Some(resources),
        resource_names: None,
        verbs: verbs.iter().map(|verb| (*verb).to_owned()).collect(),
    }
}

fn paths(paths: Vec<String>, verb: &str) -> NonResourceRule {
    NonResourceRule { non_resource_urls: Some(paths), verbs: vec![verb.to_owned()] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::access::tests::account;
    use crate::api::caller::Role;

    /// The verbs that an account of that role is told of a resource in its namespace.
    fn told(role: Role, resource: &str) -> String {
        let caller = account(role);
        let status = rules(&caller, "shop", |access| caller.may(&access));
        let about = |rule: &ResourceRule| rule.resources.iter().flatten().any(|r| r == resource);
        let rules = status.resource_rules.into_iter().filter(about);
        rules.flat_map(|rule| rule.verbs).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_list_is_what_requests_would_meet() {
        let all = "create delete deletecollection get list patch update watch";
        for (resource, by_role) in [
            ("pods", ["", "get list watch", all, "get list watch"]),
            ("pods/log", ["", "get", "get", "get"]),
            ("pods/exec", ["", "", "create get", ""]),
            ("secrets", ["", "", all, ""]),
            ("serviceaccounts", ["", "get list watch", "get list watch", "get list watch"]),
            ("nodes", ["", "", "", "get list watch"]),
            ("selfsubjectrulesreviews", ["create"; 4]),
        ] {
            let roles = [Role::None, Role::View, Role::Edit, Role::ClusterView];
            assert_eq!(roles.map(|role| told(role, resource)), by_role, "{resource}");
        }
        assert_eq!(told(Role::ClusterAdmin, "*"), "*");
    }

    #[test]
    fn a_node_hears_that_names_matter() {
        let groups = vec![mesh_model::wellknown::GROUP_NODES.to_owned()];
        let node = Caller { user: "system:node:n1".to_owned(), groups, account: None };
        assert!(rules(&node, "default", |access| node.may(&access)).incomplete);
        let caller = account(Role::Edit);
        assert!(!rules(&caller, "shop", |access| caller.may(&access)).incomplete);
    }
}
