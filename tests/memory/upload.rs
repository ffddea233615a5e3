//! A gigabyte through `buffered` costs no more memory than the limit.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full};
use tower::{Layer, ServiceExt};
use tower_bearer::{ApiVideo, BearerAuthLayer, TokenProvider};
use tower_bearer_testing::AuthServer;

use crate::{alone, growth, support};

const GIB: u64 = 1 << 30;
const FRAME: usize = 64 * 1024;
const LIMIT: usize = 8 << 20;

/// The memory of the connections and the server, both ends of which are in this process.
const OVERHEAD: usize = 8 << 20;

/// Frames with one allocation each, so that every kept frame counts.
struct Frames(u64);

impl Body for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.0 == 0 {
            return Poll::Ready(None);
        }
        self.0 -= FRAME as u64;
        Poll::Ready(Some(Ok(Frame::data(vec![self.0 as u8; FRAME].into()))))
    }
}

/// A gigabyte is uploaded through a limit of 8 MiB, also when it is challenged at its end.
#[tokio::test]
async fn gigabyte_upload_stays_within_limit() {
    let _alone = alone().await;
    let server = AuthServer::builder().challenge_late(true).start().await.unwrap();
    let source = ApiVideo::new(server.api_key()).base_url(server.uri());
    let instant = Duration::from_nanos(1);
    let provider = TokenProvider::builder(source).cool_down(instant, instant).build().unwrap();
    let layer = BearerAuthLayer::with_provider(provider);

    let request = Request::post(format!("{}videos", server.uri()));
    let request = request.body(Full::<Bytes>::from(r#"{"title": "long"}"#)).unwrap();
    let created = layer.layer(support::http1()).oneshot(request).await.unwrap();
    let created = created.into_body().collect().await.unwrap().to_bytes();
    let created: serde_json::Value = serde_json::from_slice(&created).unwrap();
    let path = format!("{}videos/{}/source", server.uri(), created["videoId"].as_str().unwrap());

    let service = layer.clone().buffered(LIMIT).layer(support::http1());
    for revoked in [false, true] {
        if revoked {
            server.revoke_access_tokens();
        }
        let request = Request::post(&path).body(Frames(GIB)).unwrap();
        let (grown, response) = growth(service.clone().oneshot(request)).await;
        assert!(grown < LIMIT + OVERHEAD, "memory has grown by {grown} bytes");
        assert_eq!(response.unwrap().status() == StatusCode::UNAUTHORIZED, revoked);
    }
    assert_eq!(server.uploads()[0].bytes, GIB);
    while layer.provider().status().refreshing {
        tokio::task::yield_now().await;
    }
    let response = service.oneshot(Request::post(&path).body(Frames(FRAME as u64)).unwrap()).await.unwrap();
    assert_eq!(response.status(), StatusCode::CREATED);
    assert_eq!(server.counters().challenged, 1);
}
