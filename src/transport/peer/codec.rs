//! What travels on the two streams between members, as bytes (formats-and-peers 6.3).
//!
//! A message stream is a row of messages, each behind its length. A msgapp stream leaves out what its
//! reader knows already: sender and receiver, and where entries begin that follow those sent before.
//! So both of its ends keep a position (term and index) per connection.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message as _;
use quorate_proto::raftpb::{Entry, EntryType, Message};

use crate::core::raft::{MSG_APP, MSG_HEARTBEAT};
use crate::core::types::MemberId;

/// The largest message, or entry, that is taken from a stream.
pub const MESSAGE_BYTES_MAX: usize = 512 << 20;
/// The highest message type that members exchange, `MsgPreVoteResp`.
const MESSAGE_TYPE_MAX: u32 = 18;

const LINK_HEARTBEAT: u8 = 0;
const ENTRIES: u8 = 1;
const MESSAGE: u8 = 2;

/// Why the bytes of a stream, or of a posted message, are not raft messages. A stream cannot be read
/// on after any of these.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum CodecError {
    #[error("message of {bytes} bytes is larger than {MESSAGE_BYTES_MAX}")]
    TooLarge { bytes: u64 },
    #[error("message does not decode: {0}")]
    Malformed(#[from] prost::DecodeError),
    #[error("unknown message type {0}")]
    UnknownType(u32),
    #[error("entry {index} has unknown type {kind}")]
    UnknownEntryType { index: u64, kind: i32 },
    #[error("msgapp stream has no form {0}")]
    UnknownForm(u8),
    #[error("message of type {0} on the msgapp stream")]
    NotMsgApp(u32),
}

/// Which of the two streams.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum StreamKind {
    /// Messages of every kind.
    Message,
    /// `MsgApp` alone, in the short form.
    MsgApp,
}

impl StreamKind {
    /// Both, in the order in which they are dialled.
    pub const ALL: [StreamKind; 2] = [StreamKind::MsgApp, StreamKind::Message];

    /// Its part of the path.
    pub const fn path(self) -> &'static str {
        match self {
            StreamKind::Message => "message",
            StreamKind::MsgApp => "msgapp",
        }
    }

    /// As etcd names it in its log.
    pub const fn label(self) -> &'static str {
        match self {
            StreamKind::Message => "stream Message",
            StreamKind::MsgApp => "stream MsgApp v2",
        }
    }
}

