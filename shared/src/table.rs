//! Tables for people.

use std::fmt::{self, Display};

/// Rows of text under a header, in columns as wide as they need to be, and notes between them.
#[derive(Clone, Debug)]
pub struct Table {
    lines: Vec<Line>,
    numbers: Vec<usize>,
}

#[derive(Clone, Debug)]
enum Line {
    Row(Vec<String>),
    Note(String),
}

impl Table {
    /// A table with that header.
    pub fn new(header: &[&str]) -> Self {
        let header = header.iter().map(ToString::to_string).collect();
        Self { lines: vec![Line::Row(header)], numbers: Vec::new() }
    }

    /// Puts the text of these columns, the first is 0, to the right, as numbers are read.
    pub fn numbers(self, columns: &[usize]) -> Self {
        Self { numbers: columns.to_vec(), ..self }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.lines.push(Line::Row(cells.into_iter().collect()));
    }

    /// Adds what is to be said of the last row, on a line of its own, so that no column is as wide.
    pub fn note(&mut self, text: impl Into<String>) {
        self.lines.push(Line::Note(text.into()));
    }

    /// Whether there is only the header.
    pub fn is_empty(&self) -> bool {
        self.lines.len() == 1
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = || {
            self.lines.iter().filter_map(|line| match line {
                Line::Row(cells) => Some(cells),
                Line::Note(_) => None,
            })
        };
        let columns = rows().map(Vec::len).max().unwrap_or(0);
        let width = |column| {
            let cells = rows().filter_map(|row: &Vec<String>| row.get(column));
            cells.map(|cell: &String| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for line in &self.lines {
            let row = match line {
                Line::Row(row) => row,
                Line::Note(text) => {
                    writeln!(f, "    {text}")?;
                    continue;
                }
            };
            let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
                if self.numbers.contains(&column) {
                    format!("{cell:>width$}")
                } else {
                    format!("{cell:width$}")
                }
            });
            let line = cells.collect::<Vec<_>>().join("  ");
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["A", "LONG", "LAST"]);
        assert!(table.is_empty());
        table.row(["wide cell", "x", "y"].map(str::to_owned));
        table.row(["é", "", ""].map(str::to_owned));
        assert_eq!(table.to_string(), "A          LONG  LAST\nwide cell  x     y\né\n");
    }

    #[test]
    fn notes_make_no_column_wider() {
        let mut table = Table::new(&["A", "B"]);
        table.row(["1", "2"].map(str::to_owned));
        table.note("much longer than both");
        table.row(["3", "4"].map(str::to_owned));
        assert_eq!(table.to_string(), "A  B\n1  2\n    much longer than both\n3  4\n");
    }

    #[test]
    fn numbers_stand_to_the_right() {
        let mut table = Table::new(&["BYTES", "B", "NODE"]).numbers(&[0, 1]);
        table.row(["12", "345", "a"].map(str::to_owned));
        assert_eq!(table.to_string(), "BYTES    B  NODE\n   12  345  a\n");
    }
}
