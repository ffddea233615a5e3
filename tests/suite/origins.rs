//! Only the allowed origins see the token, whatever a redirect or a URI says.

use std::{
    convert::Infallible,
    net::Ipv4Addr,
    sync::{Arc, Mutex},
};

use axum::{Router, body::Body as AxumBody};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, Version,
    header::{AUTHORIZATION, HOST, LOCATION},
};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tower::{Layer, ServiceExt};
use tower_bearer::{
    AllowedOrigins, BearerAuthLayer, Error, NoBearer, SourceError, Token, TokenRequest, TokenSource,
};
use tower_http::follow_redirect::FollowRedirectLayer;

use crate::support::{self, Scene, scene, scene_of};

const A: &str = "https://ws.api.video";

/// A layer that allows only this origin.
fn layer(origin: &str) -> BearerAuthLayer {
    scene().build().layer.allowed_origins(AllowedOrigins::origins([origin.trim_end_matches('/')]).unwrap())
}

fn get(uri: &str) -> Request<Empty<Bytes>> {
    Request::get(uri).body(Empty::new()).unwrap()
}

/// The requests that the origins got: the URI, and whether it had a token.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<(String, bool)>>>);

impl Seen {
    fn add(&self, uri: &str, headers: &HeaderMap) {
        assert!(headers.get_all(AUTHORIZATION).iter().count() <= 1);
        self.0.lock().unwrap().push((uri.to_owned(), headers.contains_key(AUTHORIZATION)));
    }

    /// Returns a service for all origins, which redirects each request to the next URI of `chain` and responds to the
    /// last.
    fn web(
        &self,
        chain: &'static [&'static str],
    ) -> impl tower::Service<
        Request<Empty<Bytes>>,
        Response = Response<Empty<Bytes>>,
        Error = Infallible,
        Future: Send,
    > + Clone
    + Send
    + 'static {
        let seen = self.clone();
        tower::service_fn(move |request: Request<Empty<Bytes>>| {
            let seen = seen.clone();
            async move {
                seen.add(&request.uri().to_string(), request.headers());
                let hop = seen.0.lock().unwrap().len();
                let mut response = Response::new(Empty::new());
                if let Some(next) = chain.get(hop) {
                    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
                    response.headers_mut().insert(LOCATION, HeaderValue::from_static(next));
                }
                Ok(response)
            }
        })
    }

    fn tokens(&self) -> Vec<bool> {
        self.0.lock().unwrap().iter().map(|(_, token)| *token).collect()
    }
}

/// Chains of redirects, and which of their hops may see the token if the layer gets each hop.
const CHAINS: [(&[&str], &[bool]); 9] = [
    (&["https://ws.api.video/a", "https://evil.example/b"], &[true, false]),
    (&["https://ws.api.video/a", "https://evil.example/b", "https://ws.api.video/c"], &[true, false, true]),
    (&["https://ws.api.video/a", "http://ws.api.video/b"], &[true, false]),
    (&["https://ws.api.video/a", "https://ws.api.video:8443/b"], &[true, false]),
    (&["https://ws.api.video/a", "https://a.ws.api.video/b"], &[true, false]),
    (&["https://ws.api.video/a", "https://evilws.api.video/b"], &[true, false]),
    (&["https://ws.api.video/a", "https://[2001:db8::1]/b"], &[true, false]),
    (&["https://ws.api.video/a", "https://ws.api.video@evil.example/b"], &[true, false]),
    (&["https://ws.api.video/a", "/b", "https://WS.API.VIDEO:443/c"], &[true, true, true]),
];

/// A redirect leads to another origin, and the redirect follower is above the layer, which gets each hop.
#[tokio::test(start_paused = true)]
async fn token_is_safe_inside_redirect_layer() {
    for (chain, expected) in CHAINS {
        let seen = Seen::default();
        let service = FollowRedirectLayer::new().layer(layer(A).no_replay().layer(seen.web(chain)));
        let answer = service.oneshot(get(chain[0])).await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(seen.tokens(), expected, "{chain:?}");
    }
}

/// A redirect leads to another origin, and the redirect follower is below the layer: it removes the token.
#[tokio::test(start_paused = true)]
async fn token_is_safe_outside_redirect_layer() {
    for (chain, expected) in CHAINS {
        let seen = Seen::default();
        let service = layer(A).no_replay().layer(FollowRedirectLayer::new().layer(seen.web(chain)));
        let answer = service.oneshot(get(chain[0])).await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        for (hop, (token, allowed)) in seen.tokens().into_iter().zip(expected).enumerate() {
            assert!(!token || *allowed, "{chain:?}, hop {hop}");
        }
        assert!(seen.tokens()[0]);
    }
}