/// Decodes one message.
///
/// # Errors
/// `Malformed`, `UnknownType`, `UnknownEntryType`.
pub fn decode_message(bytes: Bytes) -> Result<Message, CodecError> {
    let message = Message::decode(bytes)?;
    if message.r#type > MESSAGE_TYPE_MAX {
        return Err(CodecError::UnknownType(message.r#type));
    }
    message.entries.iter().try_for_each(check_entry)?;
    Ok(message)
}

fn decode_entry(bytes: Bytes) -> Result<Entry, CodecError> {
    let entry = Entry::decode(bytes)?;
    check_entry(&entry)?;
    Ok(entry)
}

/// The raft library knows no others, and an accessor would take them for normal entries.
fn check_entry(entry: &Entry) -> Result<(), CodecError> {
    match EntryType::try_from(entry.r#type) {
        Ok(_) => Ok(()),
        Err(_) => Err(CodecError::UnknownEntryType { index: entry.index, kind: entry.r#type }),
    }
}

/// Whether `message` only keeps a stream alive.
fn is_link_heartbeat(message: &Message) -> bool {
    message.r#type == MSG_HEARTBEAT && message.from == 0 && message.to == 0
}

/// The end of the entries that a msgapp stream has carried.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Position {
    term: u64,
    index: u64,
}

impl Position {
    /// After `message` went by in full.
    fn after(message: &Message) -> Self {
        let index = message.entries.last().map_or(message.index, |entry| entry.index);
        Position { term: message.term, index }
    }

    /// Whether `message` begins here, so that the reader knows all of its head but the commit index.
    fn begins(self, message: &Message) -> bool {
        self.index == message.index
            && self.term == message.log_term
            && message.log_term == message.term
    }
}

/// Writes one stream.
#[derive(Clone, Debug)]
pub struct Encoder {
    kind: StreamKind,
    at: Position,
}

impl Encoder {
    /// For a stream that nothing was written to.
    pub fn new(kind: StreamKind) -> Self {
        Encoder { kind, at: Position::default() }
    }

    /// Appends `message`, on a msgapp stream a `MsgApp`.
    pub fn encode(&mut self, message: &Message, to: &mut BytesMut) {
        match self.kind {
            StreamKind::Message => put_message(message, to),
            StreamKind::MsgApp if self.at.begins(message) => {
                to.put_u8(ENTRIES);
                to.put_u64(message.entries.len() as u64);
                for entry in &message.entries {
                    let bytes = entry.encoded_len();
                    to.reserve(8 + bytes);
                    to.put_u64(bytes as u64);
                    entry.encode_raw(to);
                }
                to.put_u64(message.commit);
                self.at.index += message.entries.len() as u64;
            }
            StreamKind::MsgApp => {
                to.put_u8(MESSAGE);
                put_message(message, to);
                self.at = Position::after(message);
            }
        }
    }

    /// Appends what keeps the stream alive.
    pub fn heartbeat(&self, to: &mut BytesMut) {
        match self.kind {
            StreamKind::Message => {
                put_message(&Message { r#type: MSG_HEARTBEAT, ..Message::default() }, to);
            }
            StreamKind::MsgApp => to.put_u8(LINK_HEARTBEAT),
        }
    }
}

fn put_message(message: &Message, to: &mut BytesMut) {
    let bytes = message.encoded_len();
    to.reserve(8 + bytes);
    to.put_u64(bytes as u64);
    message.encode_raw(to);
}

/// Reads one stream, cut into chunks of any size. Entry data is not copied if the chunk holds the
/// whole of it.
#[derive(Debug)]
pub struct Decoder {
    kind: StreamKind,
    local: MemberId,
    remote: MemberId,
    at: Position,
    expects: Expects,
    /// Bytes of a part that is not whole yet, and how many make it whole.
    rest: BytesMut,
    needed: usize,
}

/// The next part of a stream.
#[derive(Debug)]
enum Expects {
    /// The first byte on a msgapp stream, a length on a message stream.
    Start,
    /// A message of this many bytes.
    Message(usize),
    MessageLength,
    EntryCount,
    EntryLength(Partial),
    Entry(Partial, usize),
    Commit(Partial),
}

/// A `MsgApp` in the short form of which some entries are there.
#[derive(Default, Debug)]
struct Partial {
    entries: Vec<Entry>,
    left: u64,
    bytes: usize,
}

impl Partial {
    fn next(self) -> Expects {
        if self.left == 0 { Expects::Commit(self) } else { Expects::EntryLength(self) }
    }
}

impl Decoder {
    /// For a stream from `remote` that nothing was read from.
    pub fn new(kind: StreamKind, local: MemberId, remote: MemberId) -> Self {
        let mut decoder = Decoder {
            kind,
            local,
            remote,
            at: Position::default(),
            expects: Expects::Start,
            rest: BytesMut::new(),
            needed: 0,
        };
        decoder.needed = decoder.size();
        decoder
    }

    /// Takes the next bytes; appends every message that they complete, link heartbeats left out.
    ///
    /// # Errors
    /// [`CodecError`]; the messages before it have been appended.
    pub fn feed(&mut self, chunk: Bytes, messages: &mut Vec<Message>) -> Result<(), CodecError> {
        let mut input = if self.rest.is_empty() {
            chunk
        } else {
            self.rest.extend_from_slice(&chunk);
            if self.rest.len() < self.needed {
                return Ok(());
            }
            std::mem::take(&mut self.rest).freeze()
        };
        while input.len() >= self.needed {
            let part = input.split_to(self.needed);
            if let Some(message) = self.take(part)?
                && !is_link_heartbeat(&message)
            {
                messages.push(message);
            }
            self.needed = self.size();
        }
        if !input.is_empty() {
            // The length comes from the network: what is reserved ahead stays modest.
            self.rest.reserve(self.needed.min(1 << 20));
            self.rest.extend_from_slice(&input);
        }
        Ok(())
    }

    /// Bytes of the part that is expected.
    fn size(&self) -> usize {
        match &self.expects {
            Expects::Start if self.kind == StreamKind::MsgApp => 1,
            Expects::Message(bytes) | Expects::Entry(_, bytes) => *bytes,
            Expects::Start
            | Expects::MessageLength
            | Expects::EntryCount
            | Expects::EntryLength(_)
            | Expects::Commit(_) => 8,
        }
    }

    /// Takes one whole part.
    fn take(&mut self, mut part: Bytes) -> Result<Option<Message>, CodecError> {
        self.expects = match std::mem::replace(&mut self.expects, Expects::Start) {
            Expects::Start if self.kind == StreamKind::MsgApp => match part[0] {
                LINK_HEARTBEAT => Expects::Start,
                ENTRIES => Expects::EntryCount,
                MESSAGE => Expects::MessageLength,
                other => return Err(CodecError::UnknownForm(other)),
            },
            Expects::Start | Expects::MessageLength => Expects::Message(length(&mut part, 0)?),
            Expects::Message(_) => {
                let message = decode_message(part)?;
                if self.kind == StreamKind::MsgApp {
                    if message.r#type != MSG_APP {
                        return Err(CodecError::NotMsgApp(message.r#type));
                    }
                    self.at = Position::after(&message);
                }
                return Ok(Some(message));
            }
            Expects::EntryCount => Partial { left: part.get_u64(), ..Partial::default() }.next(),
            Expects::EntryLength(partial) => {
                let bytes = length(&mut part, partial.bytes)?;
                Expects::Entry(partial, bytes)
            }
            Expects::Entry(mut partial, bytes) => {
                partial.entries.push(decode_entry(part)?);
                partial.bytes += bytes;
                partial.left -= 1;
                partial.next()
            }
            Expects::Commit(partial) => {
                let message = Message {
                    r#type: MSG_APP,
                    to: self.local.0,
                    from: self.remote.0,
                    term: self.at.term,
                    log_term: self.at.term,
                    index: self.at.index,
                    commit: part.get_u64(),
                    ..Message::default()
                };
                self.at.index = self.at.index.saturating_add(partial.entries.len() as u64);
                return Ok(Some(Message { entries: partial.entries, ..message }));
            }
        };
        Ok(None)
    }
}

/// Reads a length that comes on top of `before` bytes.
fn length(part: &mut Bytes, before: usize) -> Result<usize, CodecError> {
    let bytes = part.get_u64();
    match usize::try_from(bytes).ok().and_then(|bytes| bytes.checked_add(before)) {
        Some(sum) if sum <= MESSAGE_BYTES_MAX => Ok(bytes as usize),
        _ => Err(CodecError::TooLarge { bytes }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCAL: MemberId = MemberId(2);
    const REMOTE: MemberId = MemberId(1);

    fn entry(index: u64, data: &'static str) -> Entry {
        Entry { r#type: 0, term: 5, index, data: data.into() }
    }

    fn append(log_term: u64, index: u64, entries: Vec<Entry>) -> Message {
        Message {
            r#type: MSG_APP,
            to: LOCAL.0,
            from: REMOTE.0,
            term: 5,
            log_term,
            index,
            entries,
            commit: index,
            ..Message::default()
        }
    }

    fn encode(kind: StreamKind, messages: &[Message]) -> Bytes {
        let (mut encoder, mut bytes) = (Encoder::new(kind), BytesMut::new());
        for message in messages {
            encoder.heartbeat(&mut bytes);
            encoder.encode(message, &mut bytes);
        }
        bytes.freeze()
    }

    fn decode(kind: StreamKind, bytes: &Bytes, step: usize) -> Result<Vec<Message>, CodecError> {
        let (mut decoder, mut messages) = (Decoder::new(kind, LOCAL, REMOTE), Vec::new());
        let mut left = bytes.clone();
        while !left.is_empty() {
            decoder.feed(left.split_to(step.min(left.len())), &mut messages)?;
        }
        Ok(messages)
    }

    fn hex(text: &str) -> Bytes {
        let digits: Vec<u8> =
            text.bytes().filter_map(|b| (b as char).to_digit(16).map(|d| d as u8)).collect();
        digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect::<Vec<_>>().into()
    }

    #[test]
    fn what_is_written_is_read_however_it_is_cut() {
        let messages = [
            append(4, 9, vec![entry(10, "a"), entry(11, "")]),
            append(5, 11, vec![entry(12, "follows")]),
            append(5, 12, Vec::new()),
            append(5, 12, vec![entry(13, "x"), entry(14, "y")]),
            // Sent again from an earlier position.
            append(5, 11, vec![entry(12, "follows")]),
        ];
        for kind in StreamKind::ALL {
            let bytes = encode(kind, &messages);
            for step in [1, 2, 3, 7, 8, 9, 64, bytes.len()] {
                assert_eq!(decode(kind, &bytes, step).unwrap(), messages, "{kind:?} by {step}");
            }
        }
    }

    #[test]
    fn the_short_form_is_etcds() {
        let messages = [append(5, 7, vec![entry(8, "ab")]), append(5, 8, vec![entry(9, "c")])];
        let (mut encoder, mut bytes) = (Encoder::new(StreamKind::MsgApp), BytesMut::new());
        encoder.encode(&messages[0], &mut bytes);
        let first = bytes.split();
        assert_eq!(first[0], MESSAGE);
        encoder.encode(&messages[1], &mut bytes);
        encoder.heartbeat(&mut bytes);
        let short = "01 0000000000000001 0000000000000007 1005 1809 220163 0000000000000008 00";
        assert_eq!(bytes, hex(short));
    }

    #[test]
    fn a_message_of_another_log_term_is_sent_whole() {
        let (mut encoder, mut bytes) = (Encoder::new(StreamKind::MsgApp), BytesMut::new());
        for (message, form) in [
            (append(5, 7, vec![entry(8, "")]), MESSAGE),
            (append(5, 8, vec![entry(9, "")]), ENTRIES),
            (append(4, 9, vec![entry(10, "")]), MESSAGE),
            (append(5, 12, Vec::new()), MESSAGE),
            (append(5, 12, Vec::new()), ENTRIES),
            (Message { term: 6, ..append(5, 12, Vec::new()) }, MESSAGE),
            (append(5, 12, Vec::new()), MESSAGE),
        ] {
            encoder.encode(&message, &mut bytes);
            assert_eq!(bytes.split()[0], form, "{message:?}");
        }
    }

    /// As a member of release 3.4 writes them: zeros in full, an empty snapshot in each message.
    #[test]
    fn messages_of_old_releases_are_read() {
        let snapshot = "4a0a 1208 0a02 2800 1000 1800";
        // The link heartbeat, 30 bytes long.
        let link = format!("0808 1000 1800 2000 2800 3000 4000 {snapshot} 5000 5800");
        assert_eq!(hex(&link).len(), 30);
        let append = format!(
            "0803 1002 1801 2005 2804 3009 3a0a 0800 1005 180a 2202 6162 4009 {snapshot} 5000 5800"
        );
        let framed = |text: &str| {
            let mut bytes = BytesMut::new();
            bytes.put_u64(hex(text).len() as u64);
            bytes.put(hex(text));
            bytes.freeze()
        };
        let stream: Bytes = [framed(&link), framed(&append), framed("0808")].concat().into();
        for step in [1, 5, stream.len()] {
            let messages = decode(StreamKind::Message, &stream, step).unwrap();
            let [message] = &messages[..] else { panic!("{messages:?}") };
            assert_eq!((message.r#type, message.term, message.log_term), (MSG_APP, 5, 4));
            assert_eq!((message.index, message.commit), (9, 9));
            assert_eq!(message.entries, [entry(10, "ab")]);
        }
        let mut stream = BytesMut::new();
        stream.put_u8(MESSAGE);
        stream.put(framed(&append));
        stream.put(hex("00 01 0000000000000001 000000000000000a 0800 1005 180b 2202 6364"));
        stream.put_u64(10);
        let messages = decode(StreamKind::MsgApp, &stream.freeze(), 4).unwrap();
        assert_eq!(messages.len(), 2);
        let second = &messages[1];
        assert_eq!((second.to, second.from), (LOCAL.0, REMOTE.0));
        // The position is in the message's term, not in that of the entry before it.
        assert_eq!((second.term, second.log_term), (5, 5));
        assert_eq!((second.index, second.commit), (10, 10));
        assert_eq!(second.entries, [entry(11, "cd")]);
    }

    #[test]
    fn what_no_member_writes_is_refused() {
        let bad = |kind, text: &str| decode(kind, &hex(text), 1000).unwrap_err();
        let large = "0000000020000001";
        assert_eq!(
            bad(StreamKind::Message, large),
            CodecError::TooLarge { bytes: (512 << 20) + 1 }
        );
        assert_eq!(
            bad(StreamKind::Message, "ffffffffffffffff"),
            CodecError::TooLarge { bytes: u64::MAX }
        );
        assert_eq!(bad(StreamKind::Message, "0000000000000002 0813"), CodecError::UnknownType(19));
        assert!(matches!(
            bad(StreamKind::Message, "0000000000000002 08ff"),
            CodecError::Malformed(_)
        ));
        assert_eq!(
            bad(StreamKind::Message, "0000000000000006 0803 3a02 0807"),
            CodecError::UnknownEntryType { index: 0, kind: 7 }
        );
        assert_eq!(bad(StreamKind::MsgApp, "03"), CodecError::UnknownForm(3));
        assert_eq!(bad(StreamKind::MsgApp, "02 0000000000000002 0808"), CodecError::NotMsgApp(8));
        // Entries that are small one by one must not add up beyond the limit either.
        let two = "01 0000000000000002 0000000000000002 1005 000000001fffffff";
        assert_eq!(bad(StreamKind::MsgApp, two), CodecError::TooLarge { bytes: 0x1fff_ffff });
    }

    proptest::proptest! {
        /// A stream with one byte damaged is read to the same end however it is cut, and never brings
        /// the reader down.
        #[test]
        fn a_damaged_stream_is_read_or_refused(
            at in 0..400usize,
            flip in 1..=255u8,
            step in 1..70usize,
        ) {
            let messages = [
                append(4, 9, vec![entry(10, "a"), entry(11, "")]),
                append(5, 11, vec![entry(12, "follows")]),
                append(5, 12, Vec::new()),
                append(5, 12, vec![entry(13, "x"), entry(14, "y")]),
                append(4, 14, vec![entry(15, "z")]),
            ];
            for kind in StreamKind::ALL {
                let mut bytes = encode(kind, &messages).to_vec();
                let at = at % bytes.len();
                bytes[at] ^= flip;
                let bytes: Bytes = bytes.into();
                let whole = decode(kind, &bytes, bytes.len());
                proptest::prop_assert_eq!(decode(kind, &bytes, step), whole);
            }
        }
    }
}
