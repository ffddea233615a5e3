//! [`Assertion`]: a source of JWTs that are signed with a [`SigningKey`] (RFC 7523 §3).

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use ring::error::{KeyRejected, Unspecified};
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, RSA_PKCS1_SHA256, RsaKeyPair,
};
use rustls_pki_types::PrivateKeyDer;
use secrecy::zeroize::Zeroizing;
use serde_json::{Map, Value};

use super::super::{Credential, DAY, SECOND, TokenRequest, TokenSource, check_duration, check_text};
use super::form::base64_of_any_form;
use crate::debug::debug_fields;
use crate::error::{Facts, SourceError};
use crate::token::Token;

/// How long an assertion is valid. Authorization servers accept a few minutes; GitHub accepts ten at most.
const LIFETIME: Duration = Duration::from_secs(300);

/// How late the clock of the server may be.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// A private key that signs assertions.
///
/// A key that is not valid is an error of [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build), or else of
/// the first use. `Debug` shows only the algorithm and the key's id.
#[derive(Clone)]
pub struct SigningKey {
    algorithm: &'static str,
    key_id: Option<String>,
    signer: Result<Arc<Signer>, SourceError>,
}

/// Signs a message. Fails if the system has no randomness.
type Signer = dyn Fn(&[u8]) -> Result<Vec<u8>, Unspecified> + Send + Sync;

impl SigningKey {
    /// Makes a key for ES256 (RFC 7518 §3.4) from PKCS#8 or SEC1 in PEM (`BEGIN PRIVATE KEY`, `BEGIN EC PRIVATE KEY`).
    ///
    /// Each constructor also takes the forms that a key has in an environment variable: `\n` or spaces in place of the line
    /// breaks, quotes around it, and base64 of the PEM or of the DER in it.
    pub fn es256(pem: &str) -> Self {
        Self::parse("ES256", pem, |key| {
            let der = match key {
                PrivateKeyDer::Pkcs8(der) => der.secret_pkcs8_der().to_vec(),
                PrivateKeyDer::Sec1(der) => pkcs8_of_p256(der.secret_sec1_der()),
                _ => return Err(None),
            };
            let (algorithm, der) = (&ECDSA_P256_SHA256_FIXED_SIGNING, Zeroizing::new(der));
            let pair = EcdsaKeyPair::from_pkcs8(algorithm, &der, &SystemRandom::new()).map_err(Some)?;
            Ok(Arc::new(move |message| Ok(pair.sign(&SystemRandom::new(), message)?.as_ref().to_vec())))
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
                _ => return Err(None),
            }
            .map_err(Some)?;
            Ok(Arc::new(move |message| {
                let mut signature = vec![0; pair.public().modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), message, &mut signature)?;
                Ok(signature)
            }))
        })
    }

    /// Makes a key for EdDSA with Ed25519 (RFC 8037 §3.1) from PKCS#8 in PEM (`BEGIN PRIVATE KEY`).
    pub fn ed_dsa(pem: &str) -> Self {
        Self::parse("EdDSA", pem, |key| {
            let PrivateKeyDer::Pkcs8(der) = key else { return Err(None) };
            let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der()).map_err(Some)?;
            Ok(Arc::new(move |message| Ok(pair.sign(message).as_ref().to_vec())))
        })
    }

    /// Parses a key. `signer` returns the reason if the key is of the right kind, but not usable.
    fn parse(
        algorithm: &'static str,
        text: &str,
        signer: impl FnOnce(&PrivateKeyDer<'static>) -> Result<Arc<Signer>, Option<KeyRejected>>,
    ) -> Self {
        let parsed = private_key(text).and_then(|key| {
            signer(&key).map_err(|rejected| match rejected.map(|rejected| rejected.to_string()).as_deref() {
                Some("TooSmall") => "it is too short: RSA needs 2048 bits",
                Some("TooLarge") => "it is too long: RSA may have 4096 bits",
                _ => "it is for another algorithm, has no public key in it (openssl pkey adds it), or is damaged",
            })
        });
        // The reasons quote nothing of the key.
        let expected = format!("the signing key must be a private key for {algorithm} in PEM");
        let signer = parsed.map_err(|reason| SourceError::configuration(format!("{expected}: {reason}")));
        Self { algorithm, key_id: None, signer }
    }

    /// Sets the key's id, which goes into the header of each assertion (`kid`, RFC 7515 §4.1.4). Default: none.
    pub fn key_id(mut self, key_id: impl Into<String>) -> Self {
        self.key_id = Some(key_id.into());
        self
    }

    /// Signs these claims as a JWT in the compact form (RFC 7515 §7.1).
    fn sign(&self, claims: Map<String, Value>) -> Result<Zeroizing<String>, SourceError> {
        let signer = self.signer.clone()?;
        let mut header =
            Map::from_iter([("typ".into(), "JWT".into()), ("alg".into(), self.algorithm.into())]);
        header.extend(self.key_id.iter().map(|key_id| ("kid".into(), key_id.as_str().into())));
        let encoded = |part| BASE64_URL_SAFE_NO_PAD.encode(Value::Object(part).to_string());
        let mut jwt = Zeroizing::new(format!("{}.{}", encoded(header), encoded(claims)));
        let signature = signer(jwt.as_bytes()).map_err(without_randomness)?;
        jwt.push('.');
        BASE64_URL_SAFE_NO_PAD.encode_string(signature, &mut jwt);
        Ok(jwt)
    }
}

