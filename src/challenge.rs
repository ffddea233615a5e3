//! Which response is a challenge: a request for another token.

use std::{fmt, sync::Arc, time::Duration};

use http::header::{HeaderValue, WWW_AUTHENTICATE};
use http::{Extensions, HeaderMap, Response, StatusCode, Version};

use crate::www_authenticate::bearer_challenges;

/// The head of a response, as a challenge predicate sees it.
///
/// Nothing of the body is read to decide. A gRPC status is in the head as well if the response has trailers only.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ResponseHead<'a> {
    /// The status.
    pub status: StatusCode,
    /// The HTTP version.
    pub version: Version,
    /// The header fields.
    pub headers: &'a HeaderMap,
    /// The extensions, which layers beneath may have added.
    pub extensions: &'a Extensions,
}

impl<'a> ResponseHead<'a> {
    pub(crate) fn of<B>(response: &'a Response<B>) -> Self {
        Self {
            status: response.status(),
            version: response.version(),
            headers: response.headers(),
            extensions: response.extensions(),
        }
    }
}

/// The default rule, for HTTP: a 401, unless it says that another token would not help.
///
/// A 401 with `WWW-Authenticate: Bearer` whose `error` is `insufficient_scope` or `invalid_request` is no challenge
/// (RFC 6750 §3.1). Without such an error a 401 is a challenge. No other status is.
///
/// ```
/// use http::{Response, header::WWW_AUTHENTICATE};
/// use tower_bearer::{BearerAuthLayer, StaticToken, TokenProvider, challenge};
///
/// // An API that answers 403 for an expired token, with a header of its own:
/// let layer = BearerAuthLayer::with_provider(TokenProvider::new(StaticToken::new("eyJ0eXAi")))
///     .challenge(|head| challenge::bearer(head) || head.headers.contains_key("x-token-expired"));
/// ```
pub fn bearer(head: ResponseHead<'_>) -> bool {
    head.status == StatusCode::UNAUTHORIZED
        && !head.headers.get_all(WWW_AUTHENTICATE).iter().any(another_token_would_not_help)
}

/// The rule for gRPC: `grpc-status: 16` (UNAUTHENTICATED) in the head of a 200, or what [`bearer`] says.
///
/// ([gRPC over HTTP/2](https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md), "Trailers-Only".)
pub fn grpc(head: ResponseHead<'_>) -> bool {
    head.headers.get("grpc-status").is_some_and(|status| status == "16") || bearer(head)
}

fn another_token_would_not_help(value: &HeaderValue) -> bool {
    bearer_challenges(value.as_bytes()).iter().flatten().any(|(name, value)| {
        name == "error" && matches!(value.as_str(), "insufficient_scope" | "invalid_request")
    })
}

/// The parameters of a Bearer challenge: what a 401's `WWW-Authenticate` header asks for (RFC 6750 §3).
///
/// A source reads them with [`TokenRequest::challenge`](crate::TokenRequest::challenge), to obtain a token that the API
/// accepts. An API asks in this way for further claims (`error="insufficient_claims"`, `claims`: Microsoft's continuous
/// access evaluation) or for a stronger or newer authentication (`error="insufficient_user_authentication"`,
/// `acr_values`, `max_age`: RFC 9470 §3).
///
/// `Debug` shows the names of the parameters, without their values: they are the API's text.
///
/// ```
/// use http::{HeaderMap, HeaderValue, header::WWW_AUTHENTICATE};
/// use tower_bearer::challenge::Challenge;
///
/// let mut headers = HeaderMap::new();
/// let value = r#"Bearer error="insufficient_user_authentication", acr_values="myACR", max_age=5"#;
/// headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static(value));
/// let challenge = Challenge::from_headers(&headers).unwrap();
/// assert_eq!(challenge.acr_values(), Some("myACR"));
/// assert_eq!(challenge.max_age(), Some(std::time::Duration::from_secs(5)));
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Challenge {
    /// Names in lower case, values without their quotes. Shared: a challenge is cloned for its refresh.
    params: Arc<[(String, String)]>,
}