/// A user's input contains an absolute URI.
#[tokio::test(start_paused = true)]
async fn foreign_origin_gets_no_token() {
    let Scene { source, layer, .. } =
        scene().layer(|layer| layer.allowed_origins(AllowedOrigins::origins([A]).unwrap())).build();
    let api = support::Api::default();
    let service = layer.layer(api.service());
    for uri in [
        "https://evil.example/",
        "http://ws.api.video/",
        "https://ws.api.video:444/",
        "https://ws.api.video@evil.example/",
    ] {
        let answer = service.clone().oneshot(get(uri)).await.unwrap();
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
    }
    // No token was sent or obtained, and no request was retried.
    assert!(api.headers().iter().all(|headers| !headers.contains_key(AUTHORIZATION)));
    assert_eq!((api.requests(), source.fetches()), (4, 0));

    // The caller's own header does not change, even if the layer's option is to replace it.
    let replacing = layer
        .clone()
        .existing_authorization(tower_bearer::ExistingAuthorization::Replace)
        .layer(api.service());
    let mut request = get("https://evil.example/");
    request.headers_mut().insert(AUTHORIZATION, HeaderValue::from_static("Basic own"));
    replacing.oneshot(request).await.unwrap();
    assert_eq!(api.headers().last().unwrap()[AUTHORIZATION], "Basic own");
}

/// The source's allowed origins are the default, and the layer's method replaces them.
#[tokio::test(start_paused = true)]
async fn layer_origins_override_source() {
    struct Elsewhere;

    impl TokenSource for Elsewhere {
        async fn fetch(&self, _: &TokenRequest<'_>) -> Result<Token, SourceError> {
            Ok(Token::builder("abc").build()?)
        }

        fn allowed_origins(&self) -> AllowedOrigins {
            AllowedOrigins::origins(["https://elsewhere.example"]).unwrap_or(AllowedOrigins::https())
        }
    }

    let layer = scene_of(Elsewhere).build().layer;
    for (layer, expected) in [
        (layer.clone(), [true, false, false]),
        (layer.clone().allowed_origins(AllowedOrigins::https()), [true, true, false]),
        (layer.allowed_origins(AllowedOrigins::any_insecure()), [true, true, true]),
    ] {
        let seen = Seen::default();
        let service = layer.layer(seen.web(&[]));
        for uri in ["https://elsewhere.example/", "https://api.example/", "http://api.example/"] {
            service.clone().oneshot(get(uri)).await.unwrap();
        }
        assert_eq!(seen.tokens(), expected);
    }
}

/// A request goes to another origin than api.video's.
#[tokio::test(start_paused = true)]
async fn api_videos_tokens_are_for_its_own_origin() {
    use http_body_util::Full;
    use tower_bearer::{ApiVideo, TokenClient};

    let auth = tower::service_fn(|_: Request<String>| async {
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::from(r#"{"access_token": "abc"}"#)))
    });
    for (source, inside) in [
        (ApiVideo::new("key"), "https://ws.api.video/videos"),
        (ApiVideo::sandbox("key"), "https://sandbox.api.video/videos"),
        (
            ApiVideo::new("key").base_url(Uri::from_static("http://127.0.0.1:3000/x")),
            "http://127.0.0.1:3000/x/videos",
        ),
        (ApiVideo::new("key").base_url(Uri::from_static("http://sidecar")), "http://sidecar/videos"),
    ] {
        assert_eq!(format!("{}videos", source.api_base()), inside);
        let source = source.with_client(TokenClient::with_service(auth).allow_plaintext());
        let seen = Seen::default();
        let service = scene_of(source).build().layer.layer(seen.web(&[]));
        for uri in [inside, "https://api.video/", "https://evil.example/", "http://127.0.0.1:3001/"] {
            service.clone().oneshot(get(uri)).await.unwrap();
        }
        assert_eq!(seen.tokens(), [true, false, false, false], "{inside}");
    }
}

/// Starts a server on loopback that redirects to the URI in the query and records its requests.
async fn site(seen: Seen) -> Uri {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let uri = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    let handler = move |request: Request<AxumBody>| async move {
        let host = request.headers()[HOST].to_str().unwrap().to_owned();
        seen.add(&host, request.headers());
        match request.uri().query() {
            Some(next) => (StatusCode::TEMPORARY_REDIRECT, [(LOCATION, next.to_owned())], ""),
            None => (StatusCode::OK, [(LOCATION, String::new())], "here"),
        }
    };
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(handler)).await.unwrap() });
    uri
}

