//! A replication connection: login, commands and their answers. `tokio-postgres` has no replication
//! mode.
//!
//! [`base_backup`] sends what `pg_basebackup` sends, [`stream_wal`] what `pg_receivewal` sends.
//!
//! Source: PostgreSQL manual, "Streaming Replication Protocol" and "Message Formats".

pub mod base_backup;
pub mod stream_wal;

use std::fmt;
use std::io;
use std::time::Duration;

use bytes::BytesMut;
use futures_util::FutureExt;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
use postgres_protocol::message::backend::{DataRowBody, ErrorFields, Message};
use postgres_protocol::message::frontend;
use shared::pg::{Node, Settings};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use tokio_postgres::fallible_iterator::FallibleIterator;
use tokio_postgres::types::PgLsn;

use crate::stream::{self, Stream};

/// How much is asked of the socket at once; the server sends messages of 32 KiB.
const READ_BYTES: usize = 256 << 10;
/// Time for dialling, TLS and authentication together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// What the server does to notice an agent that is gone: it asks as soon as an agent notices a server …
const KEEPALIVES: &str =
    "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3";
/// … and gives up one that takes nothing, in milliseconds: so soon as `wal_sender_timeout` would by
/// default. A walsender that is told to end first sends why, and waits for a frozen agent's full socket
/// for ever; a checkpoint that gives its slot up waits for the walsender, and `pg_wal` grows beyond
/// `max_slot_wal_keep_size`. A store that takes nothing for so long costs the connection too, and what
/// was under way: the slot holds back what was sent.
pub(crate) const TCP_USER_TIMEOUT: Duration = Duration::from_mins(1);
/// Warnings kept for the log; a damaged table can cause one per page.
const WARNINGS_MAX: usize = 100;

/// Why a replication connection failed.
#[derive(Debug, Error)]
pub enum ReplicationError {
    /// The server could not be reached.
    #[error("connect to {node} for replication")]
    Connect {
        /// The server.
        node: String,
        /// What was wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The server asks for something this client does not do.
    #[error("{node} asks for {asked}, which is not supported; use scram-sha-256 in pg_hba.conf")]
    Authentication {
        /// The server.
        node: String,
        /// What it asked for.
        asked: &'static str,
    },
    /// The server wants a password and none is configured.
    #[error("{node} asks for a password; set postgres.password_file")]
    NoPassword {
        /// The server.
        node: String,
    },
    /// The connection broke.
    #[error("read from {node}")]
    Broken {
        /// The server.
        node: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// The server sent nothing for too long.
    #[error("{node} sent nothing for {} s", limit.as_secs())]
    Stalled {
        /// The server.
        node: String,
        /// The limit.
        limit: Duration,
    },
    /// The server refused.
    #[error("{node} says: {message}")]
    Server {
        /// The server.
        node: String,
        /// Its words.
        message: Box<ServerMessage>,
    },
    /// The server ended the stream.
    #[error("{node} is shutting down")]
    ShuttingDown {
        /// The server.
        node: String,
    },
    /// The server does not keep to the protocol.
    #[error("{node} sent an unexpected answer: {what}")]
    Protocol {
        /// The server.
        node: String,
        /// What was unexpected.
        what: String,
    },
}

impl ReplicationError {
    /// Tells whether the same may succeed if tried again soon.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connect { .. }
            | Self::Broken { .. }
            | Self::Stalled { .. }
            | Self::ShuttingDown { .. } => true,
            Self::Server { message, .. } => {
                // Too many connections, shutting down, starting up; the rest needs a person.
                ["53300", "57P01", "57P02", "57P03"].contains(&message.code.as_str())
            }
            Self::Authentication { .. } | Self::NoPassword { .. } | Self::Protocol { .. } => false,
        }
    }
}

/// An error or warning in the server's words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerMessage {
    /// `ERROR`, `WARNING`, …
    pub severity: String,
    /// The SQLSTATE.
    pub code: String,
    /// What happened.
    pub message: String,
    /// More about it, if there is.
    pub detail: String,
    /// What to do, if the server has an idea.
    pub hint: String,
}

