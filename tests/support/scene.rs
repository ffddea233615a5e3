//! What a test has, in one expression: a source, an API, a provider and a layer.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Empty;
use tower::Layer;
use tower_bearer::{BearerAuth, BearerAuthLayer, TokenProvider, TokenProviderBuilder, TokenSource};

use super::{Act, Api, ApiService, Source};

/// Destructure it, and take what the test uses.
pub struct Scene<T = Source> {
    pub source: Arc<T>,
    pub api: Api,
    pub provider: TokenProvider,
    pub layer: BearerAuthLayer,
    /// The API behind the layer, for requests without a body.
    pub service: BearerAuth<ApiService<Empty<Bytes>>>,
}

type Options<'a, T> = Box<dyn FnOnce(T) -> T + 'a>;

pub struct SceneBuilder<'a, T = Source> {
    source: T,
    api: Api,
    provider: Options<'a, TokenProviderBuilder<Arc<T>>>,
    layer: Options<'a, BearerAuthLayer>,
}

/// Starts a scene: tokens have no lifetime, the API accepts none of them, and all options have their defaults.
pub fn scene<'a>() -> SceneBuilder<'a> {
    scene_of(Source::default())
}

/// Starts a scene with a source of another type.
pub fn scene_of<'a, T: TokenSource>(source: T) -> SceneBuilder<'a, T> {
    SceneBuilder {
        source,
        api: Api::default(),
        provider: Box::new(|builder| builder),
        layer: Box::new(|layer| layer),
    }
}

impl SceneBuilder<'_> {
    /// Sets the lifetime of the tokens after the last act.
    pub fn living(mut self, lifetime: Duration) -> Self {
        self.source.lifetime = Some(lifetime);
        self
    }

    /// Sets how long each call of the source takes, instead of a second.
    pub fn takes(mut self, duration: Duration) -> Self {
        self.source.takes = duration;
        self
    }

    /// Adds an act of the source.
    pub fn then(self, act: Act) -> Self {
        self.source.next(act);
        self
    }

    /// Adds an act of the source so many times.
    pub fn times(self, times: usize, act: impl Fn() -> Act) -> Self {
        (0..times).fold(self, |scene, _| scene.then(act()))
    }
}

impl<'a, T: TokenSource + 'a> SceneBuilder<'a, T> {
    /// Lets the API accept these tokens.
    pub fn accept(self, tokens: impl IntoIterator<Item: AsRef<str>>) -> Self {
        tokens.into_iter().for_each(|token| self.api.accept(token.as_ref()));
        self
    }

    /// Sets options of the provider, after those of earlier calls.
    pub fn provider(
        mut self,
        options: impl FnOnce(TokenProviderBuilder<Arc<T>>) -> TokenProviderBuilder<Arc<T>> + 'a,
    ) -> Self {
        let earlier = self.provider;
        self.provider = Box::new(|builder| options(earlier(builder)));
        self
    }

    /// Sets options of the layer.
    pub fn layer(mut self, options: impl FnOnce(BearerAuthLayer) -> BearerAuthLayer + 'a) -> Self {
        self.layer = Box::new(options);
        self
    }

    pub fn build(self) -> Scene<T> {
        let (source, api) = (Arc::new(self.source), self.api);
        let provider = (self.provider)(TokenProvider::builder(Arc::clone(&source))).build().unwrap();
        let layer = (self.layer)(BearerAuthLayer::with_provider(provider.clone()));
        let service = layer.layer(api.service());
        Scene { source, api, provider, layer, service }
    }

    /// As [`build`](Self::build), with a provider that has the first token.
    pub async fn with_token(self) -> Scene<T> {
        let scene = self.build();
        scene.provider.token().await.unwrap();
        scene
    }
}
