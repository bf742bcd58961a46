//! What the services are told of a request's headers (v3-api 8.5).
//!
//! Only what a service looks at: who asks, what the client puts there by the name of `Grpc-Metadata-`,
//! until when it waits, and that the call came through the gateway. The other headers, which etcd's
//! gateway passes on under names of its own, have no reader here.

use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderName};
use tonic::Status;
use tonic::metadata::MetadataMap;

use crate::transport::grpc::deadline;

const PREFIX: &str = "grpc-metadata-";
const TIMEOUT: &str = "grpc-timeout";
/// Tells the services that no certificate names the user: it would be the gateway's (v3-api 7.1).
const FROM_GATEWAY: HeaderName = HeaderName::from_static("grpcgateway-accept");
const GATEWAY_AUTHORIZATION: HeaderName = HeaderName::from_static("grpcgateway-authorization");

/// Names that are gRPC's own, which a client cannot set.
fn is_reserved(name: &str) -> bool {
    name.starts_with("grpc-") || matches!(name, "content-type" | "te" | "user-agent")
}

/// The metadata of a call.
///
/// # Errors
/// If it has a deadline that cannot be read.
pub fn of(headers: &HeaderMap) -> Result<MetadataMap, Status> {
    let mut metadata = HeaderMap::with_capacity(4);
    let accepted = headers.get(http::header::ACCEPT).cloned();
    metadata
        .insert(FROM_GATEWAY, accepted.unwrap_or_else(|| http::HeaderValue::from_static("*/*")));
    for (name, value) in headers {
        if name == AUTHORIZATION {
            metadata.append(AUTHORIZATION, value.clone());
            metadata.append(GATEWAY_AUTHORIZATION, value.clone());
        } else if let Some(name) = name.as_str().strip_prefix(PREFIX) {
            // What is left after the prefix need not be a name, as nothing is none.
            if let Ok(name) = HeaderName::try_from(name)
                && !is_reserved(name.as_str())
            {
                metadata.append(name, value.clone());
            }
        }
    }
    if let Some(timeout) = headers.get(TIMEOUT) {
        if deadline::malformed(headers).is_some() {
            let shown = timeout.as_bytes().escape_ascii();
            return Err(Status::invalid_argument(format!("invalid grpc-timeout: {shown}")));
        }
        metadata.insert(TIMEOUT, timeout.clone());
    }
    Ok(MetadataMap::from_headers(metadata))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn services_learn_what_concerns_them() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("authorization", "Bearer token"),
            ("grpc-metadata-hasleader", "true"),
            ("grpc-metadata-grpc-timeout", "1n"),
            ("grpc-metadata-content-type", "x"),
            ("grpc-metadata-", "x"),
            ("grpc-timeout", "5S"),
            ("accept", "application/json"),
            ("token", "not this one"),
            ("cookie", "token=nor this"),
        ] {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_str(value).unwrap());
        }
        let metadata = of(&headers).unwrap().into_headers();
        let mut seen: Vec<_> =
            metadata.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        seen.sort_unstable();
        assert_eq!(
            seen,
            [
                ("authorization", "Bearer token"),
                ("grpc-timeout", "5S"),
                ("grpcgateway-accept", "application/json"),
                ("grpcgateway-authorization", "Bearer token"),
                ("hasleader", "true"),
            ]
        );
        headers.insert(TIMEOUT, HeaderValue::from_static("soon"));
        let refused = of(&headers).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        assert_eq!(refused.message(), "invalid grpc-timeout: soon");
        assert!(of(&HeaderMap::new()).unwrap().contains_key("grpcgateway-accept"));
    }
}
