//! The configuration in the form that requests use.

use std::sync::Arc;

use mesh_model::ObjectKey;
use mesh_model::snapshot::HttpRoute;

use crate::backend::{Backend, Registry};
use crate::route::{RouteTable, Rule};
use crate::status::Problem;

/// Where a request goes.
#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) ingress: ObjectKey,
    pub(crate) backends: Box<[Arc<Backend>]>,
}

/// All routes of one configuration; never changed, only replaced.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pub(crate) routes: RouteTable<Arc<Route>>,
    pub(crate) count: usize,
}

impl Table {
    /// Makes the table of `routes`; of two with the same host and path the first by name counts.
    pub(crate) fn new(routes: &[HttpRoute], registry: &Registry) -> (Self, Vec<Problem>) {
        let mut ordered: Vec<&HttpRoute> = routes.iter().collect();
        ordered.sort_by(|a, b| a.ingress.cmp(&b.ingress));
        let rules = ordered.iter().map(|route| Rule {
            host: route.host.clone(),
            path: route.path.clone(),
            target: Arc::new(Route {
                ingress: route.ingress.clone(),
                backends: route.backends.iter().map(|a| registry.backend(*a)).collect(),
            }),
        });
        let (routes, invalid) = RouteTable::new(rules);
        let count = ordered.len() - invalid.len();
        let problems = invalid.into_iter().map(|(index, reason)| Problem {
            object: format!("ingress {}", ordered[index].ingress),
            reason: reason.to_string(),
        });
        (Self { routes, count }, problems.collect())
    }
}
