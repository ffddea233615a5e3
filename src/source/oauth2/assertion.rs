//! [`Assertion`]: a source of JWTs that are signed with a [`SigningKey`] (RFC 7523 §3).

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use ring::{
    rand::{SecureRandom, SystemRandom},
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, RSA_PKCS1_SHA256, RsaKeyPair,
    },
};
use rustls::pki_types::{PrivateKeyDer, pem::PemObject};
use secrecy::zeroize::Zeroizing;
use serde_json::{Map, Value};

use super::super::{TokenRequest, TokenSource};
use crate::{
    error::{SourceError, seconds},
    token::Token,
};

/// How long an assertion is valid. Authorization servers accept a few minutes; GitHub accepts ten at most.
const LIFETIME: Duration = Duration::from_secs(300);

/// How long before its signature an assertion claims to be issued, for a server whose clock is late.
const CLOCK_SKEW: Duration = Duration::from_secs(30);

/// A private key that signs assertions.
///
/// A key that is not valid is an error of [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build), or else of
/// the first use. `Debug` shows only the algorithm and the key's id.
#[derive(Clone)]
pub struct SigningKey {
    algorithm: &'static str,
    key_id: Option<String>,
    pair: Result<Arc<Pair>, SourceError>,
}

enum Pair {
    Ecdsa(EcdsaKeyPair),
    Rsa(RsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

impl SigningKey {
    /// Makes a key for ES256 (RFC 7518 §3.4) from PKCS#8 in PEM (`BEGIN PRIVATE KEY`).
    pub fn es256(pem: &str) -> Self {
        Self::parse("ES256", pem, |key| match key {
            PrivateKeyDer::Pkcs8(der) => {
                let random = SystemRandom::new();
                let pair = EcdsaKeyPair::from_pkcs8(
                    &ECDSA_P256_SHA256_FIXED_SIGNING,
                    der.secret_pkcs8_der(),
                    &random,
                );
                pair.ok().map(Pair::Ecdsa)
            }
            _ => None,
        })
    }

    /// Makes a key for RS256 (RFC 7518 §3.3) from PKCS#8 or PKCS#1 in PEM (`BEGIN PRIVATE KEY`, `BEGIN RSA PRIVATE KEY`).
    ///
    /// The key has 2,048 to 4,096 bits.
    pub fn rs256(pem: &str) -> Self {
        Self::parse("RS256", pem, |key| {
            let pair = match key {
                PrivateKeyDer::Pkcs8(der) => RsaKeyPair::from_pkcs8(der.secret_pkcs8_der()),
                PrivateKeyDer::Pkcs1(der) => RsaKeyPair::from_der(der.secret_pkcs1_der()),
                _ => return None,
            };
            pair.ok().map(Pair::Rsa)
        })
    }

    /// Makes a key for EdDSA with Ed25519 (RFC 8037 §3.1) from PKCS#8 in PEM (`BEGIN PRIVATE KEY`).
    pub fn ed_dsa(pem: &str) -> Self {
        Self::parse("EdDSA", pem, |key| match key {
            PrivateKeyDer::Pkcs8(der) => {
                Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der()).ok().map(Pair::Ed25519)
            }
            _ => None,
        })
    }

    fn parse(
        algorithm: &'static str,
        pem: &str,
        pair: impl FnOnce(&PrivateKeyDer<'static>) -> Option<Pair>,
    ) -> Self {
        let pair = PrivateKeyDer::from_pem_slice(pem.as_bytes()).ok().as_ref().and_then(pair);
        // Without the parser's error: it could quote the key.
        let pair = pair.map(Arc::new).ok_or_else(|| {
            SourceError::configuration(format!(
                "the signing key must be a private key for {algorithm}, not for another algorithm, in PEM as PKCS#8 \
                 (openssl pkcs8 -topk8 -nocrypt)"
            ))
        });
        Self { algorithm, key_id: None, pair }
    }

    /// Sets the key's id, which goes into the header of each assertion (`kid`, RFC 7515 §4.1.4). Default: none.
    pub fn key_id(mut self, key_id: impl Into<String>) -> Self {
        self.key_id = Some(key_id.into());
        self
    }

    /// Signs these claims as a JWT in the compact form (RFC 7515 §7.1).
    fn sign(&self, claims: Map<String, Value>) -> Result<Zeroizing<String>, SourceError> {
        let pair = self.pair.clone()?;
        let mut header =
            Map::from_iter([("typ".into(), "JWT".into()), ("alg".into(), self.algorithm.into())]);
        header.extend(self.key_id.iter().map(|key_id| ("kid".into(), key_id.as_str().into())));
        let encoded = |part| BASE64_URL_SAFE_NO_PAD.encode(Value::Object(part).to_string());
        let mut jwt = Zeroizing::new(format!("{}.{}", encoded(header), encoded(claims)));
        let failed = |_| SourceError::unavailable("the system has no randomness to sign an assertion");
        let random = SystemRandom::new();
        let signature = match &*pair {
            Pair::Ecdsa(pair) => pair.sign(&random, jwt.as_bytes()).map_err(failed)?.as_ref().to_vec(),
            Pair::Rsa(pair) => {
                let mut signature = vec![0; pair.public().modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &random, jwt.as_bytes(), &mut signature).map_err(failed)?;
                signature
            }
            Pair::Ed25519(pair) => pair.sign(jwt.as_bytes()).as_ref().to_vec(),
        };
        jwt.push('.');
        BASE64_URL_SAFE_NO_PAD.encode_string(signature, &mut jwt);
        Ok(jwt)
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningKey")
            .field("algorithm", &self.algorithm)
            .field("key_id", &self.key_id)
            .finish_non_exhaustive()
    }
}

/// A [`TokenSource`] of signed JWTs: the assertion of [`OAuth2::jwt_bearer`](super::OAuth2::jwt_bearer), or the subject of
/// [`OAuth2::token_exchange`](super::OAuth2::token_exchange).
///
/// Each [`fetch`](TokenSource::fetch) signs a new one, with `iat`, `exp` and a random `jti`, without any I/O. `Debug` shows
/// the names of the claims.
///
/// ```
/// use tower_bearer::oauth2::{Assertion, SigningKey};
///
/// # let pem = "";
/// let assertion = Assertion::new(SigningKey::rs256(pem).key_id("key-1"))
///     .issuer("sender@project.iam.gserviceaccount.com")
///     .audience("https://oauth2.googleapis.com/token")
///     .claim("scope", "https://www.googleapis.com/auth/devstorage.read_only");
/// ```
#[derive(Clone)]
pub struct Assertion {
    key: SigningKey,
    claims: Map<String, Value>,
    lifetime: Duration,
}

impl Assertion {
    /// Makes assertions that are signed with `key`.
    pub fn new(key: SigningKey) -> Self {
        Self { key, claims: Map::new(), lifetime: LIFETIME }
    }

    /// Sets `iss`: who issues the assertion. Default: none.
    pub fn issuer(self, issuer: impl Into<String>) -> Self {
        self.claim("iss", issuer)
    }

    /// Sets `sub`: whom a token is requested for. Default: none.
    pub fn subject(self, subject: impl Into<String>) -> Self {
        self.claim("sub", subject)
    }

    /// Sets `aud`: the authorization server, as it names itself. Default: none.
    pub fn audience(self, audience: impl Into<String>) -> Self {
        self.claim("aud", audience)
    }

    /// Sets another claim, whose value is a text. `iat`, `exp` and `jti` are always set by the assertion.
    pub fn claim(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.claims.insert(name.into(), Value::String(value.into()));
        self
    }

    /// Sets how long an assertion is valid. Default: 5 min. From a second to a day.
    ///
    /// Another lifetime is an error of [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build), or else of the
    /// first use.
    pub fn lifetime(mut self, lifetime: Duration) -> Self {
        self.lifetime = lifetime;
        self
    }

    /// Checks the key and the options.
    pub(super) fn check(&self) -> Result<(), SourceError> {
        if !(Duration::from_secs(1)..=Duration::from_secs(24 * 60 * 60)).contains(&self.lifetime) {
            let got = seconds(self.lifetime);
            return Err(SourceError::configuration(format!("lifetime must be >= 1s and <= 1d, got {got}")));
        }
        self.key.pair.clone().map(drop)
    }

    /// Signs a new assertion.
    pub(super) fn sign(&self) -> Result<Zeroizing<String>, SourceError> {
        self.check()?;
        let mut claims = self.claims.clone();
        // Since 1970, by the wall clock: the server compares them with its own.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        claims.insert("iat".into(), now.saturating_sub(CLOCK_SKEW).as_secs().into());
        claims.insert("exp".into(), (now + self.lifetime).as_secs().into());
        let mut id = [0; 16];
        SystemRandom::new()
            .fill(&mut id)
            .map_err(|_| SourceError::unavailable("the system has no randomness to sign an assertion"))?;
        claims.insert("jti".into(), BASE64_URL_SAFE_NO_PAD.encode(id).into());
        self.key.sign(claims)
    }
}

impl TokenSource for Assertion {
    async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
        Ok(Token::builder(self.sign()?.as_str()).expires_in(self.lifetime).build()?)
    }

    fn validate(&self) -> Result<(), SourceError> {
        self.check()
    }
}

impl fmt::Debug for Assertion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Assertion")
            .field("key", &self.key)
            .field("claims", &self.claims.keys().collect::<Vec<_>>())
            .field("lifetime", &self.lifetime)
            .finish()
    }
}
