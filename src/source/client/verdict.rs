//! [`Verdict`]: what the failed response of a token endpoint says of the grant, and of the refresh token in it.

use http::{HeaderMap, StatusCode, header::CONTENT_TYPE};

use crate::error::{Facts, Fate, Seconds, SourceError, SourceErrorKind};
use crate::retry_after::retry_after;

/// What a response says.
#[derive(Clone, Copy, Debug)]
struct Verdict {
    kind: SourceErrorKind,
    /// What became of the refresh token in the request, if there was one.
    fate: Fate,
    /// The code in the response, if it is a known one, and what to check.
    code: Option<(&'static str, &'static str)>,
}

/// What is known of the body of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// A JSON object or a form.
    Fields {
        /// The [`stated_code`](super::stated_code::stated_code).
        code: Option<&'static str>,
        /// Whether it says that there is an error, perhaps without a known code.
        has_error: bool,
        has_token: bool,
    },
    Empty,
    /// Something else, such as the page of a firewall, or it was not complete.
    Other,
    /// It is not known.
    Unread,
}

/// The error codes that say more than the status: those of RFC 6749 §4.1.2.1 and §5.2, RFC 6750 §3.1, RFC 8628 §3.5,
/// RFC 8707 §2, RFC 9449 §5 and §8, OpenID Connect Core §3.1.2.6, and of large servers.
const CODES: [(&str, SourceErrorKind, Fate, &str); 27] = {
    use Fate::{Doubtful, Rejected, Unclear, Unspent};
    use SourceErrorKind::{Configuration, LoginRequired, Rejected as Refused, Unavailable};

    const GRANT: &str = "the grant is not valid, has expired, or was revoked";
    const CLIENT: &str =
        "check the client's id and its secret; of an assertion, the key, the audience and the clock";
    const DPOP: &str = "the server asks for DPoP, which this source does not have";
    const LOGIN: &str = "a user has to log in again";
    const REQUEST: &str = "check the options, and the subject token of an exchange";

    [
        ("invalid_grant", Refused, Rejected, GRANT),
        ("invalid_token", Refused, Rejected, GRANT),
        ("bad_refresh_token", Refused, Rejected, GRANT),
        ("invalid_refresh_token", Refused, Rejected, GRANT),
        ("refresh_token_expired", Refused, Rejected, GRANT),
        ("expired_token", LoginRequired, Rejected, LOGIN),
        ("invalid_client", Refused, Unspent, CLIENT),
        ("unauthorized_client", Refused, Unspent, "the client may not use this grant"),
        ("deleted_client", Refused, Unspent, CLIENT),
        ("disabled_client", Refused, Unspent, CLIENT),
        ("incorrect_client_credentials", Refused, Unspent, CLIENT),
        ("access_denied", Refused, Doubtful, "the grant was denied"),
        ("invalid_request", Configuration, Doubtful, REQUEST),
        ("interaction_required", LoginRequired, Doubtful, LOGIN),
        ("login_required", LoginRequired, Doubtful, LOGIN),
        ("account_selection_required", LoginRequired, Doubtful, LOGIN),
        ("consent_required", LoginRequired, Doubtful, "a user has to log in again, and to consent"),
        ("unmet_authentication_requirements", LoginRequired, Doubtful, "a user has to log in more strongly"),
        ("invalid_scope", Configuration, Unspent, "check the scopes"),
        ("invalid_target", Configuration, Unspent, "check the resources and the audience"),
        ("unsupported_grant_type", Configuration, Unspent, "the server does not offer this grant"),
        ("invalid_dpop_proof", Configuration, Unspent, DPOP),
        ("use_dpop_nonce", Configuration, Unspent, DPOP),
        ("temporarily_unavailable", Unavailable, Unspent, "the server cannot respond now"),
        ("server_error", Unavailable, Unclear, "the server has failed"),
        ("slow_down", Unavailable, Unspent, "the server asks for fewer requests"),
        ("authorization_pending", Unavailable, Unspent, "a user has to confirm first"),
    ]
};

/// Whether a server that responds with this status may be down. Anything may respond in its place then.
pub(super) fn is_outage(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 425 | 429 | 500..=599)
}

/// The known codes.
pub(super) fn codes() -> impl Iterator<Item = &'static str> {
    CODES.into_iter().map(|(code, ..)| code)
}

