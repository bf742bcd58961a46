//! The write-ahead log as bytes: etcd's segments, frames, records and checksums, and what a list of
//! records amounts to. Files are the business of `storage/wal_log.rs`.
//!
//! A segment is a sequence of frames, each a multiple of 8 bytes:
//!
//! ```text
//! length word, 8 bytes LE   bits 0..56 the record's length L; bit 63 set and bits 56..59 = P if P > 0
//! record, L bytes           protobuf { type = 1, crc = 2, data = 3 }
//! padding, P bytes          zeros up to the next multiple of 8
//! ```
//!
//! `crc` is the CRC-32C of all `data` written so far, across records and segments, so that a record
//! vouches for everything before it. The first record of a segment repeats the value. A segment is
//! made full of zeros before it is written; a length word of zero is the end of the data.
//!
//! A record that a power failure cut short is told from a damaged one by the sectors of 512 bytes
//! that a disk writes whole: a cut record in a file full of zeros has a piece between two sector
//! borders that is all zero. Such a tail was never acknowledged and may go; everything else that does
//! not match its checksum is damage and is never mended here.

use std::fmt;

use bytes::Bytes;
use prost::Message;
use prost::encoding::{
    DecodeContext, WireType, decode_key, decode_varint, encode_varint, encoded_len_varint,
    skip_field,
};
use quorate_proto::{raftpb, walpb};

/// Bytes after which a segment is closed and the next begun; also what is allocated for each. etcd's
/// number, megabytes and not mebibytes.
pub const SEGMENT_BYTES: u64 = 64_000_000;

/// The unit that a disk writes whole.
const SECTOR_BYTES: u64 = 512;

/// Length of the word before each record.
const WORD_BYTES: usize = 8;

/// What a record holds, with the number that stands in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RecordKind {
    /// Whose log this is, the same bytes in every segment.
    Metadata = 1,
    /// A raft log entry.
    Entry = 2,
    /// Term, vote and commit index.
    State = 3,
    /// No data: the checksum so far.
    Crc = 4,
    /// Index and term of a snapshot that has been saved.
    Snapshot = 5,
}

impl RecordKind {
    fn from_number(number: i64) -> Option<Self> {
        Some(match number {
            1 => RecordKind::Metadata,
            2 => RecordKind::Entry,
            3 => RecordKind::State,
            4 => RecordKind::Crc,
            5 => RecordKind::Snapshot,
            _ => return None,
        })
    }
}

impl fmt::Display for RecordKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RecordKind::Metadata => "metadata",
            RecordKind::Entry => "entry",
            RecordKind::State => "state",
            RecordKind::Crc => "crc",
            RecordKind::Snapshot => "snapshot",
        })
    }
}

/// Why the bytes of a log cannot be what its writer meant.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum Damage {
    #[error("record is cut short")]
    CutShort,
    #[error("record does not parse: {0}")]
    Record(prost::DecodeError),
    #[error("record type {0} is unknown")]
    UnknownType(i64),
    #[error("crc mismatch: computed {computed:08x}, stored {stored:08x}")]
    Crc { computed: u32, stored: u32 },
    #[error(
        "crc mismatch with the segment before: it ended at {before:08x}, this begins at {here:08x}"
    )]
    Chain { before: u32, here: u32 },
    #[error("{kind} record does not decode: {source}")]
    Undecodable { kind: RecordKind, source: prost::DecodeError },
    #[error("metadata differs from that of an earlier segment")]
    MetadataDiffers,
    #[error("entry {found} follows entry {last}: those between are missing")]
    Hole { last: u64, found: u64 },
    #[error("snapshot record for index {index} has term {found}, not {asked}")]
    SnapshotTerm { index: u64, asked: u64, found: u64 },
    #[error("no metadata record")]
    NoMetadata,
    #[error("no snapshot record for index {index}, term {term}")]
    SnapshotMissing { index: u64, term: u64 },
}

/// The name of a segment, `%016x-%016x.wal`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SegmentName {
    /// 0 for the first ever, then rising by one.
    pub seq: u64,
    /// One above the last entry written before this segment.
    pub index: u64,
}

impl SegmentName {
    /// The parts of `name`, or `None` if it is not the name of a segment.
    pub fn parse(name: &str) -> Option<Self> {
        let (seq, index) = name.strip_suffix(".wal")?.split_once('-')?;
        Some(SegmentName { seq: parse_hex16(seq)?, index: parse_hex16(index)? })
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{:016x}.wal", self.seq, self.index)
    }
}

