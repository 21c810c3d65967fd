//! What a request can fail with, and the one table from failure to HTTP status and Kubernetes reason.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{
    ListMeta, Status, StatusCause, StatusDetails,
};
use mesh_model::kinds::Kind;

use crate::fields::Conflict;
use crate::store::{Compacted, TxnError};

/// One field that is not as it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// Path of the field, such as `spec.containers[0].image`.
    pub field: String,
    /// What is wrong, starting with the Kubernetes error type: `Required value`, `Invalid value: 7: ...`.
    pub message: String,
}

impl Cause {
    fn reason(&self) -> &'static str {
        let starts = |text: &str| self.message.starts_with(text);
        match () {
            () if starts("Required value") => "FieldValueRequired",
            () if starts("Duplicate value") => "FieldValueDuplicate",
            () if starts("Unsupported value") => "FieldValueNotSupported",
            () if starts("Forbidden") => "FieldValueForbidden",
            () if starts("Not found") => "FieldValueNotFound",
            () if starts("Too long") => "FieldValueTooLong",
            () if starts("Too many") => "FieldValueTooMany",
            () if starts("Internal error") => "InternalError",
            () => "FieldValueInvalid",
        }
    }
}

/// A request that the API refuses or cannot fulfil. Nothing was stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// The object does not exist.
    #[error("{} \"{name}\" not found", resource(.kind))]
    NotFound {
        /// Its kind.
        kind: &'static Kind,
        /// Its name.
        name: String,
    },
    /// An object of that name exists.
    #[error("{} \"{name}\" already exists", resource(.kind))]
    AlreadyExists {
        /// Its kind.
        kind: &'static Kind,
        /// Its name.
        name: String,
    },
    /// The object is not as the caller thinks.
    #[error("Operation cannot be fulfilled on {} \"{name}\": {detail}", resource(.kind))]
    Conflict {
        /// Its kind.
        kind: &'static Kind,
        /// Its name.
        name: String,
        /// What differs.
        detail: String,
    },
    /// An apply would change what others have.
    #[error("Apply failed with {}", applied(.0))]
    ApplyConflict(Vec<Conflict>),
    /// Fields are not as they must be.
    #[error("{} \"{name}\" is invalid: {}", qualified(.kind), listed(.causes))]
    Invalid {
        /// Its kind.
        kind: &'static Kind,
        /// Its name.
        name: String,
        /// The fields.
        causes: Vec<Cause>,
    },
    /// The request makes no sense.
    #[error("{0}")]
    BadRequest(String),
    /// The caller has shown no certificate of the cluster.
    #[error("Unauthorized: {0}")]
    Unauthorized(String),
    /// The caller may not do that, or nobody may.
    #[error("{} \"{name}\" is forbidden: {detail}", resource(.kind))]
    Forbidden {
        /// Kind of the object.
        kind: &'static Kind,
        /// Its name; empty for a collection.
        name: String,
        /// Why.
        detail: String,
    },
    /// The caller may not use that path.
    #[error("forbidden: {0}")]
    ForbiddenPath(String),
    /// Nothing is served there.
    #[error("{0}")]
    NotServed(String),
    /// The path does not know the method.
    #[error("the server does not allow this method on the requested resource")]
    MethodNotAllowed,
    /// The answer cannot be written as the caller wants it.
    #[error("only the following media types are accepted: {0}")]
    NotAcceptable(&'static str),
    /// The body is of a type that is not understood.
    #[error("{0}")]
    UnsupportedMediaType(String),
    /// The body is too large.
    #[error("Request entity too large: limit is {0}")]
    TooLarge(usize),
    /// It may be done later.
    #[error("{message}")]
    TooManyRequests {
        /// What holds it up.
        message: String,
        /// More about it, for people.
        cause: Option<String>,
        /// When to try again; unknown when absent.
        retry_after_secs: Option<i32>,
    },
    /// The revision of a watch or of a page is no longer known.
    #[error("too old resource version: {} ({})", .0.asked, .0.oldest)]
    Expired(Compacted),
    /// The store did not take the write.
    #[error("the write is not stored: {0}")]
    Storage(String),
    /// A stored object cannot be understood.
    #[error("stored object {key} is damaged: {detail}")]
    Damaged {
        /// Its key.
        key: String,
        /// What the decoder said.
        detail: String,
    },
    /// Another program that the answer comes from is unreachable.
    #[error("{0}")]
    BadGateway(String),
    /// Another program that the answer comes from is too slow.
    #[error("{0}")]
    GatewayTimeout(String),
}

fn resource(kind: &Kind) -> String {
    if kind.group.is_empty() {
        kind.plural.to_owned()
    } else {
        format!("{}.{}", kind.plural, kind.group)
    }
}

fn qualified(kind: &Kind) -> String {
    if kind.group.is_empty() {
        kind.kind.to_owned()
    } else {
        format!("{}.{}", kind.kind, kind.group)
    }
}

fn listed(causes: &[Cause]) -> String {
    let mut texts: Vec<_> = causes.iter().map(|c| format!("{}: {}", c.field, c.message)).collect();
    match texts.len() {
        1 => texts.remove(0),
        _ => format!("[{}]", texts.join(", ")),
    }
}

