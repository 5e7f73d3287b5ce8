//! Waiting times given to this process, in place of the usual ones: no result depends on them, so that they are no
//! part of a recipe. Harnesses run with short ones; a site may stretch them.

use std::str::FromStr;
use std::time::Duration;

use crate::scheduler::Timings;

/// One waiting time by the name of its field in [`Timings`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wait {
    name: String,
    value: Duration,
}

/// Not a waiting time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    /// Not of the form `name=time`.
    #[error("{text:?} is not of the form name=time, as in lease_ttl=30s or beat=200ms")]
    Form {
        /// What was given.
        text: String,
    },
    /// There is none of that name.
    #[error("there is no waiting time {name:?}; there are: {}", names().join(", "))]
    Name {
        /// What was given.
        name: String,
    },
    /// They contradict each other.
    #[error("{rule}; set both")]
    Order {
        /// What does not hold.
        rule: &'static str,
    },
}

type Field = (&'static str, fn(&mut Timings) -> &mut Duration);

const FIELDS: [Field; 18] = [
    ("beat", |t| &mut t.beat),
    ("suspect", |t| &mut t.suspect),
    ("lease_ttl", |t| &mut t.lease_ttl),
    ("lease_grace", |t| &mut t.lease_grace),
    ("member_silence", |t| &mut t.member_silence),
    ("reconnect", |t| &mut t.reconnect),
    ("sweep", |t| &mut t.sweep),
    ("exchange", |t| &mut t.exchange),
    ("exchange_per_rank", |t| &mut t.exchange_per_rank),
    ("first_formation", |t| &mut t.first_formation),
    ("last_call", |t| &mut t.last_call),
    ("keep_for_group", |t| &mut t.keep_for_group),
    ("reattach", |t| &mut t.reattach),
    ("hang", |t| &mut t.hang),
    ("grow", |t| &mut t.grow),
    ("drain", |t| &mut t.drain),
    ("retry", |t| &mut t.retry),
    ("retry_cap", |t| &mut t.retry_cap),
];

fn names() -> Vec<&'static str> {
    FIELDS.iter().map(|(name, _)| *name).collect()
}

impl FromStr for Wait {
    type Err = Wrong;

    fn from_str(text: &str) -> Result<Self, Wrong> {
        let wrong = || Wrong::Form { text: text.into() };
        let (name, time) = text.trim().split_once('=').ok_or_else(wrong)?;
        let split = time.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let (number, unit) = time.split_at(split);
        let number: u32 = number.parse().map_err(|_| wrong())?;
        let value = match unit {
            "ms" => Duration::from_millis(number.into()),
            "s" => Duration::from_secs(number.into()),
            "m" => Duration::from_secs(u64::from(number) * 60),
            _ => return Err(wrong()),
        };
        if !names().contains(&name) {
            return Err(Wrong::Name { name: name.into() });
        }
        let name = name.into();
        Ok(Self { name, value })
    }
}

/// Puts `waits` in the place of the usual ones, later ones winning.
///
/// # Errors
/// When what comes out would count every living worker as lost.
pub(super) fn apply(waits: &[Wait], timings: &mut Timings) -> Result<(), Wrong> {
    for wait in waits {
        let field = FIELDS.iter().find(|(name, _)| *name == wait.name);
        let (_, field) = field.expect("a name is checked when it is parsed");
        *field(timings) = wait.value;
    }
    let rules = [
        (!timings.beat.is_zero(), "beat must be longer than zero"),
        (!timings.sweep.is_zero(), "sweep must be longer than zero"),
        (
            timings.suspect > timings.beat,
            "suspect must be longer than beat",
        ),
        (
            timings.member_silence >= timings.suspect,
            "member_silence must not be shorter than suspect",
        ),
        (
            timings.lease_ttl > timings.beat * 2,
            "lease_ttl must be longer than two beats",
        ),
    ];
    match rules.iter().find(|(holds, _)| !holds) {
        Some(&(_, rule)) => Err(Wrong::Order { rule }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(waits: &[&str]) -> Result<Timings, Wrong> {
        let waits: Vec<Wait> = waits.iter().map(|w| w.parse()).collect::<Result<_, _>>()?;
        let mut timings = Timings::default();
        apply(&waits, &mut timings).map(|()| timings)
    }

    #[test]
    fn each_wait_can_be_set_and_a_contradiction_is_refused() {
        let short = applied(&["beat=200ms", "suspect=1s", "lease_ttl=2s", "hang=3m"]);
        let short = short.expect("they fit");
        assert_eq!(short.beat, Duration::from_millis(200));
        assert_eq!(short.hang, Duration::from_secs(180));
        assert_eq!(short.reconnect, Timings::default().reconnect);
        for (name, field) in FIELDS {
            let mut timings = Timings::default();
            *field(&mut timings) = Duration::from_secs(4321);
            assert_ne!(timings, Timings::default(), "{name} is a field of its own");
        }
        for (wrong, says) in [
            (&["beat"][..], "name=time"),
            (&["beat=5"], "name=time"),
            (&["beat=-5s"], "name=time"),
            (&["beet=5s"], "there are: beat, suspect"),
            (&["beat=0s"], "longer than zero"),
            (&["lease_ttl=1s"], "two beats"),
            (&["suspect=1s"], "suspect must be longer"),
        ] {
            let error = applied(wrong).expect_err("refused").to_string();
            assert!(error.contains(says), "{wrong:?}: {error}");
        }
    }
}
