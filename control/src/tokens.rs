//! Tokens of service accounts: JSON Web Tokens (RFC 7519) signed with ES256 (RFC 7518, section 3.4).
//!
//! Owns: the signing key (never leaves the data folder) and the form of tokens. Never does: knowing whether an account
//! or a pod exists. Entry: [`Signer`].

use std::path::{Path, PathBuf};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _,
    UnparsedPublicKey,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::pki::{PkiError, read_bytes, write};

const ALGORITHM: &str = "ES256";

/// Who a token is for, for how long, and what it is bound to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Who may accept it.
    pub aud: Vec<String>,
    /// Unix time after which it is worth nothing.
    pub exp: i64,
    /// Unix time at which it was made.
    pub iat: i64,
    /// Unix time before which it is worth nothing.
    pub nbf: i64,
    /// Who made it.
    pub iss: String,
    /// Its own name.
    pub jti: String,
    /// `system:serviceaccount:NAMESPACE:NAME`.
    pub sub: String,
    /// What it is bound to.
    #[serde(rename = "kubernetes.io")]
    pub bound: Bound,
}

/// The objects that a token is bound to: it ends with each of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bound {
    /// The namespace of all of them.
    pub namespace: String,
    /// The account.
    pub serviceaccount: Reference,
    /// The pod that it was made for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<Reference>,
}

/// An object: another one of the same name is not meant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reference {
    /// Its name.
    pub name: String,
    /// Its unique id.
    pub uid: String,
}

/// Why a token is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It has not the form of a token of this cluster.
    #[error("the token is not one of this cluster")]
    Form,
    /// It was not signed by this cluster, or was changed.
    #[error("the signature of the token is wrong")]
    Signature,
    /// Its time is over, or has not come.
    #[error("the token has expired")]
    Expired,
}

#[derive(Serialize, Deserialize)]
struct Header {
    alg: String,
    kid: String,
}

/// The key that signs tokens.
pub struct Signer {
    key: EcdsaKeyPair,
    kid: String,
    issuer: String,
}

impl Signer {
    /// The key in the data folder; made at the first start. `domain` is that of the cluster.
    pub fn open(dir: &Path, domain: &str) -> Result<Self, PkiError> {
        let path = dir.join("service-account.key");
        let damaged = |path: &PathBuf, detail: &str| PkiError::Damaged {
            path: path.clone(),
            detail: detail.to_owned(),
        };
        let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
        if !path.exists() {
            let key = EcdsaKeyPair::generate_pkcs8(algorithm, &SystemRandom::new())
                .map_err(|_| damaged(&path, "no key could be made"))?;
            write(&path, key.as_ref(), 0o600)?;
        }
        let key = EcdsaKeyPair::from_pkcs8(algorithm, &read_bytes(&path)?)
            .map_err(|_| damaged(&path, "expected a P-256 key in PKCS #8 (DER)"))?;
        let kid = URL_SAFE_NO_PAD.encode(&Sha256::digest(key.public_key().as_ref())[..16]);
        Ok(Self { key, kid, issuer: format!("https://kubernetes.default.svc.{domain}") })
    }

    /// Who the tokens are from; also the audience of tokens for the API itself.
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// The token of these claims.
    pub fn sign(&self, claims: &Claims) -> String {
        let header = Header { alg: ALGORITHM.to_owned(), kid: self.kid.clone() };
        let text = format!("{}.{}", part(&header), part(claims));
        let signature = self
            .key
            .sign(&SystemRandom::new(), text.as_bytes())
            .expect("P-256 signs any text while the system has random numbers");
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    /// The claims of a token that this key signed and that is valid at `now`, in Unix time.
    pub fn verify(&self, token: &str, now: i64) -> Result<Claims, Refused> {
        let (text, signature) = token.rsplit_once('.').ok_or(Refused::Form)?;
        let (header, claims) = text.split_once('.').ok_or(Refused::Form)?;
        let header: Header = parse(header).ok_or(Refused::Form)?;
        if header.alg != ALGORITHM || header.kid != self.kid {
            return Err(Refused::Form);
        }
        let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|_| Refused::Form)?;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, self.key.public_key().as_ref())
            .verify(text.as_bytes(), &signature)
            .map_err(|_| Refused::Signature)?;
        let claims: Claims = parse(claims).ok_or(Refused::Form)?;
        if claims.iss != self.issuer {
            return Err(Refused::Form);
        }
        if now >= claims.exp || now < claims.nbf {
            return Err(Refused::Expired);
        }
        Ok(claims)
    }
}

fn part(value: &impl Serialize) -> String {
    URL_SAFE_NO_PAD.encode(serde_json::to_vec(value).expect("plain data becomes JSON"))
}

fn parse<T: for<'de> Deserialize<'de>>(part: &str) -> Option<T> {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims(signer: &Signer) -> Claims {
        let reference =
            |name: &str| Reference { name: name.to_owned(), uid: format!("{name}-uid") };
        Claims {
            aud: vec![signer.issuer().to_owned()],
            exp: 200,
            iat: 100,
            nbf: 100,
            iss: signer.issuer().to_owned(),
            jti: "1".to_owned(),
            sub: "system:serviceaccount:shop:web".to_owned(),
            bound: Bound {
                namespace: "shop".to_owned(),
                serviceaccount: reference("web"),
                pod: Some(reference("web-0")),
            },
        }
    }

    #[test]
    fn a_token_is_valid_for_its_time_and_from_its_own_key_only() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let signer = Signer::open(dir.path(), "cluster.local").unwrap();
        let claims = claims(&signer);
        let token = signer.sign(&claims);
        assert_eq!(signer.verify(&token, 100), Ok(claims.clone()));
        assert_eq!(signer.verify(&token, 99), Err(Refused::Expired));
        assert_eq!(signer.verify(&token, 200), Err(Refused::Expired));
        // A restart keeps the key.
        let again = Signer::open(dir.path(), "cluster.local").unwrap();
        assert_eq!(again.verify(&token, 150), Ok(claims.clone()));
        let stranger = Signer::open(other.path(), "cluster.local").unwrap();
        assert_eq!(stranger.verify(&token, 150), Err(Refused::Form));
        let mut forged = stranger;
        forged.kid.clone_from(&signer.kid);
        assert_eq!(signer.verify(&forged.sign(&claims), 150), Err(Refused::Signature));
    }

    #[test]
    fn what_was_changed_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let signer = Signer::open(dir.path(), "cluster.local").unwrap();
        let token = signer.sign(&claims(&signer));
        let parts: Vec<&str> = token.split('.').collect();
        let mut more = claims(&signer);
        more.exp = 1 << 40;
        let longer = format!("{}.{}.{}", parts[0], part(&more), parts[2]);
        assert_eq!(signer.verify(&longer, 150), Err(Refused::Signature));
        let none = Header { alg: "none".to_owned(), kid: signer.kid.clone() };
        let unsigned = format!("{}.{}.", part(&none), parts[1]);
        assert_eq!(signer.verify(&unsigned, 150), Err(Refused::Form));
        for junk in ["", ".", "..", "a.b.c", parts[1]] {
            assert_eq!(signer.verify(junk, 150), Err(Refused::Form), "{junk}");
        }
    }
}
