//! PostgreSQL: how to reach a server, and the names and headers of its WAL files.

pub mod connect;
pub mod error;
mod guard;
pub mod settings;
pub mod wal;

pub use connect::{Connection, connect, connect_pooler};
pub use error::{ConnectError, QueryError};
pub use settings::{Node, PostgresConfig, Settings, SettingsError, Tls, TlsMode};
