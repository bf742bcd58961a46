//! JSON to messages.

use std::borrow::Cow;

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;

use super::{Error, Json};

/// Messages in each other, the outermost counted. No more come through the protobuf reader of whoever
/// this message is sent to, which also bounds what any walk over a message needs of the stack.
pub const MESSAGES_MAX: usize = 101;

/// A text that is being read.
pub struct Input<'a> {
    text: &'a str,
    at: usize,
    /// Messages that are open.
    depth: usize,
}

/// What a value begins with.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Token {
    Object,
    Array,
    Text,
    Number,
    True,
    False,
    Null,
    /// No value.
    Other,
}

impl<'a> Input<'a> {
    pub(super) fn new(text: &'a [u8]) -> Result<Self, Error> {
        match std::str::from_utf8(text) {
            Ok(text) => Ok(Input { text, at: 0, depth: 0 }),
            Err(error) => {
                let known = std::str::from_utf8(&text[..error.valid_up_to()]).unwrap_or_default();
                let input = Input { text: known, at: known.len(), depth: 0 };
                Err(input.wrong(known.len(), "invalid UTF-8"))
            }
        }
    }

    /// An error at a place.
    fn wrong(&self, at: usize, what: &str) -> Error {
        let before = &self.text[..at];
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().map_or(0, |last| last.chars().count()) + 1;
        Error(format!("proto: (line {line}:{column}): {what}"))
    }

    fn unexpected(&self) -> Error {
        let token = self.token_text();
        self.wrong(self.at, &format!("unexpected token {token}"))
    }