fn without_randomness(_: Unspecified) -> SourceError {
    let error = SourceError::unavailable("the system has no randomness to sign an assertion");
    error.with_facts(Facts { is_unsent: true, ..Facts::default() })
}

/// Reads a private key in any of its forms. The error is the reason.
fn private_key(text: &str) -> Result<PrivateKeyDer<'static>, &'static str> {
    let text = text.trim_start_matches('\u{feff}').trim().trim_matches(['"', '\'']);
    let text = Zeroizing::new(text.replace("\\\\n", "\n").replace("\\n", "\n").replace("\\r", ""));
    let reasons = [
        ("ENCRYPTED", "it is encrypted: decrypt it (openssl pkcs8 -topk8 -nocrypt)"),
        ("BEGIN OPENSSH PRIVATE KEY", "it is in OpenSSH's form: convert it (ssh-keygen -p -m PKCS8)"),
        ("PUBLIC KEY-----", "it is a public key"),
        ("BEGIN CERTIFICATE", "it is a certificate"),
    ];
    if let Some((_, reason)) = reasons.into_iter().find(|(label, _)| text.contains(label)) {
        return Err(reason);
    }
    let is_key = |part: &&str| part.starts_with("BEGIN ") && part.ends_with("PRIVATE KEY");
    // Base64 of the PEM or of the DER in it has no parts.
    let base64 = text.split("-----").skip_while(|part| !is_key(part)).nth(1).unwrap_or(&text);
    // The lines may be indented, or have become one.
    let compact: Zeroizing<String> = Zeroizing::new(base64.split_whitespace().collect());
    let decoded = base64_of_any_form(&compact).unwrap_or_default();
    match std::str::from_utf8(&decoded) {
        Ok(inner) if inner.contains("-----BEGIN") => private_key(inner),
        _ => PrivateKeyDer::try_from(decoded.to_vec())
            .map_err(|_| "it is damaged, or has no line -----BEGIN PRIVATE KEY-----"),
    }
}

/// Puts a key in SEC1 (RFC 5915), which has to be for P-256, into PKCS#8 (RFC 5958), which ring reads.
fn pkcs8_of_p256(sec1: &[u8]) -> Vec<u8> {
    // INTEGER 0; SEQUENCE { OID id-ecPublicKey, OID prime256v1 } (RFC 5480 §2.1.1)
    const HEAD: &[u8] =
        b"\x02\x01\x00\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07";
    // A length from 128 on has the long form. No key for P-256 is longer than 255 bytes.
    let der = |tag: u8, content: &[u8]| {
        let length = content.len() as u8;
        let head: &[u8] = if content.len() < 128 { &[tag, length] } else { &[tag, 0x81, length] };
        [head, content].concat()
    };
    der(0x30, &[HEAD, &der(0x04, sec1)].concat())
}

