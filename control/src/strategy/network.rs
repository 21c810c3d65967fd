//! Services, EndpointSlices, Ingresses.

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::{Ingress, IngressClass};

use super::Object;

impl Object for Service {
    fn prepare_create(&mut self) {
        self.status = None;
    }

    fn copy_status(&mut self, from: &Self) {
        self.status.clone_from(&from.status);
    }
}

impl Object for EndpointSlice {}

impl Object for Ingress {
    const GENERATION: bool = true;

    fn prepare_create(&mut self) {
        self.status = None;
    }

    fn copy_status(&mut self, from: &Self) {
        self.status.clone_from(&from.status);
    }

    fn spec_differs(&self, old: &Self) -> bool {
        self.spec != old.spec
    }
}

impl Object for IngressClass {}
