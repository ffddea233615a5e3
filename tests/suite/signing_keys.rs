//! The keys that sign assertions, in the forms in which programs have them, and how long an assertion is valid.
//!
//! The keys in `tests/keys` were made for these tests and are used nowhere else.

#![cfg(feature = "oauth2-jwt")]

use std::time::{Duration, UNIX_EPOCH};

use base64::{
    Engine,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use http::{Request, Response};
use ring::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use serde_json::Value;
use tower_bearer::{
    BoxError, OAuth2, RefreshReason, SourceError, SourceErrorKind, TokenClient, TokenProvider, TokenRequest,
    TokenSource,
    oauth2::{Assertion, ClientAuth, Server, SigningKey},
};

macro_rules! key {
    ($name:literal) => {
        include_str!(concat!("keys/", $name, ".pem"))
    };
}

async fn signed(assertion: &Assertion) -> Result<String, SourceError> {
    let token = assertion.fetch(&TokenRequest::new(RefreshReason::Missing)).await?;
    Ok(token.access_token().to_owned())
}

fn claims(jwt: &str) -> Value {
    let payload = jwt.split('.').nth(1).unwrap();
    serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(payload).unwrap()).unwrap()
}

/// The DER in a PEM, in base64.
fn der(pem: &str) -> String {
    pem.lines().filter(|line| !line.starts_with("-----")).collect()
}

/// A signing key comes from a file or an environment variable, in any usual form.
#[tokio::test]
async fn key_may_have_any_usual_form() {
    let public = BASE64_STANDARD.decode(der(key!("ec_public"))).unwrap();
    // The point is at the end of the SubjectPublicKeyInfo.
    let public = UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &public[public.len() - 65..]);
    for pem in [key!("ec"), key!("ec_sec1")] {
        let base64 = BASE64_STANDARD.encode(pem);
        let wrapped: Vec<_> =
            base64.as_bytes().chunks(76).map(|line| str::from_utf8(line).unwrap()).collect();
        for form in [
            pem.to_owned(),
            format!("\n {pem}\n"),
            pem.replace('\n', "\r\n"),
            pem.replace('\n', "\\n"),
            pem.replace('\n', " "),
            pem.replace('\n', ""),
            pem.replace('\n', "\\\\n"),
            pem.replace('\n', "\t\n    "),
            format!("\u{feff}{pem}"),
            format!("\" {pem} \""),
            base64.trim_end_matches('=').to_owned(),
            base64.replace('+', "-").replace('/', "_"),
            der(pem).replace('+', "-").replace('/', "_"),
            pem.replace('\n', "\\r\\n"),
            format!("\"{pem}\""),
            format!("'{}'\n", pem.replace('\n', "\\n")),
            base64.clone(),
            format!("\"{base64}\""),
            wrapped.join("\n"),
            BASE64_STANDARD.encode(pem.replace('\n', "\\n")),
            der(pem),
        ] {
            let jwt = signed(&Assertion::new(SigningKey::es256(&form))).await;
            let jwt = jwt.unwrap_or_else(|error| panic!("{error}: {}", form.escape_debug()));
            let (message, signature) = jwt.rsplit_once('.').unwrap();
            let signature = BASE64_URL_SAFE_NO_PAD.decode(signature).unwrap();
            public.verify(message.as_bytes(), &signature).unwrap();
        }
    }
    for key in [
        SigningKey::es256(key!("ec_with_params")),
        SigningKey::rs256(key!("rsa")),
        SigningKey::rs256(key!("rsa_pkcs1")),
        SigningKey::rs256(&key!("rsa").replace('\n', "\\n")),
        SigningKey::rs256(&BASE64_STANDARD.encode(key!("rsa_pkcs1"))),
        SigningKey::ed_dsa(key!("ed")),
        SigningKey::ed_dsa(&der(key!("ed"))),
    ] {
        signed(&Assertion::new(key)).await.unwrap();
    }
}

