//! Numbers in sentences.

use std::time::Duration;

/// A count as the number that a check judges.
#[expect(clippy::cast_precision_loss, reason = "it is compared with limits of two digits")]
pub fn number(count: u64) -> f64 {
    count as f64
}

/// A part of a whole, in percent; of nothing it is none.
pub fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { 100.0 * number(part) / number(whole) }
}

/// `912 bytes`, `1.2 GiB`.
pub fn bytes(count: u64) -> String {
    let (mut size, mut unit) = (number(count), "bytes");
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if size < 1024.0 {
            break;
        }
        (size, unit) = (size / 1024.0, next);
    }
    if unit == "bytes" { format!("{count} bytes") } else { format!("{size:.1} {unit}") }
}

/// `0.4 s`, `40 s`, `4 min 10 s`, `3 h 20 min`, `5 d 3 h`: two units at most.
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    let two = |large: u64, unit: &str, small: u64, small_unit: &str| match small {
        0 => format!("{large} {unit}"),
        _ => format!("{large} {unit} {small} {small_unit}"),
    };
    if days > 0 {
        two(days, "d", hours % 24, "h")
    } else if hours > 0 {
        two(hours, "h", minutes % 60, "min")
    } else if minutes > 0 {
        two(minutes, "min", seconds % 60, "s")
    } else if seconds > 9 {
        format!("{seconds} s")
    } else {
        format!("{:.1} s", time.as_secs_f64())
    }
}

/// `1 session waits`, `2 sessions wait`: the word that goes with a count.
pub fn counted(count: u64, one: &str, more: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { more })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (count, expected) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1024, "1.0 KiB"),
            (16 << 20, "16.0 MiB"),
            (1 << 52, "4.0 PiB"),
        ] {
            assert_eq!(bytes(count), expected);
        }
        for (seconds, expected) in [
            (0.44, "0.4 s"),
            (40.0, "40 s"),
            (60.0, "1 min"),
            (250.0, "4 min 10 s"),
            (12000.0, "3 h 20 min"),
            (86400.0, "1 d"),
            (442_800.0, "5 d 3 h"),
        ] {
            assert_eq!(duration(Duration::from_secs_f64(seconds)), expected);
        }
        assert_eq!(counted(1, "session waits", "sessions wait"), "1 session waits");
        assert_eq!(percent(1, 0).to_string(), "0");
    }
}
