//! Acting as somebody else (`kubectl --as`): administrators may, to see what others would meet. Whoever asks for it is never taken for
//! himself: what was meant to be refused would be done.

use http::{HeaderMap, HeaderName};
use k8s_openapi::api::core::v1::ServiceAccount;

use super::caller::Caller;
use super::{Api, tokens};
use crate::error::ApiError;
use crate::registry::Registry;

const ALL: &str = "impersonate-";
const USER: HeaderName = HeaderName::from_static("impersonate-user");
const GROUP: HeaderName = HeaderName::from_static("impersonate-group");

impl Api {
    /// Whom the request is to be judged as.
    pub(super) fn acting(&self, caller: Caller, headers: &HeaderMap) -> Result<Caller, ApiError> {
        match asked(headers)? {
            None => Ok(caller),
            Some((user, _)) if !caller.is_admin() => Err(ApiError::ForbiddenPath(format!(
                "User \"{}\" cannot impersonate \"{user}\"",
                caller.user
            ))),
            Some((user, groups)) => Ok(named(&self.0.registry, user, groups)),
        }
    }
}

/// The user that is meant, and his groups.
fn asked(headers: &HeaderMap) -> Result<Option<(String, Vec<String>)>, ApiError> {
    let refused = |why: String| Err(ApiError::BadRequest(why));
    let mut all = headers.keys().filter(|name| name.as_str().starts_with(ALL)).peekable();
    if all.peek().is_none() {
        return Ok(None);
    }
    if let Some(other) = all.find(|name| **name != USER && **name != GROUP) {
        return refused(format!("{other}: only users and groups can be impersonated here"));
    }
    let values = |name: &HeaderName| {
        let values = headers.get_all(name).iter().map(|value| value.to_str().map(str::to_owned));
        values.collect::<Result<Vec<String>, _>>()
    };
    let (Ok(users), Ok(groups)) = (values(&USER), values(&GROUP)) else {
        return refused("names of those to be impersonated must be ASCII".to_owned());
    };
    match <[String; 1]>::try_from(users) {
        Ok([user]) if !user.is_empty() => Ok(Some((user, groups))),
        _ => refused("one user is needed to impersonate".to_owned()),
    }
}

/// The user of that name. A service account is in the groups of its namespace, unless others are named.
fn named(registry: &Registry, user: String, groups: Vec<String>) -> Caller {
    let Some((namespace, name)) = tokens::account_name(&user) else {
        return Caller { user, groups, account: None };
    };
    // One that is not there may nothing.
    let account = registry.get::<ServiceAccount>(Some(namespace), name).unwrap_or_default();
    let caller = tokens::caller(namespace, name, &account, None);
    if groups.is_empty() { caller } else { Caller { groups, ..caller } }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(given: &[(&'static str, &str)]) -> Result<Option<(String, Vec<String>)>, u16> {
        let headers: HeaderMap =
            given.iter().map(|(n, v)| (n.parse().unwrap(), v.parse().unwrap())).collect();
        asked(&headers).map_err(|error| error.code().0)
    }

    #[test]
    fn nobody_is_half_impersonated() {
        assert_eq!(of(&[("accept", "*/*")]), Ok(None));
        assert_eq!(of(&[("impersonate-user", "jo")]), Ok(Some(("jo".to_owned(), vec![]))));
        assert_eq!(of(&[("impersonate-group", "g")]), Err(400), "a group alone is nobody");
        assert_eq!(of(&[("impersonate-user", "")]), Err(400));
        for other in ["impersonate-uid", "impersonate-extra-scopes"] {
            assert_eq!(of(&[("impersonate-user", "jo"), (other, "x")]), Err(400), "{other}");
        }
        let mut headers = HeaderMap::new();
        headers.insert(USER, "jo".parse().unwrap());
        for group in ["a", "b"] {
            headers.append(GROUP, group.parse().unwrap());
        }
        let groups = vec!["a".to_owned(), "b".to_owned()];
        assert_eq!(asked(&headers).unwrap(), Some(("jo".to_owned(), groups)));
        headers.append(USER, "jim".parse().unwrap());
        assert!(asked(&headers).is_err(), "one of them is meant");
    }
}
