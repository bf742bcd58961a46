//! Any message comes back from its JSON form as it was.
//!
//! The messages are made from their descriptors, field by field, so that none is left out when one is
//! added: all that is known here of a type is its name.

use std::collections::HashMap;

use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorSet};

use super::*;

/// Draws, each from the one before (splitmix64).
struct Random(u64);

impl Random {
    fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.draw() % end
    }

    fn number(&mut self) -> u64 {
        match self.below(6) {
            0 => 0,
            1 => u64::MAX,
            2 => i64::MAX as u64,
            3 => i64::MIN as u64,
            4 => self.below(300),
            _ => self.draw(),
        }
    }

    fn bytes(&mut self) -> Vec<u8> {
        (0..self.below(12)).map(|_| self.draw() as u8).collect()
    }

    fn text(&mut self) -> String {
        const LETTERS: [char; 12] = [
            'a',
            '"',
            '\\',
            '/',
            '\n',
            '\0',
            '\u{1f}',
            '<',
            'é',
            '\u{2028}',
            '\u{1f600}',
            '\u{7f}',
        ];
        (0..self.below(8)).map(|_| LETTERS[self.below(12) as usize]).collect()
    }
}

struct Schema(HashMap<String, DescriptorProto>);

impl Schema {
    fn new() -> Self {
        fn gather(
            scope: &str,
            found: &DescriptorProto,
            all: &mut HashMap<String, DescriptorProto>,
        ) {
            let name = format!("{scope}.{}", found.name());
            found.nested_type.iter().for_each(|inner| gather(&name, inner, all));
            all.insert(name, found.clone());
        }
        let set = FileDescriptorSet::decode(crate::DESCRIPTORS).unwrap();
        let mut all = HashMap::new();
        for file in &set.file {
            let scope = format!(".{}", file.package());
            file.message_type.iter().for_each(|message| gather(&scope, message, &mut all));
        }
        Schema(all)
    }

    /// The encoding of a message of any content.
    fn message(&self, name: &str, random: &mut Random, depth: u32) -> Vec<u8> {
        let mut out = Vec::new();
        let mut oneofs = HashMap::new();
        for field in &self.0[name].field {
            if let Some(oneof) = field.oneof_index {
                // Of the members of a oneof one is chosen at most.
                let members = self.0[name].field.iter().filter(|f| f.oneof_index == Some(oneof));
                let members: Vec<_> = members.map(FieldDescriptorProto::number).collect();
                let chosen = *oneofs.entry(oneof).or_insert_with(|| {
                    members.get(random.below(members.len() as u64 + 1) as usize).copied()
                });
                if chosen != Some(field.number()) {
                    continue;
                }
            } else if random.below(3) == 0 {
                continue;
            }
            if field.r#type() == Type::Message && depth == 0 {
                continue;
            }
            let repeated = field.label() == Label::Repeated;
            for _ in 0..if repeated { random.below(4) } else { 1 } {
                self.field(field, random, depth, &mut out);
            }
        }
        out
    }

    fn field(
        &self,
        field: &FieldDescriptorProto,
        random: &mut Random,
        depth: u32,
        out: &mut Vec<u8>,
    ) {
        let tag = field.number() as u32;
        let varint = |value: u64, out: &mut Vec<u8>| {
            encode_key(tag, WireType::Varint, out);
            encode_varint(value, out);
        };
        let bytes = match field.r#type() {
            Type::Int64 | Type::Uint64 => return varint(random.number(), out),
            Type::Uint32 => return varint(random.number() & u64::from(u32::MAX), out),
            Type::Bool => return varint(random.below(2), out),
            Type::Enum => {
                // Mostly one that has a name.
                let value = match random.below(8) {
                    0 => random.draw() as i32,
                    _ => random.below(5) as i32,
                };
                return varint(value as i64 as u64, out);
            }
            Type::Bytes => random.bytes(),
            Type::String => random.text().into_bytes(),
            Type::Message => self.message(field.type_name(), random, depth - 1),
            other => panic!("no message of the client API has a field of type {other:?}"),
        };
        encode_key(tag, WireType::LengthDelimited, out);
        encode_varint(bytes.len() as u64, out);
        out.extend(bytes);
    }
}

fn comes_back<T: Json + Message + PartialEq + std::fmt::Debug>(schema: &Schema, name: &str) {
    for seed in 0..200 {
        let bytes = schema.message(name, &mut Random(seed), 4);
        let message =
            T::decode(&bytes[..]).unwrap_or_else(|error| panic!("{name} {seed}: {error}"));
        let mut text = Vec::new();
        encode(&message, &mut text).unwrap_or_else(|error| panic!("{name} {seed}: {error}"));
        let shown = String::from_utf8(text.clone()).expect("JSON is UTF-8");
        let back: T =
            decode(&text).unwrap_or_else(|error| panic!("{name} {seed}: {error} in {shown}"));
        let mut again = Vec::new();
        encode(&back, &mut again).unwrap();
        assert_eq!(text, again, "{name} {seed}");
        // A key and value is carried as it came, and comes back with its fields in their order and
        // without those that have their default: the text is all that can be compared.
        if !shown.contains("\"kv") && !shown.contains("prev_kv") {
            assert_eq!(back, message, "{name} {seed}: {shown}");
        }
    }
}

