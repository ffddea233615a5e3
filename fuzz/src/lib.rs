//! The fuzz targets: everything that the crate reads from an auth endpoint, an API or a store. They use the public API,
//! so that they test the code that programs run.
//!
//! ```text
//! cargo +nightly fuzz run token_response     # or retry_after, store_record, www_authenticate
//! cargo test --test suite fuzz_corpus        # the corpus and small mutations of it, on any compiler
//! ```

use std::{convert::Infallible, time::Duration};

use bytes::Bytes;
use http::{
    HeaderValue, Request, Response, StatusCode,
    header::{RETRY_AFTER, WWW_AUTHENTICATE},
};
use http_body_util::Full;
use tower::{Layer, ServiceExt};
use tower_bearer::{
    ApiVideo, BearerAuthLayer, RefreshReason, RetryPolicy, SourceError, SourceErrorKind, Token, TokenClient,
    TokenProvider, TokenRequest, TokenSource,
    challenge::Challenge,
    store::{Lease, Publication, Record, StoreError, StoreErrorKind, TokenStore},
};
use tower_bearer_store::{EncryptedStore, EncryptionKeys};

fn on_a_paused_clock<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.unwrap().block_on(future)
}

/// A source whose endpoint always responds with `answer`.
fn answered(answer: Response<Bytes>) -> ApiVideo {
    ApiVideo::new("key").with_client(TokenClient::with_service(tower::service_fn(
        move |_: Request<String>| {
            let answer = answer.clone().map(Full::new);
            async { Ok::<_, Infallible>(answer) }
        },
    )))
}

/// A token response gives a token, or an error that quotes nothing of it.
pub fn token_response(body: &[u8]) {
    let source = answered(Response::new(Bytes::copy_from_slice(body)));
    match on_a_paused_clock(source.fetch(&TokenRequest::new(RefreshReason::Missing))) {
        Ok(token) => usable(&token),
        Err(error) => {
            // An error beside no token may reject the key.
            assert!(error.is_transient() || error.kind() == SourceErrorKind::Rejected);
            quotes_nothing(body, &error);
        }
    }
}

fn usable(token: &Token) {
    let header = token.header_value();
    assert!(header.is_sensitive() && header.to_str().is_ok_and(|text| text.starts_with("Bearer ")));
    assert!(token.access_token().len() <= Token::MAX_LEN);
    assert!(token.remaining().is_some_and(|left| left <= Duration::from_secs(3650 * 24 * 3600)));
}

fn quotes_nothing(input: &[u8], error: &dyn std::fmt::Debug) {
    let shown = format!("{error:?}");
    // Longer than any text that a message of the crate has in common with the input.
    let quoted = input.windows(24).filter_map(|part| std::str::from_utf8(part).ok());
    assert!(!quoted.into_iter().any(|part| shown.contains(part)), "{shown}");
}

/// A store that contains one record and grants no lease.
#[derive(Clone)]
struct Holds(String);

impl TokenStore for Holds {
    fn namespace(&self) -> &str {
        "fuzz"
    }

    async fn load(&self) -> Result<Option<Record>, StoreError> {
        Ok(Some(Record::new(1, self.0.clone()).expires_in(Duration::from_secs(60))))
    }

    async fn lease(&self, _: Duration) -> Result<Option<Lease>, StoreError> {
        Ok(None)
    }

    async fn publish(&self, _: &Lease, _: Record) -> Result<Publication, StoreError> {
        Ok(Publication::Superseded)
    }

    async fn release(&self, _: Lease) -> Result<(), StoreError> {
        Ok(())
    }
}

/// A record gives a token or none. It is not a sealed record, because it was not sealed with the key.
pub fn store_record(text: &[u8]) {
    let store = Holds(String::from_utf8_lossy(text).into_owned());
    let retry = RetryPolicy::new().max_retries(0);
    on_a_paused_clock(async {
        match TokenProvider::reader(store.clone()).retry(retry).build().unwrap().token().await {
            Ok(token) => usable(&token),
            Err(error) => {
                assert!(error.is_transient());
                quotes_nothing(text, &error);
            }
        }
        let keys = EncryptionKeys::new("fuzz", &[7; 32]).unwrap();
        let error = EncryptedStore::new(store, keys).load().await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::InvalidRecord);
        quotes_nothing(text, &error);
    });
}

