//! The responses: JSON, problem documents, and the bodies that a fault breaks.

use std::{io, time::Duration};

use bytes::Bytes;
use http::{
    HeaderValue, Response, StatusCode,
    header::{CONTENT_LENGTH, CONTENT_TYPE, WWW_AUTHENTICATE},
};
use http_body_util::{BodyExt, Channel, Full, combinators::UnsyncBoxBody};
use serde_json::{Value, json};

use super::{
    authority::{Granted, Rate},
    oauth2::TokenError,
};
use crate::BoxError;

pub(super) type Body = UnsyncBoxBody<Bytes, BoxError>;

pub(super) fn token_response(granted: Granted) -> Response<Bytes> {
    // A whole number if possible, like api.video's.
    let expires_in = match granted.lifetime.subsec_nanos() {
        0 => json!(granted.lifetime.as_secs()),
        _ => json!(granted.lifetime.as_secs_f64()),
    };
    let mut body = json!({
        "token_type": "Bearer",
        "expires_in": expires_in,
        "access_token": granted.access_token,
    });
    if let Some(refresh_token) = granted.refresh_token {
        body["refresh_token"] = refresh_token.into();
    }
    if let Some(token_type) = granted.issued_token_type {
        body["issued_token_type"] = token_type.into();
    }
    answer(StatusCode::OK, &body)
}

/// The response to a token request that is rejected (RFC 6749 §5.2).
pub(super) fn token_error(error: &TokenError, authorized: bool) -> Response<Bytes> {
    let body = json!({ "error": error.code, "error_description": error.description });
    if error.code != "invalid_client" {
        return answer(StatusCode::BAD_REQUEST, &body);
    }
    let mut response = answer(StatusCode::UNAUTHORIZED, &body);
    if authorized {
        response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"token\""));
    }
    response
}

/// The response to a rejected key or refresh token, which is a 400.
pub(super) fn rejected_grant() -> Response<Bytes> {
    let kind = "https://docs.api.video/reference/authentication-invalid-user-credentials";
    problem_document(kind, StatusCode::BAD_REQUEST, "The user credentials were incorrect.", "")
}

/// The response to a challenged request. It has an error code only if the request had a token (RFC 6750 §3).
pub(super) fn challenged_token(had_token: bool) -> Response<Bytes> {
    let mut response = problem(StatusCode::UNAUTHORIZED, "The access token is missing, expired or revoked.");
    let challenge = if had_token { "Bearer error=\"invalid_token\"" } else { "Bearer" };
    response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
    response
}

pub(super) fn problem(status: StatusCode, title: &str) -> Response<Bytes> {
    problem_document("about:blank", status, title, "")
}

/// The response for a resource that does not exist. `name` is the parameter that has its ID.
pub(super) fn not_found(name: &str) -> Response<Bytes> {
    let kind = "https://docs.api.video/reference/resource-not-found";
    problem_document(kind, StatusCode::NOT_FOUND, "The requested resource was not found.", name)
}

/// The response to a request without a required attribute.
pub(super) fn required(name: &str) -> Response<Bytes> {
    let kind = "https://docs.api.video/reference/attribute-required";
    problem_document(kind, StatusCode::BAD_REQUEST, "This attribute is required.", name)
}

/// The response to a request with an attribute that has the wrong type or is out of its range.
pub(super) fn invalid(name: &str) -> Response<Bytes> {
    let kind = "https://docs.api.video/reference/invalid-attribute";
    problem_document(kind, StatusCode::BAD_REQUEST, "This attribute is not valid.", name)
}

fn problem_document(kind: &str, status: StatusCode, title: &str, name: &str) -> Response<Bytes> {
    answer_as(
        "application/problem+json",
        status,
        &json!({ "type": kind, "title": title, "name": name, "status": status.as_u16() }),
    )
}

pub(super) fn answer(status: StatusCode, body: &Value) -> Response<Bytes> {
    answer_as("application/json", status, body)
}

fn answer_as(content_type: &'static str, status: StatusCode, body: &Value) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Adds the headers of the rate limit. Those that a service has set remain.
pub(super) fn with_rate(mut response: Response<Body>, rate: &Rate) -> Response<Body> {
    let headers = response.headers_mut();
    headers.entry("x-ratelimit-limit").or_insert(rate.limit.into());
    headers.entry("x-ratelimit-remaining").or_insert(rate.remaining.into());
    // In whole seconds, rounded up.
    headers.entry("x-ratelimit-retry-after").or_insert((rate.retry_after.as_secs() + 1).into());
    response
}

pub(super) fn whole(body: Bytes) -> Body {
    Full::new(body).map_err(Into::into).boxed_unsync()
}

/// Replaces the body of a response. The head keeps the length of the original body.
pub(super) fn broken(response: Response<Bytes>, body: impl FnOnce(Bytes) -> Body) -> Response<Body> {
    let length = response.body().len();
    let mut response = response.map(body);
    response.headers_mut().insert(CONTENT_LENGTH, length.into());
    response
}

/// Returns the first half of the body, then an error that ends the connection.
pub(super) fn truncated(body: Bytes) -> Body {
    let (mut sender, channel) = Channel::<Bytes, BoxError>::new(2);
    let _ = sender.try_send(http_body::Frame::data(body.slice(..body.len() / 2)));
    sender.abort(io::Error::from(io::ErrorKind::ConnectionReset).into());
    channel.boxed_unsync()
}

/// Returns the body one byte at a time, with a pause before each.
pub(super) fn dripping(body: Bytes, pause: Duration) -> Body {
    let (mut sender, channel) = Channel::<Bytes, BoxError>::new(1);
    tokio::spawn(async move {
        for at in 0..body.len() {
            tokio::time::sleep(pause).await;
            if sender.send_data(body.slice(at..=at)).await.is_err() {
                return;
            }
        }
    });
    channel.boxed_unsync()
}