    /// The token that is next, for an error: a number or a word to its end, else its first letter.
    fn token_text(&self) -> &'a str {
        let rest = &self.text[self.at..];
        match self.token() {
            Token::Text => {
                let mut copy = Input { text: self.text, at: self.at, depth: 0 };
                copy.skip();
                &self.text[self.at..copy.at]
            }
            Token::Object | Token::Array | Token::Other => {
                let end = rest.chars().next().map_or(0, char::len_utf8);
                &rest[..end]
            }
            _ => &rest[..rest.find(ends_scalar).unwrap_or(rest.len())],
        }
    }

    fn byte(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn space(&mut self) {
        while let Some(b' ' | b'\t' | b'\r' | b'\n') = self.byte() {
            self.at += 1;
        }
    }

    /// The token at this place, which white space does not come before.
    fn token(&self) -> Token {
        match self.byte() {
            Some(b'{') => Token::Object,
            Some(b'[') => Token::Array,
            Some(b'"') => Token::Text,
            Some(b'-' | b'0'..=b'9') => Token::Number,
            Some(b't') => Token::True,
            Some(b'f') => Token::False,
            Some(b'n') => Token::Null,
            _ => Token::Other,
        }
    }

    /// Takes one byte of punctuation.
    fn take(&mut self, byte: u8) -> Result<(), Error> {
        self.space();
        if self.byte() != Some(byte) {
            return Err(self.unexpected());
        }
        self.at += 1;
        Ok(())
    }

    /// Whether `byte` is next; it is taken then.
    fn takes(&mut self, byte: u8) -> bool {
        self.space();
        let found = self.byte() == Some(byte);
        self.at += usize::from(found);
        found
    }

    /// Passes over a value, however deep.
    fn skip(&mut self) {
        let mut scanner = super::Scanner::default();
        let rest = &self.text.as_bytes()[self.at..];
        self.at += match scanner.feed(rest) {
            Ok(Some(end)) => end,
            // The whole text has been found to be JSON: this is a number that ends it.
            Ok(None) | Err(_) => rest.len(),
        };
    }

    /// Reads an object into a message.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn object<T: Json>(&mut self, message: &mut T) -> Result<(), Error> {
        self.space();
        if self.token() != Token::Object {
            return Err(self.unexpected());
        }
        if self.depth == MESSAGES_MAX {
            return Err(self.wrong(self.at, "exceeded max recursion depth"));
        }
        self.depth += 1;
        self.at += 1;
        let mut seen = 0;
        if !self.takes(b'}') {
            loop {
                self.space();
                let start = self.at;
                if self.token() != Token::Text {
                    return Err(self.unexpected());
                }
                let name = self.text()?;
                self.take(b':')?;
                self.space();
                // A null and its name are as good as absent, but not a second time.
                if !message
                    .field(&name, &mut seen, self)
                    .map_err(|error| self.named(error, start))?
                {
                    self.skip();
                }
                if !self.takes(b',') {
                    break;
                }
            }
            self.take(b'}')?;
        }
        self.depth -= 1;
        Ok(())
    }

    /// Gives an error that knows no place the place `at`.
    fn named(&self, error: Error, at: usize) -> Error {
        match error.0.strip_prefix(PLACELESS) {
            Some(what) => self.wrong(at, what),
            None => error,
        }
    }

    /// Notes that field `index` is here; answers whether it has a value, which is then next.
    ///
    /// # Errors
    /// If the object had it before.
    pub fn first(&mut self, seen: &mut u64, index: u32, name: &str) -> Result<bool, Error> {
        let bit = 1 << index;
        if *seen & bit != 0 {
            return Err(Error(format!("{PLACELESS}duplicate field {name:?}")));
        }
        *seen |= bit;
        if self.token() == Token::Null {
            self.skip();
            return Ok(false);
        }
        Ok(true)
    }

    /// Checks that no other member of a oneof is set.
    ///
    /// # Errors
    /// If one is.
    pub fn alone(&self, set: bool, oneof: &str, name: &str) -> Result<(), Error> {
        if set {
            let what = format!("error parsing {name:?}, oneof {oneof} is already set");
            return Err(Error(format!("{PLACELESS}{what}")));
        }
        Ok(())
    }

    /// Reads a message inside of another.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn message<T: Json>(&mut self, message: &mut T) -> Result<(), Error> {
        message.read(self)
    }

    /// Reads an array, of which `item` reads each element.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn list(
        &mut self,
        mut item: impl FnMut(&mut Self) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.take(b'[')?;
        if self.takes(b']') {
            return Ok(());
        }
        loop {
            self.space();
            item(self)?;
            if !self.takes(b',') {
                return self.take(b']');
            }
        }
    }

    fn invalid(&self, at: usize, kind: &str, name: &str) -> Error {
        let shown = Input { text: self.text, at, depth: 0 };
        let value = shown.token_text();
        self.wrong(at, &format!("invalid value for {kind} field {name}: {value}"))
    }

    /// # Errors
    /// If the value is none.
    pub fn boolean(&mut self, name: &str) -> Result<bool, Error> {
        let at = self.at;
        let value = match self.token() {
            Token::True => true,
            Token::False => false,
            _ => return Err(self.invalid(at, "bool", name)),
        };
        self.skip();
        Ok(value)
    }

    /// # Errors
    /// If the value is none, or out of range.
    pub fn int64(&mut self, name: &str) -> Result<i64, Error> {
        self.integer("int64", name)
    }

    /// # Errors
    /// If the value is none, or out of range.
    pub fn uint64(&mut self, name: &str) -> Result<u64, Error> {
        self.integer("uint64", name)
    }

    /// # Errors
    /// If the value is none, or out of range.
    pub fn uint32(&mut self, name: &str) -> Result<u32, Error> {
        self.integer("uint32", name)
    }

    /// Reads a number, or a string that holds one.
    fn integer<T: TryFrom<i128>>(&mut self, kind: &str, name: &str) -> Result<T, Error> {
        let at = self.at;
        let text = match self.token() {
            Token::Number => {
                self.skip();
                Cow::Borrowed(&self.text[at..self.at])
            }
            Token::Text => self.text()?,
            _ => return Err(self.invalid(at, kind, name)),
        };
        let value = integer(&text).and_then(|value| T::try_from(value).ok());
        value.ok_or_else(|| self.invalid(at, kind, name))
    }

    /// # Errors
    /// If the value is no string, or not of base64.
    pub fn bytes(&mut self, name: &str) -> Result<Bytes, Error> {
        let at = self.at;
        if self.token() != Token::Text {
            return Err(self.invalid(at, "bytes", name));
        }
        let text = self.text()?;
        match from_base64(text.as_bytes()) {
            Some(bytes) => Ok(bytes.into()),
            None => Err(self.invalid(at, "bytes", name)),
        }
    }

    /// # Errors
    /// If the value is no string.
    pub fn string(&mut self, name: &str) -> Result<String, Error> {
        match self.token() {
            Token::Text => self.text().map(Cow::into_owned),
            _ => Err(self.invalid(self.at, "string", name)),
        }
    }

    /// Reads a value of an enum; `None` for a name that it does not have, which a newer client may
    /// know.
    ///
    /// # Errors
    /// If the value is no name and no number.
    pub fn enumeration(&mut self, name: &str, names: &[(&str, i32)]) -> Result<Option<i32>, Error> {
        let at = self.at;
        match self.token() {
            Token::Text => {
                let text = self.text()?;
                Ok(names.iter().find(|(name, _)| *name == text).map(|(_, number)| *number))
            }
            Token::Number => self.integer("enum", name).map(Some),
            _ => Err(self.invalid(at, "enum", name)),
        }
    }

    /// Reads a string, which is next.
    fn text(&mut self) -> Result<Cow<'a, str>, Error> {
        let start = self.at + 1;
        let bytes = self.text.as_bytes();
        let find = |from: usize| {
            let found = bytes[from..].iter().position(|b| matches!(b, b'"' | b'\\'));
            found.map(|run| from + run).ok_or_else(|| self.unexpected())
        };
        let mut end = find(start)?;
        if bytes[end] == b'"' {
            self.at = end + 1;
            return Ok(Cow::Borrowed(&self.text[start..end]));
        }
        let mut out = String::with_capacity(end - start + 16);
        let mut from = start;
        while bytes[end] != b'"' {
            out.push_str(&self.text[from..end]);
            let escape = bytes.get(end + 1);
            from = end + 2;
            match escape {
                Some(b'b') => out.push('\u{8}'),
                Some(b'f') => out.push('\u{c}'),
                Some(b'n') => out.push('\n'),
                Some(b'r') => out.push('\r'),
                Some(b't') => out.push('\t'),
                Some(letter @ (b'"' | b'\\' | b'/')) => out.push(char::from(*letter)),
                Some(b'u') => {
                    let (letter, length) = unicode(&bytes[end..])
                        .ok_or_else(|| self.wrong(end, "invalid escape code in a string"))?;
                    out.push(letter);
                    from = end + length;
                }
                _ => return Err(self.wrong(end, "invalid escape code in a string")),
            }
            end = find(from)?;
        }
        out.push_str(&self.text[from..end]);
        self.at = end + 1;
        Ok(Cow::Owned(out))
    }
}