/// Conflicts as clients are used to them: one in a line, several with a line for each field.
fn applied(conflicts: &[Conflict]) -> String {
    if let [only] = conflicts {
        return format!("1 conflict: conflict with {}: {}", only.owner, only.field);
    }
    let mut lines = Vec::new();
    let mut owner = None;
    for conflict in conflicts {
        if owner != Some(&conflict.owner) {
            lines.push(format!("conflicts with {}:", conflict.owner));
            owner = Some(&conflict.owner);
        }
        lines.push(format!("- {}", conflict.field));
    }
    format!("{} conflicts: {}", conflicts.len(), lines.join("\n"))
}

impl ApiError {
    /// HTTP status and Kubernetes reason.
    pub fn code(&self) -> (u16, &'static str) {
        match self {
            Self::BadRequest(_) => (400, "BadRequest"),
            Self::Unauthorized(_) => (401, "Unauthorized"),
            Self::Forbidden { .. } | Self::ForbiddenPath(_) => (403, "Forbidden"),
            Self::NotFound { .. } | Self::NotServed(_) => (404, "NotFound"),
            Self::MethodNotAllowed => (405, "MethodNotAllowed"),
            Self::NotAcceptable(_) => (406, "NotAcceptable"),
            Self::AlreadyExists { .. } => (409, "AlreadyExists"),
            Self::Conflict { .. } | Self::ApplyConflict(_) => (409, "Conflict"),
            Self::Expired(_) => (410, "Expired"),
            Self::TooLarge(_) => (413, "RequestEntityTooLarge"),
            Self::UnsupportedMediaType(_) => (415, "UnsupportedMediaType"),
            Self::Invalid { .. } => (422, "Invalid"),
            Self::TooManyRequests { .. } => (429, "TooManyRequests"),
            Self::Storage(_) | Self::Damaged { .. } => (500, "InternalError"),
            Self::BadGateway(_) => (502, "BadGateway"),
            Self::GatewayTimeout(_) => (504, "Timeout"),
        }
    }

    /// The `Status` object that a client gets.
    pub fn status(&self) -> Status {
        let (code, reason) = self.code();
        Status {
            metadata: ListMeta::default(),
            status: Some("Failure".to_owned()),
            message: Some(self.to_string()),
            reason: Some(reason.to_owned()),
            code: Some(code.into()),
            details: self.details(),
        }
    }

    fn details(&self) -> Option<StatusDetails> {
        let (kind, name, causes) = match self {
            Self::NotFound { kind, name }
            | Self::AlreadyExists { kind, name }
            | Self::Conflict { kind, name, .. }
            | Self::Forbidden { kind, name, .. } => (kind, name, None),
            Self::Invalid { kind, name, causes } => (kind, name, Some(causes)),
            Self::ApplyConflict(conflicts) => {
                let cause = |conflict: &Conflict| StatusCause {
                    reason: Some("FieldManagerConflict".to_owned()),
                    message: Some(format!("conflict with {}", conflict.owner)),
                    field: Some(conflict.field.clone()),
                };
                let causes = Some(conflicts.iter().map(cause).collect());
                return Some(StatusDetails { causes, ..StatusDetails::default() });
            }
            Self::TooManyRequests { cause, retry_after_secs, .. } => {
                let cause = cause.as_ref().map(|message| StatusCause {
                    reason: Some("DisruptionBudget".to_owned()),
                    message: Some(message.clone()),
                    field: None,
                });
                return Some(StatusDetails {
                    causes: cause.map(|cause| vec![cause]),
                    retry_after_seconds: *retry_after_secs,
                    ..StatusDetails::default()
                });
            }
            _ => return None,
        };
        let causes = causes.map(|causes| {
            let cause = |c: &Cause| StatusCause {
                field: Some(c.field.clone()),
                message: Some(c.message.clone()),
                reason: Some(c.reason().to_owned()),
            };
            causes.iter().map(cause).collect()
        });
        Some(StatusDetails {
            group: (!kind.group.is_empty()).then(|| kind.group.to_owned()),
            // As upstream: the kind where fields are named, the resource elsewhere.
            kind: Some(if causes.is_some() { kind.kind } else { kind.plural }.to_owned()),
            name: (!name.is_empty()).then(|| name.clone()),
            causes,
            ..StatusDetails::default()
        })
    }
}

impl From<Compacted> for ApiError {
    fn from(error: Compacted) -> Self {
        Self::Expired(error)
    }
}

impl From<TxnError> for ApiError {
    fn from(error: TxnError) -> Self {
        Self::Storage(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use mesh_model::kinds::by_any_name;

    use super::*;

    #[test]
    fn the_words_are_those_that_people_know() {
        let kind = by_any_name("deployment").unwrap();
        let name = "web".to_owned();
        let error = ApiError::NotFound { kind, name: name.clone() };
        assert_eq!(error.to_string(), "deployments.apps \"web\" not found");
        let field = "spec.replicas".to_owned();
        let message = "Invalid value: -1: must be greater than or equal to 0".to_owned();
        let error = ApiError::Invalid { kind, name, causes: vec![Cause { field, message }] };
        assert_eq!(
            error.to_string(),
            "Deployment.apps \"web\" is invalid: spec.replicas: Invalid value: -1: must be greater \
             than or equal to 0"
        );
        let details = error.status().details.unwrap();
        assert_eq!(details.causes.unwrap()[0].reason.as_deref(), Some("FieldValueInvalid"));
    }
}