/// Exactly 16 lower-case hexadecimal digits, as `%016x` prints them.
pub(crate) fn parse_hex16(text: &str) -> Option<u64> {
    let digits = text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if digits { u64::from_str_radix(text, 16).ok() } else { None }
}

/// Why the segments in a directory do not make a log.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum SegmentsError {
    #[error("no segment begins at or before index {index}")]
    NoneAt { index: u64 },
    #[error("segment {missing:016x} is missing between {before} and {after}")]
    Gap { missing: u64, before: SegmentName, after: SegmentName },
}

/// Which of `names` (ascending) must be read to recover from a snapshot at `index`: the last one that
/// begins at or before it, and all after. The answer is the position of the first.
///
/// # Errors
/// If none begins early enough, or one is missing in between.
pub fn first_segment(names: &[SegmentName], index: u64) -> Result<usize, SegmentsError> {
    let first = names
        .iter()
        .rposition(|name| name.index <= index)
        .ok_or(SegmentsError::NoneAt { index })?;
    for pair in names[first..].windows(2) {
        if pair[0].seq.checked_add(1) != Some(pair[1].seq) {
            return Err(SegmentsError::Gap {
                missing: pair[0].seq.wrapping_add(1),
                before: pair[0],
                after: pair[1],
            });
        }
    }
    Ok(first)
}

/// Whether what is about to be appended must reach the disk before anybody is told: a commit index
/// that moved alone need not, raft finds it again.
pub fn must_sync(before: &raftpb::HardState, after: &raftpb::HardState, entries: usize) -> bool {
    entries > 0 || before.vote != after.vote || before.term != after.term
}

/// Turns records into frames and carries the checksum along.
#[derive(Clone, Debug)]
pub struct Encoder {
    crc: u32,
}

impl Encoder {
    /// An encoder that continues after a record with checksum `crc`; 0 for a new log.
    pub const fn new(crc: u32) -> Self {
        Encoder { crc }
    }

    /// The checksum of everything encoded so far.
    pub const fn crc(&self) -> u32 {
        self.crc
    }

    /// Appends the record with which every segment begins.
    pub fn crc_record(&mut self, out: &mut Vec<u8>) {
        self.frame(RecordKind::Crc, None, out);
    }

    /// Appends the metadata, given encoded because all segments must hold the same bytes.
    pub fn metadata(&mut self, metadata: &[u8], out: &mut Vec<u8>) {
        self.frame(RecordKind::Metadata, Some((metadata, &[])), out);
    }

    /// Appends `entry`, copying its data once.
    pub fn entry(&mut self, entry: &raftpb::Entry, out: &mut Vec<u8>) {
        let mut head = Small::default();
        head.varint_field(1, entry.r#type as u64);
        head.varint_field(2, entry.term);
        head.varint_field(3, entry.index);
        if !entry.data.is_empty() {
            head.push(4 << 3 | 2);
            head.varint(entry.data.len() as u64);
        }
        self.frame(RecordKind::Entry, Some((head.bytes(), &entry.data)), out);
    }

    /// Appends `state`.
    pub fn hard_state(&mut self, state: &raftpb::HardState, out: &mut Vec<u8>) {
        let mut data = Small::default();
        data.varint_field(1, state.term);
        data.varint_field(2, state.vote);
        data.varint_field(3, state.commit);
        self.frame(RecordKind::State, Some((data.bytes(), &[])), out);
    }

    /// Appends `snapshot`.
    pub fn snapshot(&mut self, snapshot: &walpb::Snapshot, out: &mut Vec<u8>) {
        // Index and term are written even when zero, as etcd does.
        let data = walpb::Snapshot {
            index: Some(snapshot.index()),
            term: Some(snapshot.term()),
            conf_state: snapshot.conf_state.clone(),
        }
        .encode_to_vec();
        self.frame(RecordKind::Snapshot, Some((&data, &[])), out);
    }

    /// One frame whose data comes in two pieces.
    fn frame(&mut self, kind: RecordKind, data: Option<(&[u8], &[u8])>, out: &mut Vec<u8>) {
        if let Some((head, tail)) = data {
            self.crc = crc32c::crc32c_append(crc32c::crc32c_append(self.crc, head), tail);
        }
        let mut fields = Small::default();
        fields.varint_field(1, kind as u64);
        fields.varint_field(2, u64::from(self.crc));
        let mut length = fields.bytes().len();
        if let Some((head, tail)) = data {
            fields.push(3 << 3 | 2);
            fields.varint((head.len() + tail.len()) as u64);
            length = fields.bytes().len() + head.len() + tail.len();
        }
        let padding = length.wrapping_neg() % 8;
        let mut word = length as u64;
        if padding > 0 {
            word |= (0x80 | padding as u64) << 56;
        }
        out.reserve(WORD_BYTES + length + padding);
        out.extend_from_slice(&word.to_le_bytes());
        out.extend_from_slice(fields.bytes());
        if let Some((head, tail)) = data {
            out.extend_from_slice(head);
            out.extend_from_slice(tail);
        }
        out.extend_from_slice(&[0; 8][..padding]);
    }
}

/// A short message built on the stack: at most four varints with their keys, 44 bytes.
struct Small {
    buffer: [u8; 44],
    len: usize,
}

impl Default for Small {
    fn default() -> Self {
        Small { buffer: [0; 44], len: 0 }
    }
}

impl Small {
    fn bytes(&self) -> &[u8] {
        &self.buffer[..self.len]
    }