/// Begins an error whose place is that of the field's name.
const PLACELESS: &str = "\0";

fn ends_scalar(letter: char) -> bool {
    matches!(letter, ' ' | '\t' | '\r' | '\n' | ',' | ']' | '}' | ':')
}

/// The character of an escape that begins the bytes, and the escape's length.
fn unicode(bytes: &[u8]) -> Option<(char, usize)> {
    let unit = |at: usize| {
        let digits = bytes.get(at..at + 6)?.strip_prefix(b"\\u")?;
        u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    };
    let first = unit(0)?;
    if let Some(letter) = char::from_u32(first) {
        return Some((letter, 6));
    }
    let second = unit(6)?;
    if !(0xd800..0xdc00).contains(&first) || !(0xdc00..0xe000).contains(&second) {
        return None;
    }
    char::from_u32(0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00)).map(|c| (c, 12))
}

/// The integer that a JSON number stands for, which may have a fraction of zeros and an exponent.
fn integer(text: &str) -> Option<i128> {
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (mantissa, exponent) = match text.find(['e', 'E']) {
        Some(at) => {
            let exponent = &text[at + 1..];
            let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
            if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                return None;
            }
            (&text[..at], exponent.strip_prefix('+').unwrap_or(exponent).parse::<i32>().ok()?)
        }
        None => (text, 0),
    };
    let (whole, fraction) = match mantissa.split_once('.') {
        Some((_, "")) => return None,
        Some(parts) => parts,
        None => (mantissa, ""),
    };
    let leading_zero = whole.len() > 1 && whole.starts_with('0');
    let plain = |digits: &str| digits.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || leading_zero || !plain(whole) || !plain(fraction) {
        return None;
    }
    // The point goes where the exponent says: so many digits are before it.
    let point = i64::try_from(whole.len()).ok()? + i64::from(exponent);
    let digits = || whole.bytes().chain(fraction.bytes());
    let point = usize::try_from(point.max(0)).ok()?;
    if digits().skip(point).any(|digit| digit != b'0') {
        return None;
    }
    let mut value = digits()
        .take(point)
        .try_fold(0i128, |sum, digit| sum.checked_mul(10)?.checked_add(i128::from(digit - b'0')))?;
    for _ in whole.len() + fraction.len()..point {
        if value == 0 {
            break;
        }
        value = value.checked_mul(10)?;
    }
    Some(if negative { -value } else { value })
}

