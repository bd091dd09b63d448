//! The `START_REPLICATION` command for physical replication: WAL as it is written.
//!
//! Source: PostgreSQL manual, "Streaming Replication Protocol"; `walsender.c`.

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use chrono::{DateTime, Utc};
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend::{self, CopyData};
use tokio_postgres::types::PgLsn;

use super::{Replication, ReplicationError};

/// The message that answers `START_REPLICATION`, which `postgres-protocol` does not know …
const COPY_BOTH_TAG: u8 = b'W';
/// … and the one with the same content that it knows.
const COPY_OUT_TAG: u8 = b'H';
/// SQLSTATE of "requested WAL segment … has already been removed" and of a missing history file.
/// Source: `WalSndErrorFile` and `SendTimeLineHistory` in `walsender.c`.
const UNDEFINED_FILE: &str = "58P01";
/// Seconds from 1970-01-01 to 2000-01-01, from which PostgreSQL counts. Source: `timestamp.h`.
const POSTGRES_EPOCH: i64 = 946_684_800;

/// WAL that a server sends, on one timeline.
#[derive(Debug)]
pub struct WalStream {
    connection: Replication,
    /// Set when the server had nothing to send on the timeline, because it ends there.
    ended: Option<Ended>,
}

/// What a server sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WalEvent {
    /// WAL, which is on the server's disk.
    Data {
        /// The position of its first byte.
        lsn: PgLsn,
        /// The bytes.
        data: Bytes,
        /// How far the server's disk has WAL.
        server_lsn: PgLsn,
    },
    /// A sign of life.
    Keepalive {
        /// How far the server's disk has WAL.
        server_lsn: PgLsn,
        /// The server asks for [`WalStream::report`] at once.
        reply: bool,
    },
    /// The server has no more on this timeline, because it is on a later one.
    Ended,
}

/// Where the timeline that was asked for ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The timeline after it.
    pub next_timeline: u32,
    /// Where that begins.
    pub switch_lsn: PgLsn,
}

impl Replication {
    /// Asks for the history file of a timeline: its name and content.
    ///
    /// # Errors
    ///
    /// The connection broke, or the server has no such file: see [`ReplicationError::is_removed`].
    pub async fn timeline_history(
        &mut self,
        timeline: u32,
    ) -> Result<(String, String), ReplicationError> {
        self.query(&format!("TIMELINE_HISTORY {timeline}")).await?;
        let rows = self.rows().await;
        // The server is ready after a refusal too, and says so before it answers the next command.
        if rows.as_ref().map_or_else(ReplicationError::is_removed, |_| true) {
            self.ready().await?;
        }
        let rows = rows?;
        let [row] = rows.as_slice() else {
            return Err(self.unexpected("TIMELINE_HISTORY gave no row"));
        };
        Ok((self.field(row, 0)?, self.field(row, 1)?))
    }

    /// Starts to stream from `lsn` on `timeline`; the slot holds back what is not yet reported as
    /// flushed. `slot` must be letters, digits and underscores.
    ///
    /// # Errors
    ///
    /// The connection broke; or the server refused, because the WAL was removed
    /// ([`ReplicationError::is_removed`]) or the slot is in use or gone.
    pub async fn start_replication(
        mut self,
        slot: &str,
        timeline: u32,
        lsn: PgLsn,
    ) -> Result<WalStream, ReplicationError> {
        let command = format!("START_REPLICATION SLOT {slot} PHYSICAL {lsn} TIMELINE {timeline}");
        self.query(&command).await?;
        while self.buffer.is_empty() {
            self.fill().await?;
        }
        if self.buffer.first() == Some(&COPY_BOTH_TAG) {
            self.buffer[0] = COPY_OUT_TAG;
        }
        let ended = match self.message().await? {
            Message::CopyOutResponse(_) => None,
            // Nothing to copy: the answer is at once where the timeline ended.
            Message::RowDescription(_) => Some(self.ended().await?),
            _ => return Err(self.unexpected("START_REPLICATION did not begin to copy")),
        };
        Ok(WalStream { connection: self, ended })
    }

    /// Reads where the timeline ended, up to the server's readiness for the next command.
    async fn ended(&mut self) -> Result<Ended, ReplicationError> {
        let rows = self.rows().await?;
        let [row] = rows.as_slice() else {
            return Err(self.unexpected("the stream ended without a next timeline"));
        };
        let ended = Ended { next_timeline: self.field(row, 0)?, switch_lsn: self.field(row, 1)? };
        self.ready().await?;
        Ok(ended)
    }
}

impl WalStream {
    /// Returns what comes next. Dropping the future loses nothing.
    ///
    /// # Errors
    ///
    /// The connection broke, the server said nothing for too long, or it ended the stream.
    pub async fn next(&mut self) -> Result<WalEvent, ReplicationError> {
        if self.ended.is_some() {
            return Ok(WalEvent::Ended);
        }
        let message = self.connection.message().await?;
        self.event(message)
    }

