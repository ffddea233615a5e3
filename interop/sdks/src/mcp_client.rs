// The client of the page `guide::mcp`, for the programs `mcp_fleet` and `mcp_conformance`: a test compares the texts. It is
// included, because the recipe has no `pub`.

type Headers = HashMap<HeaderName, HeaderValue>;
type Result<T> = std::result::Result<T, StreamableHttpError<reqwest::Error>>;

#[derive(Clone)]
struct WithToken {
    client: reqwest::Client,
    provider: TokenProvider,
}

impl WithToken {
    async fn send<T, F>(&self, mut send: impl FnMut(Option<String>) -> F + Send) -> Result<T>
    where
        F: Future<Output = Result<T>> + Send,
    {
        let send = |token: Token| send(Some(token.access_token().to_owned()));
        let is_challenge = |sent: &_| matches!(sent, Err(StreamableHttpError::AuthRequired(_)));
        self.provider.with_token(send, is_challenge).await.map_err(io::Error::other)?
    }
}

impl StreamableHttpClient for WithToken {
    type Error = reqwest::Error;

    async fn post_message(
        &self,
        uri: Arc<str>,
        message: ClientJsonRpcMessage,
        session: Option<Arc<str>>,
        _: Option<String>,
        headers: Headers,
    ) -> Result<StreamableHttpPostResponse> {
        self.send(|token| {
            let (message, session) = (message.clone(), session.clone());
            self.client.post_message(uri.clone(), message, session, token, headers.clone())
        })
        .await
    }

    async fn delete_session(
        &self,
        uri: Arc<str>,
        session: Arc<str>,
        _: Option<String>,
        headers: Headers,
    ) -> Result<()> {
        self.send(|token| self.client.delete_session(uri.clone(), session.clone(), token, headers.clone()))
            .await
    }

    async fn get_stream(
        &self,
        uri: Arc<str>,
        session: Option<Arc<str>>,
        last_event: Option<String>,
        _: Option<String>,
        headers: Headers,
    ) -> Result<BoxStream<'static, std::result::Result<Sse, SseError>>> {
        self.send(|token| {
            let (session, last_event) = (session.clone(), last_event.clone());
            self.client.get_stream(uri.clone(), session, last_event, token, headers.clone())
        })
        .await
    }
}
