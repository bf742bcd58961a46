//! `.snap` files as bytes: a raft snapshot in a checksummed envelope, and the membership that its data
//! carries for readers up to etcd 3.6, in the form of a v2 store.

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;
use prost::Message;
use quorate_proto::{raftpb, snappb};
use serde::{Deserialize, Serialize};

use super::wal::parse_hex16;

/// Why a file is not a snapshot. It is put aside and an older one is taken.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum SnapDamage {
    #[error("file is empty")]
    Empty,
    #[error("envelope does not decode: {0}")]
    Envelope(prost::DecodeError),
    #[error("envelope holds no data or no crc")]
    NoData,
    #[error("crc mismatch: computed {computed:08x}, stored {stored:08x}")]
    Crc { computed: u32, stored: u32 },
    #[error("snapshot does not decode: {0}")]
    Snapshot(prost::DecodeError),
}

/// The name of a snapshot file, `%016x-%016x.snap`: the other order than in a WAL segment's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SnapName {
    pub term: u64,
    pub index: u64,
}

impl SnapName {
    /// The parts of `name`, or `None` if it is not the name of a snapshot.
    pub fn parse(name: &str) -> Option<Self> {
        let (term, index) = name.strip_suffix(".snap")?.split_once('-')?;
        Some(SnapName { term: parse_hex16(term)?, index: parse_hex16(index)? })
    }
}

impl fmt::Display for SnapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{:016x}.snap", self.term, self.index)
    }
}

/// The name of a backend received for the snapshot at `index`.
pub fn db_name(index: u64) -> String {
    format!("{index:016x}.snap.db")
}

/// The index in the name of a received backend.
pub fn parse_db_name(name: &str) -> Option<u64> {
    parse_hex16(name.strip_suffix(".snap.db")?)
}

/// The content of the file for `snapshot`.
pub fn encode(snapshot: &raftpb::Snapshot) -> Vec<u8> {
    let data = Bytes::from(snapshot.encode_to_vec());
    let crc = crc32c::crc32c(&data);
    snappb::Snapshot { crc: Some(crc), data: Some(data) }.encode_to_vec()
}

/// The snapshot in the content of a file.
///
/// # Errors
/// If the content is not what [`encode`] or etcd wrote.
pub fn decode(bytes: Bytes) -> Result<raftpb::Snapshot, SnapDamage> {
    if bytes.is_empty() {
        return Err(SnapDamage::Empty);
    }
    let envelope = snappb::Snapshot::decode(bytes).map_err(SnapDamage::Envelope)?;
    let stored = envelope.crc();
    let data = envelope.data.unwrap_or_default();
    // A checksum of 0 is what a writer that knew nothing of it would leave; etcd refuses it too.
    if data.is_empty() || stored == 0 {
        return Err(SnapDamage::NoData);
    }
    let computed = crc32c::crc32c(&data);
    if computed != stored {
        return Err(SnapDamage::Crc { computed, stored });
    }
    raftpb::Snapshot::decode(data).map_err(SnapDamage::Snapshot)
}

/// The membership that a v2 store holds.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct V2Membership {
    /// Ascending by id when parsed.
    pub members: Vec<V2Member>,
    /// Ids that may not join again; ascending when parsed.
    pub removed: Vec<u64>,
    /// Such as `3.5.0`.
    pub cluster_version: Option<String>,
}

/// One member in a v2 store.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct V2Member {
    pub id: u64,
    pub peer_urls: Vec<String>,
    pub is_learner: bool,
    /// Empty, as are the client URLs, until the member has started for the first time.
    pub name: String,
    pub client_urls: Vec<String>,
}

