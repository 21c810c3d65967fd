//! What a pod asks for, and what a node has.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Node, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use mesh_model::containers::is_sidecar;

use super::quantity::{thousandths, units};

/// Amounts by resource: `cpu` in thousandths of a core, everything else in whole units.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Resources(BTreeMap<String, i64>);

impl Resources {
    pub(super) fn of(&self, name: &str) -> i64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, i64)> {
        self.0.iter().map(|(name, amount)| (name.as_str(), *amount))
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (name, amount) in other.iter() {
            let mine = self.0.entry(name.to_owned()).or_insert(0);
            *mine = mine.saturating_add(amount);
        }
    }

    pub(super) fn subtract(&mut self, other: &Self) {
        for (name, amount) in other.iter() {
            let mine = self.0.entry(name.to_owned()).or_insert(0);
            *mine = mine.saturating_sub(amount);
        }
    }

    fn raise_to(&mut self, other: &Self) {
        for (name, amount) in other.iter() {
            let mine = self.0.entry(name.to_owned()).or_insert(0);
            *mine = (*mine).max(amount);
        }
    }

    fn parse<'a>(quantities: impl IntoIterator<Item = (&'a String, &'a Quantity)>) -> Self {
        // Unreadable quantities cannot be stored: the API refuses them.
        let amounts = quantities.into_iter().filter_map(|(name, quantity)| {
            let amount = if name == "cpu" { thousandths(&quantity.0) } else { units(&quantity.0) };
            Some((name.clone(), amount?))
        });
        Self(amounts.collect())
    }

    /// What a node can give to pods.
    pub(super) fn allocatable(node: &Node) -> Self {
        let status = node.status.as_ref();
        let amounts = status.and_then(|s| s.allocatable.as_ref().or(s.capacity.as_ref()));
        Self::parse(amounts.into_iter().flatten())
    }

    /// What the pod needs at its hungriest moment.
    ///
    /// Init containers run one after the other, beside the sidecars that were started before them.
    pub(super) fn requested(pod: &Pod) -> Self {
        let Some(spec) = &pod.spec else {
            return Self::default();
        };
        let mut sidecars = Self::default();
        let mut peak = Self::default();
        for container in spec.init_containers.iter().flatten() {
            let request = container_request(container);
            if is_sidecar(container) {
                sidecars.add(&request);
                peak.raise_to(&sidecars);
            } else {
                let mut moment = sidecars.clone();
                moment.add(&request);
                peak.raise_to(&moment);
            }
        }
        let mut total = sidecars;
        for container in &spec.containers {
            total.add(&container_request(container));
        }
        total.raise_to(&peak);
        if let Some(resources) = &spec.resources {
            for (name, amount) in request(resources).iter() {
                total.0.insert(name.to_owned(), amount);
            }
        }
        total.add(&Self::parse(spec.overhead.iter().flatten()));
        total
    }
}

fn container_request(container: &Container) -> Resources {
    container.resources.as_ref().map(request).unwrap_or_default()
}

/// Requests; a limit without a request counts as one.
fn request(requirements: &ResourceRequirements) -> Resources {
    let mut result = Resources::parse(requirements.limits.iter().flatten());
    result.0.extend(Resources::parse(requirements.requests.iter().flatten()).0);
    result
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn requested(spec: serde_json::Value) -> Resources {
        let pod: Pod = serde_json::from_value(json!({"spec": spec})).unwrap();
        Resources::requested(&pod)
    }

    #[test]
    fn containers_add_up_and_limits_stand_in() {
        let r = requested(json!({"containers": [
            {"name": "a", "resources": {"requests": {"cpu": "100m", "memory": "1Mi"}}},
            {"name": "b", "resources": {"limits": {"cpu": "0.5"}}},
            {"name": "c"},
        ], "overhead": {"cpu": "10m"}}));
        assert_eq!(r.of("cpu"), 610);
        assert_eq!(r.of("memory"), 1_048_576);
    }

    #[test]
    fn init_containers_count_by_their_peak_beside_sidecars() {
        let cpu =
            |name: &str, cpu: &str| json!({"name": name, "resources": {"requests": {"cpu": cpu}}});
        let mut sidecar = cpu("s", "200m");
        sidecar["restartPolicy"] = json!("Always");
        let r = requested(json!({
            "initContainers": [cpu("i1", "900m"), sidecar.clone(), cpu("i2", "800m")],
            "containers": [cpu("a", "300m")],
        }));
        assert_eq!(r.of("cpu"), 1000, "sidecar and the second init container");
        let r = requested(json!({"initContainers": [sidecar], "containers": [cpu("a", "300m")]}));
        assert_eq!(r.of("cpu"), 500);
    }
}
