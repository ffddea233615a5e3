//! [`Front`]: stands in front of an authorization server. It cuts connections, kills the processes that have made them,
//! and knows what became of each refresh token.

use std::{
    collections::{BTreeMap, HashMap},
    net::Ipv4Addr,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use bytes::Bytes;
use futures_util::stream;
use http::{
    HeaderMap, Request, Response, StatusCode,
    header::{CONTENT_LENGTH, CONTENT_TYPE},
};
use http_body_util::{BodyExt, Either, Full, StreamBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, oneshot},
};
use tower_bearer::BoxError;

use crate::worker::{hash, random};

/// One in this many exchanges goes wrong.
const FAULTS: u64 = 3;

/// Kills a process. The answer comes when it is dead.
pub type Kill = mpsc::Sender<oneshot::Sender<()>>;

/// A step of an exchange, seen from the server.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Received,
    Answered,
    Half,
    Delivered,
}

/// The process is killed at this step of an exchange, or only its connection is cut.
#[derive(Clone)]
struct Fault {
    at: Step,
    name: &'static str,
    kills: bool,
    kill: Kill,
}

impl Fault {
    fn random(kill: Kill) -> Option<Self> {
        let (at, name) = [
            (Step::Received, "after the request"),
            (Step::Answered, "before the answer"),
            (Step::Half, "within the answer"),
            (Step::Delivered, "after the answer"),
        ][random(4) as usize];
        let kills = at == Step::Delivered || random(2) == 0;
        (random(FAULTS) == 0).then_some(Self { at, name, kills, kill })
    }
}

/// What became of the answer to a refresh token.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// This process has it, and has not published it.
    Delivered(usize),
    Published,
    Lost(&'static str),
}

/// What has happened.
#[derive(Default)]
pub struct Ledger {
    answers: HashMap<u64, Fate>,
    /// The spent refresh tokens that were presented again, and accepted or rejected.
    pub reuse_accepted: u64,
    pub reuse_rejected: u64,
    /// The answers that no process got, or that died with one.
    pub answers_lost: u64,
    pub kills: BTreeMap<String, u64>,
    pub cuts: BTreeMap<String, u64>,
    /// Why the login ended.
    rejection: Option<&'static str>,
}

const PROCESS_DIED: &str = "the process died with the answer";
const SERVER_DIED: &str = "the server died with the answer";
const CUT: &str = "the answer was cut";

/// The reasons for which no client can keep a login if there is no grace period.
pub const ANSWER_LOST: [&str; 3] = [PROCESS_DIED, SERVER_DIED, CUT];

impl Ledger {
    /// Returns why the login has ended.
    pub fn end_login(&mut self) -> &'static str {
        self.rejection.take().unwrap_or("unexplained")
    }

    pub fn published(&mut self, process: usize) {
        for fate in self.answers.values_mut().filter(|fate| **fate == Fate::Delivered(process)) {
            *fate = Fate::Published;
        }
    }

    /// A process has died: what it had not published is lost.
    pub fn died(&mut self, process: usize) {
        for fate in self.answers.values_mut().filter(|fate| **fate == Fate::Delivered(process)) {
            *fate = Fate::Lost(PROCESS_DIED);
            self.answers_lost += 1;
        }
    }

    fn answered(&mut self, token: u64, fate: Fate) {
        self.answers_lost += u64::from(matches!(fate, Fate::Lost(_)));
        self.answers.insert(token, fate);
    }

    /// The server has answered to a refresh token.
    fn judged(&mut self, token: u64, is_accepted: bool) {
        let earlier = self.answers.get(&token).copied();
        if earlier.is_some() {
            *if is_accepted { &mut self.reuse_accepted } else { &mut self.reuse_rejected } += 1;
        }
        if is_accepted {
            self.rejection = None;
        } else {
            self.rejection.get_or_insert(match earlier {
                Some(Fate::Lost(why)) => why,
                Some(Fate::Delivered(_)) => "presented by two processes",
                Some(Fate::Published) => "the store lost the record",
                None => "unexplained",
            });
        }
    }
}

/// The header by which a process says which one it is.
pub const PROCESS: &str = "x-process";

/// The path to the server.
#[derive(Clone)]
pub struct Front {
    /// How to kill each process.
    kills: Arc<[Kill]>,
    token_endpoint: String,
    client: reqwest::Client,
    ledger: Arc<Mutex<Ledger>>,
}

type Body = Either<Full<Bytes>, HalfBody>;
type HalfBody = StreamBody<stream::Iter<std::array::IntoIter<Result<Frame<Bytes>, BoxError>, 2>>>;

