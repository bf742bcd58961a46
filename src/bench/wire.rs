//! Requests written and replies read by hand, in one pass and without a message in between.
//!
//! Only the calls that are measured are here; the few that set a run up go through the generated
//! types. Layout of a gRPC message: one byte "compressed", four bytes length (big endian), protobuf.

use bytes::{BufMut, BytesMut};
use prost::encoding::{decode_varint, encode_varint, encoded_len_varint};

/// What a reply holds that it should not, or lacks.
#[derive(thiserror::Error, Debug, PartialEq, Eq, Clone, Copy)]
#[error("malformed reply: {0}")]
pub struct Malformed(pub &'static str);

/// Bytes before a message in a gRPC stream.
pub const FRAME_HEADER: usize = 5;

/// Appends one gRPC frame whose message `write` appends.
pub fn frame(buf: &mut BytesMut, write: impl FnOnce(&mut BytesMut)) {
    let start = buf.len();
    buf.put_bytes(0, FRAME_HEADER);
    write(buf);
    let len = buf.len() - start - FRAME_HEADER;
    let len = u32::try_from(len).expect("a request is far below 4 GiB");
    buf[start + 1..start + FRAME_HEADER].copy_from_slice(&len.to_be_bytes());
}

fn bytes_field(buf: &mut BytesMut, tag: u8, value: &[u8]) {
    // A proto3 field that is empty is absent.
    if !value.is_empty() {
        buf.put_u8(tag << 3 | 2);
        encode_varint(value.len() as u64, buf);
        buf.put_slice(value);
    }
}

fn bytes_field_len(value: &[u8]) -> usize {
    if value.is_empty() { 0 } else { 1 + encoded_len_varint(value.len() as u64) + value.len() }
}

fn varint_field(buf: &mut BytesMut, tag: u8, value: u64) {
    if value != 0 {
        buf.put_u8(tag << 3);
        encode_varint(value, buf);
    }
}

/// `PutRequest`.
pub fn put(buf: &mut BytesMut, key: &[u8], value: &[u8]) {
    bytes_field(buf, 1, key);
    bytes_field(buf, 2, value);
}

/// One `success` operation of a `TxnRequest` without compares: a put.
pub fn txn_put(buf: &mut BytesMut, key: &[u8], value: &[u8]) {
    let put_len = bytes_field_len(key) + bytes_field_len(value);
    buf.put_u8(2 << 3 | 2); // TxnRequest.success
    encode_varint((1 + encoded_len_varint(put_len as u64) + put_len) as u64, buf);
    buf.put_u8(2 << 3 | 2); // RequestOp.request_put
    encode_varint(put_len as u64, buf);
    put(buf, key, value);
}

/// How a range is asked for, its key apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeShape {
    pub range_end: Vec<u8>,
    /// Most keys in a reply; 0 for no limit.
    pub limit: u64,
    pub serializable: bool,
    pub keys_only: bool,
    pub count_only: bool,
}

/// `RangeRequest`.
pub fn range(buf: &mut BytesMut, key: &[u8], shape: &RangeShape) {
    bytes_field(buf, 1, key);
    bytes_field(buf, 2, &shape.range_end);
    varint_field(buf, 3, shape.limit);
    varint_field(buf, 7, shape.serializable.into());
    varint_field(buf, 8, shape.keys_only.into());
    varint_field(buf, 9, shape.count_only.into());
}

/// `LeaseKeepAliveRequest`.
pub fn keep_alive(buf: &mut BytesMut, lease: i64) {
    varint_field(buf, 1, lease as u64);
}

/// The value of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    /// Four or eight bytes; none of the messages read here has such a field.
    Fixed,
}

/// The fields of a message, in the order they were sent.
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: u64) -> Result<&'a [u8], Malformed> {
        let len = usize::try_from(len).ok().filter(|&len| len <= self.0.len());
        let (taken, rest) =
            self.0.split_at(len.ok_or(Malformed("a field ends after its message"))?);
        self.0 = rest;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64, Malformed> {
        decode_varint(&mut self.0).map_err(|_| Malformed("not a varint"))
    }

    fn field(&mut self) -> Result<(u64, Field<'a>), Malformed> {
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Field::Varint(self.varint()?),
            1 => self.take(8).map(|_| Field::Fixed)?,
            2 => {
                let len = self.varint()?;
                Field::Bytes(self.take(len)?)
            }
            5 => self.take(4).map(|_| Field::Fixed)?,
            _ => return Err(Malformed("unknown wire type")),
        };
        Ok((key >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Field<'a>), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        (!self.0.is_empty()).then(|| self.field())
    }
}