/// A redirect over sockets leads from A to B and back, where B is another port.
#[tokio::test]
async fn redirect_over_sockets_hides_token() {
    let seen = Seen::default();
    let (a, b) = (site(seen.clone()).await, site(seen.clone()).await);
    let layer = layer(&a.to_string());
    let uri = format!("{a}?{b}?{a}");
    for above in [true, false] {
        seen.0.lock().unwrap().clear();
        let status = if above {
            let service = FollowRedirectLayer::new().layer(layer.layer(support::http1()));
            service.oneshot(get(&uri)).await.unwrap().status()
        } else {
            let service = layer.layer(FollowRedirectLayer::new().layer(support::http1()));
            service.oneshot(get(&uri)).await.unwrap().status()
        };
        assert_eq!(status, StatusCode::OK);
        let hosts = seen.0.lock().unwrap().clone();
        let authority = |uri: &Uri| uri.authority().unwrap().to_string();
        assert_eq!(hosts[0], (authority(&a), true));
        assert_eq!(hosts[1], (authority(&b), false));
        assert_eq!(hosts[2].0, authority(&a));
    }
}

/// The client of an axum gateway sends a request line with another host than the API's.
#[tokio::test]
async fn gateway_client_cannot_divert_token() {
    let seen = Seen::default();
    let (api, evil) = (site(seen.clone()).await, site(seen.clone()).await);
    let client = layer(&api.to_string()).no_replay().layer(support::http1::<AxumBody>());
    // It forwards every request unchanged, including one with an absolute URI.
    let gateway = Router::new().fallback(move |request: Request<AxumBody>| async move {
        match client.oneshot(request).await {
            Ok(response) => response.map(AxumBody::new),
            Err(_) => Response::builder().status(StatusCode::BAD_GATEWAY).body(AxumBody::empty()).unwrap(),
        }
    });
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, gateway).await.unwrap() });

    for uri in [&api, &evil] {
        let stream = TcpStream::connect(address).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        // The request line has the absolute URI: `GET http://evil/ HTTP/1.1`.
        let mut request = get(&uri.to_string());
        *request.version_mut() = Version::HTTP_11;
        request.headers_mut().insert(HOST, HeaderValue::from_str(uri.authority().unwrap().as_str()).unwrap());
        let answer = sender.send_request(request).await.unwrap();
        assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "here");
    }
    assert_eq!(seen.tokens(), [true, false]);
}

/// A redirect follower below the layer ends at another host that responds with 401, or at the API itself.
#[tokio::test(start_paused = true)]
async fn foreign_401_is_no_challenge() {
    let web = tower::service_fn(|request: Request<Empty<Bytes>>| async move {
        let mut response = Response::new(Empty::<Bytes>::new());
        if request.uri().host() == Some("evil.example") {
            *response.status_mut() = StatusCode::UNAUTHORIZED;
        } else if request.uri().path() == "/away" {
            *response.status_mut() = StatusCode::FOUND;
            response.headers_mut().insert(LOCATION, HeaderValue::from_static("https://evil.example/"));
        } else if request.uri().path() == "/here" {
            *response.status_mut() = StatusCode::FOUND;
            response.headers_mut().insert(LOCATION, HeaderValue::from_static("/challenged"));
        } else {
            *response.status_mut() = StatusCode::UNAUTHORIZED;
        }
        Ok::<_, Infallible>(response)
    });
    for (path, fetches) in [("/away", 1), ("/here", 2)] {
        let Scene { source, layer, .. } =
            scene().layer(|layer| layer.allowed_origins(AllowedOrigins::origins([A]).unwrap())).build();
        let service = layer.layer(FollowRedirectLayer::new().layer(web));
        let answer = service.oneshot(get(&format!("{A}{path}"))).await.unwrap();
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
        tokio::time::sleep(std::time::Duration::from_secs(10)).await;
        assert_eq!(source.fetches(), fetches, "{path}");
    }
}

/// A first program calls another host than the one of its token, and gets a 401 without a reason.
#[tokio::test(start_paused = true)]
async fn strict_origins_fail_with_reason() {
    let seen = Seen::default();
    let client = layer(A).strict_origins().layer(seen.web(&[]));
    let error = client.clone().oneshot(get("https://evil.example:8443/videos?key=canary")).await.unwrap_err();
    let expected = "https://evil.example:8443 is not an allowed origin: the token is sent only to {https://ws.api.video}";
    assert_eq!(error.to_string(), expected);
    assert!(matches!(error.downcast_ref(), Some(Error::OriginNotAllowed(_))), "{error:?}");
    // Requests that need no token are sent, and so are those to the allowed origin.
    let mut without = get("https://evil.example/1");
    without.extensions_mut().insert(NoBearer);
    client.clone().oneshot(without).await.unwrap();
    let mut own = get("https://evil.example/2");
    own.headers_mut().insert(AUTHORIZATION, HeaderValue::from_static("Basic abc"));
    client.clone().oneshot(own).await.unwrap();
    client.oneshot(get("https://ws.api.video/3")).await.unwrap();
    let uris = ["https://evil.example/1", "https://evil.example/2", "https://ws.api.video/3"];
    assert_eq!(seen.0.lock().unwrap().iter().map(|(uri, _)| uri.clone()).collect::<Vec<_>>(), uris);
}
