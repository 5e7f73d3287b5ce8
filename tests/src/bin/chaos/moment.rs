//! Moments on the wall clock, as logs have them.

use serde_json::Value;

/// A line of a coordinator's log.
#[derive(Debug, Clone)]
pub(crate) struct Said {
    /// In seconds since 1970.
    pub(crate) at: f64,
    pub(crate) message: String,
}

/// Now, in seconds since 1970.
#[expect(
    clippy::disallowed_methods,
    reason = "logs of other processes are compared with what is done here"
)]
pub(crate) fn now() -> f64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0.0, |since| since.as_secs_f64())
}

/// Reads a line, if it is one of the log.
pub(crate) fn parse(line: &str) -> Option<Said> {
    let value: Value = serde_json::from_str(line).ok()?;
    Some(Said {
        at: seconds(value["timestamp"].as_str()?)?,
        message: value["fields"]["message"].as_str()?.to_owned(),
    })
}

/// Seconds since 1970 of `2026-11-26T12:56:38.759647Z`.
fn seconds(text: &str) -> Option<f64> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let mut date = date.split('-').map(str::parse::<i64>);
    let (year, month, day) = (date.next()?.ok()?, date.next()?.ok()?, date.next()?.ok()?);
    let mut time = time.split(':');
    let hours: f64 = time.next()?.parse().ok()?;
    let minutes: f64 = time.next()?.parse().ok()?;
    let seconds: f64 = time.next()?.parse().ok()?;
    // Days since 1970 of a civil date, with the year beginning in March.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = 365 * year + year.div_euclid(4) - year.div_euclid(100)
        + year.div_euclid(400)
        + (153 * month + 2) / 5
        + day
        - 1
        - 719_468;
    Some(days as f64 * 86400.0 + hours * 3600.0 + minutes * 60.0 + seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_stamp_is_seconds_since_1970() {
        assert_eq!(seconds("1970-01-01T00:00:00.5Z"), Some(0.5));
        assert_eq!(seconds("2024-02-29T12:00:00.0Z"), Some(1_709_208_000.0));
        assert_eq!(seconds("2026-11-26T00:00:00.0Z"), Some(1_795_651_200.0));
        assert_eq!(seconds("yesterday"), None);
    }
}
