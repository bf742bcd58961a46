//! Where a JSON value ends, in bytes that come in pieces; and whether it is one.

use super::Error;

/// Arrays and objects in each other. As many as etcd's own reader takes.
const NESTING_MAX: usize = 10_000;

/// Follows the bytes of one value.
pub struct Scanner {
    state: State,
    /// The arrays and objects that are open.
    open: Vec<Container>,
}

#[derive(Clone, Copy)]
enum Container {
    Array,
    ObjectName,
    ObjectValue,
}

#[derive(Clone, Copy)]
enum State {
    Value,
    /// Or the end of an array.
    ValueOrEnd,
    Name,
    /// Or the end of an object.
    NameOrEnd,
    /// A value has ended inside an array or object.
    After,
    Text,
    Escape,
    /// So many hexadecimal digits are left.
    Unicode(u8),
    Minus,
    Zero,
    Integer,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
    Word(&'static str, u8),
    Done,
}

impl Default for Scanner {
    fn default() -> Self {
        Scanner { state: State::Value, open: Vec::new() }
    }
}

impl Scanner {
    /// Takes more bytes; answers how many of them belong to the value once it has ended.
    ///
    /// # Errors
    /// At the first byte that no value has there.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Option<usize>, Error> {
        let mut at = 0;
        while let Some(byte) = bytes.get(at) {
            if let State::Text = self.state {
                // Most bytes are inside of strings.
                let rest = &bytes[at..];
                let plain = |b: &u8| !matches!(b, b'"' | b'\\' | 0..0x20);
                let run = rest.iter().position(|b| !plain(b)).unwrap_or(rest.len());
                at += run;
                if run > 0 {
                    continue;
                }
            }
            if !self.step(*byte)? {
                // A number ended with the byte before.
                return Ok(Some(at));
            }
            at += 1;
            if let State::Done = self.state {
                return Ok(Some(at));
            }
        }
        Ok(None)
    }

    /// Takes the end of the bytes.
    ///
    /// # Errors
    /// If the value has not ended.
    pub fn finish(&self) -> Result<(), Error> {
        match self.state {
            State::Done => Ok(()),
            _ if self.at_number_end() && self.open.is_empty() => Ok(()),
            _ => Err(Error("unexpected EOF".to_owned())),
        }
    }

    /// Whether nothing has come but white space.
    pub fn is_fresh(&self) -> bool {
        matches!(self.state, State::Value) && self.open.is_empty()
    }

    fn at_number_end(&self) -> bool {
        use State::{ExponentDigits, Fraction, Integer, Zero};
        matches!(self.state, Zero | Integer | Fraction | ExponentDigits)
    }

