//! [`ClientAuth`]: how the client authenticates to the authorization server.

use base64::{Engine, prelude::BASE64_STANDARD};
use form_urlencoded::byte_serialize;
use http::HeaderValue;
use secrecy::{ExposeSecret, SecretString, zeroize::Zeroizing};

#[cfg(feature = "oauth2-jwt")]
use super::assertion::{Assertion, SigningKey};
use super::{super::check_text, form::Form};
use crate::error::SourceError;

/// How a client authenticates to an authorization server (RFC 6749 §2.3).
///
/// `Debug` shows the client's id and the method, and no secret.
#[derive(Clone, Debug)]
pub struct ClientAuth {
    pub(super) id: String,
    method: Method,
}

#[derive(Clone, Debug)]
enum Method {
    None,
    Public,
    Basic {
        secret: SecretString,
        is_encoded: bool,
    },
    Post(SecretString),
    #[cfg(feature = "oauth2-jwt")]
    PrivateKeyJwt(Assertion),
}

impl ClientAuth {
    /// Sends nothing about the client, as RFC 7523 §2.1 allows: the assertion or the subject token identifies it.
    pub fn none() -> Self {
        Self { id: String::new(), method: Method::None }
    }

    /// Sends the id of a public client, which has no secret (`client_id` in the body, RFC 6749 §3.2.1).
    pub fn public(id: impl Into<String>) -> Self {
        Self { id: id.into(), method: Method::Public }
    }

    /// Sends id and secret in the `Authorization` header, both form-encoded (`client_secret_basic`, RFC 6749 §2.3.1).
    pub fn basic(id: impl Into<String>, secret: impl Into<String>) -> Self {
        Self { id: id.into(), method: Method::Basic { secret: secret.into().into(), is_encoded: true } }
    }

    /// Sends id and secret as [`basic`](Self::basic) does, but not form-encoded, for servers that do not decode them.
    ///
    /// It only makes a difference if one of them has a character other than `A-Z a-z 0-9 * - . _`.
    pub fn basic_raw(id: impl Into<String>, secret: impl Into<String>) -> Self {
        Self { id: id.into(), method: Method::Basic { secret: secret.into().into(), is_encoded: false } }
    }

    /// Sends id and secret in the body (`client_secret_post`, RFC 6749 §2.3.1).
    pub fn post(id: impl Into<String>, secret: impl Into<String>) -> Self {
        Self { id: id.into(), method: Method::Post(secret.into().into()) }
    }

    /// Sends an assertion that is signed with the client's key (`private_key_jwt`, RFC 7523 §2.2). Each request has a new
    /// one.
    ///
    /// Its audience is the issuer, if the [`Server`](super::Server) was made from it, else the URL of the token endpoint.
    #[cfg(feature = "oauth2-jwt")]
    #[cfg_attr(docsrs, doc(cfg(feature = "oauth2-jwt")))]
    pub fn private_key_jwt(id: impl Into<String>, key: SigningKey) -> Self {
        let id = id.into();
        let assertion = Assertion::new(key).issuer(id.clone()).subject(id.clone());
        Self { id, method: Method::PrivateKeyJwt(assertion) }
    }

    /// Changes the assertion that [`private_key_jwt`](Self::private_key_jwt) sends, such as its audience, its lifetime or
    /// its clock skew. It has no effect on the other methods.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_bearer::oauth2::{ClientAuth, SigningKey};
    /// # let pem = "";
    /// let client = ClientAuth::private_key_jwt("your-client-id", SigningKey::es256(pem))
    ///     .assertion(|assertion| assertion.audience("https://login.example.com").lifetime(Duration::from_secs(60)));
    /// ```
    #[cfg(feature = "oauth2-jwt")]
    #[cfg_attr(docsrs, doc(cfg(feature = "oauth2-jwt")))]
    pub fn assertion(mut self, change: impl FnOnce(Assertion) -> Assertion) -> Self {
        if let Method::PrivateKeyJwt(assertion) = &mut self.method {
            *assertion = change(assertion.clone());
        }
        self
    }

    /// Replaces the secret, if the method has one.
    pub(super) fn set_secret(&mut self, new: String) {
        match &mut self.method {
            Method::Basic { secret, .. } | Method::Post(secret) => *secret = new.into(),
            _ => {}
        }
    }

