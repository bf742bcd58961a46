//! Who asks: what a request carries to say so.

/// What the certificate of a connection says of its client. The listener puts it into the extensions of
/// each http request of a connection whose client showed a certificate that was verified, which only
/// happens with client-cert-auth.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClientCert {
    /// The subject's Common Name, the user that the client is if it shows no token; `None` if the
    /// subject has none or an empty one.
    pub common_name: Option<String>,
}