    fn push(&mut self, byte: u8) {
        self.buffer[self.len] = byte;
        self.len += 1;
    }

    fn varint(&mut self, value: u64) {
        encode_varint(value, &mut &mut self.buffer[self.len..]);
        self.len += encoded_len_varint(value);
    }

    fn varint_field(&mut self, tag: u8, value: u64) {
        self.push(tag << 3);
        self.varint(value);
    }
}

/// What stands at some place of a segment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step<'a> {
    /// The window must hold this many bytes from the same place on; never more than `rest`.
    Need(usize),
    /// A sound record; the next frame is `frame_bytes` further on.
    Record { kind: RecordKind, data: &'a [u8], frame_bytes: usize },
    /// The data of this segment ends here.
    End,
    /// A record that was being written when the power failed: the data of the log ends here.
    Torn,
}

/// Turns frames into records and checks them; lives from the first segment read to the last.
#[derive(Clone, Debug, Default)]
pub struct Decoder {
    crc: u32,
}

impl Decoder {
    /// The checksum of everything decoded so far; from here an [`Encoder`] continues.
    pub const fn crc(&self) -> u32 {
        self.crc
    }

    /// Reads the frame at the beginning of `window`, which stands at byte `at` (a multiple of 8) of
    /// a segment that goes on for `rest` bytes from there; `last` says whether the segment is the
    /// log's last, the only one that can be torn.
    ///
    /// The decoder has moved on only when the answer is a record.
    ///
    /// # Errors
    /// What no power failure explains.
    pub fn step<'a>(
        &mut self,
        window: &'a [u8],
        at: u64,
        rest: u64,
        last: bool,
    ) -> Result<Step<'a>, Damage> {
        let torn = || if last { Ok(Step::Torn) } else { Err(Damage::CutShort) };
        if rest == 0 {
            return Ok(Step::End);
        }
        if rest < WORD_BYTES as u64 {
            return torn();
        }
        let Some(word) = window.first_chunk::<WORD_BYTES>() else {
            return Ok(Step::Need(WORD_BYTES));
        };
        let word = u64::from_le_bytes(*word);
        if word == 0 {
            return Ok(Step::End);
        }
        let length = word & ((1 << 56) - 1);
        let padding = if word >> 63 == 1 { word >> 56 & 7 } else { 0 };
        // At most 2^56 + 15: no overflow.
        let frame = WORD_BYTES as u64 + length + padding;
        if frame > rest {
            return torn();
        }
        let frame_bytes = usize::try_from(frame).map_err(|_| Damage::CutShort)?;
        let Some(body) = window.get(WORD_BYTES..frame_bytes) else {
            return Ok(Step::Need(frame_bytes));
        };
        let torn_or = |damage| {
            if last && has_zero_piece(body, at + WORD_BYTES as u64) {
                Ok(Step::Torn)
            } else {
                Err(damage)
            }
        };
        let record = match parse_record(&body[..length as usize]) {
            Ok(record) => record,
            Err(error) => return torn_or(Damage::Record(error)),
        };
        if record.kind == RecordKind::Crc as i64 {
            // A decoder that starts in the middle of the chain takes the value over.
            if self.crc != 0 && self.crc != record.crc {
                return Err(Damage::Chain { before: self.crc, here: record.crc });
            }
            self.crc = record.crc;
            return Ok(Step::Record { kind: RecordKind::Crc, data: &[], frame_bytes });
        }
        let computed = crc32c::crc32c_append(self.crc, record.data);
        if computed != record.crc {
            return torn_or(Damage::Crc { computed, stored: record.crc });
        }
        let kind = RecordKind::from_number(record.kind).ok_or(Damage::UnknownType(record.kind))?;
        self.crc = computed;
        Ok(Step::Record { kind, data: record.data, frame_bytes })
    }
}