/// Reads base64 of either alphabet, padded or not.
fn from_base64(text: &[u8]) -> Option<Vec<u8>> {
    const fn engine(alphabet: &alphabet::Alphabet, padded: bool) -> GeneralPurpose {
        let padding = match padded {
            true => DecodePaddingMode::RequireCanonical,
            false => DecodePaddingMode::RequireNone,
        };
        let config = GeneralPurposeConfig::new()
            .with_decode_allow_trailing_bits(true)
            .with_decode_padding_mode(padding);
        GeneralPurpose::new(alphabet, config)
    }
    const STANDARD: [GeneralPurpose; 2] =
        [engine(&alphabet::STANDARD, false), engine(&alphabet::STANDARD, true)];
    const URL_SAFE: [GeneralPurpose; 2] =
        [engine(&alphabet::URL_SAFE, false), engine(&alphabet::URL_SAFE, true)];
    let padded = usize::from(text.len() % 4 == 0);
    let decode = |text: &[u8]| match STANDARD[padded].decode(text) {
        Ok(bytes) => Some(bytes),
        Err(_) if text.iter().any(|b| matches!(b, b'-' | b'_')) => {
            URL_SAFE[padded].decode(text).ok()
        }
        Err(_) => None,
    };
    decode(text).or_else(|| {
        // Lines may be broken, as MIME does it.
        let broken = |b: &u8| matches!(b, b'\r' | b'\n');
        if !text.iter().any(broken) {
            return None;
        }
        let whole: Vec<u8> = text.iter().copied().filter(|b| !broken(b)).collect();
        decode(&whole)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_integers_in_any_spelling() {
        for (text, value) in [
            ("0", Some(0)),
            ("-0", Some(0)),
            ("12", Some(12)),
            ("1e3", Some(1000)),
            ("1E+3", Some(1000)),
            ("1.5e1", Some(15)),
            ("100.00", Some(100)),
            ("10e-1", Some(1)),
            ("-9223372036854775808", Some(i128::from(i64::MIN))),
            ("0e999999999", Some(0)),
            ("1e999999999", None),
            ("1.5", None),
            ("1e-1", None),
            ("01", None),
            ("", None),
            ("-", None),
            ("+1", None),
            ("1.", None),
            (".5", None),
            ("1e", None),
            ("1e+-1", None),
            ("0x1", None),
            (" 1", None),
        ] {
            assert_eq!(integer(text), value, "{text:?}");
        }
    }

    #[test]
    fn base64_comes_in_both_alphabets_with_or_without_padding() {
        for (text, bytes) in [
            ("", Some(&b""[..])),
            ("+/8=", Some(&[0xfb, 0xff])),
            ("-_8=", Some(&[0xfb, 0xff])),
            ("+/8", Some(&[0xfb, 0xff])),
            ("-_8", Some(&[0xfb, 0xff])),
            ("YW\nJj", Some(b"abc")),
            ("YR==", Some(b"a")),
            ("+_8=", None),
            ("YQ=", None),
            ("Y", None),
            ("YQ==YQ==", None),
            ("a b=", None),
        ] {
            assert_eq!(from_base64(text.as_bytes()).as_deref(), bytes, "{text:?}");
        }
    }
}
