//! [`Form`]: the fields of a token request, and how their texts are checked and decoded.

use base64::{Engine, prelude::BASE64_STANDARD_NO_PAD};
use form_urlencoded::Serializer;
use secrecy::zeroize::Zeroizing;

use super::super::check_text;
use crate::error::SourceError;

/// The fields of a token request, which may be secrets. They are overwritten when dropped.
#[derive(Default)]
pub(super) struct Form(Vec<(String, Zeroizing<String>)>);

impl Form {
    pub(super) fn add(&mut self, name: &str, value: &str) {
        self.0.push((name.to_owned(), Zeroizing::new(value.to_owned())));
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(added, _)| added == name)
    }

    /// Returns the names and the values.
    pub(super) fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().flat_map(|(name, value)| [name.as_str(), value.as_str()])
    }

    /// Checks each value, as [`check_text`] does.
    pub(super) fn check(&self) -> Result<(), SourceError> {
        self.0.iter().try_for_each(|(name, value)| check_text(name, value))
    }

    /// Encodes the fields as `application/x-www-form-urlencoded`, in the order in which they were added.
    pub(super) fn encoded(&self) -> String {
        let fields = self.0.iter().map(|(name, value)| (name, value.as_str()));
        Serializer::new(String::new()).extend_pairs(fields).finish()
    }
}

/// Decodes base64 in either alphabet, with or without padding.
pub(super) fn base64_of_any_form(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    let standard = text.trim_end_matches('=').replace('-', "+").replace('_', "/");
    BASE64_STANDARD_NO_PAD.decode(Zeroizing::new(standard).as_bytes()).ok().map(Zeroizing::new)
}
