//! ConfigMaps, Secrets, ServiceAccounts, Events.

use k8s_openapi::api::core::v1::{ConfigMap, Event, Secret, ServiceAccount};

use super::Object;

impl Object for ConfigMap {}
impl Object for Secret {}
impl Object for ServiceAccount {}
impl Object for Event {}
