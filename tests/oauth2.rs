//! [`OAuth2`]: what each grant sends, what a response of the token endpoint means, and which refresh token is presented.
#![cfg(feature = "oauth2")]

mod support;

use std::{
    collections::VecDeque,
    convert::Infallible,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, header::AUTHORIZATION};
use http_body_util::Full;
use support::{at_once, chain};
use tokio::time::{advance, sleep};
use tower_bearer::{
    BoxError, Error, OAuth2, RefreshReason, SourceError, SourceErrorKind, StaticToken, Token, TokenProvider,
    TokenRequest, TokenSource,
    challenge::Challenge,
    oauth2::{ClientAuth, Server},
    source_fn,
};

const TOKEN_ENDPOINT: &str = "https://login.example/token";
