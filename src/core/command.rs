//! What a normal log entry holds: etcd's `InternalRaftRequest` (formats-and-peers 5.4), read straight
//! into the one request it carries.
//!
//! In a cluster with members older than 3.5 what members publish of themselves, and the cluster's
//! version, are requests of the v2 API (5.3). They are read as the requests that took their place, and
//! written as v2 only where that is asked for.

use bytes::{Buf, Bytes, BytesMut};
use prost::encoding::{
    DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint, skip_field,
};
use prost::{DecodeError, Message};
use quorate_proto::etcdserverpb as pb;
use quorate_proto::membershippb;
use serde::{Deserialize, Serialize};

use super::membership::null_is_empty;

/// A request with the header that every entry carries.
#[derive(Clone, PartialEq, Debug)]
pub struct Command {
    /// Unique in the cluster: wakes the caller on the member that proposed it.
    pub id: u64,
    /// The authenticated user; empty when auth is off.
    pub username: String,
    /// The auth store's revision when the user was checked; 0 for none.
    pub auth_revision: u64,
    pub request: Request,
}

/// Why a log entry cannot be understood.
#[derive(thiserror::Error, Debug)]
pub enum CommandError {
    #[error("log entry does not decode as a request: {0}")]
    Malformed(#[from] DecodeError),
    /// Every release panics on such an entry: it would fall behind its peers' state otherwise.
    #[error("log entry holds no request that this version knows")]
    Unknown,
    #[error("log entry holds a request of the v2 API, {method} {path}, which is not supported")]
    V2 { method: String, path: String },
    #[error("log entry puts a value at {path} that cannot be read: {why}")]
    V2Value { path: String, why: String },
}

const HEADER_TAG: u32 = 100;
const OLD_ID_TAG: u32 = 1;

macro_rules! requests {
    ($($tag:literal $variant:ident($message:ty)),* $(,)?) => {
        /// The requests that travel through the log.
        #[derive(Clone, PartialEq, Debug)]
        pub enum Request {
            $($variant($message)),*
        }

        impl Request {
            /// The name that metrics give to the request.
            pub const fn name(&self) -> &'static str {
                match self {
                    $(Request::$variant(_) => stringify!($variant)),*
                }
            }

            fn tag(&self) -> u32 {
                match self {
                    $(Request::$variant(_) => $tag),*
                }
            }

            fn body_len(&self) -> usize {
                match self {
                    $(Request::$variant(m) => m.encoded_len()),*
                }
            }

            fn encode_body(&self, buf: &mut BytesMut) {
                match self {
                    $(Request::$variant(m) => m.encode_raw(buf)),*
                }
            }

            fn decode_body(tag: u32, body: Bytes) -> Result<Option<Request>, DecodeError> {
                Ok(Some(match tag {
                    $($tag => Request::$variant(<$message>::decode(body)?),)*
                    _ => return Ok(None),
                }))
            }
        }
    };
}

