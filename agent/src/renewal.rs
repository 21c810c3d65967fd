//! The node's certificate: renewed in time, and joined for again where that was missed.
//!
//! Who shows a certificate gets the next one, for a new key: what somebody may have learned of the one before is worth nothing
//! after its end.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use mesh_model::NodeName;
use mesh_model::certificate::{RENEW_PATH, RenewRequest, RenewResponse, Validity};
use rcgen::KeyPair;

use crate::board::Board;
use crate::credential::{Credential, CredentialError, NotKept};
use crate::errors::chain;
use crate::join::{Identity, JoinError, Joining, date, now, signing_request};

const NAME: &str = "certificate";
/// The clock may be set, and while the machine sleeps this time stands still.
const LOOK: Duration = Duration::from_secs(3600);
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(3600);
/// Somebody may have put a token there, and waits.
const LAST_JOIN: Duration = Duration::from_secs(30);

/// What keeps the certificate good.
pub(crate) struct Renewal<'a> {
    pub(crate) identity: &'a Identity,
    /// Shows the certificate that is in use.
    pub(crate) client: &'a kube::Client,
    pub(crate) joining: Joining<'a>,
    pub(crate) board: &'a Board,
}

/// What is to be done about a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Nothing for so long.
    Wait(Duration),
    Renew,
    /// It lets the node in no more.
    JoinAgain,
}

/// Why there is no next certificate yet.
#[derive(Debug, thiserror::Error)]
enum RenewalError {
    #[error("make the node's next key and signing request")]
    Request(#[source] rcgen::Error),
    #[error("ask for the next certificate")]
    Ask(#[source] Box<kube::Error>),
    #[error("mesh-control renews no certificates: it is older than this agent, upgrade it")]
    Unserved,
    #[error("mesh-control refused: {0}")]
    Refused(String),
    #[error("use the next certificate")]
    Certificate(#[source] CredentialError),
    #[error("the next certificate is good from {0} to {1}: compare this clock with mesh-control's")]
    NotNow(String, String),
    #[error(transparent)]
    Keep(#[from] NotKept),
    #[error(transparent)]
    Join(#[from] JoinError),
}

/// What is to be done now; `spread` as in [`Validity::renew_at`].
fn step(validity: Validity, spread: u8, now: i64) -> Step {
    if !validity.holds(now) {
        return Step::JoinAgain;
    }
    match u64::try_from(validity.renew_at(spread) - now) {
        Ok(left @ 1..) => Step::Wait(Duration::from_secs(left).min(LOOK)),
        _ => Step::Renew,
    }
}

/// The longest pause after a failure. Of a year's certificate, the last third has some 3,000 of them.
fn longest_retry(validity: Validity) -> Duration {
    let life = Duration::from_secs(validity.life().unsigned_abs());
    (life / 64).clamp(FIRST_RETRY, LAST_RETRY)
}

impl Renewal<'_> {
    /// Never ends. A control service that is away is asked again.
    pub(crate) async fn keep(self) -> Infallible {
        let mut pause = FIRST_RETRY;
        loop {
            let credential = Arc::clone(&self.identity.credential.borrow());
            let validity = credential.validity;
            let (done, longest) = match step(validity, credential.spread, now()) {
                Step::Wait(time) => {
                    pause = FIRST_RETRY;
                    tokio::time::sleep(time).await;
                    continue;
                }
                Step::Renew => (self.renew().await, longest_retry(validity)),
                Step::JoinAgain => {
                    let joined = self.joining.again(self.identity).await;
                    (joined.map_err(RenewalError::from), LAST_JOIN)
                }
            };
            self.report(done, validity);
            // Also after a success: by clocks that differ, the next certificate may be due at once.
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
    }

    async fn renew(&self) -> Result<(), RenewalError> {
        let next = ask(self.client, self.joining.node).await?;
        let Validity { from, until } = next.validity;
        if !next.validity.holds(now()) {
            return Err(RenewalError::NotNow(date(from), date(until)));
        }
        // First: what only this process has would be lost with it.
        next.keep(&self.joining.folder())?;
        self.identity.credential.send_replace(Arc::new(next));
        Ok(())
    }

    fn report(&self, done: Result<(), RenewalError>, validity: Validity) {
        match done {
            Ok(()) => {
                let until = date(self.identity.validity().until);
                tracing::info!(until, "the node has its next certificate");
                self.board.done(NAME);
            }
            Err(RenewalError::Join(error)) => self.fail(chain(&error)),
            Err(error) => {
                let (until, server) = (date(validity.until), &self.identity.server);
                self.fail(format!(
                    "not renewed: {}; good until {until}: let the node reach {server} before that, \
                     or it has to join again",
                    chain(&error)
                ));
            }
        }
    }

    fn fail(&self, why: String) {
        tracing::warn!(why, "the node has no next certificate, trying again");
        self.board.failed(NAME, vec![why]);
    }
}

async fn ask(client: &kube::Client, node: &NodeName) -> Result<Credential, RenewalError> {
    let key = KeyPair::generate().map_err(RenewalError::Request)?;
    let csr_pem = signing_request(node, &key).map_err(RenewalError::Request)?;
    let body = serde_json::to_vec(&RenewRequest { csr_pem }).expect("plain data becomes JSON");
    let request = http::Request::post(RENEW_PATH)
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(body)
        .expect("a constant path and header");
    let answer: RenewResponse = client.request(request).await.map_err(|error| match error {
        kube::Error::Api(status) if status.code == 404 => RenewalError::Unserved,
        kube::Error::Api(status) => RenewalError::Refused(status.message.clone()),
        error => RenewalError::Ask(Box::new(error)),
    })?;
    Credential::new(key.serialize_pem(), answer.certificate_pem).map_err(RenewalError::Certificate)
}

#[cfg(test)]
mod tests;
