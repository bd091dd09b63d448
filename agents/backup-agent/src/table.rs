//! Tables and quantities for people.

use std::fmt::{self, Display};
use std::time::Duration;

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use indicatif::{HumanBytes, HumanDuration};

/// Rows of text under a header, in columns as wide as they need to be.
#[derive(Clone, Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with that header.
    pub fn new(header: &[&str]) -> Self {
        Self { rows: vec![header.iter().map(ToString::to_string).collect()] }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Whether there is only the header.
    pub fn is_empty(&self) -> bool {
        self.rows.len() == 1
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column| {
            let cells = self.rows.iter().filter_map(|row: &Vec<String>| row.get(column));
            cells.map(|cell: &String| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let last = row.len().saturating_sub(1);
            for (column, cell) in row.iter().enumerate() {
                if column == last {
                    writeln!(f, "{cell}")?;
                } else {
                    write!(f, "{cell:width$}  ", width = widths[column])?;
                }
            }
        }
        Ok(())
    }
}

/// `1.2 GiB`.
pub fn bytes(count: u64) -> String {
    HumanBytes(count).to_string()
}

/// `3 minutes`.
pub fn span(span: TimeDelta) -> String {
    let span = span.to_std().unwrap_or(Duration::ZERO);
    if span < Duration::from_secs(1) {
        return format!("{} ms", span.as_millis());
    }
    HumanDuration(span).to_string()
}

/// `2026-03-01T14:30:00Z`.
pub fn time(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Secs, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["A", "LONG", "LAST"]);
        table.row(["wide cell", "x", "y"].map(str::to_owned));
        assert_eq!(table.to_string(), "A          LONG  LAST\nwide cell  x     y\n");
    }
}
