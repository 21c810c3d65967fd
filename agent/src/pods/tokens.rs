//! Tokens of the service accounts that pods run as: asked of the API, kept with the pod, renewed in time.
//!
//! A token is kept on disk until its pod is gone: a pod has to come back after a reboot although the control service is
//! away. So an old token is better than none; it is tried again to renew it. Nor does a token that cannot be had, because its
//! account was deleted, keep anything else from the pod.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use super::observed::PodRef;
use super::report::{ReportError, StatusReporter};

/// What a token that says nothing about it lives.
const DEFAULT_SECS: i64 = 3600;
/// A token that could not be renewed is tried again after this time.
const RETRY: Duration = Duration::from_secs(30);
/// Renewed at the latest, however long it lives.
const LONGEST: SignedDuration = SignedDuration::from_hours(24);

/// Tokens that are asked for at the same time: each question may be a connection, and a hundred of them at once are answered too late.
const PARALLEL: usize = 8;

/// What distinguishes the tokens of one pod.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TokenKind {
    /// Who may accept it; none for the API itself.
    pub audience: Option<String>,
    /// How long it is asked to live.
    pub secs: i64,
}

/// What is asked of the API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenWanted {
    /// The pod that it is bound to.
    pub pod: PodRef,
    /// The service account that the pod runs as.
    pub account: String,
    /// Which one.
    pub kind: TokenKind,
}

/// A token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// As it is sent.
    pub text: String,
    /// When it is worth nothing any more.
    pub expires_at: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    kind: TokenKind,
    token: Token,
    made_at: Timestamp,
}

impl Kept {
    /// When it should be renewed: at 80 % of its life.
    fn renew_at(&self) -> Timestamp {
        let life = self.token.expires_at.duration_since(self.made_at);
        let wait = (life * 4 / 5).min(LONGEST);
        self.made_at.checked_add(wait).unwrap_or(self.made_at)
    }
}

/// The tokens of a pod, by kind; in place of one that was never had, why.
pub(crate) type Texts = BTreeMap<TokenKind, Result<String, String>>;

/// What there is for the volumes of a pod.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) texts: Texts,
    /// Of each token that is not renewed: why, and what helps. For people. A missing answer is no reason: it comes.
    pub(crate) refusals: Vec<String>,
}

/// A token as new as it can be had.
struct Had {
    kept: Kept,
    /// When it is to be renewed.
    due: Timestamp,
    /// Why it is the old one.
    refusal: Option<String>,
}

/// Which tokens the pod's volumes hold.
fn kinds(spec: &PodSpec) -> impl Iterator<Item = TokenKind> + '_ {
    let projected = spec.volumes.iter().flatten().filter_map(|v| v.projected.as_ref());
    let sources = projected.flat_map(|p| p.sources.iter().flatten());
    sources.filter_map(|s| s.service_account_token.as_ref()).map(kind)
}

/// The token that a source of a volume means.
pub(crate) fn kind(
    source: &k8s_openapi::api::core::v1::ServiceAccountTokenProjection,
) -> TokenKind {
    let audience = source.audience.clone().filter(|audience| !audience.is_empty());
    TokenKind { audience, secs: source.expiration_seconds.unwrap_or(DEFAULT_SECS) }
}

/// Gets tokens, and knows when they are due.
pub(crate) struct Tokens {
    issuer: Arc<dyn StatusReporter>,
    due: Mutex<HashMap<String, Timestamp>>,
    asking: Semaphore,
}

impl Tokens {
    pub(crate) fn new(issuer: Arc<dyn StatusReporter>) -> Self {
        Self { issuer, due: Mutex::default(), asking: Semaphore::new(PARALLEL) }
    }

    /// When the volumes of a pod have to be written again because of its tokens.
    pub(crate) fn due(&self, uid: &str) -> Option<Timestamp> {
        self.due.lock().unwrap_or_else(PoisonError::into_inner).get(uid).copied()
    }

    /// Forgets a pod that is gone.
    pub(crate) fn forget(&self, uid: &str) {
        self.due.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }

