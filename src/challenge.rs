//! Which response is a challenge: a request for another token.

use std::{fmt, sync::Arc};

use http::{
    Extensions, HeaderMap, Response, StatusCode, Version,
    header::{HeaderValue, WWW_AUTHENTICATE},
};
use http_auth::ChallengeParser;

/// The head of a response, as a challenge predicate sees it.
///
/// Only the head: nothing of the body is read to decide. gRPC's refusals are in the head too, in an answer of trailers
/// only.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ResponseHead<'a> {
    /// The status.
    pub status: StatusCode,
    /// The HTTP version.
    pub version: Version,
    /// The header fields.
    pub headers: &'a HeaderMap,
    /// What layers beneath have added.
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
/// A 401 with `WWW-Authenticate: Bearer` whose `error` is `insufficient_scope` or `invalid_request` is an answer
/// (RFC 6750 §3.1). Without the header, or with one that cannot be read, a 401 is a challenge. No other status is.
///
/// ```
/// use http::{Response, header::WWW_AUTHENTICATE};
/// use tower_bearer::{BearerAuthLayer, TokenProvider, challenge};
/// # use tower_bearer::{SourceError, Token, TokenSource};
/// # struct Vault;
/// # impl TokenSource for Vault {
/// #     async fn fetch(&self, _: Option<&Token>) -> Result<Token, SourceError> { Ok(Token::builder("a").build()?) }
/// # }
///
/// // An API that says 403 for an expired token, with a header of its own:
/// let layer = BearerAuthLayer::with_provider(TokenProvider::new(Vault))
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
    let Ok(text) = value.to_str() else { return false };
    // The parser yields what it can read, then one error: what follows is not ours to guess at.
    ChallengeParser::new(text).map_while(Result::ok).any(|challenge| {
        challenge.scheme.eq_ignore_ascii_case("bearer")
            && challenge.params.iter().any(|(name, value)| {
                name.eq_ignore_ascii_case("error")
                    && matches!(&*value.to_unescaped(), "insufficient_scope" | "invalid_request")
            })
    })
}

/// A rule, chosen.
#[derive(Clone)]
pub(crate) enum Challenge {
    Bearer,
    Custom(Arc<dyn Fn(ResponseHead<'_>) -> bool + Send + Sync>),
}

impl Challenge {
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

impl fmt::Debug for Challenge {
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

    #[test]
    fn only_a_401_is_a_challenge() {
        assert!(is_challenge(401, &[]));
        for status in [200, 302, 400, 402, 403, 407, 419, 440, 498, 500, 511] {
            assert!(!is_challenge(status, &[]), "{status}");
            assert!(!is_challenge(status, &["Bearer error=\"invalid_token\""]), "{status}");
        }
    }

    #[test]
    fn a_401_that_another_token_would_not_help_is_an_answer() {
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

    #[test]
    fn grpc_refuses_in_the_head_of_a_200() {
        let is_challenge = |status, headers: &[_]| grpc(ResponseHead::of(&response(status, headers)));
        assert!(is_challenge(200, &[("grpc-status", "16")]));
        assert!(is_challenge(401, &[]));
        for status in ["0", "7", "14", "160"] {
            assert!(!is_challenge(200, &[("grpc-status", status)]), "{status}");
        }
        assert!(!is_challenge(200, &[]));
    }
}
