//! How fast a position moves.

use std::collections::VecDeque;
use std::time::Duration;

/// So many points are kept for a window.
const POINTS: u32 = 12;

/// The positions of the last while, thinned out.
#[derive(Clone, Debug)]
pub struct Pace {
    window: Duration,
    points: VecDeque<(Duration, u64)>,
    newest: Option<(Duration, u64)>,
}

impl Pace {
    /// A pace over the last `window`.
    pub fn over(window: Duration) -> Self {
        Self { window, points: VecDeque::new(), newest: None }
    }

    /// Takes in where the position was at a moment. One that went back begins anew.
    pub fn push(&mut self, at: Duration, lsn: u64) {
        if self.newest.is_some_and(|(before, newest)| lsn < newest || at < before) {
            self.points.clear();
        }
        self.newest = Some((at, lsn));
        let spacing = self.window / POINTS;
        if self.points.back().is_none_or(|(last, _)| *last + spacing <= at) {
            self.points.push_back((at, lsn));
        }
        while self.points.get(1).is_some_and(|(second, _)| *second + self.window <= at) {
            self.points.pop_front();
        }
    }

    /// Bytes per second; `None` until it was watched for a sixth of the window.
    pub fn bytes_per_second(&self) -> Option<f64> {
        let ((from, first), (to, last)) = (*self.points.front()?, self.newest?);
        let watched = to.saturating_sub(from);
        (watched >= self.window / 6).then(|| float(last - first) / watched.as_secs_f64())
    }
}

/// A number of bytes, exact up to 2^53.
#[expect(clippy::cast_precision_loss, reason = "a rate needs no more than 53 bits")]
pub fn float(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_mins(1);

    fn pushed(points: impl IntoIterator<Item = (u64, u64)>) -> Pace {
        let mut pace = Pace::over(WINDOW);
        for (seconds, lsn) in points {
            pace.push(Duration::from_secs(seconds), lsn);
        }
        pace
    }

    #[test]
    fn a_pace_is_that_of_the_last_window() {
        for (name, pace, expected) in [
            ("nothing", pushed([]), None),
            ("one point", pushed([(0, 5)]), None),
            ("too short", pushed([(0, 5), (9, 500)]), None),
            ("long enough", pushed([(0, 500), (10, 1500)]), Some(100.0)),
            ("no movement is a pace", pushed([(0, 500), (30, 500)]), Some(0.0)),
            ("the past is forgotten", pushed((0..600).map(|at| (at, at.max(500)))), Some(1.0)),
            ("a pause is not", pushed([(0, 0), (1000, 1000), (1010, 3000)]), Some(1.0)),
            ("going back begins anew", pushed([(0, 500), (20, 9000), (30, 100)]), None),
        ] {
            let found = pace.bytes_per_second().map(|it| (it * 10.0).round() / 10.0);
            match name {
                "a pause is not" => assert!(found > expected, "{name}: {found:?}"),
                _ => assert_eq!(found, expected, "{name}"),
            }
        }
    }

    #[test]
    fn few_points_are_kept() {
        let pace = pushed((0..10_000).map(|at| (at, at)));
        assert!(pace.points.len() <= POINTS as usize + 2, "{}", pace.points.len());
    }
}