    /// All tokens of a pod's volumes; `file` is where they are kept.
    pub(crate) async fn of(&self, pod: &Pod, identity: &PodRef, file: &Path) -> Found {
        let mut found = Found::default();
        let Some(spec) = pod.spec.as_ref() else { return found };
        let wanted: BTreeSet<TokenKind> = kinds(spec).collect();
        if wanted.is_empty() {
            return found;
        }
        let account = spec.service_account_name.clone().filter(|name| !name.is_empty());
        let account = account.unwrap_or_else(|| "default".to_owned());
        let present = read(file);
        let (mut all, mut due) = (Vec::new(), Timestamp::MAX);
        for kind in wanted {
            let old = present.iter().find(|kept| kept.kind == kind);
            let wanted =
                TokenWanted { pod: identity.clone(), account: account.clone(), kind: kind.clone() };
            let text = match self.one(&wanted, old, Timestamp::now()).await {
                Ok(had) => {
                    due = due.min(had.due);
                    found.refusals.extend(had.refusal);
                    let text = had.kept.token.text.clone();
                    all.push(had.kept);
                    Ok(text)
                }
                Err(why) => Err(why),
            };
            found.texts.insert(kind, text);
        }
        if all != present
            && let Err(error) = write(file, &all)
        {
            // It is asked for again when it is needed.
            tracing::warn!(pod = %identity, %error, "tokens not kept for the next start");
        }
        let mut dues = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        dues.insert(identity.uid.clone(), due);
        found
    }

    /// One token, or why there is none. `old` is what is kept of it.
    async fn one(
        &self,
        wanted: &TokenWanted,
        old: Option<&Kept>,
        now: Timestamp,
    ) -> Result<Had, String> {
        if let Some(old) = old.filter(|old| now < old.renew_at()) {
            return Ok(Had { kept: old.clone(), due: old.renew_at(), refusal: None });
        }
        let turn = self.asking.acquire().await;
        let answer = self.issuer.token(wanted).await;
        drop(turn);
        let (pod, account) = (&wanted.pod, &wanted.account);
        match (answer, old) {
            (Ok(token), _) => {
                let fresh = Kept { kind: wanted.kind.clone(), token, made_at: now };
                Ok(Had { due: fresh.renew_at(), kept: fresh, refusal: None })
            }
            (Err(error), Some(old)) => {
                tracing::warn!(%pod, account, %error, "token not renewed, will retry");
                let is_refused = !matches!(error, ReportError::Unavailable(_));
                let refusal = is_refused.then(|| {
                    let (namespace, ends_at) = (&pod.namespace, old.token.expires_at);
                    format!(
                        "token of service account {account:?} not renewed: {error}. The pod keeps the old one, which ends at \
                         {ends_at}: make the account again (kubectl create serviceaccount {account} --namespace {namespace}), \
                         or replace the pod"
                    )
                });
                let due = super::restart::after(now, RETRY);
                Ok(Had { kept: old.clone(), due, refusal })
            }
            (Err(error), None) => Err(format!("token of service account {account:?}: {error}")),
        }
    }
}

