//! Feature gates: what is switched on or off by name before it is settled.

use std::fmt;

use super::slot::parse_bool;

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

impl Stage {
    /// The label that `etcd_server_feature_enabled` gives it.
    pub const fn label(self) -> &'static str {
        match self {
            Stage::Alpha => "ALPHA",
            Stage::Beta => "BETA",
        }
    }
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

    /// Whether it stands for all gates of a stage.
    fn is_group(self) -> bool {
        matches!(self, Gate::AllAlpha | Gate::AllBeta)
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

impl FeatureGates {
    /// Reads `A=true,B=false`. `AllAlpha` and `AllBeta` set the gates of their stage that the same
    /// text does not set by name, wherever in the text they stand.
    ///
    /// # Errors
    /// etcd's words for what is wrong; nothing is set then.
    pub fn set_text(&mut self, text: &str) -> Result<(), String> {
        let mut named = Vec::new();
        for item in text.split(',').filter(|item| !item.is_empty()) {
            let (name, value) = match item.split_once('=') {
                Some((name, value)) => (name.trim(), value.trim()),
                None => return Err(format!("missing bool value for {}", item.trim())),
            };
            let on = parse_bool(value).ok_or_else(|| {
                format!(
                    "invalid value of {name}={value}, err: strconv.ParseBool: parsing {value:?}: \
                     invalid syntax"
                )
            })?;
            let gate = Gate::from_name(name)
                .ok_or_else(|| format!("unrecognized feature gate: {name}"))?;
            named.push((gate, on));
        }
        for &(gate, on) in &named {
            let stage = match gate {
                Gate::AllAlpha => Stage::Alpha,
                Gate::AllBeta => Stage::Beta,
                _ => continue,
            };
            for &other in Gate::ALL.iter().filter(|g| !g.is_group() && g.stage() == stage) {
                self.set(other, on);
            }
        }
        for (gate, on) in named {
            self.set(gate, on);
        }
        Ok(())
    }
}

impl fmt::Display for FeatureGates {
    /// The gates that are not at their default, as `--feature-gates` takes them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let changed = Gate::ALL.iter().filter(|&&g| self.enabled(g) != g.default());
        for (n, &gate) in changed.enumerate() {
            let comma = if n == 0 { "" } else { "," };
            write!(f, "{comma}{}={}", gate.name(), self.enabled(gate))?;
        }
        Ok(())
    }
}

impl fmt::Debug for FeatureGates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(Gate::ALL.iter().map(|&g| (g.name(), self.enabled(g)))).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_gate_stands_above_its_stage() {
        let mut gates = FeatureGates::default();
        assert_eq!(gates.to_string(), "");
        gates.set_text("LeaseCheckpoint=false,AllAlpha=1,FastLeaseKeepAlive=f").unwrap();
        assert!(gates.enabled(Gate::PriorityRequest));
        assert!(!gates.enabled(Gate::LeaseCheckpoint));
        assert!(!gates.enabled(Gate::FastLeaseKeepAlive));
        assert!(gates.enabled(Gate::TxnModeWriteWithSharedBuffer));
        assert!(!gates.enabled(Gate::AllBeta));
    }

    #[test]
    fn errors_are_those_of_etcd() {
        for (text, error) in [
            ("Nope=true", "unrecognized feature gate: Nope"),
            ("LeaseCheckpoint", "missing bool value for LeaseCheckpoint"),
            (
                "LeaseCheckpoint=yes",
                "invalid value of LeaseCheckpoint=yes, err: strconv.ParseBool: parsing \"yes\": \
                 invalid syntax",
            ),
        ] {
            let mut gates = FeatureGates::default();
            assert_eq!(gates.set_text(text), Err(error.to_owned()));
            assert_eq!(gates, FeatureGates::default());
        }
    }
}