impl Challenge {
    /// The longest challenge that is read: the sum of its names and values, in bytes. A longer one counts as absent.
    pub const MAX_LEN: usize = 16 * 1024;

    /// Reads the Bearer challenge of a response's headers.
    ///
    /// Of several, the first with an `error` counts, else the first. `None` if there is none with parameters. What breaks
    /// the grammar of the field (RFC 9110 §11.6.1) before or after the challenge does not matter.
    pub fn from_headers(headers: &HeaderMap) -> Option<Self> {
        let mut found: Option<Self> = None;
        let fields = headers.get_all(WWW_AUTHENTICATE).iter();
        for params in fields.flat_map(|field| bearer_challenges(field.as_bytes())) {
            let length: usize = params.iter().map(|(name, value)| name.len() + value.len()).sum();
            if length == 0 || length > Self::MAX_LEN {
                continue;
            }
            let challenge = Self { params: params.into() };
            if challenge.error().is_some() {
                return Some(challenge);
            }
            found = found.or(Some(challenge));
        }
        found
    }

    /// The parameter of this name, compared without regard to case.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        let named = |(key, _): &&(String, String)| key.eq_ignore_ascii_case(name);
        self.params.iter().find(named).map(|(_, value)| value.as_str())
    }

    /// `error`: why the API challenged the request (RFC 6750 §3.1, RFC 9470 §3).
    pub fn error(&self) -> Option<&str> {
        self.parameter("error")
    }

    /// `scope`: the scopes that the request needs, separated by spaces (RFC 6750 §3).
    pub fn scope(&self) -> Option<&str> {
        self.parameter("scope")
    }

    /// `claims`: the claims to ask the token endpoint for, as the API encodes them (Microsoft: base64 of JSON).
    pub fn claims(&self) -> Option<&str> {
        self.parameter("claims")
    }

    /// `acr_values`: the authentication context classes that the API accepts, separated by spaces (RFC 9470 §3).
    pub fn acr_values(&self) -> Option<&str> {
        self.parameter("acr_values")
    }

    /// `max_age`: how long ago the user may have authenticated, in whole seconds (RFC 9470 §3). `None` if it is not
    /// a number.
    pub fn max_age(&self) -> Option<Duration> {
        let digits = self.parameter("max_age")?;
        // `parse` would accept a sign.
        let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
        digits.parse().ok().filter(|_| is_number).map(Duration::from_secs)
    }
}

impl fmt::Debug for Challenge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.params.iter().map(|(name, _)| name)).finish()
    }
}