    /// Whether the body has the client's id.
    pub(super) fn sends_id(&self) -> bool {
        !matches!(self.method, Method::None | Method::Basic { .. })
    }

    pub(super) fn validate(&self) -> Result<(), SourceError> {
        let invalid = |what: &'static str| Err(SourceError::configuration(what));
        if self.id.is_empty() && !matches!(self.method, Method::None) {
            return invalid("the client id must not be empty");
        }
        check_text("the client id", &self.id)?;
        if let Method::Basic { secret, .. } | Method::Post(secret) = &self.method {
            if secret.expose_secret().is_empty() {
                return invalid("the client secret must not be empty");
            }
            check_text("the client secret", secret.expose_secret())?;
        }
        match &self.method {
            Method::Basic { is_encoded: false, .. } if self.id.contains(':') => {
                invalid("the client id must not have a colon unless it is form-encoded")
            }
            Method::None | Method::Public | Method::Basic { .. } | Method::Post(_) => Ok(()),
            #[cfg(feature = "oauth2-jwt")]
            Method::PrivateKeyJwt(assertion) => assertion.check(),
        }
    }

    /// Adds the authentication to a request: fields to its form, or the value of its `Authorization` header. `audience`
    /// is the default one of an assertion.
    pub(super) fn add_to(&self, form: &mut Form, audience: &str) -> Result<Option<HeaderValue>, SourceError> {
        match &self.method {
            Method::None => {}
            Method::Public => form.add("client_id", &self.id),
            Method::Basic { secret, is_encoded } => {
                return basic(&self.id, secret.expose_secret(), *is_encoded).map(Some);
            }
            Method::Post(secret) => {
                form.add("client_id", &self.id);
                form.add("client_secret", secret.expose_secret());
            }
            #[cfg(feature = "oauth2-jwt")]
            Method::PrivateKeyJwt(assertion) => {
                let signed = assertion.sign(Some(audience))?;
                form.add("client_id", &self.id);
                form.add("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer");
                form.add("client_assertion", &signed);
            }
        }
        let _ = audience;
        Ok(None)
    }
}

fn basic(id: &str, secret: &str, is_encoded: bool) -> Result<HeaderValue, SourceError> {
    let encoded = |text: &str| match is_encoded {
        true => byte_serialize(text.as_bytes()).collect(),
        false => text.to_owned(),
    };
    let pair = Zeroizing::new(format!("{}:{}", encoded(id), *Zeroizing::new(encoded(secret))));
    let value = Zeroizing::new(format!("Basic {}", BASE64_STANDARD.encode(pair.as_bytes())));
    // Base64 is always a valid header value.
    let mut header = HeaderValue::from_str(&value)
        .map_err(|_| SourceError::configuration("the client secret cannot be sent in a header"))?;
    header.set_sensitive(true);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(auth: &ClientAuth) -> String {
        let header = auth.add_to(&mut Form::default(), "").unwrap().unwrap();
        assert!(header.is_sensitive());
        let decoded = BASE64_STANDARD.decode(header.to_str().unwrap().strip_prefix("Basic ").unwrap());
        String::from_utf8(decoded.unwrap()).unwrap()
    }

    /// A client id or secret has characters that Basic authentication form-encodes (RFC 6749 §2.3.1), and the server
    /// expects them raw.
    #[test]
    fn basic_is_form_encoded_unless_raw() {
        assert_eq!(header(&ClientAuth::basic("a:b", "p%q r+é")), "a%3Ab:p%25q+r%2B%C3%A9");
        assert_eq!(header(&ClientAuth::basic_raw("a", "p%q r:+")), "a:p%q r:+");
    }

    /// A client id or secret is not valid: the error does not show it.
    #[test]
    fn invalid_client_error_shows_no_secret() {
        for (auth, expected) in [
            (ClientAuth::public(""), "the client id must not be empty"),
            (ClientAuth::basic("", "canary"), "the client id must not be empty"),
            (ClientAuth::post("id", ""), "the client secret must not be empty"),
            (ClientAuth::basic_raw("a:b", "canary"), "the client id must not have a colon"),
        ] {
            let error = auth.validate().unwrap_err();
            assert!(error.to_string().starts_with(expected), "{error}");
            assert!(!format!("{error:?} {auth:?}").contains("canary"));
        }
        assert!(ClientAuth::none().validate().is_ok());
    }
}