/// A signing key cannot be used: the error has the reason, and quotes nothing of the key.
#[tokio::test]
async fn unusable_key_error_has_reason() {
    let ec = key!("ec");
    for (key, reason) in [
        (SigningKey::es256(key!("ec_public")), "it is a public key"),
        (SigningKey::rs256(&key!("ec_public").replace('\n', "\\n")), "it is a public key"),
        (SigningKey::es256(key!("ec_encrypted")), "it is encrypted: decrypt it"),
        (SigningKey::es256(key!("ec_sec1_encrypted")), "it is encrypted: decrypt it"),
        (SigningKey::rs256(key!("rsa1024")), "it is too short: RSA needs 2048 bits"),
        (
            SigningKey::rs256(ec),
            "it is for another algorithm, has no public key in it (openssl pkey adds it), or is damaged",
        ),
        (
            SigningKey::rs256(key!("ec_sec1")),
            "it is for another algorithm, has no public key in it (openssl pkey adds it), or is damaged",
        ),
        (
            SigningKey::es256(key!("rsa")),
            "it is for another algorithm, has no public key in it (openssl pkey adds it), or is damaged",
        ),
        (
            SigningKey::es256(key!("rsa_pkcs1")),
            "it is for another algorithm, has no public key in it (openssl pkey adds it), or is damaged",
        ),
        (
            SigningKey::es256(key!("p384_sec1")),
            "it is for another algorithm, has no public key in it (openssl pkey adds it), or is damaged",
        ),
        (
            SigningKey::ed_dsa(ec),
            "it is for another algorithm, has no public key in it (openssl pkey adds it), or is damaged",
        ),
        (SigningKey::ed_dsa(key!("openssh")), "it is in OpenSSH's form: convert it"),
        (
            SigningKey::es256("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"),
            "it is a certificate",
        ),
        (SigningKey::es256(&ec[..100]), "it is damaged, or has no line -----BEGIN PRIVATE KEY-----"),
        (
            SigningKey::es256(&ec.replace("MIGH", "MIGG")),
            "it is for another algorithm, has no public key in it (openssl pkey adds it), or is damaged",
        ),
        (SigningKey::es256(""), "it is damaged, or has no line -----BEGIN PRIVATE KEY-----"),
        (
            SigningKey::es256("/run/secrets/key.pem"),
            "it is damaged, or has no line -----BEGIN PRIVATE KEY-----",
        ),
        (SigningKey::es256("c2VjcmV0"), "it is damaged, or has no line -----BEGIN PRIVATE KEY-----"),
    ] {
        let client = ClientAuth::private_key_jwt("id", key.clone());
        let source =
            OAuth2::client_credentials(Server::token_endpoint("https://login.example/token"), client);
        let error = TokenProvider::builder(source.clone()).build().unwrap_err();
        assert!(
            error.to_string().ends_with(reason) || error.to_string().contains(&format!("{reason} (")),
            "{error}"
        );
        let shown = format!("{error:?} {source:?}");
        for secret in [ec, key!("rsa"), key!("rsa1024"), key!("ec_encrypted")] {
            assert!(!shown.contains(secret.lines().nth(1).unwrap()), "{shown}");
        }
        assert_eq!(signed(&Assertion::new(key)).await.unwrap_err().kind(), SourceErrorKind::Configuration);
    }
}

/// A server's clock is late, or it limits the window of an assertion: `exp` less `iat` is the lifetime.
#[tokio::test]
async fn window_is_lifetime() {
    let assertion = || Assertion::new(SigningKey::es256(key!("ec")));
    let (second, minute) = (Duration::from_secs(1), Duration::from_secs(60));
    for (assertion, lifetime, skew) in [
        (assertion(), 5 * minute, minute),
        (assertion().lifetime(60 * minute), 60 * minute, minute),
        (assertion().lifetime(minute), minute, minute / 2),
        (assertion().lifetime(2 * second), 2 * second, second),
        (assertion().lifetime(minute + second / 2).clock_skew(Duration::ZERO), minute, Duration::ZERO),
        (assertion().clock_skew(Duration::ZERO), 5 * minute, Duration::ZERO),
        (assertion().clock_skew(2 * minute), 5 * minute, 2 * minute),
        (assertion().clock_skew(Duration::MAX).lifetime(60 * minute), 60 * minute, 30 * minute),
    ] {
        let before = UNIX_EPOCH.elapsed().unwrap().as_secs();
        let token = assertion.fetch(&TokenRequest::new(RefreshReason::Missing)).await.unwrap();
        let after = UNIX_EPOCH.elapsed().unwrap().as_secs();
        let claims = claims(token.access_token());
        let (issued, expires) = (claims["iat"].as_u64().unwrap(), claims["exp"].as_u64().unwrap());
        assert_eq!(expires - issued, lifetime.as_secs());
        assert!((before..=after).contains(&(issued + skew.as_secs())), "{claims}");
        let left = token.remaining().unwrap();
        assert!(left <= lifetime - skew && left > lifetime - skew - second, "{left:?}");
    }
}

/// The options of an assertion hold for client authentication, too.
#[tokio::test]
async fn client_assertion_has_its_options() {
    let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let client = TokenClient::with_service(tower::service_fn({
        let seen = std::sync::Arc::clone(&seen);
        move |request: Request<String>| {
            let form: Vec<(String, String)> =
                form_urlencoded::parse(request.body().as_bytes()).into_owned().collect();
            seen.lock().unwrap().extend(form.into_iter().filter(|(name, _)| name == "client_assertion"));
            async { Ok::<_, BoxError>(Response::new(r#"{"access_token":"a"}"#.to_owned())) }
        }
    }));
    let auth = || ClientAuth::private_key_jwt("id", SigningKey::es256(key!("ec")));
    let changed = |assertion: Assertion| {
        assertion.audience("other").lifetime(Duration::from_secs(60)).clock_skew(Duration::ZERO)
    };
    for auth in [auth(), auth().assertion(changed)] {
        let server = Server::token_endpoint("https://login.example/token");
        let source = OAuth2::client_credentials(server, auth).with_client(client.clone());
        source.fetch(&TokenRequest::new(RefreshReason::Missing)).await.unwrap();
    }
    let [first, second] = [0, 1].map(|number| claims(&seen.lock().unwrap()[number].1));
    let window = |claims: &Value| claims["exp"].as_u64().unwrap() - claims["iat"].as_u64().unwrap();
    assert_eq!((&first["aud"], window(&first)), (&"https://login.example/token".into(), 300));
    assert_eq!((&second["aud"], window(&second)), (&"other".into(), 60));
    assert_eq!((&second["iss"], &second["sub"]), (&"id".into(), &"id".into()));
}
