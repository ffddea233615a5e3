//! [`Form`]: the fields of a token request.

use form_urlencoded::Serializer;
use secrecy::zeroize::Zeroizing;

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

    /// Encodes the fields as `application/x-www-form-urlencoded`, in the order in which they were added.
    pub(super) fn encoded(&self) -> String {
        let fields = self.0.iter().map(|(name, value)| (name, value.as_str()));
        Serializer::new(String::new()).extend_pairs(fields).finish()
    }
}