/// Whether one of the pieces into which sector borders cut `body` (which stands at byte `at` of the
/// file) is all zero.
fn has_zero_piece(body: &[u8], at: u64) -> bool {
    let mut rest = body;
    let mut at = at;
    while !rest.is_empty() {
        let to_border = (SECTOR_BYTES - at % SECTOR_BYTES) as usize;
        let (piece, after) = rest.split_at(to_border.min(rest.len()));
        if piece.iter().all(|byte| *byte == 0) {
            return true;
        }
        at += piece.len() as u64;
        rest = after;
    }
    false
}

struct RawRecord<'a> {
    kind: i64,
    crc: u32,
    data: &'a [u8],
}

/// Parses a record without copying its data, as the generated decoder would.
fn parse_record(mut bytes: &[u8]) -> Result<RawRecord<'_>, prost::DecodeError> {
    let mut record = RawRecord { kind: 0, crc: 0, data: &[] };
    while !bytes.is_empty() {
        match decode_key(&mut bytes)? {
            (1, WireType::Varint) => record.kind = decode_varint(&mut bytes)? as i64,
            (2, WireType::Varint) => record.crc = decode_varint(&mut bytes)? as u32,
            (3, WireType::LengthDelimited) => {
                let length = decode_varint(&mut bytes)?;
                let data = usize::try_from(length).ok().and_then(|n| bytes.split_at_checked(n));
                let Some((data, rest)) = data else { return Err(underflow()) };
                record.data = data;
                bytes = rest;
            }
            (1..=3, _) => return Err(underflow()),
            (tag, wire_type) => {
                skip_field(wire_type, tag, &mut bytes, DecodeContext::default())?;
            }
        }
    }
    Ok(record)
}

/// prost's own error for a message that ends too early; it cannot be made directly.
fn underflow() -> prost::DecodeError {
    decode_varint(&mut &[][..]).expect_err("an empty buffer holds no varint")
}

/// The snapshot records of a log, and which of them may be started from.
#[derive(Clone, Debug, Default)]
pub struct SnapshotScan {
    snapshots: Vec<walpb::Snapshot>,
    commit: u64,
}

impl SnapshotScan {
    /// Takes the next record of the log, from its very first segment on.
    ///
    /// # Errors
    /// If a snapshot or state record does not decode.
    pub fn take(&mut self, kind: RecordKind, data: &[u8]) -> Result<(), Damage> {
        match kind {
            RecordKind::Snapshot => self.snapshots.push(decode(kind, data)?),
            RecordKind::State => self.commit = decode::<raftpb::HardState>(kind, data)?.commit,
            RecordKind::Metadata | RecordKind::Entry | RecordKind::Crc => {}
        }
        Ok(())
    }

    /// The records at or below the last commit index, in the order of the log. One above it belongs
    /// to a snapshot that was being received when the member stopped: its state is not complete.
    pub fn valid(self) -> Vec<walpb::Snapshot> {
        let commit = self.commit;
        self.snapshots.into_iter().filter(|snapshot| snapshot.index() <= commit).collect()
    }
}

/// What the records from a snapshot on amount to.
#[derive(Clone, Debug)]
pub struct Replay {
    start: (u64, u64),
    metadata: Option<Bytes>,
    hard_state: raftpb::HardState,
    entries: Vec<raftpb::Entry>,
    last_index: u64,
    /// Term of the entry at the start's own index, if the log holds it.
    term_at_start: Option<u64>,
    start_seen: bool,
}

impl Replay {
    /// A replay of what follows the snapshot at `index` and `term`.
    pub fn new(index: u64, term: u64) -> Self {
        Replay {
            start: (index, term),
            metadata: None,
            hard_state: raftpb::HardState::default(),
            entries: Vec::new(),
            last_index: index,
            term_at_start: None,
            start_seen: false,
        }
    }

