//! [`TrustedKey`]: the key whose JWTs the server trusts, and the verification of a JWT.

use std::time::SystemTime;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use rcgen::KeyPair;
use ring::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use serde_json::Value;

/// A key for ES256 (RFC 7518 §3.4).
pub(super) struct TrustedKey(KeyPair);

impl TrustedKey {
    pub(super) fn generate() -> Self {
        // Fails only if the kernel has no random number generator.
        Self(KeyPair::generate().expect("the system has no randomness"))
    }

    /// Returns the private key in PEM (PKCS#8).
    pub(super) fn pem(&self) -> String {
        self.0.serialize_pem()
    }

    /// Returns the claims of a JWT that this key has signed for one of the `audiences`, and that is valid now. The error
    /// says what is wrong with the JWT.
    pub(super) fn verify(&self, jwt: &str, audiences: &[String]) -> Result<Value, &'static str> {
        let (signed, signature) = jwt.rsplit_once('.').ok_or("The JWT has no signature.")?;
        let (header, claims) = signed.split_once('.').ok_or("The JWT has no claims.")?;
        let header = decode(header).ok_or("The header of the JWT is not JSON in base64url.")?;
        if header["alg"] != "ES256" {
            return Err("The algorithm of the JWT is not ES256.");
        }
        // RFC 7515 §4.1.11: none of these extensions is known here.
        if header.get("crit").is_some() {
            return Err("The JWT has a critical extension.");
        }
        let signature = BASE64_URL_SAFE_NO_PAD.decode(signature).unwrap_or_default();
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, self.0.public_key_raw())
            .verify(signed.as_bytes(), &signature)
            .map_err(|_| "The signature of the JWT is not valid.")?;
        let claims = decode(claims).ok_or("The claims of the JWT are not JSON in base64url.")?;

        let is_here = |audience: &Value| audiences.iter().any(|here| audience == here);
        if !claims["aud"].as_array().map_or_else(|| is_here(&claims["aud"]), |all| all.iter().any(is_here)) {
            return Err("The audience of the JWT is neither the token endpoint nor the issuer.");
        }
        let now = SystemTime::UNIX_EPOCH.elapsed().map_or(0.0, |since| since.as_secs_f64());
        if claims["exp"].as_f64().is_none_or(|exp| exp <= now) {
            return Err("The JWT is expired, or has no expiry.");
        }
        if claims.get("nbf").is_some_and(|nbf| nbf.as_f64().is_none_or(|nbf| nbf > now)) {
            return Err("The JWT is not valid yet.");
        }
        Ok(claims)
    }
}

fn decode(part: &str) -> Option<Value> {
    serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(part).ok()?).ok()
}
