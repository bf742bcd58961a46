//! What a normal log entry holds: etcd's `InternalRaftRequest` (formats-and-peers 5.4), read straight
//! into the one request it carries.

use bytes::{Buf, Bytes, BytesMut};
use prost::encoding::{
    DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint, skip_field,
};
use prost::{DecodeError, Message};
use quorate_proto::etcdserverpb as pb;
use quorate_proto::membershippb;

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

    /// Reads an entry's data; byte fields share its memory.
    ///
    /// # Errors
    /// If it is not a request, or holds none that this version knows.
    pub fn decode(mut data: Bytes) -> Result<Command, CommandError> {
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
    fn damaged_and_foreign_entries_are_errors() {
        let whole = Command::new(1, put("key")).encode();
        for len in 1..whole.len() {
            let cut = Command::decode(whole.slice(..len));
            assert!(cut.is_err() || cut.is_ok_and(|c| c.id == 0), "cut at {len}");
        }
        assert!(matches!(Command::decode(Bytes::new()), Err(CommandError::Unknown)));
    }
}