    /// Takes the next record, from the first segment that must be read on.
    ///
    /// # Errors
    /// If the record contradicts those before it.
    pub fn take(&mut self, kind: RecordKind, data: &[u8]) -> Result<(), Damage> {
        let (start_index, start_term) = self.start;
        match kind {
            RecordKind::Crc => {}
            RecordKind::Metadata => match &self.metadata {
                Some(metadata) if metadata != data => return Err(Damage::MetadataDiffers),
                Some(_) => {}
                None => {
                    decode::<walpb::Metadata>(kind, data)?;
                    self.metadata = Some(Bytes::copy_from_slice(data));
                }
            },
            RecordKind::Entry => {
                let entry: raftpb::Entry = decode(kind, data)?;
                if entry.index > start_index {
                    let position = entry.index - start_index - 1;
                    if position > self.entries.len() as u64 {
                        let last = start_index + self.entries.len() as u64;
                        return Err(Damage::Hole { last, found: entry.index });
                    }
                    // A new leader overwrites what was not committed.
                    self.entries.truncate(position as usize);
                    self.last_index = entry.index;
                    self.entries.push(entry);
                } else {
                    // Also from here on everything is replaced, what lies behind the start included.
                    self.entries.clear();
                    self.last_index = start_index;
                    if entry.index == start_index {
                        self.term_at_start = Some(entry.term);
                    }
                }
            }
            RecordKind::State => self.hard_state = decode(kind, data)?,
            RecordKind::Snapshot => {
                let snapshot: walpb::Snapshot = decode(kind, data)?;
                if snapshot.index() == start_index {
                    if snapshot.term() != start_term {
                        return Err(Damage::SnapshotTerm {
                            index: start_index,
                            asked: start_term,
                            found: snapshot.term(),
                        });
                    }
                    // A snapshot of this member's own has its last entry in the log. One that came
                    // from a leader replaced the log: what stood in it at higher indexes is void.
                    if start_index > 0 && self.term_at_start != Some(start_term) {
                        self.entries.clear();
                        self.last_index = start_index;
                    }
                    self.start_seen = true;
                }
            }
        }
        Ok(())
    }

    /// The outcome, when all records have been taken.
    ///
    /// # Errors
    /// If the log holds no metadata, or no record of the snapshot asked for.
    pub fn finish(self) -> Result<Replayed, Damage> {
        let metadata = self.metadata.ok_or(Damage::NoMetadata)?;
        if !self.start_seen {
            return Err(Damage::SnapshotMissing { index: self.start.0, term: self.start.1 });
        }
        Ok(Replayed {
            metadata,
            hard_state: self.hard_state,
            entries: self.entries,
            last_index: self.last_index,
        })
    }
}

/// The state of a log after a snapshot.
#[derive(Clone, PartialEq, Debug)]
pub struct Replayed {
    /// Encoded `walpb.Metadata`; known to decode.
    pub metadata: Bytes,
    /// The last one written; all zero if none was.
    pub hard_state: raftpb::HardState,
    /// Those after the snapshot, without holes, committed or not.
    pub entries: Vec<raftpb::Entry>,
    /// Index of the last entry, or of the snapshot if none follows it.
    pub last_index: u64,
}

