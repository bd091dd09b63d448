//! From answers to values.

use shared::pg::{Connection, QueryError};
use shared::telemetry::chain;
use thiserror::Error;
use tokio_postgres::Row;
use tokio_postgres::types::{FromSql, FromSqlOwned, ToSql};

use crate::known::{Known, Unknown};

/// Why a question brought nothing.
#[derive(Debug, Error)]
pub enum AnswerError {
    /// There is no answer.
    #[error(transparent)]
    Query(#[from] QueryError),
    /// A column is not of the type it is known to have.
    #[error("read an answer")]
    Column(#[from] tokio_postgres::Error),
    /// A number is outside its range.
    #[error("{what} is {found}, which is out of range")]
    Range {
        /// What was asked.
        what: &'static str,
        /// The answer.
        found: i64,
    },
}

/// The columns of a row, one after the other.
pub(super) struct Columns<'a> {
    row: &'a Row,
    next: usize,
}

impl<'a> Columns<'a> {
    pub(super) fn take<T: FromSql<'a>>(&mut self) -> Result<T, AnswerError> {
        self.next += 1;
        Ok(self.row.try_get(self.next - 1)?)
    }

    /// A number that is not negative, asked for as `bigint`.
    pub(super) fn number<T: TryFrom<i64>>(&mut self, what: &'static str) -> Result<T, AnswerError> {
        let found: i64 = self.take()?;
        T::try_from(found).map_err(|_| AnswerError::Range { what, found })
    }
}

/// Reads a row of one column.
pub(super) fn only<T: FromSqlOwned>(columns: &mut Columns<'_>) -> Result<T, AnswerError> {
    columns.take()
}

/// Asks, and reads each row.
pub(super) async fn rows<T>(
    connection: &Connection,
    sql: &str,
    read: impl FnMut(&mut Columns<'_>) -> Result<T, AnswerError>,
) -> Result<Vec<T>, AnswerError> {
    rows_of(connection, sql, &[], read).await
}

/// The same with parameters.
pub(super) async fn rows_of<T>(
    connection: &Connection,
    sql: &str,
    parameters: &[&(dyn ToSql + Sync)],
    mut read: impl FnMut(&mut Columns<'_>) -> Result<T, AnswerError>,
) -> Result<Vec<T>, AnswerError> {
    let rows = connection.query(sql, parameters).await?;
    rows.iter().map(|row| read(&mut Columns { row, next: 0 })).collect()
}

/// Asks for one row.
pub(super) async fn row<T>(
    connection: &Connection,
    sql: &str,
    read: impl FnOnce(&mut Columns<'_>) -> Result<T, AnswerError>,
) -> Result<T, AnswerError> {
    let row = connection.query_one(sql, &[]).await?;
    read(&mut Columns { row: &row, next: 0 })
}

/// Waits until the server has answered all there is. Of each question a statement is left to close,
/// and a server that cannot say that it has done so writes into its log that a client was lost.
pub(super) async fn finish(connection: Connection) {
    // One that does not answer has told what it could before.
    connection.simple_query("").await.ok();
}

/// What cannot be told is unknown.
pub(super) fn known<T>(answer: Result<T, AnswerError>) -> Known<T> {
    answer.map_err(|error| Unknown::because(chain(&error)))
}