requests! {
    3 Range(pb::RangeRequest),
    4 Put(pb::PutRequest),
    5 DeleteRange(pb::DeleteRangeRequest),
    6 Txn(pb::TxnRequest),
    7 Compaction(pb::CompactionRequest),
    8 LeaseGrant(pb::LeaseGrantRequest),
    9 LeaseRevoke(pb::LeaseRevokeRequest),
    10 Alarm(pb::AlarmRequest),
    11 LeaseCheckpoint(pb::LeaseCheckpointRequest),
    1000 AuthEnable(pb::AuthEnableRequest),
    1011 AuthDisable(pb::AuthDisableRequest),
    1013 AuthStatus(pb::AuthStatusRequest),
    1012 Authenticate(pb::InternalAuthenticateRequest),
    1100 AuthUserAdd(pb::AuthUserAddRequest),
    1101 AuthUserDelete(pb::AuthUserDeleteRequest),
    1102 AuthUserGet(pb::AuthUserGetRequest),
    1103 AuthUserChangePassword(pb::AuthUserChangePasswordRequest),
    1104 AuthUserGrantRole(pb::AuthUserGrantRoleRequest),
    1105 AuthUserRevokeRole(pb::AuthUserRevokeRoleRequest),
    1106 AuthUserList(pb::AuthUserListRequest),
    1107 AuthRoleList(pb::AuthRoleListRequest),
    1200 AuthRoleAdd(pb::AuthRoleAddRequest),
    1201 AuthRoleDelete(pb::AuthRoleDeleteRequest),
    1202 AuthRoleGet(pb::AuthRoleGetRequest),
    1203 AuthRoleGrantPermission(pb::AuthRoleGrantPermissionRequest),
    1204 AuthRoleRevokePermission(pb::AuthRoleRevokePermissionRequest),
    1300 ClusterVersionSet(membershippb::ClusterVersionSetRequest),
    1301 ClusterMemberAttrSet(membershippb::ClusterMemberAttrSetRequest),
    1302 DowngradeInfoSet(membershippb::DowngradeInfoSetRequest),
    9900 DowngradeVersionTest(pb::DowngradeVersionTestRequest),
}

impl Command {
    /// A request without a user.
    pub fn new(id: u64, request: Request) -> Self {
        Command { id, username: String::new(), auth_revision: 0, request }
    }

    /// The entry's data, fields in ascending order as etcd writes them.
    pub fn encode(&self) -> Bytes {
        let header = pb::RequestHeader {
            id: self.id,
            username: self.username.clone(),
            auth_revision: self.auth_revision,
        };
        let body_len = self.request.body_len();
        // Two keys and two lengths take at most 2 * (5 + 10) bytes.
        let mut buf = BytesMut::with_capacity(body_len + header.encoded_len() + 30);
        let put_header = |buf: &mut BytesMut| {
            encode_key(HEADER_TAG, WireType::LengthDelimited, buf);
            encode_varint(header.encoded_len() as u64, buf);
            header.encode_raw(buf);
        };
        if self.request.tag() > HEADER_TAG {
            put_header(&mut buf);
        }
        encode_key(self.request.tag(), WireType::LengthDelimited, &mut buf);
        encode_varint(body_len as u64, &mut buf);
        self.request.encode_body(&mut buf);
        if self.request.tag() < HEADER_TAG {
            put_header(&mut buf);
        }
        buf.freeze()
    }

    /// The entry's data as a request of the v2 API; `None` if there is no such request.
    pub fn encode_v2(&self) -> Option<Bytes> {
        let (path, value) = match &self.request {
            Request::ClusterVersionSet(set) => (V2_VERSION.to_string(), set.ver.clone()),
            Request::ClusterMemberAttrSet(set) => {
                let attributes = set.member_attributes.clone().unwrap_or_default();
                let attributes =
                    V2Attributes { name: attributes.name, client_urls: attributes.client_urls };
                let json = serde_json::to_string(&attributes).expect("names are always JSON");
                (format!("{V2_MEMBERS}{:x}{V2_ATTRIBUTES}", set.member_id), json)
            }
            _ => return None,
        };
        let request = V2Request { id: self.id, method: V2_PUT.to_string(), path, value };
        Some(request.encode_to_vec().into())
    }

    /// Reads an entry's data; byte fields share its memory.
    ///
    /// # Errors
    /// If it is not a request, or holds none that this version knows.
    pub fn decode(data: Bytes) -> Result<Command, CommandError> {
        match Self::decode_v3(data.clone()) {
            // A path is no message, so a v2 request never passes for one of the others.
            Err(error @ CommandError::Malformed(_)) => match V2Request::decode(data) {
                Ok(request) if request.path.starts_with('/') => request.command(),
                _ => Err(error),
            },
            decoded => decoded,
        }
    }

