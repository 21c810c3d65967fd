//! Endpoints that people write for Services without a selector, such as those of a database outside: mirrored as EndpointSlices,
//! which are what nodes look at.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Endpoints, Service};
use mesh_model::ObjectKey;

use self::plan::{MANAGER, MAX_ENDPOINTS, is_meant, is_open, plan};
use super::{apply, follow_slices, service_of, slices_of};
use crate::controllers::queue::WorkQueue;
use crate::controllers::recorder::Recorder;
use crate::controllers::runtime::{Context, Reconcile, key};
use crate::error::ApiError;
use crate::objects;

mod plan;

pub(in crate::controllers) struct Controller {
    context: Arc<Context>,
    recorder: Recorder,
    /// How many addresses too many people were told of.
    told: Mutex<HashMap<ObjectKey, usize>>,
}

impl Controller {
    pub(in crate::controllers) fn new(
        context: Arc<Context>,
    ) -> (Arc<Self>, Arc<WorkQueue<ObjectKey>>) {
        let queue = WorkQueue::new();
        let sink = queue.clone();
        context.endpoints.listen(move |old, new| {
            // The record of an election is renewed every other second, and leads nowhere.
            let mut meant = old.into_iter().chain(new).filter(|one| is_meant(one));
            if let Some(endpoints) = meant.next() {
                sink.add(key(&**endpoints));
            }
        });
        let sink = queue.clone();
        context.services.listen(move |old, new| {
            let open = |service: Option<&Arc<Service>>| service.is_some_and(|s| is_open(s));
            if let Some(service) = new.or(old).filter(|_| open(old) != open(new)) {
                sink.add(key(&**service));
            }
        });
        follow_slices(&context, &queue, MANAGER);
        let recorder = context.recorder.of("endpoint-slice-mirroring-controller");
        (Arc::new(Self { context, recorder, told: Mutex::default() }), queue)
    }

    /// Says that addresses are left out, once for each number of them.
    fn tell(&self, key: &ObjectKey, endpoints: Option<&Endpoints>, skipped: usize) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(endpoints) = endpoints.filter(|_| skipped > 0) else {
            told.remove(key);
            return;
        };
        if told.insert(key.clone(), skipped) != Some(skipped) {
            let message = format!(
                "A max of {MAX_ENDPOINTS} addresses can be mirrored to EndpointSlices per family and set of ports. \
                 {skipped} addresses were skipped"
            );
            self.recorder.warning(endpoints, "TooManyAddressesToMirror", message);
        }
    }
}

#[async_trait]
impl Reconcile for Controller {
    type Key = ObjectKey;
    const NAME: &'static str = "endpointslicemirroring";

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, ApiError> {
        let service = self.context.services.get(&key.namespace, &key.name);
        let endpoints = self.context.endpoints.get(&key.namespace, &key.name);
        let endpoints = endpoints
            .filter(|endpoints| is_meant(endpoints) && service.is_some_and(|s| is_open(&s)));
        let slices = slices_of(&self.context, key, MANAGER);
        let plan = plan(endpoints.as_deref(), &slices);
        for step in plan.steps {
            tracing::debug!(endpoints = %key, %step, "endpoints written by hand");
            apply(&self.context, &key.namespace, step).await?;
        }
        self.tell(key, endpoints.as_deref(), plan.skipped);
        Ok(None)
    }

    fn all(&self) -> Vec<ObjectKey> {
        let endpoints = self.context.endpoints.all();
        let meant = endpoints.iter().filter(|one| is_meant(one)).map(|one| key(&**one));
        let slices = self.context.slices.all();
        let mirrored = slices.iter().filter_map(|slice| {
            let service = service_of(slice, MANAGER)?;
            Some(ObjectKey::new(objects::namespace(&slice.metadata), service))
        });
        meant.chain(mirrored).collect::<BTreeSet<_>>().into_iter().collect()
    }
}