fn decode<M: Message + Default>(kind: RecordKind, data: &[u8]) -> Result<M, Damage> {
    M::decode(data).map_err(|source| Damage::Undecodable { kind, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a leader has overwritten stays so, also if it wrote no further than the start.
    #[test]
    fn entries_behind_the_start_are_void_once_earlier_ones_are_replaced() {
        let mut replay = Replay::new(5, 2);
        let mut take = |kind, data: Vec<u8>| replay.take(kind, &data).unwrap();
        take(RecordKind::Metadata, walpb::Metadata::default().encode_to_vec());
        for index in 3..9 {
            take(RecordKind::Entry, entry(1, index, b"old").encode_to_vec());
        }
        for index in 4..6 {
            take(RecordKind::Entry, entry(2, index, b"new").encode_to_vec());
        }
        let snapshot = walpb::Snapshot { index: Some(5), term: Some(2), conf_state: None };
        take(RecordKind::Snapshot, snapshot.encode_to_vec());
        let replayed = replay.finish().unwrap();
        assert_eq!((replayed.entries, replayed.last_index), (vec![], 5));
    }

    fn entry(term: u64, index: u64, data: &'static [u8]) -> raftpb::Entry {
        raftpb::Entry { r#type: 0, term, index, data: Bytes::from_static(data) }
    }

    fn read(
        bytes: &[u8],
        last: bool,
        decoder: &mut Decoder,
    ) -> Result<(Vec<(RecordKind, Vec<u8>)>, usize, bool), (usize, Damage)> {
        let mut at = 0;
        let mut records = Vec::new();
        loop {
            let rest = bytes.len() - at;
            match decoder
                .step(&bytes[at..], at as u64, rest as u64, last)
                .map_err(|damage| (at, damage))?
            {
                Step::Need(n) => panic!("the window was all there is, asked for {n} of {rest}"),
                Step::Record { kind, data, frame_bytes } => {
                    records.push((kind, data.to_vec()));
                    at += frame_bytes;
                }
                Step::End => return Ok((records, at, false)),
                Step::Torn => return Ok((records, at, true)),
            }
        }
    }

    /// Header, two entries of which the second spans several sectors, a hard state.
    fn sample() -> (Vec<u8>, Encoder) {
        let mut out = Vec::new();
        let mut encoder = Encoder::new(0);
        encoder.crc_record(&mut out);
        let metadata = walpb::Metadata { node_id: Some(7), cluster_id: Some(9) };
        encoder.metadata(&metadata.encode_to_vec(), &mut out);
        encoder.snapshot(&walpb::Snapshot::default(), &mut out);
        encoder.entry(&entry(1, 1, b"one"), &mut out);
        encoder.entry(&entry(1, 2, &[0xAB; 1700]), &mut out);
        encoder.hard_state(&raftpb::HardState { term: 1, vote: 7, commit: 1 }, &mut out);
        (out, encoder)
    }

    #[test]
    fn a_fresh_log_begins_with_the_bytes_that_etcd_writes() {
        let (bytes, _) = sample();
        assert_eq!(bytes[..16], [0x04, 0, 0, 0, 0, 0, 0, 0x84, 0x08, 0x04, 0x10, 0, 0, 0, 0, 0]);
        assert_eq!(bytes.len() % 8, 0);
    }

    #[test]
    fn records_come_back_and_the_chain_goes_on_over_segments() {
        let (first, mut encoder) = sample();
        let mut second = Vec::new();
        encoder.crc_record(&mut second);
        encoder.entry(&entry(2, 3, b""), &mut second);

        let mut decoder = Decoder::default();
        let (records, end, torn) = read(&first, false, &mut decoder).unwrap();
        assert_eq!((end, torn), (first.len(), false));
        let kinds: Vec<_> = records.iter().map(|(kind, _)| *kind).collect();
        use RecordKind::{Crc, Entry, Metadata, Snapshot, State};
        assert_eq!(kinds, [Crc, Metadata, Snapshot, Entry, Entry, State]);
        let decoded = raftpb::Entry::decode(&records[4].1[..]).unwrap();
        assert_eq!(decoded, entry(1, 2, &[0xAB; 1700]));
        read(&second, true, &mut decoder).unwrap();
        assert_eq!(decoder.crc(), encoder.crc());

        // The second alone, from the middle of the chain.
        read(&second, true, &mut Decoder::default()).unwrap();
        // The second after something else.
        let mut other = Decoder { crc: 1 };
        let (at, damage) = read(&second, true, &mut other).unwrap_err();
        assert_eq!(at, 0);
        assert!(matches!(damage, Damage::Chain { before: 1, .. }));
    }

    #[test]
    fn a_log_cut_off_anywhere_is_torn_and_keeps_what_is_whole() {
        let (bytes, _) = sample();
        let whole = read(&bytes, true, &mut Decoder::default()).unwrap().0;
        let mut ends = vec![0];
        for _ in &whole {
            let at = *ends.last().unwrap();
            let word = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
            let length = (word & 0xff_ffff) + if word >> 63 == 1 { word >> 56 & 7 } else { 0 };
            ends.push(at + 8 + length as usize);
        }
        for cut in 0..bytes.len() {
            let (records, end, torn) = read(&bytes[..cut], true, &mut Decoder::default()).unwrap();
            let kept = ends.iter().filter(|end| **end <= cut).count() - 1;
            assert_eq!(records, whole[..kept], "cut at {cut}");
            assert_eq!(end, ends[kept], "cut at {cut}");
            assert_eq!(torn, ends[kept] != cut, "cut at {cut}");
            // In a segment that is not the last, no such thing is forgiven.
            if torn {
                let damage = read(&bytes[..cut], false, &mut Decoder::default()).unwrap_err();
                assert_eq!(damage, (end, Damage::CutShort), "cut at {cut}");
            }
        }
    }

    #[test]
    fn a_missing_sector_is_torn_in_the_last_segment_only() {
        let (bytes, _) = sample();
        // Sectors 1 and 2 lie within the big entry.
        for sector in 1..3 {
            let mut torn = bytes.clone();
            torn[sector * 512..(sector + 1) * 512].fill(0);
            let (records, _, is_torn) = read(&torn, true, &mut Decoder::default()).unwrap();
            assert!(is_torn);
            assert_eq!(records.len(), 4);
            let (_, damage) = read(&torn, false, &mut Decoder::default()).unwrap_err();
            assert!(matches!(damage, Damage::Crc { .. }));
        }
    }

    #[test]
    fn a_flipped_bit_of_data_is_never_mended() {
        let (bytes, _) = sample();
        // Behind the word, and within the data of the big entry.
        for at in 300..1700 {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x10;
            let (place, damage) = read(&flipped, true, &mut Decoder::default()).unwrap_err();
            assert!(place < at);
            assert!(matches!(damage, Damage::Crc { .. }), "{damage}");
        }
    }

    #[test]
    fn a_short_window_asks_for_more() {
        let (bytes, _) = sample();
        let mut decoder = Decoder::default();
        let rest = bytes.len() as u64;
        assert_eq!(decoder.step(&bytes[..3], 0, rest, true).unwrap(), Step::Need(8));
        assert_eq!(decoder.step(&bytes[..8], 0, rest, true).unwrap(), Step::Need(16));
        assert!(matches!(
            decoder.step(&bytes[..16], 0, rest, true).unwrap(),
            Step::Record { kind: RecordKind::Crc, frame_bytes: 16, .. }
        ));
        // The length is believed only as far as the file goes.
        let word = ((1u64 << 40) | 1 << 63 | 1 << 56).to_le_bytes();
        assert_eq!(decoder.step(&word, 16, rest - 16, true).unwrap(), Step::Torn);
    }

    #[test]
    fn unknown_types_are_refused() {
        let data = b"x";
        let crc = crc32c::crc32c(data);
        let mut body = vec![0x08, 9, 0x10];
        encode_varint(u64::from(crc), &mut body);
        body.extend_from_slice(&[0x1a, 1, b'x']);
        let mut frame = (body.len() as u64).to_le_bytes().to_vec();
        frame.extend_from_slice(&body);
        let (at, damage) = read(&frame, true, &mut Decoder::default()).unwrap_err();
        assert_eq!((at, damage), (0, Damage::UnknownType(9)));
    }

    #[test]
    fn segment_names() {
        let name = SegmentName { seq: 0x1f, index: 0xabc };
        assert_eq!(name.to_string(), "000000000000001f-0000000000000abc.wal");
        assert_eq!(SegmentName::parse(&name.to_string()), Some(name));
        for bad in [
            "0.tmp",
            "1f-abc.wal",
            "000000000000001f-0000000000000abc.wal.broken",
            "+00000000000001f-0000000000000abc.wal",
            "000000000000001F-0000000000000ABC.wal",
            "",
        ] {
            assert_eq!(SegmentName::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_first_segment_is_the_last_that_begins_early_enough() {
        let name = |seq, index| SegmentName { seq, index };
        let names = [name(3, 10), name(4, 20), name(5, 20), name(6, 30)];
        assert_eq!(first_segment(&names, 10), Ok(0));
        assert_eq!(first_segment(&names, 19), Ok(0));
        assert_eq!(first_segment(&names, 20), Ok(2));
        assert_eq!(first_segment(&names, 99), Ok(3));
        assert_eq!(first_segment(&names, 9), Err(SegmentsError::NoneAt { index: 9 }));
        let gap = [name(1, 0), name(3, 10), name(5, 20)];
        assert_eq!(first_segment(&gap, 20), Ok(2));
        assert!(matches!(first_segment(&gap, 10), Err(SegmentsError::Gap { missing: 4, .. })));
    }

    fn replay(
        index: u64,
        term: u64,
        records: &[(RecordKind, Vec<u8>)],
    ) -> Result<Replayed, Damage> {
        let mut replay = Replay::new(index, term);
        for (kind, data) in records {
            replay.take(*kind, data)?;
        }
        replay.finish()
    }

    fn metadata() -> (RecordKind, Vec<u8>) {
        let metadata = walpb::Metadata { node_id: Some(1), cluster_id: Some(2) };
        (RecordKind::Metadata, metadata.encode_to_vec())
    }

    fn log_entry(term: u64, index: u64) -> (RecordKind, Vec<u8>) {
        (RecordKind::Entry, entry(term, index, b"x").encode_to_vec())
    }

    fn snapshot(index: u64, term: u64) -> (RecordKind, Vec<u8>) {
        let snapshot = walpb::Snapshot { index: Some(index), term: Some(term), conf_state: None };
        (RecordKind::Snapshot, snapshot.encode_to_vec())
    }

    fn state(term: u64, commit: u64) -> (RecordKind, Vec<u8>) {
        let state = raftpb::HardState { term, vote: 0, commit };
        (RecordKind::State, state.encode_to_vec())
    }

    fn positions(replayed: &Replayed) -> Vec<(u64, u64)> {
        replayed.entries.iter().map(|entry| (entry.term, entry.index)).collect()
    }

    #[test]
    fn a_later_entry_voids_those_from_its_index_on() {
        let records = [
            metadata(),
            snapshot(0, 0),
            log_entry(1, 1),
            log_entry(1, 2),
            log_entry(1, 3),
            state(2, 1),
            log_entry(2, 2),
        ];
        let replayed = replay(0, 0, &records).unwrap();
        assert_eq!(positions(&replayed), [(1, 1), (2, 2)]);
        assert_eq!(replayed.last_index, 2);
        assert_eq!((replayed.hard_state.term, replayed.hard_state.commit), (2, 1));
        // From a snapshot on, what it covers is left out.
        let mut records = records.to_vec();
        records.push(snapshot(1, 1));
        assert_eq!(positions(&replay(1, 1, &records).unwrap()), [(2, 2)]);
    }

    #[test]
    fn a_hole_another_term_other_metadata_or_nothing_is_refused() {
        let base = [metadata(), snapshot(0, 0), log_entry(1, 1)];
        let with = |more: (RecordKind, Vec<u8>)| {
            let mut records = base.to_vec();
            records.push(more);
            records
        };
        assert_eq!(replay(0, 0, &with(log_entry(1, 3))), Err(Damage::Hole { last: 1, found: 3 }));
        assert_eq!(
            replay(1, 1, &with(snapshot(1, 2))),
            Err(Damage::SnapshotTerm { index: 1, asked: 1, found: 2 })
        );
        assert_eq!(replay(1, 1, &base), Err(Damage::SnapshotMissing { index: 1, term: 1 }));
        assert_eq!(
            replay(0, 0, &with((RecordKind::Metadata, vec![8, 5]))),
            Err(Damage::MetadataDiffers)
        );
        assert_eq!(replay(0, 0, &base[1..]), Err(Damage::NoMetadata));
        assert!(matches!(
            replay(0, 0, &with((RecordKind::Entry, vec![0xff]))),
            Err(Damage::Undecodable { kind: RecordKind::Entry, .. })
        ));
    }

    #[test]
    fn a_received_snapshot_replaces_the_log() {
        // Entries 2 and 3 of term 1 were never committed; the snapshot at 2 came from a leader.
        let records = [
            metadata(),
            snapshot(0, 0),
            log_entry(1, 1),
            log_entry(1, 2),
            log_entry(1, 3),
            snapshot(2, 2),
            state(2, 2),
        ];
        let replayed = replay(2, 2, &records).unwrap();
        assert_eq!((positions(&replayed), replayed.last_index), (vec![], 2));
        // One of the member's own leaves the entries after it.
        let own = [
            metadata(),
            snapshot(0, 0),
            log_entry(1, 1),
            log_entry(1, 2),
            log_entry(1, 3),
            snapshot(2, 1),
        ];
        assert_eq!(positions(&replay(2, 1, &own).unwrap()), [(1, 3)]);
    }

    #[test]
    fn snapshots_above_the_commit_index_are_not_valid() {
        let mut scan = SnapshotScan::default();
        for (kind, data) in
            [snapshot(0, 0), state(1, 9), snapshot(5, 1), snapshot(10, 1), state(2, 7)]
        {
            scan.take(kind, &data).unwrap();
        }
        let indexes: Vec<_> = scan.valid().iter().map(walpb::Snapshot::index).collect();
        assert_eq!(indexes, [0, 5]);
    }

    #[test]
    fn what_must_be_synced() {
        let before = raftpb::HardState { term: 3, vote: 1, commit: 9 };
        assert!(!must_sync(&before, &raftpb::HardState { commit: 10, ..before }, 0));
        assert!(must_sync(&before, &before, 1));
        assert!(must_sync(&before, &raftpb::HardState { vote: 2, ..before }, 0));
        assert!(must_sync(&before, &raftpb::HardState { term: 4, ..before }, 0));
    }

    #[test]
    fn no_mutation_makes_the_decoder_panic_or_loop() {
        let (bytes, _) = sample();
        let mut state = 0x1234_5678_9abc_def1u64;
        let mut next = |bound: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % bound as u64) as usize
        };
        for _ in 0..100_000 {
            let mut mutated = bytes.clone();
            for _ in 0..1 + next(4) {
                let at = next(mutated.len());
                match next(3) {
                    0 => mutated[at] ^= 1 << next(8),
                    1 => mutated[at] = next(256) as u8,
                    _ => mutated.truncate(at.max(1)),
                }
            }
            let last = next(2) == 0;
            if let Ok((records, end, _)) = read(&mutated, last, &mut Decoder::default()) {
                assert!(end <= mutated.len());
                let mut replay = Replay::new(0, 0);
                for (kind, data) in &records {
                    if replay.take(*kind, data).is_err() {
                        break;
                    }
                }
            }
        }
    }
}