    fn decode_v3(mut data: Bytes) -> Result<Command, CommandError> {
        let mut command = None;
        let mut header = pb::RequestHeader::default();
        let mut old_id = 0;
        while data.has_remaining() {
            let (tag, wire_type) = decode_key(&mut data)?;
            match (tag, wire_type) {
                (OLD_ID_TAG, WireType::Varint) => old_id = decode_varint(&mut data)?,
                (_, WireType::LengthDelimited) => {
                    let len = decode_varint(&mut data)?;
                    if len > data.len() as u64 {
                        return Err(cut_short().into());
                    }
                    let body = data.split_to(len as usize);
                    if tag == HEADER_TAG {
                        header = pb::RequestHeader::decode(body)?;
                    } else if let Some(request) = Request::decode_body(tag, body)? {
                        command = Some(request);
                    }
                }
                _ => skip_field(wire_type, tag, &mut data, DecodeContext::default())?,
            }
        }
        Ok(Command {
            id: if header.id == 0 { old_id } else { header.id },
            username: header.username,
            auth_revision: header.auth_revision,
            request: command.ok_or(CommandError::Unknown)?,
        })
    }
}

const V2_PUT: &str = "PUT";
const V2_VERSION: &str = "/0/version";
const V2_MEMBERS: &str = "/0/members/";
const V2_ATTRIBUTES: &str = "/attributes";

/// A request of the v2 API, as far as members make them for themselves.
#[derive(Clone, PartialEq, Message)]
struct V2Request {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(string, tag = "2")]
    method: String,
    #[prost(string, tag = "3")]
    path: String,
    #[prost(string, tag = "4")]
    value: String,
}

/// What a member publishes of itself.
#[derive(Default, Serialize, Deserialize)]
struct V2Attributes {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    name: String,
    #[serde(
        rename = "clientURLs",
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "null_is_empty"
    )]
    client_urls: Vec<String>,
}

impl V2Request {
    /// The request that took this one's place.
    fn command(self) -> Result<Command, CommandError> {
        let V2Request { id, method, path, value } = self;
        if method != V2_PUT {
            return Err(CommandError::V2 { method, path });
        }
        if path == V2_VERSION {
            let set = membershippb::ClusterVersionSetRequest { ver: value };
            return Ok(Command::new(id, Request::ClusterVersionSet(set)));
        }
        let member = path.strip_prefix(V2_MEMBERS).and_then(|p| p.strip_suffix(V2_ATTRIBUTES));
        let Some(member_id) = member.and_then(|id| u64::from_str_radix(id, 16).ok()) else {
            return Err(CommandError::V2 { method, path });
        };
        let attributes: V2Attributes = serde_json::from_str(&value)
            .map_err(|error| CommandError::V2Value { path, why: error.to_string() })?;
        let V2Attributes { name, client_urls } = attributes;
        let set = membershippb::ClusterMemberAttrSetRequest {
            member_id,
            member_attributes: Some(membershippb::Attributes { name, client_urls }),
        };
        Ok(Command::new(id, Request::ClusterMemberAttrSet(set)))
    }
}