/// What was kept; a file that is missing or damaged is as good as none.
fn read(file: &Path) -> Vec<Kept> {
    let bytes = std::fs::read(file).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

/// Not durable at once: tokens that are lost in a crash are asked for again.
fn write(file: &Path, all: &[Kept]) -> io::Result<()> {
    use io::Write as _;
    let directory = file.parent().ok_or(io::ErrorKind::InvalidInput)?;
    super::volumes::private_directory(directory)?;
    let fresh = file.with_extension("new");
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(&fresh)?.write_all(&serde_json::to_vec(all)?)?;
    std::fs::rename(&fresh, file)
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use k8s_openapi::api::core::v1::PodStatus;

    use super::*;
    use crate::pods::report::PodEvent;

    /// Issues tokens with a number, that live so many seconds; or is away, or refuses those for an audience.
    #[derive(Default)]
    struct Issuer {
        asked: Mutex<Vec<TokenWanted>>,
        life: Mutex<i64>,
        away: Mutex<bool>,
        refused: Mutex<Option<&'static str>>,
    }

    #[async_trait]
    impl StatusReporter for Issuer {
        async fn status(&self, _: &PodRef, _: &PodStatus) -> Result<(), ReportError> {
            Ok(())
        }
        async fn event(&self, _: &PodEvent) -> Result<(), ReportError> {
            Ok(())
        }
        async fn deleted(&self, _: &PodRef) -> Result<(), ReportError> {
            Ok(())
        }
        async fn mirror(&self, _: &Pod) -> Result<(), ReportError> {
            Ok(())
        }
        async fn token(&self, wanted: &TokenWanted) -> Result<Token, ReportError> {
            if *self.away.lock().unwrap() {
                return Err(ReportError::Unavailable("away".to_owned()));
            }
            let refused = *self.refused.lock().unwrap();
            if refused.is_some() && wanted.kind.audience.as_deref() == refused {
                return Err(ReportError::Refused("serviceaccounts \"web\" not found".to_owned()));
            }
            let mut asked = self.asked.lock().unwrap();
            asked.push(wanted.clone());
            let life = SignedDuration::from_secs(*self.life.lock().unwrap());
            let expires_at = Timestamp::now().checked_add(life).unwrap();
            Ok(Token { text: format!("token-{}", asked.len()), expires_at })
        }
    }

    fn pod() -> (Pod, PodRef) {
        let source = |path: &str, audience: Option<&str>| serde_json::json!({"serviceAccountToken": {"path": path, "audience": audience, "expirationSeconds": 3607}});
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "d", "uid": "u"},
            "spec": {"serviceAccountName": "web", "containers": [], "volumes": [{"name": "v", "projected": {
                "sources": [source("a", None), source("b", Some("vault")), source("c", None)]}}]}}))
        .unwrap();
        let identity = PodRef::of(&pod).unwrap();
        (pod, identity)
    }

    #[tokio::test]
    async fn tokens_are_kept_until_it_is_time_to_renew_them() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("u/tokens.json");
        let issuer = Arc::new(Issuer::default());
        *issuer.life.lock().unwrap() = 1000;
        let tokens = Tokens::new(issuer.clone());
        let (pod, identity) = pod();
        let before = Timestamp::now();
        let first = tokens.of(&pod, &identity, &file).await.texts;
        assert_eq!(first.len(), 2, "equal sources share a token");
        assert_eq!(issuer.asked.lock().unwrap()[0].account, "web");
        let due = tokens.due("u").unwrap().duration_since(before).as_secs();
        assert!((799..=801).contains(&due), "{due}");
        // A new agent goes on with what there is, also without the API.
        *issuer.away.lock().unwrap() = true;
        let again = Tokens::new(issuer.clone());
        assert_eq!(again.of(&pod, &identity, &file).await.texts, first);
        assert_eq!(issuer.asked.lock().unwrap().len(), 2);
        let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&file).unwrap());
        assert_eq!(mode & 0o777, 0o600);
    }

    #[tokio::test]
    async fn an_old_token_is_better_than_none_and_is_replaced_when_it_can_be() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("u/tokens.json");
        let issuer = Arc::new(Issuer::default());
        let tokens = Tokens::new(issuer.clone());
        let (pod, identity) = pod();
        *issuer.away.lock().unwrap() = true;
        let none = tokens.of(&pod, &identity, &file).await.texts;
        let why = none.values().next().unwrap().clone().unwrap_err();
        assert!(why.contains("\"web\"") && why.contains("away"), "{why}");
        *issuer.away.lock().unwrap() = false;
        // It has expired when it is made.
        let old = tokens.of(&pod, &identity, &file).await.texts;
        *issuer.away.lock().unwrap() = true;
        let kept = tokens.of(&pod, &identity, &file).await;
        assert_eq!(kept.texts, old);
        assert!(kept.refusals.is_empty(), "nobody could be told now: {:?}", kept.refusals);
        assert!(tokens.due("u").unwrap() > Timestamp::now());
        *issuer.away.lock().unwrap() = false;
        assert_ne!(tokens.of(&pod, &identity, &file).await.texts, old);
        tokens.forget("u");
        assert_eq!(tokens.due("u"), None);
    }

    #[tokio::test]
    async fn a_token_that_is_refused_keeps_nothing_else_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("u/tokens.json");
        let issuer = Arc::new(Issuer::default());
        let tokens = Tokens::new(issuer.clone());
        let (pod, identity) = pod();
        let texts = async || {
            let found = tokens.of(&pod, &identity, &file).await;
            let [own, vault] = [None, Some("vault")].map(|audience: Option<&str>| {
                let kind = TokenKind { audience: audience.map(str::to_owned), secs: 3607 };
                found.texts[&kind].clone()
            });
            (own, vault, found.refusals)
        };
        *issuer.refused.lock().unwrap() = Some("vault");
        let (own, vault, refusals) = texts().await;
        assert!(own.is_ok() && refusals.is_empty(), "{own:?}, {refusals:?}");
        assert!(vault.unwrap_err().contains("serviceaccounts \"web\" not found"));
        *issuer.refused.lock().unwrap() = None;
        // They have expired when they are made.
        let (own, vault, _) = texts().await;
        *issuer.refused.lock().unwrap() = Some("vault");
        *issuer.life.lock().unwrap() = 3600;
        let (renewed, kept, refusals) = texts().await;
        assert_ne!(renewed, own);
        assert_eq!(kept, vault);
        assert_eq!(refusals.len(), 1);
        let why = &refusals[0];
        assert!(why.contains("serviceaccounts \"web\" not found"), "{why}");
        assert!(why.contains("kubectl create serviceaccount web --namespace d"), "{why}");
        let due = tokens.due("u").unwrap();
        assert!(due > Timestamp::now(), "it is asked for again, not at once");
        assert!(due <= crate::pods::restart::after(Timestamp::now(), RETRY), "but soon");
        // An agent that comes next has it, too.
        let next = Tokens::new(issuer.clone());
        let found = next.of(&pod, &identity, &file).await;
        assert!(found.texts.values().any(|text| *text == vault), "{:?}", found.texts);
    }
}