/// Whether a `RangeResponse` found anything: it carries a key, or counts one.
///
/// # Errors
/// If the bytes are not a message.
pub fn range_found(reply: &[u8]) -> Result<bool, Malformed> {
    for field in Fields(reply) {
        match field? {
            (2, Field::Bytes(_)) => return Ok(true),
            (4, Field::Varint(count)) if count > 0 => return Ok(true),
            _ => {}
        }
    }
    Ok(false)
}

/// `TxnResponse.succeeded`.
///
/// # Errors
/// If the bytes are not a message.
pub fn txn_succeeded(reply: &[u8]) -> Result<bool, Malformed> {
    for field in Fields(reply) {
        if let (2, Field::Varint(succeeded)) = field? {
            return Ok(succeeded != 0);
        }
    }
    Ok(false)
}

/// `ID` and `TTL` of a `LeaseKeepAliveResponse`.
///
/// # Errors
/// If the bytes are not a message.
pub fn keep_alive_reply(reply: &[u8]) -> Result<(i64, i64), Malformed> {
    let (mut lease, mut ttl) = (0, 0);
    for field in Fields(reply) {
        match field? {
            (2, Field::Varint(value)) => lease = value as i64,
            (3, Field::Varint(value)) => ttl = value as i64,
            _ => {}
        }
    }
    Ok((lease, ttl))
}

/// A `WatchResponse`, its events still encoded.
#[derive(Default, Debug)]
pub struct WatchReply<'a> {
    pub watch_id: i64,
    pub created: bool,
    pub canceled: bool,
    pub compact_revision: i64,
    pub cancel_reason: &'a [u8],
    message: &'a [u8],
}

impl<'a> WatchReply<'a> {
    /// # Errors
    /// If the bytes are not a message.
    pub fn parse(message: &'a [u8]) -> Result<Self, Malformed> {
        let mut reply = WatchReply { message, ..WatchReply::default() };
        for field in Fields(message) {
            match field? {
                (2, Field::Varint(value)) => reply.watch_id = value as i64,
                (3, Field::Varint(value)) => reply.created = value != 0,
                (4, Field::Varint(value)) => reply.canceled = value != 0,
                (5, Field::Varint(value)) => reply.compact_revision = value as i64,
                (6, Field::Bytes(reason)) => reply.cancel_reason = reason,
                _ => {}
            }
        }
        Ok(reply)
    }

    /// The events, in order.
    pub fn events(&self) -> impl Iterator<Item = Result<WatchEvent<'a>, Malformed>> + use<'a> {
        Fields(self.message).filter_map(|field| match field {
            Ok((11, Field::Bytes(event))) => Some(WatchEvent::parse(event)),
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        })
    }
}

/// What the benchmark reads of an event.
#[derive(Default, Debug, PartialEq, Eq)]
pub struct WatchEvent<'a> {
    pub deleted: bool,
    pub key: &'a [u8],
    pub mod_revision: i64,
    pub value: &'a [u8],
}