fn cut_short() -> DecodeError {
    decode_varint(&mut &[][..]).expect_err("an empty buffer holds no varint")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &'static str) -> Request {
        Request::Put(pb::PutRequest { key: key.into(), value: "v".into(), ..Default::default() })
    }

    #[test]
    fn the_bytes_are_those_of_the_generated_message() {
        for (request, generated) in [
            (
                put("k"),
                pb::InternalRaftRequest {
                    put: Some(pb::PutRequest {
                        key: "k".into(),
                        value: "v".into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                },
            ),
            (
                Request::ClusterVersionSet(membershippb::ClusterVersionSetRequest {
                    ver: "3.7.0".into(),
                }),
                pb::InternalRaftRequest {
                    cluster_version_set: Some(membershippb::ClusterVersionSetRequest {
                        ver: "3.7.0".into(),
                    }),
                    ..Default::default()
                },
            ),
        ] {
            let header = pb::RequestHeader { id: 77, username: "u".into(), auth_revision: 3 };
            let command = Command { id: 77, username: "u".into(), auth_revision: 3, request };
            let expected = pb::InternalRaftRequest { header: Some(header), ..generated };
            assert_eq!(command.encode(), expected.encode_to_vec());
            assert_eq!(Command::decode(command.encode()).unwrap(), command);
        }
    }

    #[test]
    fn the_old_id_counts_where_there_is_no_header() {
        let old = pb::InternalRaftRequest {
            id: 9,
            compaction: Some(pb::CompactionRequest { revision: 5, physical: false }),
            ..Default::default()
        };
        let command = Command::decode(old.encode_to_vec().into()).unwrap();
        assert_eq!(command.id, 9);
    }

    #[test]
    fn what_old_members_publish_is_read_and_written_as_they_do() {
        let version = membershippb::ClusterVersionSetRequest { ver: "3.4.0".into() };
        let version = Command::new(0x1234, Request::ClusterVersionSet(version));
        let attributes = membershippb::Attributes {
            name: "m1".into(),
            client_urls: vec!["http://127.0.0.1:2379".into()],
        };
        let attributes = membershippb::ClusterMemberAttrSetRequest {
            member_id: 0x8e9e_05c5_2164_694d,
            member_attributes: Some(attributes),
        };
        let attributes = Command::new(7, Request::ClusterMemberAttrSet(attributes));
        for (command, path, value) in [
            (version, "/0/version", "3.4.0"),
            (
                attributes,
                "/0/members/8e9e05c52164694d/attributes",
                r#"{"name":"m1","clientURLs":["http://127.0.0.1:2379"]}"#,
            ),
        ] {
            let data = command.encode_v2().unwrap();
            let request = V2Request::decode(data.clone()).unwrap();
            assert_eq!((request.path.as_str(), request.value.as_str()), (path, value));
            assert_eq!((request.id, request.method.as_str()), (command.id, "PUT"));
            assert_eq!(Command::decode(data).unwrap(), command);
            // etcd 3.4 writes every field, empty or not.
            let mut whole = request.encode_to_vec();
            for field in [0x28, 0x38, 0x48, 0x50, 0x58, 0x60, 0x68, 0x70, 0x78] {
                whole.extend([field, 0]);
            }
            whole.extend([0x32, 0, 0x80, 0x01, 0]);
            assert_eq!(Command::decode(whole.into()).unwrap(), command);
        }
        assert_eq!(Command::new(1, put("k")).encode_v2(), None);
    }

    #[test]
    fn other_requests_of_the_v2_api_are_named() {
        let said = |method: &str, path: &str, value: &str| {
            let request =
                V2Request { id: 1, method: method.into(), path: path.into(), value: value.into() };
            Command::decode(request.encode_to_vec().into()).unwrap_err().to_string()
        };
        assert_eq!(
            said("PUT", "/1/key", "v"),
            "log entry holds a request of the v2 API, PUT /1/key, which is not supported"
        );
        assert!(said("DELETE", "/0/version", "").contains("DELETE /0/version"));
        assert!(said("PUT", "/0/members/xyz/attributes", "{}").contains("not supported"));
        assert_eq!(
            said("PUT", "/0/members/1/attributes", "no JSON"),
            "log entry puts a value at /0/members/1/attributes that cannot be read: expected ident \
             at line 1 column 2"
        );
    }

    #[test]
    fn damaged_and_foreign_entries_are_errors() {
        let whole = Command::new(1, put("key")).encode();
        for len in 1..whole.len() {
            let cut = Command::decode(whole.slice(..len));
            assert!(cut.is_err() || cut.is_ok_and(|c| c.id == 0), "cut at {len}");
        }
        assert!(matches!(Command::decode(Bytes::new()), Err(CommandError::Unknown)));
    }
}
