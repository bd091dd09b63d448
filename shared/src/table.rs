//! Tables for people.

use std::fmt::{self, Display};

/// Rows of text under a header, in columns as wide as they need to be.
#[derive(Clone, Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
    numbers: Vec<usize>,
}

impl Table {
    /// A table with that header.
    pub fn new(header: &[&str]) -> Self {
        let header = header.iter().map(ToString::to_string).collect();
        Self { rows: vec![header], numbers: Vec::new() }
    }

    /// Puts the text of these columns, the first is 0, to the right, as numbers are read.
    pub fn numbers(self, columns: &[usize]) -> Self {
        Self { numbers: columns.to_vec(), ..self }
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
    fn numbers_stand_to_the_right() {
        let mut table = Table::new(&["BYTES", "B", "NODE"]).numbers(&[0, 1]);
        table.row(["12", "345", "a"].map(str::to_owned));
        assert_eq!(table.to_string(), "BYTES    B  NODE\n   12  345  a\n");
    }
}
