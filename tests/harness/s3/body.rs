//! Bodies on their way: slowed down, cut off, damaged.

use std::io;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use s3s::dto::StreamingBlob;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, Take};
use tokio::time::sleep;
use tokio_util::io::ReaderStream;

use super::faults::BodyPlan;
use crate::background::FLUSH;
use crate::network::transfer_time;

/// How much of a file is read at once, in bytes.
const READ_BYTES: usize = 256 << 10;
/// How much of it is sent at once when something is to happen on the way.
const READ_BYTES_PLANNED: usize = 16 << 10;

/// The body of an answer: `length` bytes of a file, from where it stands.
pub(super) fn of_file(file: File, length: u64, plan: BodyPlan) -> StreamingBlob {
    let piece = if plan == BodyPlan::default() { READ_BYTES } else { READ_BYTES_PLANNED };
    let sender = Sender {
        file: ReaderStream::with_capacity(file.take(length), piece),
        sent: 0,
        plan,
        cut_at: plan.cut.map(|at| at.offset(length)),
        stall_at: plan.stall.map(|at| at.offset(length)),
        flip_at: plan.flip.map(|at| at.offset(length.saturating_sub(1))),
    };
    StreamingBlob::wrap(stream::try_unfold(sender, Sender::next))
}

struct Sender {
    file: ReaderStream<Take<File>>,
    sent: u64,
    plan: BodyPlan,
    cut_at: Option<u64>,
    stall_at: Option<u64>,
    flip_at: Option<u64>,
}

impl Sender {
    async fn next(mut self) -> io::Result<Option<(Bytes, Self)>> {
        if self.stall_at == Some(self.sent) {
            std::future::pending::<()>().await;
        }
        if self.cut_at == Some(self.sent) {
            // What was sent before should leave before the connection is closed.
            sleep(FLUSH).await;
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let Some(mut piece) = self.file.next().await.transpose()? else { return Ok(None) };
        let end = |at: u64| usize::try_from(at - self.sent).unwrap_or(usize::MAX);
        if let Some(at) = [self.cut_at, self.stall_at].into_iter().flatten().min() {
            // What follows is never sent.
            piece.truncate(end(at));
        }
        if let Some(at) = self.flip_at.filter(|&at| self.sent <= at)
            && end(at) < piece.len()
        {
            let mut damaged = BytesMut::from(&piece[..]);
            damaged[end(at)] ^= 1;
            piece = damaged.freeze();
        }
        if let Some(rate) = self.plan.bytes_per_second {
            sleep(transfer_time(piece.len(), rate)).await;
        }
        self.sent += piece.len() as u64;
        Ok(Some((piece, self)))
    }
}

/// A request's body as slow as planned, each piece shown to `look`.
pub(super) fn of_request(
    body: StreamingBlob,
    plan: BodyPlan,
    look: impl Fn(&[u8]) + Send + Sync + 'static,
) -> StreamingBlob {
    let look = Arc::new(look);
    let slow = body.map_err(io::Error::other).and_then(move |piece| {
        let look = Arc::clone(&look);
        async move {
            if let Some(rate) = plan.bytes_per_second {
                sleep(transfer_time(piece.len(), rate)).await;
            }
            look(&piece);
            Ok(piece)
        }
    });
    StreamingBlob::wrap(slow)
}

/// Reads a request's body to its end and drops it, so that the client gets to see the answer.
pub(super) async fn discard(body: Option<StreamingBlob>) {
    if let Some(mut body) = body {
        while let Some(Ok(_)) = body.next().await {}
    }
}
