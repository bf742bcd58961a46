//! What a program did to the files of one directory, in order.

/// A file or directory, whatever its names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct Node(pub(crate) u32);

/// The directory that is watched.
pub(crate) const ROOT: Node = Node(0);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    File,
    Dir,
}

/// A name within a directory.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct Name {
    pub(crate) dir: Node,
    pub(crate) name: std::ffi::OsString,
}

/// What a sync makes durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scope {
    /// All of a file or all names in a directory.
    Node(Node),
    /// Bytes `from..to` of a file.
    Range {
        file: Node,
        from: u64,
        to: u64,
    },
    All,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Event {
    /// `durable`: on disk when the call returned (`O_DSYNC`).
    Write {
        file: Node,
        offset: u64,
        data: Box<[u8]>,
        durable: bool,
    },
    Resize {
        file: Node,
        from: u64,
        to: u64,
    },
    /// These names now stand for these nodes, all at once.
    Names(Vec<(Name, Option<Node>)>),
    /// A sync was asked for: it covers what stands before it, but only once it has ended.
    SyncBegin(Scope),
    /// The sync that began at this place has succeeded.
    SyncEnd(usize),
    /// What the program, or the one who watches it, wanted to be remembered.
    Mark(Vec<u8>),
}

/// What [`trace`](crate::trace) has seen.
#[derive(Debug)]
pub struct Log {
    pub(crate) kinds: Vec<Kind>,
    pub(crate) events: Vec<Event>,
    /// Events before this one are the state at the start.
    pub(crate) start: usize,
}

impl Log {
    /// The places at which power can be lost: after so many events, the next one under way.
    pub fn cuts(&self) -> std::ops::RangeInclusive<usize> {
        self.start..=self.events.len()
    }

    /// The marks, each with its place: a cut above it comes after the mark.
    pub fn marks(&self) -> impl Iterator<Item = (usize, &[u8])> {
        self.events.iter().enumerate().filter_map(|(at, event)| match event {
            Event::Mark(mark) => Some((at, &mark[..])),
            _ => None,
        })
    }

    /// The cuts just before a sync succeeded, where most is at stake.
    pub fn syncs(&self) -> impl Iterator<Item = usize> {
        let ends = self.events.iter().enumerate().skip(self.start);
        ends.filter(|(_, event)| matches!(event, Event::SyncEnd(_))).map(|(at, _)| at)
    }
}
