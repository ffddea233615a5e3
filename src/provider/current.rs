//! [`Current`]: what each service keeps of the current token, so that reading it costs one atomic load.

use std::{ops::Deref, sync::Arc};

use arc_swap::{ArcSwapOption, Cache};
use http::HeaderValue;

use super::core::Core;
use crate::token::{self, TokenId};

/// The current token as one service saw it last, looked up again only if the provider has published another since.
///
/// A service that sends nothing keeps the token before the current one, whose refresh token has been spent.
#[derive(Clone)]
pub(crate) struct Current(Cache<Published, Option<Arc<token::Inner>>>);

/// Where the provider publishes its tokens.
#[derive(Clone)]
struct Published(Arc<Core>);

impl Deref for Published {
    type Target = ArcSwapOption<token::Inner>;

    fn deref(&self) -> &Self::Target {
        self.0.current()
    }
}

impl Current {
    pub(super) fn of(core: &Arc<Core>) -> Self {
        Self(Cache::new(Published(Arc::clone(core))))
    }

    /// The header for a request and the token that it is of, if there is one that will do.
    ///
    /// One that is ageing will, and `core` renews it behind the caller's back.
    #[inline]
    pub(super) fn header(&mut self, core: &Arc<Core>) -> Option<(&HeaderValue, TokenId)> {
        match self.0.load() {
            Some(token) if token.is_fresh_now() || core.renew_ahead(token) => {
                Some((token.header(), token.id()))
            }
            _ => None,
        }
    }
}
