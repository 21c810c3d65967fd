use std::sync::Mutex;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::PodStatus;
use tokio::sync::mpsc;

use super::*;
use crate::pods::report::ReportError;
use crate::pods::tests::options;
use crate::pods::tokens::{Token, TokenWanted};

/// Passes on events, and issues tokens that have expired, until the account is deleted.
struct Api {
    events: mpsc::UnboundedSender<PodEvent>,
    has_account: Mutex<bool>,
}

#[async_trait]
impl StatusReporter for Api {
    async fn status(&self, _: &PodRef, _: &PodStatus) -> Result<(), ReportError> {
        Ok(())
    }
    async fn event(&self, event: &PodEvent) -> Result<(), ReportError> {
        self.events.send(event.clone()).unwrap();
        Ok(())
    }
    async fn deleted(&self, _: &PodRef) -> Result<(), ReportError> {
        Ok(())
    }
    async fn mirror(&self, _: &Pod) -> Result<(), ReportError> {
        Ok(())
    }
    async fn token(&self, wanted: &TokenWanted) -> Result<Token, ReportError> {
        if !*self.has_account.lock().unwrap() {
            let why = format!("serviceaccounts {:?} not found", wanted.account);
            return Err(ReportError::Refused(why));
        }
        Ok(Token { text: "old".to_owned(), expires_at: jiff::Timestamp::now() })
    }
}

fn work(setting: &str) -> Arc<PodWork> {
    let pod = serde_json::json!({
        "metadata": {"name": "web", "namespace": "shop", "uid": "u1"},
        "spec": {"serviceAccountName": "web", "containers": [], "volumes": [
            {"name": "api", "projected": {"sources": [
                {"serviceAccountToken": {"path": "token"}},
                {"configMap": {"name": "settings"}}]}},
            {"name": "cfg", "configMap": {"name": "settings"}}]}});
    let values = [("a.conf".to_owned(), setting.as_bytes().to_vec())].into();
    Arc::new(PodWork {
        pod: serde_json::from_value(pod).unwrap(),
        config_maps: [("settings".to_owned(), values)].into(),
        binary_keys: Default::default(),
        secrets: Default::default(),
        service_env: Default::default(),
        departure: None,
    })
}

#[tokio::test]
async fn volumes_are_kept_up_to_date_without_the_account_of_their_token() {
    let directory = tempfile::tempdir().unwrap();
    let (events, mut told) = mpsc::unbounded_channel();
    let api = Arc::new(Api { events, has_account: Mutex::new(true) });
    let options = options(directory.path().to_str().unwrap());
    let context = Arc::new(Context::new(options, api.clone(), Drain::alone()));
    tokio::spawn(context.outbox.clone().deliver(api.clone()));
    let prepare = async |setting: &str| {
        let work = work(setting);
        let job = Job {
            context: Arc::clone(&context),
            pod: PodRef::of(&work.pod).unwrap(),
            work: Some(work),
            pod_ips: Vec::new(),
            sandbox_attempt: 0,
            step: Step::PrepareVolumes,
        };
        let done = job.run().await;
        let text = |volume: &str, secret: bool, file: &str| {
            let path = context.layout.volume("u1", volume, secret).join(file);
            std::fs::read_to_string(path).unwrap_or_default()
        };
        let found =
            [text("api", true, "token"), text("api", true, "a.conf"), text("cfg", false, "a.conf")];
        (done, found)
    };
    let files = |setting: &str| ["old", setting, setting].map(str::to_owned);
    assert_eq!(prepare("one").await, (Ok(()), files("one")));
    *api.has_account.lock().unwrap() = false;
    assert_eq!(prepare("two").await, (Ok(()), files("two")));
    let event = told.recv().await.unwrap();
    assert_eq!((event.reason, event.warning), ("FailedMount", true));
    for part in ["serviceaccounts \"web\" not found", "make the account again"] {
        assert!(event.message.contains(part), "{}", event.message);
    }
}