impl Front {
    /// Starts it. Returns the URL of its token endpoint. Nothing goes wrong for a process that is not in `kills`.
    pub async fn start(
        kills: Vec<Kill>,
        token_endpoint: String,
        ledger: Arc<Mutex<Ledger>>,
    ) -> Result<String, BoxError> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let url = format!("http://{}/token", listener.local_addr()?);
        let client = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).build()?;
        let front = Self { kills: kills.into(), token_endpoint, client, ledger };
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                tokio::spawn(front.clone().serve(connection));
            }
        });
        Ok(url)
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn serve(self, connection: TcpStream) {
        // Who has connected is not known yet.
        if random(4 * FAULTS) == 0 {
            *self.ledger().cuts.entry("before the request".to_owned()).or_default() += 1;
            return;
        }
        let later = OnceLock::new();
        let exchange = service_fn(|request: Request<Incoming>| {
            let process =
                request.headers().get(PROCESS).and_then(|process| process.to_str().ok()?.parse().ok());
            let process: usize = process.unwrap_or(usize::MAX);
            let fault = self.kills.get(process).and_then(|kill| Fault::random(kill.clone()));
            if let Some(fault) =
                fault.clone().filter(|fault| matches!(fault.at, Step::Half | Step::Delivered))
            {
                let _ = later.set(fault);
            }
            self.exchange(request, process, fault)
        });
        let served =
            http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(connection), exchange);
        // An error is a connection that was cut.
        let _ = served.await;
        if let Some(fault) = later.get() {
            self.happens(fault).await;
        }
    }

    async fn happens(&self, fault: &Fault) {
        {
            let mut ledger = self.ledger();
            let counts = if fault.kills { &mut ledger.kills } else { &mut ledger.cuts };
            *counts.entry(fault.name.to_owned()).or_default() += 1;
        }
        if fault.kills {
            // Nothing may follow: with the process, its connection ends, and with that this future.
            let (dead, is_dead) = oneshot::channel();
            if fault.kill.send(dead).await.is_ok() {
                let _ = is_dead.await;
            }
        }
    }

    /// Forwards an exchange. An error cuts the connection.
    async fn exchange(
        &self,
        request: Request<Incoming>,
        process: usize,
        fault: Option<Fault>,
    ) -> Result<Response<Body>, BoxError> {
        let (head, body) = request.into_parts();
        let form = body.collect().await?.to_bytes();
        let token = refresh_token(&form)?;
        if let Some(fault) = fault.as_ref().filter(|fault| fault.at == Step::Received) {
            self.happens(fault).await;
            return Err("cut".into());
        }
        let (status, headers, answer) = match self.forward(head.headers, form).await {
            Ok(answer) => answer,
            // The server does not run.
            Err(error) if error.is_connect() => return Err(error.into()),
            Err(error) => {
                self.ledger().answered(token, Fate::Lost(SERVER_DIED));
                return Err(error.into());
            }
        };
        if status.is_success() || matches!(status.as_u16(), 400 | 401) {
            self.ledger().judged(token, status.is_success());
        }
        if status.is_success() {
            let fate = match &fault {
                Some(Fault { at: Step::Answered | Step::Half, kills: true, .. }) => Fate::Lost(PROCESS_DIED),
                Some(Fault { at: Step::Answered | Step::Half, .. }) => Fate::Lost(CUT),
                _ => Fate::Delivered(process),
            };
            self.ledger().answered(token, fate);
        }
        if let Some(fault) = fault.as_ref().filter(|fault| fault.at == Step::Answered) {
            self.happens(fault).await;
            return Err("cut".into());
        }
        let mut response = Response::builder().status(status).header(CONTENT_LENGTH, answer.len());
        if let Some(value) = headers.get(CONTENT_TYPE) {
            response = response.header(CONTENT_TYPE, value);
        }
        let half = Frame::data(answer.slice(..answer.len() / 2));
        let half = StreamBody::new(stream::iter([Ok(half), Err("cut".into())]));
        let is_half = fault.is_some_and(|fault| fault.at == Step::Half);
        let body = if is_half { Either::Right(half) } else { Either::Left(Full::new(answer)) };
        Ok(response.body(body)?)
    }

    async fn forward(
        &self,
        mut headers: HeaderMap,
        form: Bytes,
    ) -> Result<(StatusCode, HeaderMap, Bytes), reqwest::Error> {
        headers.remove("host");
        let request = self.client.post(&self.token_endpoint).headers(headers).body(form);
        let response = request.send().await?;
        let (status, headers) = (response.status(), response.headers().clone());
        Ok((status, headers, response.bytes().await?))
    }
}

/// Returns a hash of the refresh token in a form.
fn refresh_token(form: &[u8]) -> Result<u64, BoxError> {
    let form = std::str::from_utf8(form)?;
    let token = form.split('&').find_map(|field| field.strip_prefix("refresh_token="));
    Ok(hash(token.ok_or("the request has no refresh token")?))
}