    /// Returns what has come already; `None` if the rest must be waited for.
    ///
    /// # Errors
    ///
    /// As [`WalStream::next`].
    pub fn next_here(&mut self) -> Result<Option<WalEvent>, ReplicationError> {
        loop {
            if let Some(message) = self.connection.message_here()? {
                return self.event(message).map(Some);
            }
            // With TLS, what is read at once is a part of one record.
            if !self.connection.fill_here()? {
                return Ok(None);
            }
        }
    }

    /// Is not woken by what comes until the next of it is asked for.
    pub fn ignore(&mut self) {
        self.connection.stream.ignore();
    }

    fn event(&self, message: Message) -> Result<WalEvent, ReplicationError> {
        let connection = &self.connection;
        let mut data = match message {
            Message::CopyData(body) => body.into_bytes(),
            Message::CopyDone => return Ok(WalEvent::Ended),
            Message::CommandComplete(_) => {
                // As soon as we have confirmed everything. Source: `WalSndDone` in `walsender.c`.
                return Err(ReplicationError::ShuttingDown { node: connection.node.clone() });
            }
            _ => return Err(connection.unexpected("a message within the stream")),
        };
        match data.try_get_u8() {
            Ok(b'w') if data.len() >= 24 => {
                let (lsn, server_lsn) = (data.get_u64().into(), data.get_u64().into());
                data.advance(8);
                Ok(WalEvent::Data { lsn, data, server_lsn })
            }
            Ok(b'k') if data.len() >= 17 => {
                let server_lsn = data.get_u64().into();
                data.advance(8);
                Ok(WalEvent::Keepalive { server_lsn, reply: data.get_u8() == 1 })
            }
            _ => Err(connection.unexpected("a message of unknown type within the stream")),
        }
    }

    /// Reports how far WAL is safe: the slot moves there, and commits that wait for this standby go on
    /// up to it. Nothing else is reported as written, for which `synchronous_commit = remote_write` waits,
    /// and nothing as applied.
    ///
    /// With `ask`, the server answers with a keepalive.
    ///
    /// # Errors
    ///
    /// The connection broke, or the server takes nothing for too long.
    pub async fn report(&mut self, safe: PgLsn, ask: bool) -> Result<(), ReplicationError> {
        let connection = &mut self.connection;
        let mut status = BytesMut::with_capacity(34);
        status.put_u8(b'r');
        // Written, and flushed.
        status.put_u64(safe.into());
        status.put_u64(safe.into());
        status.put_u64(0);
        status.put_i64(postgres_micros(Utc::now()));
        status.put_u8(ask.into());
        let mut out = BytesMut::with_capacity(64);
        CopyData::new(status).map_err(|e| connection.broken(e))?.write(&mut out);
        match connection.send(&out).await {
            Err(broken @ ReplicationError::Broken { .. }) => {
                Err(self.last_word().unwrap_or(broken))
            }
            sent => sent,
        }
    }

    /// Why the server ended the stream, if it said so before the connection broke.
    fn last_word(&mut self) -> Option<ReplicationError> {
        loop {
            match self.next_here() {
                Ok(Some(WalEvent::Ended) | None) | Err(ReplicationError::Broken { .. }) => {
                    return None;
                }
                Ok(Some(_)) => {}
                Err(reason) => return Some(reason),
            }
        }
    }

    /// The error of a server that says nothing although it was asked.
    pub fn silent(&self, limit: Duration) -> ReplicationError {
        ReplicationError::Stalled { node: self.connection.node.clone(), limit }
    }

    /// After [`WalEvent::Ended`]: ends the copy, and returns the connection for the next one.
    ///
    /// # Errors
    ///
    /// The connection broke, or the server does not say where the timeline ended.
    pub async fn finish(mut self) -> Result<(Replication, Ended), ReplicationError> {
        if let Some(ended) = self.ended {
            return Ok((self.connection, ended));
        }
        let mut out = BytesMut::new();
        frontend::copy_done(&mut out);
        self.connection.send(&out).await?;
        loop {
            match self.connection.message().await? {
                // Answers to reports that crossed the end of the copy.
                Message::CopyData(_) | Message::CopyDone => {}
                Message::RowDescription(_) => break,
                _ => return Err(self.connection.unexpected("the end of the stream")),
            }
        }
        let ended = self.connection.ended().await?;
        Ok((self.connection, ended))
    }
}

impl ReplicationError {
    /// Tells whether the server says that the WAL or history file asked for is no longer there.
    pub fn is_removed(&self) -> bool {
        matches!(self, Self::Server { message, .. } if message.code == UNDEFINED_FILE)
    }
}

