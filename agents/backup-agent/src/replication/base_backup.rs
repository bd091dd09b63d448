//! The `BASE_BACKUP` command.
//!
//! `pg_basebackup` itself can write to a pipe only if there is a single tablespace. Speaking the
//! protocol gives each tablespace, the manifest and the server's warnings as they come, and no
//! second process to look after.

use bytes::{Buf, Bytes};
use postgres_protocol::message::backend::Message;
use tokio_postgres::types::PgLsn;

use super::{Replication, ReplicationError, ServerMessage};

/// SQLSTATE `data_corrupted`: how the server ends a backup that read pages with wrong checksums.
const DATA_CORRUPTED: &str = "XX001";

/// How a base backup is taken.
#[derive(Clone, Debug)]
pub struct BaseBackupOptions {
    /// Shown in `backup_label`.
    pub label: String,
    /// Checkpoint at once instead of spread over `checkpoint_completion_target`.
    pub fast_checkpoint: bool,
    /// The most the server reads in a second, in kilobytes; the server allows 32 to 1 048 576.
    pub rate_kilobytes_max: Option<u32>,
}

/// A tablespace of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tablespace {
    /// Its object id; `None` for the data directory itself.
    pub oid: Option<u32>,
    /// Where it lies on the server; `None` for the data directory itself.
    pub location: Option<String>,
    /// How large the server estimates it, in bytes.
    pub bytes: u64,
}

/// What a base backup stream consists of, in order.
#[derive(Clone, Debug)]
pub enum Event {
    /// A tar archive begins: a tablespace, or the data directory (last).
    Archive {
        /// `base.tar` or `<oid>.tar`.
        name: String,
    },
    /// The `backup_manifest` begins.
    Manifest,
    /// Content of what began last.
    Data(Bytes),
    /// The stream is complete.
    End {
        /// The end of the WAL that the backup needs, exclusive.
        end_lsn: PgLsn,
        /// Its timeline.
        timeline: u32,
    },
}

/// A base backup under way.
#[derive(Debug)]
pub struct BaseBackup {
    connection: Replication,
    /// Where the WAL that the backup needs starts.
    pub start_lsn: PgLsn,
    /// The timeline at the start.
    pub timeline: u32,
    /// The tablespaces that will be sent, the data directory among them.
    pub tablespaces: Vec<Tablespace>,
}

/// How a base backup ended on the server.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// The server found pages with wrong checksums: the backup is suspect.
    pub checksum_failure: Option<ServerMessage>,
    /// The server's warnings, the first hundred of them.
    pub warnings: Vec<ServerMessage>,
    /// How many there were.
    pub warning_count: u64,
}
impl Replication {
    /// Starts a base backup; returns once the server has made its checkpoint and begun.
    ///
    /// The WAL that the backup needs is not in the stream, and the server does not wait for it to
    /// be archived: whoever calls this does.
    ///
    /// # Errors
    ///
    /// The connection broke or the server refused.
    pub async fn base_backup(
        mut self,
        options: &BaseBackupOptions,
    ) -> Result<BaseBackup, ReplicationError> {
        let checkpoint = if options.fast_checkpoint { "fast" } else { "spread" };
        let mut command = format!(
            "BASE_BACKUP (LABEL '{}', PROGRESS, CHECKPOINT '{checkpoint}', WAIT false, \
             MANIFEST 'yes', MANIFEST_CHECKSUMS 'CRC32C'",
            options.label.replace('\'', "''")
        );
        let rate = options.rate_kilobytes_max.map(|rate| format!(", MAX_RATE {rate}"));
        command.push_str(rate.as_deref().unwrap_or_default());
        command.push(')');
        self.query(&command).await?;

        let started = self.rows().await?;
        let [start] = started.as_slice() else {
            return Err(self.unexpected("BASE_BACKUP gave no start position"));
        };
        let (start_lsn, timeline) = (self.field(start, 0)?, self.field(start, 1)?);
        let mut tablespaces = Vec::new();
        for row in self.rows().await? {
            let kilobytes: u64 = self.optional(&row, 2)?.unwrap_or(0);
            tablespaces.push(Tablespace {
                oid: self.optional(&row, 0)?,
                location: self.optional(&row, 1)?,
                bytes: kilobytes << 10,
            });
        }
        match self.message().await? {
            Message::CopyOutResponse(_) => {}
            _ => return Err(self.unexpected("BASE_BACKUP did not begin to copy")),
        }
        Ok(BaseBackup { connection: self, start_lsn, timeline, tablespaces })
    }
}

impl BaseBackup {
    /// Returns what comes next; nothing may be asked after [`Event::End`].
    ///
    /// # Errors
    ///
    /// The connection broke, the server gave the backup up, or it broke the protocol.
    pub async fn next(&mut self) -> Result<Event, ReplicationError> {
        let connection = &mut self.connection;
        loop {
            let mut data = match connection.message().await? {
                Message::CopyData(body) => body.into_bytes(),
                Message::CopyDone => break,
                _ => return Err(connection.unexpected("a message within the copy")),
            };
            if data.is_empty() {
                return Err(connection.unexpected("an empty copy message"));
            }
            match data.get_u8() {
                b'd' => return Ok(Event::Data(data)),
                b'n' => {
                    let name = data.split(|byte| *byte == 0).next().unwrap_or_default();
                    let name = String::from_utf8_lossy(name).into_owned();
                    return Ok(Event::Archive { name });
                }
                b'm' => return Ok(Event::Manifest),
                // The server's own count; ours is of what arrived.
                b'p' => {}
                other => {
                    return Err(connection.unexpected(&format!("copy message type {other}")));
                }
            }
        }
        let rows = connection.rows().await?;
        let [end] = rows.as_slice() else {
            return Err(connection.unexpected("BASE_BACKUP gave no end position"));
        };
        Ok(Event::End { end_lsn: connection.field(end, 0)?, timeline: connection.field(end, 1)? })
    }

    /// Waits for the server's last word after [`Event::End`].
    ///
    /// # Errors
    ///
    /// Anything but success or a report of wrong page checksums.
    pub async fn finish(mut self) -> Result<Verdict, ReplicationError> {
        let checksum_failure = match self.connection.ready().await {
            Ok(()) => None,
            Err(ReplicationError::Server { message, .. }) if message.code == DATA_CORRUPTED => {
                Some(*message)
            }
            Err(error) => return Err(error),
        };
        Ok(Verdict {
            checksum_failure,
            warnings: self.connection.warnings,
            warning_count: self.connection.warning_count,
        })
    }
}
