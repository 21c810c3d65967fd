//! Which backends a request goes to: immutable, pure, replaced as a whole.

#[cfg(test)]
mod tests;

use std::collections::HashMap;

use mesh_model::snapshot::PathMatch;

use crate::{authority, path};

/// One rule to look up, with whatever the caller wants to find.
#[derive(Debug, Clone)]
pub struct Rule<T> {
    /// Host, `*.suffix` for exactly one more label, or any when absent.
    pub host: Option<String>,
    /// Path to match.
    pub path: PathMatch,
    /// What a match gives.
    pub target: T,
}

/// A rule was left out of the table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRule {
    /// The host is no name and no `*.name`.
    #[error("host {0:?} is neither a name nor *.name")]
    Host(String),
    /// The path is no path.
    #[error("path {path:?}: {source}")]
    Path {
        /// As it was written.
        path: String,
        /// What is wrong with it.
        source: path::InvalidPath,
    },
    /// An earlier rule has the same host and path.
    #[error("host and path are taken by an earlier rule")]
    Taken,
}

/// Finds the most specific rule for a host and a path.
///
/// Precedence: the host's own rules, then those of its wildcard, then those for any host; among these
/// Exact before Prefix, and a longer Prefix before a shorter one (Ingress v1, "Multiple matches" and
/// "Hostname wildcards"). A host whose rules do not match the path falls through to the less specific
/// ones: that is how a default backend gets what no rule takes.
#[derive(Debug)]
pub struct RouteTable<T> {
    exact: HashMap<Box<str>, Paths<T>>,
    wildcard: HashMap<Box<str>, Paths<T>>,
    any: Paths<T>,
}

#[derive(Debug)]
struct Paths<T> {
    exact: HashMap<Box<[u8]>, T>,
    /// Without the final slash: the root is empty.
    prefix: HashMap<Box<[u8]>, T>,
    longest_prefix: usize,
}

impl<T> Default for Paths<T> {
    fn default() -> Self {
        Self { exact: HashMap::new(), prefix: HashMap::new(), longest_prefix: 0 }
    }
}

impl<T> Default for RouteTable<T> {
    fn default() -> Self {
        Self { exact: HashMap::new(), wildcard: HashMap::new(), any: Paths::default() }
    }
}

impl<T> RouteTable<T> {
    /// Makes a table of `rules`; of several with the same host and path the first is taken.
    ///
    /// Returns the rules that were left out, by their place in `rules`, with the reason.
    pub fn new(rules: impl IntoIterator<Item = Rule<T>>) -> (Self, Vec<(usize, InvalidRule)>) {
        let mut table = Self::default();
        let mut invalid = Vec::new();
        for (index, rule) in rules.into_iter().enumerate() {
            if let Err(error) = table.insert(rule) {
                invalid.push((index, error));
            }
        }
        (table, invalid)
    }

    fn insert(&mut self, rule: Rule<T>) -> Result<(), InvalidRule> {
        let (exact, text) = match &rule.path {
            PathMatch::Exact(path) => (true, path),
            PathMatch::Prefix(path) => (false, path),
        };
        let key = path::normalise_route(text)
            .map_err(|source| InvalidRule::Path { path: text.clone(), source })?;
        let paths = self.paths_of(rule.host.as_deref())?;
        if exact {
            paths.insert_exact(key, rule.target)
        } else {
            paths.insert_prefix(key, rule.target)
        }
    }

    fn paths_of(&mut self, host: Option<&str>) -> Result<&mut Paths<T>, InvalidRule> {
        let Some(text) = host.filter(|h| !h.is_empty()) else { return Ok(&mut self.any) };
        let invalid = || InvalidRule::Host(text.to_owned());
        let (map, name) = match text.strip_prefix("*.") {
            Some(suffix) => (&mut self.wildcard, suffix),
            None => (&mut self.exact, text),
        };
        let name = authority::host(name.as_bytes()).map_err(|_| invalid())?;
        if name.len() != text.trim_end_matches('.').trim_start_matches("*.").len() {
            return Err(invalid()); // a port, which no Ingress host has
        }
        Ok(map.entry(name.into_owned().into_boxed_str()).or_default())
    }

    /// The target for a host in lower case without port (`""` when the request names none) and a
    /// normalised path.
    pub fn find(&self, host: &str, path: &[u8]) -> Option<&T> {
        let wildcard = || self.wildcard.get(host.split_once('.')?.1)?.find(path);
        let exact = self.exact.get(host).and_then(|paths| paths.find(path));
        exact.or_else(wildcard).or_else(|| self.any.find(path))
    }
}

impl<T> Paths<T> {
    fn insert_exact(&mut self, path: Vec<u8>, target: T) -> Result<(), InvalidRule> {
        insert_first(&mut self.exact, path, target)
    }

    fn insert_prefix(&mut self, mut path: Vec<u8>, target: T) -> Result<(), InvalidRule> {
        while path.last() == Some(&b'/') {
            path.pop();
        }
        self.longest_prefix = self.longest_prefix.max(path.len());
        insert_first(&mut self.prefix, path, target)
    }

    fn find(&self, path: &[u8]) -> Option<&T> {
        if !self.exact.is_empty()
            && let Some(target) = self.exact.get(path)
        {
            return Some(target);
        }
        if self.longest_prefix == 0 {
            return self.prefix.get(&b""[..]);
        }
        let mut end = path.len();
        loop {
            // Only as far as some prefix reaches: a path of a thousand slashes costs no more than the table.
            if end <= self.longest_prefix
                && let Some(target) = self.prefix.get(&path[..end])
            {
                return Some(target);
            }
            end = memchr::memrchr(b'/', &path[..end])?;
        }
    }
}

fn insert_first<T>(
    map: &mut HashMap<Box<[u8]>, T>,
    path: Vec<u8>,
    target: T,
) -> Result<(), InvalidRule> {
    match map.entry(path.into_boxed_slice()) {
        std::collections::hash_map::Entry::Occupied(_) => Err(InvalidRule::Taken),
        std::collections::hash_map::Entry::Vacant(place) => {
            place.insert(target);
            Ok(())
        }
    }
}