impl ServerMessage {
    fn new(mut fields: ErrorFields<'_>) -> io::Result<Self> {
        use postgres_protocol::message::backend::ErrorField;
        let mut message = Self::default();
        let text =
            |field: &ErrorField<'_>| String::from_utf8_lossy(field.value_bytes()).into_owned();
        while let Some(field) = fields.next()? {
            match field.type_() {
                b'V' => message.severity = text(&field),
                b'C' => message.code = text(&field),
                b'M' => message.message = text(&field),
                b'D' => message.detail = text(&field),
                b'H' => message.hint = text(&field),
                _ => {}
            }
        }
        Ok(message)
    }
}

impl fmt::Display for ServerMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        for more in [&self.detail, &self.hint] {
            if !more.is_empty() {
                write!(f, "; {more}")?;
            }
        }
        Ok(())
    }
}

/// What `IDENTIFY_SYSTEM` answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SystemIdentity {
    /// The system identifier.
    pub system_identifier: u64,
    /// The timeline.
    pub timeline: u32,
    /// The flush position of a primary, the replay position of a standby.
    pub lsn: PgLsn,
}

/// A connection in replication mode.
pub struct Replication {
    node: String,
    stream: Stream,
    buffer: BytesMut,
    /// Longest silence of the server that is waited for.
    stall_limit: Duration,
    warnings: Vec<ServerMessage>,
    warning_count: u64,
}

impl fmt::Debug for Replication {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replication").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Replication {
    /// Connects to a server in replication mode, to read from a slot: the server ends the connection if
    /// nothing is read for a minute.
    ///
    /// `stall_limit` bounds the server's silence in everything after.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or does not let this user in.
    pub async fn connect(
        settings: &Settings,
        node: &Node,
        stall_limit: Duration,
    ) -> Result<Self, ReplicationError> {
        let limit_ms = TCP_USER_TIMEOUT.as_millis();
        let options = format!("{KEEPALIVES} -c tcp_user_timeout={limit_ms}");
        Self::connect_with(settings, node, stall_limit, &options).await
    }

