//! `mvccpb.KeyValue`, parsed and unparsed.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::encoding::{DecodeContext, WireType, decode_varint, encode_key, encode_varint};
use prost::{DecodeError, Message};

use crate::json::{Error, Input, Json, Object};

/// One revision of a key, parsed.
#[derive(Clone, PartialEq, Eq, Hash, ::prost::Message)]
pub struct KeyValue {
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    /// Main revision of the put that created this generation.
    #[prost(int64, tag = "2")]
    pub create_revision: i64,
    /// Main revision of this put.
    #[prost(int64, tag = "3")]
    pub mod_revision: i64,
    /// Puts since creation, this one included; 1 after a creation.
    #[prost(int64, tag = "4")]
    pub version: i64,
    #[prost(bytes = "bytes", tag = "5")]
    pub value: Bytes,
    /// The lease that the key is attached to; 0 for none.
    #[prost(int64, tag = "6")]
    pub lease: i64,
}

/// The encoding of one `mvccpb.KeyValue`, opaque to the message that carries it.
#[derive(Clone, PartialEq, Eq, Hash, Default, Debug)]
pub struct KeyValueBytes(pub Bytes);

impl KeyValueBytes {
    /// Parses the fields; byte fields share this value's memory.
    ///
    /// # Errors
    /// If the bytes are not a `KeyValue` message.
    pub fn parse(&self) -> Result<KeyValue, DecodeError> {
        KeyValue::decode(self.0.clone())
    }
}

impl From<&KeyValue> for KeyValueBytes {
    fn from(kv: &KeyValue) -> Self {
        KeyValueBytes(kv.encode_to_vec().into())
    }
}

/// prost's own error for a message that ends too early.
fn underflow() -> DecodeError {
    decode_varint(&mut &[][..]).expect_err("an empty buffer holds no varint")
}

impl Message for KeyValueBytes {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        buf.put_slice(&self.0);
    }

    /// Gathers the field as it came, so that a client can hold a reply without parsing it.
    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        _: DecodeContext,
    ) -> Result<(), DecodeError> {
        let mut raw = match std::mem::take(&mut self.0).try_into_mut() {
            Ok(raw) => raw,
            Err(shared) => BytesMut::from(&shared[..]),
        };
        encode_key(tag, wire_type, &mut raw);
        let fixed = |buf: &mut dyn Buf, raw: &mut BytesMut, len: usize| {
            if buf.remaining() < len {
                return Err(underflow());
            }
            raw.extend_from_slice(&buf.copy_to_bytes(len));
            Ok(())
        };
        match wire_type {
            WireType::Varint => encode_varint(decode_varint(buf)?, &mut raw),
            WireType::LengthDelimited => {
                let len = decode_varint(buf)?;
                encode_varint(len, &mut raw);
                let len = usize::try_from(len).map_err(|_| underflow())?;
                fixed(buf, &mut raw, len)?;
            }
            WireType::SixtyFourBit => fixed(buf, &mut raw, 8)?,
            WireType::ThirtyTwoBit => fixed(buf, &mut raw, 4)?,
            WireType::StartGroup | WireType::EndGroup => {
                return Err(underflow());
            }
        }
        self.0 = raw.freeze();
        Ok(())
    }

    fn encoded_len(&self) -> usize {
        self.0.len()
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

impl Json for KeyValue {
    fn fields(&self, out: &mut Object<'_>) {
        if !self.key.is_empty() {
            out.bytes("key", &self.key);
        }
        for (name, value) in [
            ("create_revision", self.create_revision),
            ("mod_revision", self.mod_revision),
            ("version", self.version),
        ] {
            if value != 0 {
                out.int64(name, value);
            }
        }
        if !self.value.is_empty() {
            out.bytes("value", &self.value);
        }
        if self.lease != 0 {
            out.int64("lease", self.lease);
        }
    }

    fn field(&mut self, name: &str, seen: &mut u64, input: &mut Input<'_>) -> Result<bool, Error> {
        let (index, number) = match name {
            "key" | "value" => {
                let (index, bytes) =
                    if name == "key" { (0, &mut self.key) } else { (1, &mut self.value) };
                if input.first(seen, index, name)? {
                    *bytes = input.bytes(name)?;
                }
                return Ok(true);
            }
            "create_revision" | "createRevision" => (2, &mut self.create_revision),
            "mod_revision" | "modRevision" => (3, &mut self.mod_revision),
            "version" => (4, &mut self.version),
            "lease" => (5, &mut self.lease),
            _ => return Ok(false),
        };
        if input.first(seen, index, name)? {
            *number = input.int64(name)?;
        }
        Ok(true)
    }
}

impl Json for KeyValueBytes {
    fn fields(&self, out: &mut Object<'_>) {
        match self.parse() {
            Ok(kv) => kv.fields(out),
            Err(error) => out.damaged(error),
        }
    }

    fn field(&mut self, name: &str, seen: &mut u64, input: &mut Input<'_>) -> Result<bool, Error> {
        let mut kv = KeyValue::default();
        let known = kv.field(name, seen, input)?;
        // Fields of protobuf may follow each other in any order and number.
        self.0 = [&self.0[..], &kv.encode_to_vec()].concat().into();
        Ok(known)
    }

    fn read(&mut self, input: &mut Input<'_>) -> Result<(), Error> {
        let mut kv = KeyValue::default();
        input.object(&mut kv)?;
        *self = KeyValueBytes::from(&kv);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcdserverpb::RangeResponse;

    #[test]
    fn bytes_pass_through_a_message_unchanged() {
        let kv = KeyValue {
            key: "k".into(),
            create_revision: 2,
            mod_revision: 300,
            version: 7,
            value: vec![0u8; 200].into(),
            lease: -9,
        };
        let reply = RangeResponse {
            kvs: vec![KeyValueBytes::from(&kv), KeyValueBytes::default()],
            ..Default::default()
        };
        let decoded = RangeResponse::decode(&reply.encode_to_vec()[..]).unwrap();
        assert_eq!(decoded, reply);
        assert_eq!(decoded.kvs[0].parse().unwrap(), kv);
        assert_eq!(decoded.kvs[1].parse().unwrap(), KeyValue::default());
    }

    #[test]
    fn a_cut_value_is_an_error() {
        let kv = KeyValue { value: "abc".into(), ..Default::default() };
        let mut reply =
            RangeResponse { kvs: vec![(&kv).into()], ..Default::default() }.encode_to_vec();
        reply.truncate(reply.len() - 1);
        assert!(RangeResponse::decode(&reply[..]).is_err());
    }
}