/// Returns the content type as an error shows it: only one that is known, because the header may quote the request.
pub(super) fn content_type(headers: &HeaderMap) -> &'static str {
    const KNOWN: [&str; 9] = [
        "application/json",
        "application/problem+json",
        "application/x-www-form-urlencoded",
        "application/xhtml+xml",
        "application/xml",
        "text/html",
        "text/json",
        "text/plain",
        "text/xml",
    ];

    let Some(value) = headers.get(CONTENT_TYPE) else { return "no content type" };
    let essence = value.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim();
    let known = KNOWN.into_iter().find(|known| essence.eq_ignore_ascii_case(known));
    known.unwrap_or("another content type")
}

/// Whether the content type is that of a page, such as a firewall's.
pub(super) fn is_page(headers: &HeaderMap) -> bool {
    let content_type = content_type(headers);
    content_type.ends_with("ml") || content_type == "text/plain"
}

impl Verdict {
    fn new(kind: SourceErrorKind, fate: Fate) -> Self {
        Self { kind, fate, code: None }
    }

    /// Every rule about the answer to a grant is here. The first one that matches counts.
    fn of(status: StatusCode, content: Content, asks_for_delay: bool, is_firewall: bool) -> Self {
        use Fate::{Doubtful, Rejected, Unclear, Unspent};
        use SourceErrorKind::{Configuration, InvalidResponse, Rejected as Refused, Unavailable};

        let (code, has_error, has_token) = match content {
            Content::Fields { code, has_error, has_token } => (code, has_error, has_token),
            _ => (None, false, false),
        };
        let known = CODES.into_iter().find(|(name, ..)| Some(*name) == code);
        let known = known.map(|(name, kind, fate, hint)| Self { kind, fate, code: Some((name, hint)) });
        let is_fields = matches!(content, Content::Fields { .. });
        let verdict = match (status.as_u16(), known) {
            _ if is_firewall => Self::new(InvalidResponse, Unclear),
            (_, Some(Self { fate: Rejected, .. })) if is_outage(status) => Self::new(Unavailable, Rejected),
            (408 | 425 | 429, _) => Self::new(Unavailable, Unspent),
            (500..=599, _) => Self::new(Unavailable, Unclear),
            // The user may not use this client (RFC 6749 §5.2 has 400 for the client itself).
            (403, Some(known)) if code == Some("unauthorized_client") => Self { fate: Doubtful, ..known },
            (_, Some(known)) => known,
            (400..=499, _) if asks_for_delay => Self::new(Unavailable, Unspent),
            (404 | 405 | 410 | 415, _) if is_fields => Self::new(Configuration, Doubtful),
            (300..=399 | 404 | 405 | 410 | 415, _) => Self::new(Configuration, Unspent),
            (400..=499, _) if is_fields => Self::new(Refused, Doubtful),
            (400 | 401 | 403, _) if content != Content::Other => Self::new(Refused, Doubtful),
            (200..=299, _) if has_error => Self::new(Refused, Doubtful),
            _ => Self::new(InvalidResponse, Unclear),
        };
        // With a token beside the error, the grant may have been processed.
        if has_token { Self::new(InvalidResponse, Unclear) } else { verdict }
    }
}

impl SourceError {
    /// Makes the error for a response of a token endpoint whose status is not a success.
    ///
    /// The kind is the one that [`TokenClient`](crate::TokenClient#what-a-response-means) has for the status. A 400, 401 or 403
    /// counts as one with JSON, unless its `Content-Type` is HTML, XML or plain text, as that of a firewall's page.
    ///
    /// If a refresh token was presented, a rejection is doubtful, since the body is not known
    /// ([`TokenSource::fetch`](crate::TokenSource::fetch)). A [`TokenClient`](crate::TokenClient) reads it.
    ///
    /// `Retry-After` has seconds or an HTTP date (RFC 9110 §10.2.3); any other value is ignored. The message has the
    /// status, and nothing of `headers`.
    ///
    /// ```
    /// use std::time::Duration;
    /// use http::{Response, header::RETRY_AFTER};
    /// use tower_bearer::SourceError;
    ///
    /// let response = Response::builder().status(429).header(RETRY_AFTER, "7").body(())?;
    /// let error = SourceError::from_status(response.status(), response.headers());
    /// assert!(error.is_transient());
    /// assert_eq!(error.retry_after(), Some(Duration::from_secs(7)));
    /// assert_eq!(error.to_string(), "the token endpoint responded with HTTP 429, and asks to wait 7s");
    /// # Ok::<(), http::Error>(())
    /// ```
    pub fn from_status(status: StatusCode, headers: &HeaderMap) -> Self {
        let content = if is_page(headers) { Content::Other } else { Content::Unread };
        Self::of_response(status, headers, content, "the token endpoint", "its URL")
    }