    /// Like [`connect`](Self::connect), to read a base backup: nothing waits for it on the server, and it
    /// waits for the store as long as that takes.
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect).
    pub async fn connect_for_backup(
        settings: &Settings,
        node: &Node,
        stall_limit: Duration,
    ) -> Result<Self, ReplicationError> {
        Self::connect_with(settings, node, stall_limit, KEEPALIVES).await
    }

    async fn connect_with(
        settings: &Settings,
        node: &Node,
        stall_limit: Duration,
        options: &str,
    ) -> Result<Self, ReplicationError> {
        let name = node.to_string();
        let connecting = async {
            let stream = stream::open(settings, node).await.map_err(|error| {
                ReplicationError::Connect { node: name.clone(), source: error.into() }
            })?;
            let mut connection = Self {
                node: name.clone(),
                stream,
                buffer: BytesMut::with_capacity(READ_BYTES),
                stall_limit: CONNECT_TIMEOUT,
                warnings: Vec::new(),
                warning_count: 0,
            };
            connection.start(settings, settings.may_give_away(node), options).await?;
            connection.stall_limit = stall_limit;
            Ok(connection)
        };
        timeout(CONNECT_TIMEOUT, connecting).await.unwrap_or_else(|_| {
            Err(ReplicationError::Stalled { node: name.clone(), limit: CONNECT_TIMEOUT })
        })
    }

    async fn start(
        &mut self,
        settings: &Settings,
        gives_hash: bool,
        options: &str,
    ) -> Result<(), ReplicationError> {
        let parameters = [
            ("user", settings.user.as_str()),
            ("replication", "true"),
            ("application_name", settings.application_name.as_str()),
            ("client_encoding", "UTF8"),
            ("options", options),
        ];
        let mut out = BytesMut::new();
        frontend::startup_message(parameters, &mut out).map_err(|e| self.broken(e))?;
        self.send(&out).await?;

        let mut scram = None;
        loop {
            out.clear();
            match self.message().await? {
                Message::AuthenticationOk
                | Message::BackendKeyData(_)
                | Message::ParameterStatus(_) => continue,
                Message::ReadyForQuery(_) => return Ok(()),
                Message::AuthenticationMd5Password(_) if !gives_hash => {
                    return Err(self.unsupported("an MD5 hash of the password without TLS"));
                }
                Message::AuthenticationMd5Password(body) => {
                    let password = self.password(settings)?;
                    let hash = md5_hash(settings.user.as_bytes(), password, body.salt());
                    frontend::password_message(hash.as_bytes(), &mut out)
                        .map_err(|e| self.broken(e))?;
                }
                Message::AuthenticationSasl(body) => {
                    let mut mechanisms = body.mechanisms();
                    let mut known = false;
                    while let Some(name) = mechanisms.next().map_err(|e| self.broken(e))? {
                        known |= name == SCRAM_SHA_256;
                    }
                    if !known {
                        return Err(self.unsupported("a SASL mechanism other than SCRAM-SHA-256"));
                    }
                    let password = self.password(settings)?;
                    let begun = ScramSha256::new(password, ChannelBinding::unsupported());
                    frontend::sasl_initial_response(SCRAM_SHA_256, begun.message(), &mut out)
                        .map_err(|e| self.broken(e))?;
                    scram = Some(begun);
                }
                Message::AuthenticationSaslContinue(body) => {
                    let Some(scram) = scram.as_mut() else {
                        return Err(self.unexpected("a SCRAM answer that was not asked for"));
                    };
                    scram.update(body.data()).map_err(|e| self.broken(e))?;
                    frontend::sasl_response(scram.message(), &mut out)
                        .map_err(|e| self.broken(e))?;
                }
                Message::AuthenticationSaslFinal(body) => {
                    let Some(scram) = scram.as_mut() else {
                        return Err(self.unexpected("a SCRAM answer that was not asked for"));
                    };
                    // The server proves here that it knows the password too.
                    scram.finish(body.data()).map_err(|e| self.broken(e))?;
                    continue;
                }
                Message::AuthenticationCleartextPassword => {
                    return Err(self.unsupported("a cleartext password"));
                }
                _ => return Err(self.unsupported("an unknown authentication method")),
            }
            self.send(&out).await?;
        }
    }

    fn password<'s>(&self, settings: &'s Settings) -> Result<&'s [u8], ReplicationError> {
        match &settings.password {
            Some(password) => Ok(password.expose().as_bytes()),
            None => Err(ReplicationError::NoPassword { node: self.node.clone() }),
        }
    }

    /// Asks the server who it is.
    ///
    /// # Errors
    ///
    /// The connection broke or the server refused.
    pub async fn identify_system(&mut self) -> Result<SystemIdentity, ReplicationError> {
        self.query("IDENTIFY_SYSTEM").await?;
        let rows = self.rows().await?;
        self.ready().await?;
        let [row] = rows.as_slice() else {
            return Err(self.unexpected("IDENTIFY_SYSTEM gave no row"));
        };
        Ok(SystemIdentity {
            system_identifier: self.field(row, 0)?,
            timeline: self.field(row, 1)?,
            lsn: self.field(row, 2)?,
        })
    }

    /// Asks for a setting of this session.
    ///
    /// # Errors
    ///
    /// The connection broke, or the server knows no such setting.
    pub async fn show(&mut self, name: &str) -> Result<String, ReplicationError> {
        self.query(&format!("SHOW {name}")).await?;
        let rows = self.rows().await?;
        self.ready().await?;
        match rows.as_slice() {
            [row] => self.field(row, 0),
            _ => Err(self.unexpected("SHOW gave no row")),
        }
    }

    async fn query(&mut self, command: &str) -> Result<(), ReplicationError> {
        let mut out = BytesMut::new();
        frontend::query(command, &mut out).map_err(|e| self.broken(e))?;
        self.send(&out).await
    }

    /// Reads one result set, its command tag included.
    async fn rows(&mut self) -> Result<Vec<Vec<Option<String>>>, ReplicationError> {
        let mut rows = Vec::new();
        loop {
            match self.message().await? {
                Message::RowDescription(_) => {}
                Message::DataRow(body) => rows.push(fields(&body).map_err(|e| self.broken(e))?),
                Message::CommandComplete(_) => return Ok(rows),
                _ => return Err(self.unexpected("a message that is no part of a result")),
            }
        }
    }

    async fn ready(&mut self) -> Result<(), ReplicationError> {
        loop {
            if let Message::ReadyForQuery(_) = self.message().await? {
                return Ok(());
            }
        }
    }

    fn field<T: std::str::FromStr>(
        &self,
        row: &[Option<String>],
        index: usize,
    ) -> Result<T, ReplicationError> {
        self.optional(row, index)?.ok_or_else(|| self.unexpected("a value is missing"))
    }

    fn optional<T: std::str::FromStr>(
        &self,
        row: &[Option<String>],
        index: usize,
    ) -> Result<Option<T>, ReplicationError> {
        let Some(text) = row.get(index).and_then(Option::as_deref) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| self.unexpected(text))
    }

    async fn send(&mut self, out: &[u8]) -> Result<(), ReplicationError> {
        let sent = async {
            self.stream.write_all(out).await?;
            self.stream.flush().await
        };
        match timeout(self.stall_limit, sent).await {
            Ok(sent) => sent.map_err(|e| self.broken(e)),
            Err(_) => Err(self.stalled()),
        }
    }

    /// Returns the next message that is no notice; an error of the server is an error here.
    async fn message(&mut self) -> Result<Message, ReplicationError> {
        loop {
            match self.message_here()? {
                Some(message) => return Ok(message),
                None => self.fill().await?,
            }
        }
    }

    /// Returns the next message if it was read as a whole.
    fn message_here(&mut self) -> Result<Option<Message>, ReplicationError> {
        loop {
            match Message::parse(&mut self.buffer).map_err(|e| self.broken(e))? {
                Some(Message::NoticeResponse(body)) => {
                    let warning = ServerMessage::new(body.fields()).map_err(|e| self.broken(e))?;
                    // One about a file comes twice: when sizes are estimated, and when it is sent.
                    if warning.severity == "WARNING" && !self.warnings.contains(&warning) {
                        self.warning_count += 1;
                        if self.warnings.len() < WARNINGS_MAX {
                            self.warnings.push(warning);
                        }
                    }
                }
                Some(Message::ErrorResponse(body)) => {
                    let message = ServerMessage::new(body.fields()).map_err(|e| self.broken(e))?;
                    let message = Box::new(message);
                    return Err(ReplicationError::Server { node: self.node.clone(), message });
                }
                message => return Ok(message),
            }
        }
    }

    async fn fill(&mut self) -> Result<(), ReplicationError> {
        self.buffer.reserve(READ_BYTES);
        match timeout(self.stall_limit, self.stream.read_buf(&mut self.buffer)).await {
            Ok(read) => self.filled(read),
            Err(_) => Err(self.stalled()),
        }
    }

    /// Reads what has come already; false if nothing has.
    fn fill_here(&mut self) -> Result<bool, ReplicationError> {
        self.buffer.reserve(READ_BYTES);
        match self.stream.read_buf(&mut self.buffer).now_or_never() {
            Some(read) => self.filled(read).map(|()| true),
            None => Ok(false),
        }
    }

    fn filled(&self, read: io::Result<usize>) -> Result<(), ReplicationError> {
        match read {
            Ok(0) => Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => Ok(()),
            Err(error) => Err(self.broken(error)),
        }
    }

    fn broken(&self, source: io::Error) -> ReplicationError {
        ReplicationError::Broken { node: self.node.clone(), source }
    }

    fn stalled(&self) -> ReplicationError {
        ReplicationError::Stalled { node: self.node.clone(), limit: self.stall_limit }
    }

    fn unexpected(&self, what: &str) -> ReplicationError {
        ReplicationError::Protocol { node: self.node.clone(), what: what.to_owned() }
    }

    fn unsupported(&self, asked: &'static str) -> ReplicationError {
        ReplicationError::Authentication { node: self.node.clone(), asked }
    }
}

fn fields(body: &DataRowBody) -> io::Result<Vec<Option<String>>> {
    let mut ranges = body.ranges();
    let mut fields = Vec::new();
    while let Some(range) = ranges.next()? {
        fields.push(range.map(|range| String::from_utf8_lossy(&body.buffer()[range]).into_owned()));
    }
    Ok(fields)
}
