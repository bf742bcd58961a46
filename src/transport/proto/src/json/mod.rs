//! The messages of the client API as JSON, in the mapping of Protocol Buffers as etcd's gateway uses
//! it: names as in the .proto files, 64-bit integers as strings, bytes as base64, defaults left out.
//!
//! A message is written straight into a buffer and read straight from one; nothing is built between.
//! The impls are generated at build time (`build/json.rs`) over [`Object`], which writes, and
//! [`Input`], which reads. [`Scanner`] finds where a value ends in bytes that come in pieces.
//!
//! What follows from the gateway's rules: `null` is an absent field, an unknown field or an unknown name
//! of an enum is passed over, an unknown number of an enum is kept, both ways.

mod read;
mod scan;
mod write;

pub use read::{Input, MESSAGES_MAX};
pub use scan::Scanner;
pub use write::Object;

/// A message with a JSON form.
pub trait Json: Default {
    /// Writes the fields that are set.
    fn fields(&self, out: &mut Object<'_>);

    /// Reads the value of the field `name`; answers false if there is no such field. `seen` has a bit
    /// for each field that the object had before.
    ///
    /// # Errors
    /// What is wrong with the value.
    fn field(&mut self, name: &str, seen: &mut u64, input: &mut Input<'_>) -> Result<bool, Error>;

    /// Reads the whole object.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    fn read(&mut self, input: &mut Input<'_>) -> Result<(), Error> {
        input.object(self)
    }
}

/// Why a text is not the JSON form of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error(String);

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// Appends a message's JSON form.
///
/// # Errors
/// If the message carries a key and value that do not decode; `out` is then of no use.
pub fn encode<T: Json>(message: &T, out: &mut Vec<u8>) -> Result<(), prost::DecodeError> {
    let mut damage = None;
    Object::write(out, &mut damage, message);
    damage.map_or(Ok(()), Err)
}

/// Reads a message from a text that holds one JSON value and, around it, white space.
///
/// # Errors
/// What is wrong, and where.
pub fn decode<T: Json>(text: &[u8]) -> Result<T, Error> {
    let mut scanner = Scanner::default();
    let end = match scanner.feed(text)? {
        Some(end) => end,
        None => scanner.finish().map(|()| text.len())?,
    };
    decode_scanned(&text[..end])
}

/// As [`decode`], of a text that a [`Scanner`] has found to be one value.
///
/// # Errors
/// What is wrong, and where.
pub fn decode_scanned<T: Json>(text: &[u8]) -> Result<T, Error> {
    let mut message = T::default();
    message.read(&mut Input::new(text)?)?;
    Ok(message)
}

mod generated {
    use super::{Error, Input, Json, Object};

    include!(concat!(env!("OUT_DIR"), "/json.rs"));
}

#[cfg(test)]
mod random;
#[cfg(test)]
mod tests;