    /// Takes a byte; answers false if it comes after the value's end.
    fn step(&mut self, byte: u8) -> Result<bool, Error> {
        let space = matches!(byte, b' ' | b'\t' | b'\r' | b'\n');
        self.state = match (self.state, byte) {
            (State::Value | State::ValueOrEnd | State::Name | State::NameOrEnd, _) if space => {
                self.state
            }
            (State::ValueOrEnd, b']') | (State::NameOrEnd, b'}') => return self.close(),
            (State::Value | State::ValueOrEnd, _) => match byte {
                b'{' => self.enter(Container::ObjectName, State::NameOrEnd)?,
                b'[' => self.enter(Container::Array, State::ValueOrEnd)?,
                b'"' => State::Text,
                b'-' => State::Minus,
                b'0' => State::Zero,
                b'1'..=b'9' => State::Integer,
                b't' => State::Word("true", 1),
                b'f' => State::Word("false", 1),
                b'n' => State::Word("null", 1),
                _ => return Err(invalid(byte, "looking for beginning of value")),
            },
            (State::Name | State::NameOrEnd, b'"') => State::Text,
            (State::Name | State::NameOrEnd, _) => {
                return Err(invalid(byte, "looking for beginning of object key string"));
            }
            (State::Text, b'"') => self.ended(),
            (State::Text, b'\\') => State::Escape,
            (State::Text, 0..0x20) => return Err(invalid(byte, "in string literal")),
            (State::Text, _) => State::Text,
            (State::Escape, b'b' | b'f' | b'n' | b'r' | b't' | b'\\' | b'/' | b'"') => State::Text,
            (State::Escape, b'u') => State::Unicode(4),
            (State::Escape, _) => return Err(invalid(byte, "in string escape code")),
            (State::Unicode(left), b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => match left {
                1 => State::Text,
                _ => State::Unicode(left - 1),
            },
            (State::Unicode(_), _) => {
                return Err(invalid(byte, "in \\u hexadecimal character escape"));
            }
            (State::Minus, b'0') => State::Zero,
            (State::Minus, b'1'..=b'9') => State::Integer,
            (State::Minus, _) => return Err(invalid(byte, "in numeric literal")),
            (State::Integer, b'0'..=b'9') => State::Integer,
            (State::Zero | State::Integer, b'.') => State::Point,
            (State::Point, b'0'..=b'9') => State::Fraction,
            (State::Point, _) => {
                return Err(invalid(byte, "after decimal point in numeric literal"));
            }
            (State::Fraction, b'0'..=b'9') => State::Fraction,
            (State::Zero | State::Integer | State::Fraction, b'e' | b'E') => State::Exponent,
            (State::Exponent, b'+' | b'-') => State::ExponentSign,
            (State::Exponent | State::ExponentSign | State::ExponentDigits, b'0'..=b'9') => {
                State::ExponentDigits
            }
            (State::Exponent | State::ExponentSign, _) => {
                return Err(invalid(byte, "in exponent of numeric literal"));
            }
            (State::Word(word, at), _) => {
                let expected = word.as_bytes()[usize::from(at)];
                if byte != expected {
                    let place = format!("in literal {word} (expecting '{}')", char::from(expected));
                    return Err(invalid(byte, &place));
                }
                match usize::from(at) + 1 == word.len() {
                    true => self.ended(),
                    false => State::Word(word, at + 1),
                }
            }
            (State::Zero | State::Integer | State::Fraction | State::ExponentDigits, _) => {
                self.state = self.ended();
                if let State::Done = self.state {
                    return Ok(false);
                }
                return self.step(byte);
            }
            (State::After, _) if space => State::After,
            (State::After, _) => return self.after(byte),
            (State::Done, _) => return Ok(false),
        };
        Ok(true)
    }

    fn enter(&mut self, container: Container, then: State) -> Result<State, Error> {
        if self.open.len() == NESTING_MAX {
            return Err(Error("exceeded max depth".to_owned()));
        }
        self.open.push(container);
        Ok(then)
    }

    fn ended(&self) -> State {
        if self.open.is_empty() { State::Done } else { State::After }
    }

    fn close(&mut self) -> Result<bool, Error> {
        self.open.pop();
        self.state = self.ended();
        Ok(true)
    }

    /// Takes a byte between two values, or between a name and its value.
    fn after(&mut self, byte: u8) -> Result<bool, Error> {
        let Some(container) = self.open.last_mut() else { return Ok(false) };
        self.state = match (*container, byte) {
            (Container::Array, b',') => State::Value,
            (Container::ObjectName, b':') => {
                *container = Container::ObjectValue;
                State::Value
            }
            (Container::ObjectValue, b',') => {
                *container = Container::ObjectName;
                State::Name
            }
            (Container::Array, b']') | (Container::ObjectValue, b'}') => return self.close(),
            (Container::Array, _) => return Err(invalid(byte, "after array element")),
            (Container::ObjectName, _) => return Err(invalid(byte, "after object key")),
            (Container::ObjectValue, _) => {
                return Err(invalid(byte, "after object key:value pair"));
            }
        };
        Ok(true)
    }
}

/// The words of etcd's own reader.
fn invalid(byte: u8, place: &str) -> Error {
    let shown = match byte {
        b'\'' => "\\'".to_owned(),
        b'"' => "\"".to_owned(),
        // Go shows a byte as the character of that number.
        0x80.. => char::from(byte).to_string(),
        _ => byte.escape_ascii().to_string(),
    };
    Error(format!("invalid character '{shown}' {place}"))
}