/// Why the data of a snapshot is not a v2 store with a membership.
#[derive(thiserror::Error, Debug)]
pub enum V2StoreError {
    #[error("v2 store does not parse: {0}")]
    Json(#[source] serde_json::Error),
    #[error("v2 store: {path} is not a member id in hex")]
    Id { path: String },
    #[error("v2 store: {path} does not parse: {source}")]
    Value {
        path: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("v2 store: {path} is missing")]
    Missing { path: String },
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct StoreOut {
    root: Node,
    current_index: u64,
    current_version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Node {
    path: String,
    created_index: u64,
    modified_index: u64,
    expire_time: String,
    value: String,
    /// `None` for a leaf.
    children: Option<BTreeMap<String, Node>>,
}

impl Default for Node {
    fn default() -> Self {
        Node {
            path: String::new(),
            created_index: 0,
            modified_index: 0,
            // The zero of Go's clock: never.
            expire_time: "0001-01-01T00:00:00Z".to_owned(),
            value: String::new(),
            children: None,
        }
    }
}

/// Only the way to the membership is read: the rest is the users' data, of any size and depth, and
/// is skipped without recursion.
#[derive(Deserialize)]
struct StoreIn {
    #[serde(rename = "Root")]
    root: RootIn,
}

#[derive(Deserialize)]
struct RootIn {
    #[serde(rename = "Children")]
    children: Option<NamespacesIn>,
}

#[derive(Deserialize)]
struct NamespacesIn {
    #[serde(rename = "0")]
    cluster: Option<Node>,
}

#[derive(Serialize, Deserialize, Default)]
struct RaftAttributes {
    #[serde(rename = "peerURLs")]
    peer_urls: Option<Vec<String>>,
    #[serde(rename = "isLearner", default, skip_serializing_if = "std::ops::Not::not")]
    is_learner: bool,
}

#[derive(Serialize, Deserialize, Default)]
struct Attributes {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    name: String,
    #[serde(rename = "clientURLs", skip_serializing_if = "Option::is_none")]
    client_urls: Option<Vec<String>>,
}

impl V2Membership {
    /// The JSON of a v2 store that holds this membership and nothing else: the `data` of a snapshot.
    pub fn to_v2_store(&self) -> Vec<u8> {
        let mut index = 0;
        let mut root = Node { path: "/".to_owned(), ..directory() };
        for namespace in ["/0", "/1"] {
            insert(&mut root, namespace, None, &mut index);
        }
        for member in &self.members {
            let at = format!("/0/members/{:x}", member.id);
            let raft = RaftAttributes {
                peer_urls: Some(member.peer_urls.clone()),
                is_learner: member.is_learner,
            };
            insert(&mut root, &format!("{at}/raftAttributes"), Some(json(&raft)), &mut index);
            if !member.name.is_empty() || !member.client_urls.is_empty() {
                let urls = &member.client_urls;
                let attributes = Attributes {
                    name: member.name.clone(),
                    client_urls: (!urls.is_empty()).then(|| urls.clone()),
                };
                insert(&mut root, &format!("{at}/attributes"), Some(json(&attributes)), &mut index);
            }
        }
        for id in &self.removed {
            let at = format!("/0/removed_members/{id:x}");
            insert(&mut root, &at, Some(String::new()), &mut index);
        }
        if let Some(version) = &self.cluster_version {
            insert(&mut root, "/0/version", Some(version.clone()), &mut index);
        }
        json(&StoreOut { root, current_index: index, current_version: 2 }).into_bytes()
    }

    /// The membership in the JSON of a v2 store; everything else in it is ignored.
    ///
    /// # Errors
    /// If it is no v2 store, or a member in it cannot be understood.
    pub fn from_v2_store(data: &[u8]) -> Result<Self, V2StoreError> {
        let store: StoreIn = serde_json::from_slice(data).map_err(V2StoreError::Json)?;
        let mut cluster = store
            .root
            .children
            .and_then(|namespaces| namespaces.cluster)
            .and_then(|cluster| cluster.children)
            .unwrap_or_default();
        let mut children =
            |name: &str| cluster.remove(name).and_then(|node| node.children).unwrap_or_default();
        let mut membership = V2Membership::default();
        for (name, node) in children("members") {
            membership.members.push(member(&name, node)?);
        }
        for name in children("removed_members").into_keys() {
            membership.removed.push(parse_id(&name, "/0/removed_members")?);
        }
        membership.members.sort_unstable_by_key(|member| member.id);
        membership.removed.sort_unstable();
        membership.cluster_version = cluster.remove("version").map(|node| node.value);
        Ok(membership)
    }
}

fn member(name: &str, node: Node) -> Result<V2Member, V2StoreError> {
    let id = parse_id(name, "/0/members")?;
    let mut leaves = node.children.unwrap_or_default();
    let path = format!("/0/members/{name}/raftAttributes");
    let Some(leaf) = leaves.remove("raftAttributes") else {
        return Err(V2StoreError::Missing { path });
    };
    let raft: RaftAttributes = parse(&leaf.value, path)?;
    let attributes: Attributes = match leaves.remove("attributes") {
        Some(leaf) => parse(&leaf.value, format!("/0/members/{name}/attributes"))?,
        None => Attributes::default(),
    };
    Ok(V2Member {
        id,
        peer_urls: raft.peer_urls.unwrap_or_default(),
        is_learner: raft.is_learner,
        name: attributes.name,
        client_urls: attributes.client_urls.unwrap_or_default(),
    })
}

fn parse<'a, T: Deserialize<'a>>(text: &'a str, path: String) -> Result<T, V2StoreError> {
    serde_json::from_str(text).map_err(|source| V2StoreError::Value { path, source })
}

fn parse_id(name: &str, below: &str) -> Result<u64, V2StoreError> {
    let digits = (1..=16).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_hexdigit());
    let id = if digits { u64::from_str_radix(name, 16).ok() } else { None };
    id.ok_or_else(|| V2StoreError::Id { path: format!("{below}/{name}") })
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("strings, numbers and maps with text keys have a JSON form")
}

fn directory() -> Node {
    Node { children: Some(BTreeMap::new()), ..Node::default() }
}

/// Puts a leaf, or a directory if `value` is `None`, at `path`, with the directories above it.
fn insert(root: &mut Node, path: &str, value: Option<String>, index: &mut u64) {
    *index += 1;
    let mut node = root;
    let mut so_far = String::new();
    for part in path.split('/').skip(1) {
        so_far = format!("{so_far}/{part}");
        let children = node.children.get_or_insert_default();
        node = children.entry(part.to_owned()).or_insert_with(|| Node {
            path: so_far.clone(),
            created_index: *index,
            modified_index: *index,
            ..directory()
        });
    }
    if let Some(value) = value {
        node.value = value;
        node.children = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot() -> raftpb::Snapshot {
        raftpb::Snapshot {
            data: membership().to_v2_store().into(),
            metadata: Some(raftpb::SnapshotMetadata {
                conf_state: Some(raftpb::ConfState { voters: vec![1, 2], ..Default::default() }),
                index: 70,
                term: 3,
            }),
        }
    }

    fn membership() -> V2Membership {
        V2Membership {
            members: vec![
                V2Member {
                    id: 1,
                    peer_urls: vec!["http://a:2380".into(), "http://b:2380".into()],
                    ..Default::default()
                },
                V2Member {
                    id: u64::MAX,
                    peer_urls: vec!["https://[::1]:2380".into()],
                    is_learner: true,
                    name: "q\"uote\u{1F980}".into(),
                    client_urls: vec!["http://c:2379".into()],
                },
            ],
            removed: vec![5, 0xabcd_ef01_2345_6789],
            cluster_version: Some("3.5.0".into()),
        }
    }

    #[test]
    fn a_snapshot_comes_back_and_damage_is_found() {
        let bytes = encode(&snapshot());
        assert_eq!(decode(bytes.clone().into()), Ok(snapshot()));
        assert_eq!(decode(Bytes::new()), Err(SnapDamage::Empty));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x20;
            // Byte 5 ends the crc's varint, which has room for more than 32 bits.
            let outcome = decode(damaged.into());
            assert!(outcome.is_err() || at == 5 && outcome == Ok(snapshot()), "byte {at}");
            assert!(decode(bytes[..at].to_vec().into()).is_err(), "cut at {at}");
        }
        let empty = snappb::Snapshot { crc: Some(1), data: None }.encode_to_vec();
        assert_eq!(decode(empty.into()), Err(SnapDamage::NoData));
        let no_crc = snappb::Snapshot { crc: None, data: Some("x".into()) }.encode_to_vec();
        assert_eq!(decode(no_crc.into()), Err(SnapDamage::NoData));
    }

    #[test]
    fn names() {
        let name = SnapName { term: 2, index: 0x186a2 };
        assert_eq!(name.to_string(), "0000000000000002-00000000000186a2.snap");
        assert_eq!(SnapName::parse(&name.to_string()), Some(name));
        assert_eq!(SnapName::parse("0000000000000002-00000000000186a2.snap.broken"), None);
        assert_eq!(SnapName::parse("00000000000186a2.snap.db"), None);
        assert_eq!(db_name(0x186a2), "00000000000186a2.snap.db");
        assert_eq!(parse_db_name("00000000000186a2.snap.db"), Some(0x186a2));
        assert_eq!(parse_db_name("db"), None);
    }

    #[test]
    fn a_membership_comes_back() {
        for membership in [membership(), V2Membership::default()] {
            let json = membership.to_v2_store();
            assert_eq!(V2Membership::from_v2_store(&json).unwrap(), membership);
        }
    }

    #[test]
    fn the_json_is_that_of_a_v2_store() {
        let one = V2Membership {
            members: vec![V2Member {
                id: 0xab,
                peer_urls: vec!["http://a:1".into()],
                ..Default::default()
            }],
            ..Default::default()
        };
        let text = String::from_utf8(one.to_v2_store()).unwrap();
        let never = r#""ExpireTime":"0001-01-01T00:00:00Z","Value":"#;
        assert_eq!(
            text,
            format!(
                r#"{{"Root":{{"Path":"/","CreatedIndex":0,"ModifiedIndex":0,{never}"","Children":{{"0":{{"Path":"/0","CreatedIndex":1,"ModifiedIndex":1,{never}"","Children":{{"members":{{"Path":"/0/members","CreatedIndex":3,"ModifiedIndex":3,{never}"","Children":{{"ab":{{"Path":"/0/members/ab","CreatedIndex":3,"ModifiedIndex":3,{never}"","Children":{{"raftAttributes":{{"Path":"/0/members/ab/raftAttributes","CreatedIndex":3,"ModifiedIndex":3,{never}"{{\"peerURLs\":[\"http://a:1\"]}}","Children":null}}}}}}}}}}}}}},"1":{{"Path":"/1","CreatedIndex":2,"ModifiedIndex":2,{never}"","Children":{{}}}}}}}},"CurrentIndex":3,"CurrentVersion":2}}"#
            )
        );
    }

    #[test]
    fn what_is_not_a_membership_is_refused_with_its_place() {
        let refuse = |text: &str| V2Membership::from_v2_store(text.as_bytes()).unwrap_err();
        assert!(matches!(refuse("{}"), V2StoreError::Json(_)));
        let members = |inside: &str| {
            refuse(&format!(
                r#"{{"Root":{{"Children":{{"0":{{"Children":{{"members":{{"Children":{inside}}}}}}}}}}}}}"#
            ))
            .to_string()
        };
        assert_eq!(members(r#"{"xyz":{}}"#), "v2 store: /0/members/xyz is not a member id in hex");
        assert_eq!(
            members(r#"{"ab":{"Children":{}}}"#),
            "v2 store: /0/members/ab/raftAttributes is missing"
        );
        assert!(
            members(r#"{"ab":{"Children":{"raftAttributes":{"Value":"["}}}}"#)
                .starts_with("v2 store: /0/members/ab/raftAttributes does not parse")
        );
    }

    #[test]
    fn deep_user_data_is_skipped() {
        let deep = format!("{}null{}", r#"{"Children":{"x":"#.repeat(5000), "}}".repeat(5000));
        let text = format!(r#"{{"Root":{{"Children":{{"1":{deep}}}}},"Stats":{{}}}}"#);
        assert_eq!(V2Membership::from_v2_store(text.as_bytes()).unwrap(), V2Membership::default());
    }

    #[test]
    fn no_mutation_makes_a_reader_panic() {
        let file = encode(&snapshot());
        let store = membership().to_v2_store();
        let mut random = 0x2545_f491_4f6c_dd1du64;
        let mut next = |bound: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random % bound as u64) as usize
        };
        let mut refused = 0;
        for _ in 0..100_000 {
            let mut file = file.clone();
            let mut store = store.clone();
            for bytes in [&mut file, &mut store] {
                let at = next(bytes.len());
                match next(3) {
                    0 => bytes[at] ^= 1 << next(8),
                    1 => bytes[at] = next(256) as u8,
                    _ => bytes.truncate(at),
                }
            }
            refused += usize::from(decode(file.into()).is_err());
            refused += usize::from(V2Membership::from_v2_store(&store).is_err());
        }
        assert!(refused > 100_000);
    }
}
