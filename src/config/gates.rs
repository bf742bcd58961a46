//! Feature gates: what is switched on or off by name before it is settled.

use std::fmt;

macro_rules! gates {
    ($($(#[$doc:meta])* $name:ident = $stage:ident, $default:literal;)+) => {
        /// One switch.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum Gate {
            $($(#[$doc])* $name),+
        }

        impl Gate {
            /// Every gate, in the order of the declaration.
            pub const ALL: &[Gate] = &[$(Gate::$name),+];

            /// Its name in `--feature-gates`.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Gate::$name => stringify!($name)),+
                }
            }

            /// How settled it is.
            pub const fn stage(self) -> Stage {
                match self {
                    $(Gate::$name => Stage::$stage),+
                }
            }

            /// Whether it is on unless set.
            pub const fn default(self) -> bool {
                match self {
                    $(Gate::$name => $default),+
                }
            }
        }
    };
}

/// How settled a gate is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    Alpha,
    Beta,
}

gates! {
    /// Sets every alpha gate that is not set by name.
    AllAlpha = Alpha, false;
    /// Sets every beta gate that is not set by name.
    AllBeta = Beta, false;
    /// The leader compares compaction hashes.
    CompactHashCheck = Alpha, false;
    /// Known leases are renewed without waiting for the applied index.
    FastLeaseKeepAlive = Beta, true;
    /// Hashes are compared with peers before serving.
    InitialCorruptCheck = Alpha, false;
    /// The leader replicates leases' remaining times.
    LeaseCheckpoint = Alpha, false;
    /// Remaining times survive a restart; needs `LeaseCheckpoint`.
    LeaseCheckpointPersist = Alpha, false;
    /// A lease may be revoked while the apply backlog is full.
    PriorityRequest = Alpha, false;
    /// Peers are dialed from the first own address that is no loopback.
    SetMemberLocalAddr = Alpha, false;
    /// The health service says NOT_SERVING while space is reclaimed.
    StopGRPCServiceOnDefrag = Alpha, false;
    /// Write transactions read through the shared buffer.
    TxnModeWriteWithSharedBuffer = Beta, true;
}

impl Gate {
    /// The gate of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Gate::ALL.iter().copied().find(|gate| gate.name() == name)
    }
}

/// Which gates are on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct FeatureGates {
    /// One bit a gate, by its place in [`Gate::ALL`].
    on: u32,
}

impl Default for FeatureGates {
    fn default() -> Self {
        let mut gates = FeatureGates { on: 0 };
        for &gate in Gate::ALL {
            gates.set(gate, gate.default());
        }
        gates
    }
}

impl FeatureGates {
    /// Whether `gate` is on.
    pub fn enabled(self, gate: Gate) -> bool {
        self.on & 1 << gate as u32 != 0
    }

    /// Switches one gate and no other.
    pub fn set(&mut self, gate: Gate, on: bool) {
        let bit = 1 << gate as u32;
        self.on = if on { self.on | bit } else { self.on & !bit };
    }
}

impl fmt::Debug for FeatureGates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(Gate::ALL.iter().map(|&g| (g.name(), self.enabled(g)))).finish()
    }
}