impl<'a> WatchEvent<'a> {
    fn parse(message: &'a [u8]) -> Result<Self, Malformed> {
        let mut event = WatchEvent::default();
        for field in Fields(message) {
            match field? {
                (1, Field::Varint(kind)) => event.deleted = kind != 0,
                (2, Field::Bytes(kv)) => {
                    for field in Fields(kv) {
                        match field? {
                            (1, Field::Bytes(key)) => event.key = key,
                            (3, Field::Varint(revision)) => event.mod_revision = revision as i64,
                            (5, Field::Bytes(value)) => event.value = value,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(event)
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use quorate_proto::etcdserverpb as pb;
    use quorate_proto::{KeyValue, mvccpb};

    use super::*;

    /// The message inside the one frame in `buf`.
    fn unframed(buf: &BytesMut) -> &[u8] {
        assert_eq!(buf[0], 0);
        let len = u32::from_be_bytes(buf[1..5].try_into().unwrap()) as usize;
        assert_eq!(buf.len(), FRAME_HEADER + len);
        &buf[FRAME_HEADER..]
    }

    #[test]
    fn requests_are_what_the_generated_types_read() {
        let value = vec![7u8; 300];
        let mut buf = BytesMut::new();
        frame(&mut buf, |buf| put(buf, b"key", &value));
        let read = pb::PutRequest::decode(unframed(&buf)).unwrap();
        assert_eq!(
            read,
            pb::PutRequest { key: "key".into(), value: value.clone().into(), ..Default::default() }
        );

        buf.clear();
        frame(&mut buf, |buf| {
            txn_put(buf, b"a", &value);
            txn_put(buf, b"b", b"");
        });
        let read = pb::TxnRequest::decode(unframed(&buf)).unwrap();
        let puts: Vec<_> = read
            .success
            .iter()
            .map(|op| match op.request.as_ref().unwrap() {
                pb::request_op::Request::RequestPut(put) => (&put.key[..], put.value.len()),
                other => panic!("not a put: {other:?}"),
            })
            .collect();
        assert_eq!(puts, [(&b"a"[..], 300), (b"b", 0)]);
        assert!(read.compare.is_empty() && read.failure.is_empty());

        buf.clear();
        let shape = RangeShape {
            range_end: b"z".to_vec(),
            limit: 500,
            serializable: true,
            keys_only: true,
            count_only: true,
        };
        frame(&mut buf, |buf| range(buf, b"key", &shape));
        let read = pb::RangeRequest::decode(unframed(&buf)).unwrap();
        let expected = pb::RangeRequest {
            key: "key".into(),
            range_end: "z".into(),
            limit: 500,
            serializable: true,
            keys_only: true,
            count_only: true,
            ..Default::default()
        };
        assert_eq!(read, expected);

        buf.clear();
        frame(&mut buf, |buf| keep_alive(buf, -5));
        assert_eq!(pb::LeaseKeepAliveRequest::decode(unframed(&buf)).unwrap().id, -5);
    }

    #[test]
    fn replies_are_read_as_the_generated_types_write_them() {
        let header =
            Some(pb::ResponseHeader { cluster_id: u64::MAX, revision: 9, ..Default::default() });
        let kv = KeyValue {
            key: "k".into(),
            mod_revision: 300,
            value: "v".into(),
            lease: -1,
            ..Default::default()
        };
        let empty = pb::RangeResponse { header, ..Default::default() };
        assert_eq!(range_found(&empty.encode_to_vec()), Ok(false));
        let counted = pb::RangeResponse { count: 3, ..empty.clone() };
        assert_eq!(range_found(&counted.encode_to_vec()), Ok(true));
        let found = pb::RangeResponse { kvs: vec![(&kv).into()], ..empty };
        assert_eq!(range_found(&found.encode_to_vec()), Ok(true));

        let txn = pb::TxnResponse { header, succeeded: true, ..Default::default() };
        assert_eq!(txn_succeeded(&txn.encode_to_vec()), Ok(true));
        assert_eq!(txn_succeeded(&[]), Ok(false));

        let reply = pb::LeaseKeepAliveResponse { header, id: -7, ttl: 60 };
        assert_eq!(keep_alive_reply(&reply.encode_to_vec()), Ok((-7, 60)));

        let put = mvccpb::Event { kv: Some((&kv).into()), ..Default::default() };
        let delete = mvccpb::Event { r#type: 1, ..put.clone() };
        let encoded = pb::WatchResponse {
            header,
            watch_id: -2,
            canceled: true,
            compact_revision: 4,
            cancel_reason: "why".into(),
            events: vec![put, delete],
            ..Default::default()
        }
        .encode_to_vec();
        let reply = WatchReply::parse(&encoded).unwrap();
        assert_eq!((reply.watch_id, reply.created, reply.canceled), (-2, false, true));
        assert_eq!((reply.compact_revision, reply.cancel_reason), (4, &b"why"[..]));
        let events: Vec<_> = reply.events().map(Result::unwrap).collect();
        let event = WatchEvent { deleted: false, key: b"k", mod_revision: 300, value: b"v" };
        assert_eq!(events[1], WatchEvent { deleted: true, ..event });
        assert_eq!(
            events[0],
            WatchEvent { deleted: false, key: b"k", mod_revision: 300, value: b"v" }
        );
    }

    #[test]
    fn cut_replies_are_errors() {
        let kv = KeyValue { key: "k".into(), ..Default::default() };
        let whole =
            pb::RangeResponse { kvs: vec![(&kv).into()], ..Default::default() }.encode_to_vec();
        assert_eq!(
            range_found(&whole[..whole.len() - 1]),
            Err(Malformed("a field ends after its message"))
        );
        assert_eq!(txn_succeeded(&[0x0f]), Err(Malformed("unknown wire type")));
        assert_eq!(keep_alive_reply(&[0xff]), Err(Malformed("not a varint")));
    }
}
