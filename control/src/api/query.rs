//! Query parameters.

use crate::error::ApiError;

/// The query of a request, decoded; unknown parameters are left alone.
#[derive(Debug, Clone, Default)]
pub struct Query(Vec<(String, String)>);

/// What happens to fields that the type does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldValidation {
    /// They are dropped.
    Ignore,
    /// They are dropped, and the client is told.
    Warn,
    /// The request is refused.
    Strict,
}

impl Query {
    /// Decodes the part of a URL after `?`.
    pub fn parse(text: Option<&str>) -> Result<Self, ApiError> {
        let pairs = serde_urlencoded::from_str(text.unwrap_or_default());
        pairs.map(Self).map_err(|e| ApiError::BadRequest(format!("query: {e}")))
    }

    /// The first value of a parameter, unless it is empty.
    pub fn value(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(n, _)| n == name);
        found.map(|(_, v)| v.as_str()).filter(|v| !v.is_empty())
    }

    /// Whether the parameter is there, even without a value.
    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(n, _)| n == name)
    }

    /// All parameters but one, encoded again, with `?`; empty when nothing is left.
    pub fn without(&self, name: &str) -> String {
        let rest: Vec<_> = self.0.iter().filter(|(n, _)| n != name).collect();
        match serde_urlencoded::to_string(rest) {
            Ok(text) if !text.is_empty() => format!("?{text}"),
            _ => String::new(),
        }
    }

    /// A boolean parameter; false when absent.
    pub fn flag(&self, name: &str) -> Result<bool, ApiError> {
        match self.value(name) {
            None => Ok(false),
            Some("true" | "1" | "True" | "TRUE") => Ok(true),
            Some("false" | "0" | "False" | "FALSE") => Ok(false),
            Some(other) => Err(invalid(name, other, "must be true or false")),
        }
    }

    /// A number that is not negative.
    pub fn number(&self, name: &str) -> Result<Option<u64>, ApiError> {
        let parsed = self.value(name).map(|text| {
            text.parse().map_err(|_| invalid(name, text, "must be a non-negative integer"))
        });
        parsed.transpose()
    }

    /// `dryRun=All`.
    pub fn dry_run(&self) -> Result<bool, ApiError> {
        match self.value("dryRun") {
            None => Ok(false),
            Some("All") => Ok(true),
            Some(other) => Err(invalid("dryRun", other, "supported values: \"All\"")),
        }
    }

    /// `fieldValidation`; as in Kubernetes, the default is to warn.
    pub fn field_validation(&self) -> Result<FieldValidation, ApiError> {
        match self.value("fieldValidation") {
            None | Some("Warn") => Ok(FieldValidation::Warn),
            Some("Ignore") => Ok(FieldValidation::Ignore),
            Some("Strict") => Ok(FieldValidation::Strict),
            Some(other) => Err(invalid(
                "fieldValidation",
                other,
                "supported values: \"Ignore\", \"Strict\", \"Warn\"",
            )),
        }
    }
}

fn invalid(name: &str, value: &str, rule: &str) -> ApiError {
    ApiError::BadRequest(format!("{name}: Invalid value: {value:?}: {rule}"))
}
