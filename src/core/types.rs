//! The numbers that must not be swapped, each a type of its own.

use std::fmt;

/// A position in the store's history: the `main` counter rises by one per writing transaction, `sub`
/// counts the changes inside it from 0 (formats-and-peers 3.1).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Revision {
    pub main: i64,
    pub sub: i64,
}

impl Revision {
    /// The first revision of the transaction `main`.
    pub const fn main(main: i64) -> Self {
        Revision { main, sub: 0 }
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}_{}", self.main, self.sub)
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty), $format:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $format, self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "(", $format, ")"), self.0)
            }
        }
    };
}

number!(
    /// A position in the raft log; the first entry is 1, 0 stands before it.
    Index(u64), "{}"
);
number!(
    /// A raft term.
    Term(u64), "{}"
);
number!(
    /// A lease; 0 means none, negative ones are valid.
    LeaseId(i64), "{:x}"
);
number!(
    /// A member of the cluster, written in lower-case hex (operations 2.1).
    MemberId(u64), "{:x}"
);
number!(
    /// A cluster, written in lower-case hex (operations 2.1).
    ClusterId(u64), "{:x}"
);

/// Milliseconds since the process started: the only clock that core is given.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Uptime(pub u64);

impl Uptime {
    /// This moment plus `ms` milliseconds.
    #[must_use]
    pub const fn plus_ms(self, ms: u64) -> Self {
        Uptime(self.0.saturating_add(ms))
    }

    /// Milliseconds from `earlier` to this moment; 0 if `earlier` is later.
    pub const fn since_ms(self, earlier: Uptime) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}
