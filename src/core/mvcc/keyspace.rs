//! How revisions and values look as bytes (formats-and-peers 3.1).

use bytes::Bytes;
use prost::Message;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
use quorate_proto::KeyValueBytes;
use quorate_proto::mvccpb::KeyValue;

use crate::core::types::Revision;

/// Bytes of a revision key: main, `_`, sub.
pub const REVISION_BYTES: usize = 17;
/// The byte that follows a revision key to mark a tombstone.
pub const TOMBSTONE_MARK: u8 = b't';

/// The key under which a change is stored: 17 bytes, 18 for a tombstone.
pub fn revision_key(revision: Revision, tombstone: bool) -> Bytes {
    let mut key = [0; REVISION_BYTES + 1];
    key[..8].copy_from_slice(&revision.main.to_be_bytes());
    key[8] = b'_';
    key[9..17].copy_from_slice(&revision.sub.to_be_bytes());
    key[17] = TOMBSTONE_MARK;
    Bytes::copy_from_slice(&key[..REVISION_BYTES + usize::from(tombstone)])
}

/// Reads a revision key; whether it marks a tombstone comes with it.
pub fn parse_revision_key(key: &[u8]) -> Option<(Revision, bool)> {
    let tombstone = match key.len() {
        REVISION_BYTES => false,
        n if n == REVISION_BYTES + 1 && key[REVISION_BYTES] == TOMBSTONE_MARK => true,
        _ => return None,
    };
    if key[8] != b'_' {
        return None;
    }
    let main = i64::from_be_bytes(key[..8].try_into().ok()?);
    let sub = i64::from_be_bytes(key[9..17].try_into().ok()?);
    Some((Revision { main, sub }, tombstone))
}

/// What rebuilding the index needs of a stored `KeyValue`, without copying anything.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stored<'a> {
    pub key: &'a [u8],
    pub create_revision: i64,
    pub version: i64,
    pub lease: i64,
}

/// Reads the fields of a stored value that the index is rebuilt from.
pub fn peek(mut value: &[u8]) -> Option<Stored<'_>> {
    let mut stored = Stored::default();
    while !value.is_empty() {
        match decode_key(&mut value).ok()? {
            (tag, WireType::Varint) => {
                let n = decode_varint(&mut value).ok()? as i64;
                match tag {
                    2 => stored.create_revision = n,
                    4 => stored.version = n,
                    6 => stored.lease = n,
                    _ => {}
                }
            }
            (tag, WireType::LengthDelimited) => {
                let len = usize::try_from(decode_varint(&mut value).ok()?).ok()?;
                let (body, rest) = value.split_at_checked(len)?;
                if tag == 1 {
                    stored.key = body;
                }
                value = rest;
            }
            (tag, wire_type) => {
                skip_field(wire_type, tag, &mut value, DecodeContext::default()).ok()?;
            }
        }
    }
    Some(stored)
}

/// What is stored under a tombstone's revision key: a `KeyValue` with only the key.
pub fn tombstone_value(key: &Bytes) -> KeyValueBytes {
    KeyValueBytes(KeyValue { key: key.clone(), ..Default::default() }.encode_to_vec().into())
}

/// What a watcher is told of a tombstone: key and `mod_revision`.
pub fn tombstone_event(key: &Bytes, main: i64) -> KeyValueBytes {
    KeyValueBytes::from(&KeyValue { key: key.clone(), mod_revision: main, ..Default::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revision_keys_sort_as_revisions_do_and_read_back() {
        let mut previous = Bytes::new();
        for main in [1, 2, 255, 256, i64::MAX] {
            for sub in [0, 1, 300] {
                let revision = Revision { main, sub };
                for tombstone in [false, true] {
                    let key = revision_key(revision, tombstone);
                    assert_eq!(parse_revision_key(&key), Some((revision, tombstone)));
                    assert!(key > previous);
                    previous = key;
                }
            }
        }
    }

    #[test]
    fn peeking_reads_what_parsing_reads() {
        let kv = KeyValue {
            key: "key".into(),
            create_revision: 300,
            mod_revision: 301,
            version: 2,
            value: vec![9; 1000].into(),
            lease: -5,
        };
        let bytes = kv.encode_to_vec();
        let expected = Stored { key: b"key", create_revision: 300, version: 2, lease: -5 };
        assert_eq!(peek(&bytes), Some(expected));
        assert_eq!(peek(&[]), Some(Stored::default()));
        assert_eq!(peek(&bytes[..bytes.len() - 20]), None);
    }

    #[test]
    fn foreign_keys_are_refused() {
        let good = revision_key(Revision { main: 3, sub: 0 }, true);
        assert_eq!(parse_revision_key(&good[..16]), None);
        assert_eq!(parse_revision_key(b"0123456789012345678"), None);
        let mut wrong_mark = good.to_vec();
        wrong_mark[17] = b'x';
        assert_eq!(parse_revision_key(&wrong_mark), None);
    }
}