    /// As [`from_status`](Self::from_status), with what is known of the body, the name of the endpoint, and that of the
    /// option that sets its URL.
    pub(super) fn of_response(
        status: StatusCode,
        headers: &HeaderMap,
        content: Content,
        endpoint: &str,
        option: &str,
    ) -> Self {
        use SourceErrorKind::{Configuration, InvalidResponse, LoginRequired, Rejected, Unavailable};

        let asked_for = retry_after(headers);
        // AWS WAF has responded, with any status.
        let is_firewall = headers.contains_key("x-amzn-waf-action");
        let Verdict { kind, fate, code: known } =
            Verdict::of(status, content, asked_for.is_some(), is_firewall);
        let code = status.as_u16();
        let responded = format!("{endpoint} responded with HTTP {code}");
        let message = match (kind, known) {
            (_, Some((name, hint))) => format!("{responded} {name}: {hint}"),
            (Rejected, _) if content == Content::Empty => {
                format!("{endpoint} rejected the request (HTTP {code}), without a reason")
            }
            (Rejected | LoginRequired, _) => format!("{endpoint} rejected the credential (HTTP {code})"),
            (Configuration, _) if status.is_redirection() => format!(
                "{endpoint} responded with a redirect (HTTP {code}), which is not followed: set {option} to the final URL"
            ),
            (Configuration, _) => {
                format!("{endpoint} does not take this request (HTTP {code}): check {option}")
            }
            (Unavailable, _) => match asked_for {
                Some(delay) => format!("{responded}, and asks to wait {}", Seconds(delay)),
                None => responded,
            },
            (InvalidResponse, _) => {
                let hint = match (code, content) {
                    (200..=299, Content::Fields { .. }) => ", with an error and an access token",
                    (200..=299, _) => ", which is not a token response in JSON",
                    (400 | 401 | 403, _) => {
                        ", not with JSON: perhaps a proxy or a firewall, else check the credential"
                    }
                    _ => "",
                };
                format!("{responded} and {}{hint}", content_type(headers))
            }
        };
        let retry_after = asked_for.filter(|_| kind == Unavailable);
        // These may come from a gateway, or after the request was processed.
        let is_answer = !status.is_redirection() && !matches!(code, 500 | 502 | 504);
        let facts = Facts { is_answer, fate: Some(fate), ..Facts::default() };
        let error = Self::new(kind, message).with_facts(facts);
        retry_after.into_iter().fold(error, Self::with_retry_after)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn from_status(code: u16, headers: &[(http::HeaderName, &str)]) -> SourceError {
        let headers = headers.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect();
        SourceError::from_status(StatusCode::from_u16(code).unwrap(), &headers)
    }

    /// The status of a response decides the kind of the error, and its delay.
    #[test]
    fn status_decides_kind_and_delay() {
        use SourceErrorKind::{Configuration, InvalidResponse, Rejected, Unavailable};

        for code in 100..=999 {
            let kind = match code {
                400 | 401 | 403 => Rejected,
                404 | 405 | 410 | 415 => Configuration,
                408 | 425 | 429 => Unavailable,
                _ => match code / 100 {
                    3 => Configuration,
                    5 => Unavailable,
                    _ => InvalidResponse,
                },
            };
            let error = from_status(code, &[]);
            assert_eq!((error.kind(), error.retry_after()), (kind, None), "{code}");
            assert!(error.to_string().contains(&format!("HTTP {code}")), "{error}");

            // A server that asks for a delay will respond otherwise.
            let error = from_status(code, &[(http::header::RETRY_AFTER, "7")]);
            let asks = matches!(code, 400..=599);
            assert_eq!(error.kind(), if asks { Unavailable } else { kind }, "{code}");
            assert_eq!(error.retry_after(), asks.then_some(Duration::from_secs(7)), "{code}");
        }
    }

    /// A firewall responds in place of the token endpoint, with a page: that says nothing about the credential.
    #[test]
    fn page_is_no_verdict() {
        for (content_type, shown) in [
            ("text/html; charset=utf-8", Some("text/html")),
            ("Application/XHTML+xml", Some("application/xhtml+xml")),
            ("text/xml", Some("text/xml")),
            ("text/plain;charset=utf-8", Some("text/plain")),
            ("application/json", None),
            ("canary/canary", None),
        ] {
            for code in [400, 401, 403] {
                let error = from_status(code, &[(http::header::CONTENT_TYPE, content_type)]);
                let expected = format!("HTTP {code} and {}", shown.unwrap_or_default());
                assert_eq!(error.is_transient(), shown.is_some(), "{content_type}");
                assert!(shown.is_none() || error.to_string().contains(&expected), "{error}");
                assert!(!error.to_string().contains("canary"), "{error}");
            }
        }
    }
}