debug_fields!(SigningKey |it| { algorithm: it.algorithm, key_id: it.key_id });

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
    clock_skew: Duration,
}

impl Assertion {
    /// Makes assertions that are signed with `key`.
    pub fn new(key: SigningKey) -> Self {
        Self { key, claims: Map::new(), lifetime: LIFETIME, clock_skew: CLOCK_SKEW }
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

    /// Sets how long an assertion is valid: `exp` less `iat`. Default: 5 min. From a second to a day.
    ///
    /// Another lifetime is an error of [`TokenProviderBuilder::build`](crate::TokenProviderBuilder::build), or else of the
    /// first use.
    pub fn lifetime(mut self, lifetime: Duration) -> Self {
        self.lifetime = lifetime;
        self
    }

    /// Sets by how much the clock of the server may be late. Default: 60 s.
    ///
    /// `iat` is that much before the time of the signature, so that such a server does not find it in the future. `exp` is
    /// one [lifetime](Self::lifetime) after `iat`. A skew of more than half of the lifetime counts as half of it.
    pub fn clock_skew(mut self, clock_skew: Duration) -> Self {
        self.clock_skew = clock_skew;
        self
    }

    /// How long before its signature an assertion is issued.
    fn backdated(&self) -> Duration {
        self.clock_skew.min(self.lifetime / 2)
    }

    /// Checks the key and the options.
    pub(super) fn check(&self) -> Result<(), SourceError> {
        check_duration("lifetime", self.lifetime, SECOND..=DAY, ">= 1s and <= 1d")?;
        let key_id = self.key.key_id.as_deref().map(|id| ("key_id", id));
        let claims = self.claims.iter().filter_map(|(name, value)| Some((name.as_str(), value.as_str()?)));
        for (name, text) in key_id.into_iter().chain(claims) {
            check_text("the name of a claim", name)?;
            check_text(&format!("{name} of the assertion"), text)?;
        }
        self.key.signer.clone().map(drop)
    }

    /// Signs a new assertion. The audience counts if none is set.
    pub(super) fn sign(&self, audience: Option<&str>) -> Result<Zeroizing<String>, SourceError> {
        self.check()?;
        let mut claims = self.claims.clone();
        if let Some(audience) = audience {
            claims.entry("aud").or_insert_with(|| audience.into());
        }
        // Since 1970, by the wall clock: the server compares them with its own.
        let now = UNIX_EPOCH.elapsed().unwrap_or_default();
        let issued = now.saturating_sub(self.backdated());
        claims.insert("iat".into(), issued.as_secs().into());
        claims.insert("exp".into(), (issued.as_secs() + self.lifetime.as_secs()).into());
        let mut id = [0; 16];
        SystemRandom::new().fill(&mut id).map_err(without_randomness)?;
        claims.insert("jti".into(), BASE64_URL_SAFE_NO_PAD.encode(id).into());
        self.key.sign(claims)
    }
}

impl TokenSource for Assertion {
    async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
        let lifetime = Duration::from_secs(self.lifetime.as_secs()).saturating_sub(self.backdated());
        Ok(Token::builder(self.sign(None)?.as_str()).expires_in(lifetime).build()?)
    }

    /// The key may be replaced for the same issuer.
    fn credential(&self) -> Credential {
        let claims = self.claims.iter().flat_map(|(name, value)| [name.clone(), value.to_string()]);
        Credential::new(claims).without_logins()
    }

    fn validate(&self) -> Result<(), SourceError> {
        self.check()
    }
}

debug_fields!(Assertion |it| { key: it.key, claims: it.claims.keys().collect::<Vec<_>>(), lifetime: it.lifetime });
