//! What changes slowly, as a server says it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::blocking::Blocker;
use super::certificate::Certificate;

/// What changes slowly. What the server refuses, and what a standby has not, is `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DeepFacts {
    /// It let us in. If not, there is a certificate to tell why, and nothing else.
    pub is_answer: bool,
    /// The server's certificate, where TLS is on.
    pub certificate: Option<Certificate>,
    /// What the buffer cache did of late.
    pub cache: Option<CacheTraffic>,
    /// The transactions of late.
    pub load: Option<Load>,
    /// The statements that run longest, three at most.
    pub queries: Option<Vec<RunningQuery>>,
    /// The transactions that are open longest, three at most.
    pub transactions: Option<Vec<OpenTransaction>>,
    /// Who is in front of those that wait for a lock, three at most.
    pub blockers: Option<Vec<Blocker>>,
    /// The database that is nearest to the end of its transaction identifiers.
    pub wraparound: Option<Wraparound>,
    /// The tables of the database with most dead rows, three at most.
    pub dead_rows: Option<Vec<DeadRows>>,
    /// What there is; taken some minutes ago.
    pub sizes: Option<Sizes>,
    /// What is in `pg_wal`.
    pub wal: Option<WalDirectory>,
    /// Checkpoints of late.
    pub checkpoints: Option<Checkpoints>,
    /// Settings by name, in the units of `pg_settings`.
    pub settings: BTreeMap<String, String>,
    /// Settings that wait for a restart.
    pub pending_restart: Vec<String>,
    /// Extensions of the database with their versions.
    pub extensions: BTreeMap<String, String>,
    /// Databases that were made with another version of their collation.
    pub collation_mismatches: Vec<String>,
}

/// What the buffer cache did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheTraffic {
    /// Over so long.
    pub over: Duration,
    /// Blocks that were found in it.
    pub hit: u64,
    /// Blocks that were read.
    pub read: u64,
}

/// Transactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Over so long.
    pub over: Duration,
    /// All that ended.
    pub transactions: u64,
    /// Transactions and subtransactions that wrote.
    pub writing: u64,
}

/// A statement that runs.
#[derive(Clone, Debug, PartialEq)]
pub struct RunningQuery {
    /// Its process.
    pub pid: i32,
    /// Its role.
    pub role: String,
    /// Its `application_name`.
    pub application_name: String,
    /// Since it began.
    pub running_for: Duration,
}

/// Who holds something.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    /// The role.
    pub role: String,
    /// Its `application_name`.
    pub application_name: String,
    /// `active`, `idle in transaction` …
    pub state: String,
}

/// A transaction that is open.
#[derive(Clone, Debug, PartialEq)]
pub struct OpenTransaction {
    /// Its process, if it has one.
    pub pid: Option<i32>,
    /// Whose it is.
    pub holder: Holder,
    /// The name of a prepared transaction.
    pub prepared: Option<String>,
    /// Since it began, or was prepared.
    pub open_for: Duration,
}

/// How far a database is from the end of its identifiers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wraparound {
    /// The database.
    pub database: String,
    /// Transactions since the oldest that is not frozen.
    pub transactions: u32,
    /// Multixacts since the oldest that is still known.
    pub multixacts: u32,
}

/// A table with dead rows.
#[derive(Clone, Debug, PartialEq)]
pub struct DeadRows {
    /// The table with its schema.
    pub table: String,
    /// How many are dead.
    pub dead: u64,
    /// Of all its rows.
    pub percent: f64,
}

/// What there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Databases and their bytes, the largest first.
    pub databases: Vec<(String, u64)>,
    /// Tables of the database that was asked.
    pub tables: u32,
}

/// What is in `pg_wal`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalDirectory {
    /// Bytes of its files.
    pub bytes: u64,
    /// Bytes that `max_wal_size` and what is kept beside allow.
    pub allowed_bytes: u64,
}

/// Checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checkpoints {
    /// Over so long.
    pub over: Duration,
    /// By `checkpoint_timeout`.
    pub timed: u64,
    /// For another reason: the WAL that was written, most often.
    pub requested: u64,
}