macro_rules! all {
    ($($package:ident: $($message:ident)*;)*) => {
        #[test]
        fn every_message_comes_back_from_json() {
            let schema = Schema::new();
            let names: HashMap<String, String> = schema
                .0
                .keys()
                .map(|name| (heck::ToUpperCamelCase::to_upper_camel_case(name.as_str()), name.clone()))
                .collect();
            let mut tested = std::collections::BTreeSet::new();
            $($({
                let rust = concat!(".", stringify!($package), ".", stringify!($message));
                let key = heck::ToUpperCamelCase::to_upper_camel_case(rust);
                let name = names.get(&key).unwrap_or_else(|| panic!("no message {rust}"));
                comes_back::<crate::$package::$message>(&schema, name);
                tested.insert(name.clone());
            })*)*
            let carried = |name: &&String| {
                [".etcdserverpb.", ".mvccpb.", ".authpb.", ".v3lockpb.", ".v3electionpb."]
                    .iter()
                    .any(|package| name.starts_with(package))
            };
            let inner = [".etcdserverpb.InternalRaftRequest", ".etcdserverpb.EmptyResponse",
                ".etcdserverpb.InternalAuthenticateRequest", ".etcdserverpb.RequestHeader",
                ".etcdserverpb.Metadata", ".etcdserverpb.DowngradeVersionTestRequest"];
            let missing: Vec<_> = schema
                .0
                .keys()
                .filter(carried)
                .filter(|name| !tested.contains(*name) && !inner.contains(&name.as_str()))
                .collect();
            assert!(missing.is_empty(), "not tested: {missing:?}");
        }
    };
}

all! {
    mvccpb: KeyValue Event;
    authpb: UserAddOptions User Permission Role;
    etcdserverpb: ResponseHeader RangeRequest RangeResponse RangeStreamResponse PutRequest PutResponse DeleteRangeRequest DeleteRangeResponse RequestOp ResponseOp Compare TxnRequest TxnResponse CompactionRequest WatchRequest WatchCreateRequest WatchCancelRequest WatchResponse LeaseGrantRequest LeaseGrantResponse LeaseRevokeRequest LeaseCheckpoint LeaseCheckpointRequest LeaseKeepAliveRequest LeaseKeepAliveResponse LeaseTimeToLiveRequest LeaseTimeToLiveResponse LeaseStatus LeaseLeasesResponse Member MemberAddRequest MemberAddResponse MemberRemoveRequest MemberRemoveResponse MemberUpdateRequest MemberUpdateResponse MemberListRequest MemberListResponse MemberPromoteRequest MemberPromoteResponse AlarmRequest AlarmMember AlarmResponse StatusResponse DowngradeInfo DowngradeRequest DowngradeResponse HashResponse HashKvRequest HashKvResponse SnapshotResponse MoveLeaderRequest AuthStatusResponse AuthenticateRequest AuthenticateResponse AuthUserAddRequest AuthUserGetRequest AuthUserGetResponse AuthUserListResponse AuthUserDeleteRequest AuthUserChangePasswordRequest AuthUserGrantRoleRequest AuthUserRevokeRoleRequest AuthRoleAddRequest AuthRoleGetRequest AuthRoleGetResponse AuthRoleListResponse AuthRoleDeleteRequest AuthRoleGrantPermissionRequest AuthRoleRevokePermissionRequest CompactionResponse LeaseRevokeResponse LeaseCheckpointResponse DefragmentResponse MoveLeaderResponse AuthEnableResponse AuthDisableResponse AuthUserAddResponse AuthUserDeleteResponse AuthUserChangePasswordResponse AuthUserGrantRoleResponse AuthUserRevokeRoleResponse AuthRoleAddResponse AuthRoleDeleteResponse AuthRoleGrantPermissionResponse AuthRoleRevokePermissionResponse HashRequest SnapshotRequest WatchProgressRequest LeaseLeasesRequest DefragmentRequest StatusRequest AuthEnableRequest AuthDisableRequest AuthStatusRequest AuthUserListRequest AuthRoleListRequest EmptyResponse;
    v3lockpb: LockRequest LockResponse UnlockRequest UnlockResponse;
    v3electionpb: CampaignRequest CampaignResponse LeaderKey LeaderRequest LeaderResponse ProclaimRequest ProclaimResponse ResignRequest ResignResponse;
}