/// Which rule a layer follows.
#[derive(Clone)]
pub(crate) enum ChallengeRule {
    Bearer,
    Custom(Arc<dyn Fn(ResponseHead<'_>) -> bool + Send + Sync>),
}

impl ChallengeRule {
    #[inline]
    pub(crate) fn matches<B>(&self, response: &Response<B>) -> bool {
        match self {
            Self::Bearer => {
                response.status() == StatusCode::UNAUTHORIZED && bearer(ResponseHead::of(response))
            }
            Self::Custom(predicate) => predicate(ResponseHead::of(response)),
        }
    }
}

impl fmt::Debug for ChallengeRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bearer => "Bearer",
            Self::Custom(_) => "Custom",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(status: u16, headers: &[(&str, &str)]) -> Response<()> {
        let builder = Response::builder().status(status);
        headers.iter().fold(builder, |builder, (name, value)| builder.header(*name, *value)).body(()).unwrap()
    }

    fn is_challenge(status: u16, www_authenticate: &[&str]) -> bool {
        let headers: Vec<_> = www_authenticate.iter().map(|value| ("www-authenticate", *value)).collect();
        bearer(ResponseHead::of(&response(status, &headers)))
    }

    /// The API responds with a status other than 401.
    #[test]
    fn only_a_401_is_a_challenge() {
        assert!(is_challenge(401, &[]));
        for status in [200, 302, 400, 402, 403, 407, 419, 440, 498, 500, 511] {
            assert!(!is_challenge(status, &[]), "{status}");
            assert!(!is_challenge(status, &["Bearer error=\"invalid_token\""]), "{status}");
        }
    }

    /// A 401 says `insufficient_scope`, which another token does not change.
    #[test]
    fn insufficient_scope_is_no_challenge() {
        for answer in [
            &["Bearer error=\"insufficient_scope\""][..],
            &["bearer realm=\"a, b\", ERROR=insufficient_scope, scope=\"x\""],
            &["Bearer error=\"invalid_request\""],
            &["Basic realm=\"x\", Bearer realm=\"y\", error=\"insufficient_scope\""],
            &["Basic realm=\"x\"", "Bearer error=\"insufficient_scope\""],
            &["Bearer error=\"insufficient\\_scope\""],
        ] {
            assert!(!is_challenge(401, answer), "{answer:?}");
        }
        for challenge in [
            &["Bearer"][..],
            &["Bearer realm=\"x\""],
            &["Bearer error=\"invalid_token\", error_description=\"insufficient_scope\""],
            &["Basic realm=\"x\", error=\"insufficient_scope\""],
            &["Bearer realm=\"error=insufficient_scope\""],
            &[""],
            &["\"unterminated"],
            &["Bearer error=\"é"],
        ] {
            assert!(is_challenge(401, challenge), "{challenge:?}");
        }
    }

    /// A 401 has several challenges.
    #[test]
    fn parameters_are_those_of_the_bearer_challenge_with_an_error() {
        let read = |values: &[&str]| {
            let headers: Vec<_> = values.iter().map(|value| ("www-authenticate", *value)).collect();
            Challenge::from_headers(response(401, &headers).headers())
        };
        let found = read(&[
            "Basic realm=\"error\", Bearer realm=\"a\"",
            "bearer ERROR=\"insufficient_claims\", claims=\"eyJ\\\"x==\", scope=\"a b\"",
        ]);
        let found = found.unwrap();
        assert_eq!(found.error(), Some("insufficient_claims"));
        assert_eq!(found.claims(), Some("eyJ\"x=="));
        assert_eq!(found.scope(), Some("a b"));
        assert_eq!(found.parameter("Realm"), None);
        assert_eq!(read(&["Bearer realm=\"a\""]).unwrap().parameter("REALM"), Some("a"));
        assert!(!format!("{found:?}").contains("eyJ"));

        assert_eq!(read(&["Bearer max_age=5"]).unwrap().max_age(), Some(Duration::from_secs(5)));
        for wrong in
            ["Bearer max_age=soon", "Bearer max_age=+5", "Bearer max_age=\"-5\"", "Bearer max_age=\"\""]
        {
            assert_eq!(read(&[wrong]).unwrap().max_age(), None, "{wrong}");
        }
        let long = format!("Bearer error=\"{}\"", "a".repeat(Challenge::MAX_LEN));
        for none in [&[][..], &["Bearer"], &["Basic realm=\"x\""], &["Bearer error"], &[""], &[&long]] {
            assert_eq!(read(none), None, "{none:?}");
        }
    }

    /// A gRPC service reports an invalid token in `grpc-status`.
    #[test]
    fn grpc_status_16_is_challenge() {
        let is_challenge = |status, headers: &[_]| grpc(ResponseHead::of(&response(status, headers)));
        assert!(is_challenge(200, &[("grpc-status", "16")]));
        assert!(is_challenge(401, &[]));
        for status in ["0", "7", "14", "160"] {
            assert!(!is_challenge(200, &[("grpc-status", status)]), "{status}");
        }
        assert!(!is_challenge(200, &[]));
    }
}
