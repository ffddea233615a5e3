//! Records the events and spans of this crate that one thread emits.
#![allow(dead_code, unreachable_pub)]

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
    subscriber::DefaultGuard,
};
use tracing_subscriber::{
    layer::{Context, Layer, SubscriberExt},
    registry::LookupSpan,
};

#[derive(Clone, Debug, Default)]
pub struct Fields(pub BTreeMap<String, String>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.to_owned());
    }
}

#[derive(Clone, Debug)]
pub struct Logged {
    pub message: String,
    pub level: Level,
    pub fields: BTreeMap<String, String>,
    /// Whether it was emitted within the span of a refresh.
    pub in_refresh_span: bool,
}

#[derive(Clone, Default)]
pub struct Record {
    pub events: Arc<Mutex<Vec<Logged>>>,
    pub spans: Arc<Mutex<Vec<BTreeMap<String, String>>>>,
    /// The names of the spans that other spans follow from.
    pub followed: Arc<Mutex<Vec<String>>>,
}

impl Record {
    /// Records the events of this thread from now on.
    ///
    /// Only one test records at a time. `tracing` caches for the whole process which events are enabled: another subscriber,
    /// which ignores them, enables all on the threads of other tests.
    pub fn start() -> (Self, (DefaultGuard, MutexGuard<'static, ()>)) {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        // Fails if it is set already.
        let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry());
        let record = Self::default();
        let guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(record.clone()));
        (record, (guard, turn))
    }

    /// Forgets the events so far.
    pub fn clear(&self) {
        self.events.lock().unwrap().clear();
    }

    pub fn events(&self) -> Vec<Logged> {
        self.events.lock().unwrap().clone()
    }

    /// The only event of this message at this level.
    pub fn one_at(&self, message: &str, level: Level) -> Logged {
        let mut found = self.events();
        found.retain(|event| event.message == message && event.level == level);
        assert_eq!(found.len(), 1, "{message}: {found:?}");
        found.remove(0)
    }

    /// The only event of this message.
    pub fn one(&self, message: &str) -> Logged {
        let mut found = self.events();
        found.retain(|event| event.message == message);
        assert_eq!(found.len(), 1, "{message}: {found:?}");
        found.remove(0)
    }
}

fn is_tower_bearer(metadata: &Metadata<'_>) -> bool {
    metadata.target() == "tower_bearer"
}

impl<S> Layer<S> for Record
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_new_span(&self, attributes: &span::Attributes<'_>, _: &span::Id, _: Context<'_, S>) {
        if is_tower_bearer(attributes.metadata()) {
            assert_eq!(
                (attributes.metadata().name(), *attributes.metadata().level()),
                ("token_refresh", Level::INFO)
            );
            assert!(attributes.is_root());
            let mut fields = Fields::default();
            attributes.record(&mut fields);
            self.spans.lock().unwrap().push(fields.0);
        }
    }

    fn on_follows_from(&self, _: &span::Id, followed: &span::Id, context: Context<'_, S>) {
        self.followed.lock().unwrap().extend(context.span(followed).map(|span| span.name().to_owned()));
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        if !is_tower_bearer(event.metadata()) {
            return;
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        let message = fields.0.remove("message").unwrap();
        let in_refresh_span = context
            .event_scope(event)
            .is_some_and(|mut scope| scope.any(|span| is_tower_bearer(span.metadata())));
        let level = *event.metadata().level();
        self.events.lock().unwrap().push(Logged { message, level, fields: fields.0, in_refresh_span });
    }
}
