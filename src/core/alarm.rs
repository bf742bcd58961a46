//! Alarms: raised per member and kind, replicated, in force on every member (v3-api 6.5).

use std::collections::BTreeSet;

use bytes::Bytes;
use prost::Message;
use quorate_proto::etcdserverpb::{AlarmMember, AlarmType};

use super::types::MemberId;

/// The alarms in force.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Alarms {
    active: BTreeSet<(i32, MemberId)>,
}

impl Alarms {
    /// Raises an alarm; answers false if it was raised before.
    pub fn activate(&mut self, member: MemberId, kind: i32) -> bool {
        self.active.insert((kind, member))
    }

    /// Clears exactly this alarm; answers false if it was not raised.
    pub fn deactivate(&mut self, member: MemberId, kind: i32) -> bool {
        self.active.remove(&(kind, member))
    }

    /// Whether any member has raised an alarm of this kind.
    pub fn any(&self, kind: AlarmType) -> bool {
        self.active
            .range((kind as i32, MemberId(0))..)
            .next()
            .is_some_and(|(k, _)| *k == kind as i32)
    }

    /// Whether `member` has raised an alarm of this kind.
    pub fn has(&self, member: MemberId, kind: AlarmType) -> bool {
        self.active.contains(&(kind as i32, member))
    }

    /// Alarms of one kind, or all for `None`, by kind and member.
    pub fn list(&self, kind: i32) -> Vec<AlarmMember> {
        self.active
            .iter()
            .filter(|(k, _)| kind == AlarmType::None as i32 || *k == kind)
            .map(|(k, member)| AlarmMember { member_id: member.0, alarm: *k })
            .collect()
    }

    /// The key of the `alarm` bucket that stands for an alarm; its value is empty.
    pub fn record(member: MemberId, kind: i32) -> Bytes {
        AlarmMember { member_id: member.0, alarm: kind }.encode_to_vec().into()
    }

    /// Adds an alarm read from the bucket.
    ///
    /// # Errors
    /// If the key is not an `AlarmMember`.
    pub fn restore(&mut self, key: &[u8]) -> Result<(), prost::DecodeError> {
        let alarm = AlarmMember::decode(key)?;
        self.active.insert((alarm.alarm, MemberId(alarm.member_id)));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alarm_is_a_pair_of_member_and_kind() {
        let (nospace, corrupt) = (AlarmType::Nospace, AlarmType::Corrupt);
        let mut alarms = Alarms::default();
        assert!(alarms.activate(MemberId(7), nospace as i32));
        assert!(!alarms.activate(MemberId(7), nospace as i32));
        assert!(alarms.any(nospace) && !alarms.any(corrupt));
        assert!(!alarms.deactivate(MemberId(0), nospace as i32), "0 is no wildcard");
        let mut read_back = Alarms::default();
        read_back.restore(&Alarms::record(MemberId(7), nospace as i32)).unwrap();
        assert_eq!(read_back, alarms);
        assert_eq!(alarms.list(0).len(), 1);
        assert_eq!(alarms.list(corrupt as i32), vec![]);
        assert!(alarms.deactivate(MemberId(7), nospace as i32));
        assert!(!alarms.any(nospace));
    }
}
