//! Counters that only grow: what they grew by of late.

use std::collections::VecDeque;
use std::time::Duration;

/// The newest values of some counters.
#[derive(Clone, Debug)]
pub(super) struct Counters<const N: usize> {
    span: Duration,
    seen: VecDeque<(Duration, [u64; N])>,
}

impl<const N: usize> Counters<N> {
    /// Looks back this far.
    pub(super) fn over(span: Duration) -> Self {
        Self { span, seen: VecDeque::new() }
    }

    /// Takes new values, and returns by how much they are above those that are oldest, and the time
    /// between. `None` at first, and after they were reset.
    pub(super) fn take(&mut self, at: Duration, values: [u64; N]) -> Option<(Duration, [u64; N])> {
        if self.seen.back().is_some_and(|(_, last)| last.iter().zip(&values).any(|(a, b)| a > b)) {
            self.seen.clear();
        }
        // The oldest one that is kept is the newest one that is old enough.
        while self.seen.get(1).is_some_and(|(then, _)| *then + self.span <= at) {
            self.seen.pop_front();
        }
        self.seen.push_back((at, values));
        let (then, oldest) = self.seen.front().filter(|(then, _)| *then < at)?;
        let mut grown = values;
        for (value, oldest) in grown.iter_mut().zip(oldest) {
            *value -= oldest;
        }
        Some((at.saturating_sub(*then), grown))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_counters_grew_by_is_told_over_a_span() {
        let second = Duration::from_secs;
        let mut counters = Counters::over(second(60));
        for (at, values, expected) in [
            (0, [5, 50], None),
            (30, [6, 50], Some((30, [1, 0]))),
            (60, [9, 51], Some((60, [4, 1]))),
            (90, [9, 60], Some((60, [3, 10]))),
            // Reset.
            (120, [1, 70], None),
            (150, [3, 71], Some((30, [2, 1]))),
            // Not asked for a long time.
            (900, [4, 71], Some((750, [1, 0]))),
        ] {
            let expected = expected.map(|(seconds, grown)| (second(seconds), grown));
            assert_eq!(counters.take(second(at), values), expected, "{at}");
        }
    }
}
