//! Messages to JSON.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use prost::DecodeError;

use super::Json;

/// An object that is being written: its fields, in the order of the calls.
pub struct Object<'a> {
    out: &'a mut Vec<u8>,
    /// What is wrong with a message that is carried unparsed.
    damage: &'a mut Option<DecodeError>,
    empty: bool,
}

impl<'a> Object<'a> {
    pub(super) fn write<T: Json>(
        out: &'a mut Vec<u8>,
        damage: &'a mut Option<DecodeError>,
        message: &T,
    ) {
        out.push(b'{');
        let mut object = Object { out, damage, empty: true };
        message.fields(&mut object);
        object.out.push(b'}');
    }

    /// Notes that a message carried in this one does not decode.
    pub fn damaged(&mut self, error: DecodeError) {
        self.damage.get_or_insert(error);
    }

    fn name(&mut self, name: &str) {
        if !std::mem::take(&mut self.empty) {
            self.out.push(b',');
        }
        self.out.push(b'"');
        // Names of fields need no escapes.
        self.out.extend_from_slice(name.as_bytes());
        self.out.extend_from_slice(b"\":");
    }

    pub fn boolean(&mut self, name: &str, value: bool) {
        self.name(name);
        self.out.extend_from_slice(if value { b"true" } else { b"false" });
    }

    pub fn int64(&mut self, name: &str, value: i64) {
        self.name(name);
        self.out.push(b'"');
        if value < 0 {
            self.out.push(b'-');
        }
        digits(self.out, value.unsigned_abs());
        self.out.push(b'"');
    }

    pub fn uint64(&mut self, name: &str, value: u64) {
        self.name(name);
        self.out.push(b'"');
        digits(self.out, value);
        self.out.push(b'"');
    }

    pub fn uint32(&mut self, name: &str, value: u32) {
        self.name(name);
        digits(self.out, u64::from(value));
    }

    pub fn bytes(&mut self, name: &str, value: &[u8]) {
        self.name(name);
        base64(self.out, value);
    }

    pub fn string(&mut self, name: &str, value: &str) {
        self.name(name);
        string(self.out, value);
    }

    pub fn enumeration(&mut self, name: &str, names: &[(&str, i32)], value: i32) {
        self.name(name);
        enumeration(self.out, names, value);
    }

    pub fn message<T: Json>(&mut self, name: &str, value: &T) {
        self.name(name);
        Object::write(self.out, self.damage, value);
    }

    pub fn messages<T: Json>(&mut self, name: &str, values: &[T]) {
        self.list(name, values, |object, value| Object::write(object.out, object.damage, value));
    }

    pub fn list_of_bytes(&mut self, name: &str, values: &[Bytes]) {
        self.list(name, values, |object, value| base64(object.out, value));
    }

    pub fn list_of_string(&mut self, name: &str, values: &[String]) {
        self.list(name, values, |object, value| string(object.out, value));
    }

    pub fn list_of_enumeration(&mut self, name: &str, names: &[(&str, i32)], values: &[i32]) {
        self.list(name, values, |object, value| enumeration(object.out, names, *value));
    }

    fn list<T>(&mut self, name: &str, values: &[T], item: impl Fn(&mut Self, &T)) {
        let [first, rest @ ..] = values else { return };
        self.name(name);
        self.out.push(b'[');
        item(self, first);
        for value in rest {
            self.out.push(b',');
            item(self, value);
        }
        self.out.push(b']');
    }
}

fn digits(out: &mut Vec<u8>, mut value: u64) {
    let mut buffer = [0; 20];
    let mut at = buffer.len();
    loop {
        at -= 1;
        buffer[at] = b'0' + (value % 10) as u8;
        value /= 10;
        if value == 0 {
            break;
        }
    }
    out.extend_from_slice(&buffer[at..]);
}

fn base64(out: &mut Vec<u8>, value: &[u8]) {
    out.push(b'"');
    let start = out.len();
    out.resize(start + value.len().div_ceil(3) * 4, 0);
    let written = STANDARD.encode_slice(value, &mut out[start..]);
    written.expect("four letters for three bytes are enough");
    out.push(b'"');
}

fn enumeration(out: &mut Vec<u8>, names: &[(&str, i32)], value: i32) {
    match names.iter().find(|(_, number)| *number == value) {
        Some((name, _)) => string(out, name),
        None => {
            // A newer release's value.
            if value < 0 {
                out.push(b'-');
            }
            digits(out, u64::from(value.unsigned_abs()));
        }
    }
}

/// Writes a string with the escapes that JSON asks for, and no others.
pub(super) fn string(out: &mut Vec<u8>, value: &str) {
    out.push(b'"');
    let mut rest = value.as_bytes();
    while let Some(at) = rest.iter().position(|b| matches!(b, b'"' | b'\\' | 0..0x20)) {
        out.extend_from_slice(&rest[..at]);
        out.push(b'\\');
        match rest[at] {
            letter @ (b'"' | b'\\') => out.push(letter),
            0x08 => out.push(b'b'),
            0x0c => out.push(b'f'),
            b'\n' => out.push(b'n'),
            b'\r' => out.push(b'r'),
            b'\t' => out.push(b't'),
            control => {
                const HEX: &[u8; 16] = b"0123456789abcdef";
                out.extend_from_slice(b"u00");
                out.push(HEX[usize::from(control >> 4)]);
                out.push(HEX[usize::from(control & 15)]);
            }
        }
        rest = &rest[at + 1..];
    }
    out.extend_from_slice(rest);
    out.push(b'"');
}
