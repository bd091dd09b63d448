//! Cuts a text that comes piece by piece into its lines.

/// The line that has begun and not ended yet.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    begun: Vec<u8>,
}

impl Lines {
    /// Takes the next piece, and hands every line that it completes to `take`, without its end.
    ///
    /// # Errors
    ///
    /// What `take` says.
    pub(crate) fn push<E>(
        &mut self,
        piece: &[u8],
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        for line in piece.split_inclusive(|byte| *byte == b'\n') {
            match line.strip_suffix(b"\n") {
                None => self.begun.extend_from_slice(line),
                Some(line) if self.begun.is_empty() => take(line)?,
                Some(end) => {
                    self.begun.extend_from_slice(end);
                    take(&self.begun)?;
                    self.begun.clear();
                }
            }
        }
        Ok(())
    }

    /// What follows after the last end of a line: nothing, usually.
    pub(crate) fn rest(&self) -> &[u8] {
        &self.begun
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_the_same_however_the_text_is_cut() {
        let text = b"one\n\ntwo, which is longer\nrest";
        for step in 1..=text.len() {
            let (mut lines, mut seen) = (Lines::default(), Vec::new());
            for piece in text.chunks(step) {
                let taken = lines.push(piece, |line| {
                    seen.push(String::from_utf8_lossy(line).into_owned());
                    Ok::<_, ()>(())
                });
                assert_eq!(taken, Ok(()));
            }
            assert_eq!(seen, ["one", "", "two, which is longer"], "step {step}");
            assert_eq!(lines.rest(), b"rest", "step {step}");
        }
    }
}
