//! Which snapshots of an image a policy keeps: a pure function of their times.

use time::OffsetDateTime;

/// How many snapshots to keep. Of each period (an hour, a day, …, in UTC) that has snapshots, the
/// newest one counts, and so many of the latest such periods are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Policy {
    /// The newest snapshots, whenever they were made.
    pub last: u64,
    /// Hours.
    pub hourly: u64,
    /// Days.
    pub daily: u64,
    /// Weeks, which begin on Monday.
    pub weekly: u64,
    /// Months.
    pub monthly: u64,
    /// Years.
    pub yearly: u64,
}

impl Policy {
    /// Whether it says nothing at all: then it would keep only what must be kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A stable snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Its number.
    pub number: u64,
    /// When it became stable, in ms since 1970.
    pub stable_unix_ms: u64,
    /// Whether somebody has pinned it.
    pub pinned: bool,
}

/// Why a snapshot is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// It is the latest of its image, which is never removed.
    Latest,
    /// It is pinned.
    Pinned,
    /// It is one of the newest.
    Last,
    /// It is the newest of its hour.
    Hourly,
    /// It is the newest of its day.
    Daily,
    /// It is the newest of its week.
    Weekly,
    /// It is the newest of its month.
    Monthly,
    /// It is the newest of its year.
    Yearly,
}

impl Reason {
    /// The reason as people call it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Latest => "latest",
            Self::Pinned => "pinned",
            Self::Last => "last",
            Self::Hourly => "hourly",
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
            Self::Yearly => "yearly",
        }
    }
}

/// What becomes of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Its number.
    pub number: u64,
    /// Why it is kept; it is removed when there is no reason.
    pub reasons: Vec<Reason>,
}

impl Verdict {
    /// Whether it stays.
    #[must_use]
    pub const fn is_kept(&self) -> bool {
        !self.reasons.is_empty()
    }
}

/// The period that a time, in ms since 1970, falls into.
type PeriodOf = fn(u64) -> i64;

/// The verdict on each snapshot of an image, newest (by number) first. `latest` is the number of the
/// image's latest snapshot.
#[must_use]
pub fn decide(policy: &Policy, snapshots: &[Candidate], latest: u64) -> Vec<Verdict> {
    let mut newest_first = snapshots.to_vec();
    newest_first.sort_unstable_by_key(|snapshot| std::cmp::Reverse(snapshot.number));
    newest_first.dedup_by_key(|snapshot| snapshot.number);
    let periods: [(u64, Reason, PeriodOf); 5] = [
        (policy.hourly, Reason::Hourly, hour),
        (policy.daily, Reason::Daily, day),
        (policy.weekly, Reason::Weekly, week),
        (policy.monthly, Reason::Monthly, month),
        (policy.yearly, Reason::Yearly, year),
    ];
    let mut left = periods.map(|(count, ..)| count);
    let mut before: [Option<i64>; 5] = [None; 5];
    let verdict = |(rank, snapshot): (usize, &Candidate)| {
        let mut reasons = Vec::new();
        let mut because = |holds: bool, reason| {
            if holds {
                reasons.push(reason);
            }
        };
        because(snapshot.number == latest, Reason::Latest);
        because(snapshot.pinned, Reason::Pinned);
        because((rank as u64) < policy.last, Reason::Last);
        for (at, (_, reason, period)) in periods.iter().enumerate() {
            let of = Some(period(snapshot.stable_unix_ms));
            // A clock that was put back may make a period come twice: then it counts twice.
            if before[at] != of {
                before[at] = of;
                because(left[at] > 0, *reason);
                left[at] = left[at].saturating_sub(1);
            }
        }
        Verdict { number: snapshot.number, reasons }
    };
    newest_first.iter().enumerate().map(verdict).collect()
}

const HOUR_MS: u64 = 3_600_000;
const DAY_MS: u64 = 24 * HOUR_MS;
/// 1970 began on a Thursday, three days into its week.
const DAYS_INTO_WEEK: i64 = 3;

const fn hour(unix_ms: u64) -> i64 {
    (unix_ms / HOUR_MS) as i64
}

const fn day(unix_ms: u64) -> i64 {
    (unix_ms / DAY_MS) as i64
}

const fn week(unix_ms: u64) -> i64 {
    (day(unix_ms) + DAYS_INTO_WEEK).div_euclid(7)
}

/// The year and month; a time that no calendar has is in a month of its own.
fn calendar(unix_ms: u64) -> (i64, i64) {
    match OffsetDateTime::from_unix_timestamp((unix_ms / 1000) as i64) {
        Ok(time) => (time.year().into(), u8::from(time.month()).into()),
        Err(_) => (i64::MAX, 0),
    }
}