/// `Retry-After` gives a delay within bounds, or none.
pub fn retry_after(header: &[u8]) {
    let (first, second) = header.split_at(header.len() / 2);
    for (standard, other) in [(header, &b""[..]), (b"", header), (first, second)] {
        let mut answer = Response::new(Bytes::new());
        *answer.status_mut() = StatusCode::TOO_MANY_REQUESTS;
        if let Ok(value) = HeaderValue::from_bytes(standard) {
            answer.headers_mut().insert(RETRY_AFTER, value);
        }
        if let Ok(value) = HeaderValue::from_bytes(other) {
            answer.headers_mut().insert("x-ratelimit-retry-after", value);
        }
        let retry = RetryPolicy::new().max_retries(0);
        let provider = TokenProvider::builder(answered(answer)).retry(retry).build().unwrap();
        let left_alone = on_a_paused_clock(async {
            assert!(provider.token().await.is_err_and(|error| error.is_transient()));
            provider.status().retry_in.unwrap()
        });
        assert!(left_alone <= Duration::from_secs(65), "{left_alone:?}");
    }
}

struct Fixed;

impl TokenSource for Fixed {
    async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
        Ok(Token::builder("abc").build()?)
    }
}

/// A Bearer challenge is found, whatever is before or after it in its field: another token would not help, so there is no
/// refresh.
fn hides_no_challenge(line: &[u8]) {
    const CHALLENGE: &[u8] = b"Bearer error=\"insufficient_scope\"";
    for field in [[line, b", ", CHALLENGE].concat(), [CHALLENGE, b", ", line].concat()] {
        let Ok(value) = HeaderValue::from_bytes(&field) else { continue };
        let headers = [(WWW_AUTHENTICATE, value.clone())].into_iter().collect();
        assert!(Challenge::from_headers(&headers).is_some_and(|challenge| challenge.error().is_some()));
        let provider = TokenProvider::new(Fixed);
        let api = tower::service_fn(move |_: Request<Full<Bytes>>| {
            let answer = Response::builder().status(StatusCode::UNAUTHORIZED);
            let answer = answer.header(WWW_AUTHENTICATE, value.clone()).body(Full::<Bytes>::default());
            async { Ok::<_, Infallible>(answer.unwrap()) }
        });
        let service = BearerAuthLayer::with_provider(provider.clone()).layer(api);
        on_a_paused_clock(service.oneshot(Request::get("/videos").body(Full::default()).unwrap())).unwrap();
        assert_eq!(provider.status().refreshes, 1);
    }
}

/// A response reaches its caller, whatever challenges it has. The input has one per line.
pub fn www_authenticate(headers: &[u8]) {
    let mut answer = Response::builder().status(StatusCode::UNAUTHORIZED);
    for line in headers.split(|byte| *byte == b'\n').take(100) {
        hides_no_challenge(line);
        if let Ok(value) = HeaderValue::from_bytes(line) {
            answer = answer.header("www-authenticate", value);
        }
    }
    let answer = answer.body(Full::<Bytes>::default()).unwrap();
    let expected = answer.headers().clone();
    let api = tower::service_fn(move |_: Request<Full<Bytes>>| {
        let answer = answer.clone();
        async { Ok::<_, Infallible>(answer) }
    });
    let service = BearerAuthLayer::with_provider(TokenProvider::new(Fixed)).layer(api);
    let request = Request::get("/videos").body(Full::default()).unwrap();
    let got = on_a_paused_clock(service.oneshot(request)).unwrap();
    assert_eq!((got.status(), got.headers()), (StatusCode::UNAUTHORIZED, &expected));
}