/// A time as PostgreSQL counts it: microseconds since 2000.
fn postgres_micros(at: DateTime<Utc>) -> i64 {
    at.timestamp_micros() - POSTGRES_EPOCH * 1_000_000
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::io;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use shared::telemetry::chain;
    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

    use super::*;
    use crate::stream::Io;

    /// Gives a little at a time, as TLS does, and then nothing; takes anything, unless it is gone.
    struct Bits {
        sent: VecDeque<Vec<u8>>,
        is_gone: bool,
    }

    impl AsyncRead for Bits {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buffer: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            match self.sent.pop_front() {
                Some(bit) => {
                    buffer.put_slice(&bit);
                    Poll::Ready(Ok(()))
                }
                None => Poll::Pending,
            }
        }
    }

    impl AsyncWrite for Bits {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            data: &[u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Ready(if self.is_gone {
                Err(io::ErrorKind::BrokenPipe.into())
            } else {
                Ok(data.len())
            })
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    impl Io for Bits {
        fn ignore(&mut self) {}
    }

    /// One message with WAL.
    fn message(lsn: u64, data: &[u8]) -> Vec<u8> {
        let mut message = BytesMut::new();
        message.put_u8(b'd');
        message.put_u32(u32::try_from(4 + 25 + data.len()).unwrap());
        message.put_u8(b'w');
        message.put_u64(lsn);
        message.put_u64(lsn);
        message.put_u64(0);
        message.put_slice(data);
        message.to_vec()
    }

    fn connection(bits: VecDeque<Vec<u8>>) -> Replication {
        Replication {
            node: "postgres-1".to_owned(),
            stream: Box::new(Bits { sent: bits, is_gone: false }),
            buffer: BytesMut::new(),
            stall_limit: Duration::from_secs(1),
            warnings: Vec::new(),
            warning_count: 0,
        }
    }

    /// What a server sends: a message's tag and what it says.
    fn said(tag: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(4 + body.len()).unwrap().to_be_bytes();
        [&[tag], length.as_slice(), body].concat()
    }

    /// A standby that was copied from a primary has no history files but the newest.
    #[tokio::test]
    async fn after_a_history_that_is_not_there_the_next_can_be_asked_for() {
        let gone = said(b'E', b"VERROR\0C58P01\0Mcould not open file\0\0");
        let file = said(b'D', b"\0\x02\0\0\0\x01n\0\0\0\x01c");
        let (ready, done) = (said(b'Z', b"I"), said(b'C', b"TIMELINE_HISTORY\0"));
        let answers = [gone.clone(), ready.clone(), gone, ready.clone(), file, done, ready];
        let mut connection = connection(answers.into());
        for timeline in [2, 3] {
            let failure = connection.timeline_history(timeline).await.unwrap_err();
            assert!(failure.is_removed(), "{failure}");
        }
        let history = connection.timeline_history(4).await.unwrap();
        assert_eq!(history, ("n".to_owned(), "c".to_owned()));
    }

    #[tokio::test]
    async fn what_the_server_said_last_counts_and_not_that_it_is_gone() {
        let killed = said(b'E', b"SFATAL\0C57P01\0Mterminating connection\0\0");
        for (case, last, expected) in [
            ("it shuts down", said(b'C', b"COPY 0\0"), "shutting down"),
            ("it was told to end", killed, "terminating connection"),
            ("it said nothing", Vec::new(), "broken pipe"),
        ] {
            let bits: VecDeque<_> = [message(0, b"x"), last].into();
            let sent = bits.into_iter().filter(|it| !it.is_empty()).collect();
            let stream = Box::new(Bits { sent, is_gone: true });
            let connection = Replication { stream, ..connection(VecDeque::new()) };
            let mut stream = WalStream { connection, ended: None };
            let failure = stream.report(7.into(), false).await.unwrap_err();
            let text = chain(&failure).to_string();
            assert!(text.contains(expected), "{case}: {text}");
        }
    }

    /// Once a fraction of a second is too seldom for a stream of which each read gives one bit.
    #[tokio::test]
    async fn all_that_has_come_is_taken_however_small_the_bits() {
        let messages: Vec<_> = (0..100).map(|n| message(n * 10_000, &[1; 10_000])).collect();
        let bits = messages.concat().chunks(4096).map(<[u8]>::to_vec).collect();
        let connection = connection(bits);
        let mut stream = WalStream { connection, ended: None };
        let mut events = vec![stream.next().await.unwrap()];
        while let Some(event) = stream.next_here().unwrap() {
            events.push(event);
        }
        let expected = |n: u64| WalEvent::Data {
            lsn: (n * 10_000).into(),
            data: vec![1; 10_000].into(),
            server_lsn: (n * 10_000).into(),
        };
        assert_eq!(events, (0..100).map(expected).collect::<Vec<_>>());
    }
}
