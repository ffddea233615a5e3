//! TLS of the default HTTP client: which root certificates it trusts, and which cryptography it uses.
//!
//! A feature only makes a variant available. The default client uses [`Roots::WebPki`] and [`Cryptography::Ring`]
//! unless the program chooses otherwise ([`TokenClient::roots`](crate::TokenClient::roots),
//! [`TokenClient::cryptography`](crate::TokenClient::cryptography)).

/// The root certificates that the default client trusts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Roots {
    /// Mozilla's roots, compiled into the program.
    #[default]
    WebPki,
    /// The roots of the operating system, or those that `SSL_CERT_FILE` and `SSL_CERT_DIR` name.
    #[cfg(feature = "native-roots")]
    #[cfg_attr(docsrs, doc(cfg(feature = "native-roots")))]
    Native,
    /// These certificates and no others, such as the one of a private authority: the text of a file in PEM, not its path.
    Pem(String),
}

/// The implementation of cryptography that the default client uses for TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cryptography {
    /// The crate `ring`.
    #[default]
    Ring,
    /// The crate `aws-lc-rs`.
    #[cfg(feature = "aws-lc-rs")]
    #[cfg_attr(docsrs, doc(cfg(feature = "aws-lc-rs")))]
    AwsLcRs,
}