fn month(unix_ms: u64) -> i64 {
    let (year, month) = calendar(unix_ms);
    year.saturating_mul(12).saturating_add(month)
}

fn year(unix_ms: u64) -> i64 {
    calendar(unix_ms).0
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn at(number: u64, hours: u64) -> Candidate {
        // From 2026-01-01T00:00Z on, a Thursday.
        let stable_unix_ms = 1_767_225_600_000 + hours * HOUR_MS;
        Candidate { number, stable_unix_ms, pinned: false }
    }

    fn kept(policy: Policy, snapshots: &[Candidate], latest: u64) -> Vec<u64> {
        let verdicts = decide(&policy, snapshots, latest);
        let mut kept: Vec<u64> =
            verdicts.iter().filter(|v| v.is_kept()).map(|v| v.number).collect();
        kept.reverse();
        kept
    }

    #[test]
    fn the_newest_of_each_period_stays() {
        // Two an hour for 100 days.
        let all: Vec<Candidate> = (0..100 * 48).map(|n| at(n + 1, n / 2)).collect();
        let none = Policy::default();
        assert_eq!(kept(none, &all, 4800), [4800], "the latest, whatever the policy");
        assert_eq!(kept(Policy { last: 3, ..none }, &all, 4800), [4798, 4799, 4800]);
        assert_eq!(kept(Policy { hourly: 2, ..none }, &all, 4800), [4798, 4800]);
        assert_eq!(kept(Policy { daily: 3, ..none }, &all, 4800), [4704, 4752, 4800]);
        // The last day, 2026-04-10, is a Friday.
        assert_eq!(kept(Policy { weekly: 2, ..none }, &all, 4800), [4800 - 5 * 48, 4800]);
        assert_eq!(kept(Policy { monthly: 2, ..none }, &all, 4800), [4800 - 10 * 48, 4800]);
        assert_eq!(kept(Policy { yearly: 9, ..none }, &all, 4800), [4800]);
    }

    #[test]
    fn a_pin_stays_and_says_so() {
        let mut all = vec![at(1, 0), at(2, 1), at(5, 2)];
        all[0].pinned = true;
        let verdicts = decide(&Policy { hourly: 1, ..Policy::default() }, &all, 5);
        let of = |number, reasons| Verdict { number, reasons };
        assert_eq!(
            verdicts,
            [
                of(5, vec![Reason::Latest, Reason::Hourly]),
                of(2, vec![]),
                of(1, vec![Reason::Pinned])
            ]
        );
    }

    proptest! {
        #[test]
        fn a_policy_keeps_what_it_says_and_a_larger_one_keeps_more(
            times in prop::collection::vec((0u64..40_000_000_000_000, any::<bool>()), 0..60),
            counts in prop::array::uniform6(0u64..6),
            more in prop::array::uniform6(0u64..3),
        ) {
            let mut times = times;
            times.sort_unstable();
            let all: Vec<Candidate> = times
                .iter()
                .zip(1..)
                .map(|((stable_unix_ms, pinned), number)| Candidate {
                    number, stable_unix_ms: *stable_unix_ms, pinned: *pinned,
                })
                .collect();
            let latest = all.len() as u64;
            let policy = |c: [u64; 6]| Policy {
                last: c[0], hourly: c[1], daily: c[2], weekly: c[3], monthly: c[4], yearly: c[5],
            };
            let small: BTreeSet<u64> = kept(policy(counts), &all, latest).into_iter().collect();
            let sums = std::array::from_fn(|at| counts[at] + more[at]);
            let large: BTreeSet<u64> = kept(policy(sums), &all, latest).into_iter().collect();
            prop_assert!(small.is_subset(&large));
            for snapshot in &all {
                let must = snapshot.pinned || snapshot.number == latest
                    || latest - snapshot.number < counts[0];
                prop_assert!(!must || small.contains(&snapshot.number));
            }
            // Each period keeps as many as it says, or all that there are.
            for (at, period) in [(1, hour as fn(u64) -> i64), (2, day), (3, week), (4, month), (5, year)] {
                let verdicts = decide(&policy(counts), &all, latest);
                let reason = [Reason::Hourly, Reason::Daily, Reason::Weekly, Reason::Monthly, Reason::Yearly][at - 1];
                let by_reason = verdicts.iter().filter(|v| v.reasons.contains(&reason)).count() as u64;
                let periods: BTreeSet<i64> = all.iter().map(|s| period(s.stable_unix_ms)).collect();
                prop_assert_eq!(by_reason, counts[at].min(periods.len() as u64));
            }
        }
    }
}
