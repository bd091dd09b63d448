//! What a server may send, whoever it is: somebody else may sit at its address.
//!
//! Without TLS nobody has proved to be the server, and it is the server that chooses how the role logs in:
//! it could ask for the password itself, or for its MD5 hash, which is as good. The client library would
//! give it. By SCRAM nothing is given away. libpq has `require_auth` for this, and its `channel_binding`
//! needs TLS; the library has neither for a connection without.
//!
//! And the library reads into memory whatever comes: a message as long as it says that it is, rows until
//! there are no more, and every parameter of the session under its name.

use std::convert::Infallible;
use std::fmt;
use std::future::{Ready, ready};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect, TlsStream};

/// Most bytes that may come after something was sent, as one message or many: answers of thousands of
/// rows have some hundred KiB.
pub(super) const ANSWER_BYTES_MAX: usize = 4 << 20;
/// Most bytes of `ParameterStatus` on one connection. A server sends some hundred, and a pooler some with
/// each server that it assigns.
const PARAMETER_BYTES_MAX: usize = 1 << 20;
/// The type and the length of a message, and what an authentication request asks for.
/// Source: PostgreSQL manual, "Message Formats".
const HEAD: usize = 5;
const AUTHENTICATION_HEAD: usize = 9;

/// Why what a server sends is not read any further.
#[derive(Debug, Error)]
pub(super) enum Refusal {
    /// It asks for the password in a way that gives it away.
    #[error("it asks for the password {0}")]
    Password(&'static str),
    /// It sends too much.
    #[error("it sends more than {0} bytes")]
    TooMuch(usize),
    /// It announces too much, or does not speak the protocol.
    #[error("it announces a message of {0} bytes: that is none of PostgreSQL")]
    TooLong(u32),
}

/// Follows the messages of a server.
#[derive(Clone, Debug)]
pub(super) struct Guard {
    /// It may ask for the password itself, or for its MD5 hash.
    allows_weak_auth: bool,
    /// What came of the head of the next message.
    head: Vec<u8>,
    /// What is still to come of the message under way.
    body_left: usize,
    /// Bytes since something was sent.
    answered: usize,
    /// Bytes of `ParameterStatus`.
    parameters: usize,
}

impl Guard {
    pub(super) fn new(allows_weak_auth: bool) -> Self {
        let head = Vec::with_capacity(AUTHENTICATION_HEAD);
        Self { allows_weak_auth, head, body_left: 0, answered: 0, parameters: 0 }
    }

    /// Something was sent: what comes from now on answers it.
    fn asked(&mut self) {
        self.answered = 0;
    }

    /// Takes what came.
    fn take(&mut self, mut bytes: &[u8]) -> Result<(), Refusal> {
        self.answered = self.answered.saturating_add(bytes.len());
        if ANSWER_BYTES_MAX < self.answered {
            return Err(Refusal::TooMuch(ANSWER_BYTES_MAX));
        }
        loop {
            let skipped = self.body_left.min(bytes.len());
            self.body_left -= skipped;
            bytes = bytes.get(skipped..).unwrap_or_default();
            let Some((first, rest)) = bytes.split_first() else { return Ok(()) };
            self.head.push(*first);
            bytes = rest;
            self.take_head()?;
        }
    }

    /// Judges the head of a message, as soon as it is there.
    fn take_head(&mut self) -> Result<(), Refusal> {
        let Some((&[kind, ref length @ ..], said)) = self.head.split_first_chunk::<HEAD>() else {
            return Ok(());
        };
        let length = u32::from_be_bytes(*length);
        // The length counts itself.
        let body = usize::try_from(length).unwrap_or(usize::MAX).saturating_sub(HEAD - 1);
        if ANSWER_BYTES_MAX < body {
            return Err(Refusal::TooLong(length));
        }
        if kind == b'R' && body >= AUTHENTICATION_HEAD - HEAD {
            match said {
                [0, 0, 0, 3] if !self.allows_weak_auth => {
                    return Err(Refusal::Password("in clear text"));
                }
                [0, 0, 0, 5] if !self.allows_weak_auth => {
                    return Err(Refusal::Password("as an MD5 hash"));
                }
                [_, _, _, _] => {}
                _ => return Ok(()),
            }
        }
        if kind == b'S' {
            self.parameters += body;
            if PARAMETER_BYTES_MAX < self.parameters {
                return Err(Refusal::TooMuch(PARAMETER_BYTES_MAX));
            }
        }
        self.body_left = body - said.len();
        self.head.clear();
        Ok(())
    }
}

/// A stream whose guard sees what comes.
pub(super) struct Guarded<S: AsyncWrite + Unpin> {
    inner: S,
    guard: Guard,
    binding: fn(&S) -> ChannelBinding,
}

/// Says goodbye, as far as that can be done at once. A server takes the end of a TLS connection without
/// `close_notify` for a broken one, and logs "Connection reset by peer" each time.
impl<S: AsyncWrite + Unpin> Drop for Guarded<S> {
    fn drop(&mut self) {
        // Whether it arrives makes no difference here.
        let _at_once =
            Pin::new(&mut self.inner).poll_shutdown(&mut Context::from_waker(Waker::noop()));
    }
}

impl<S: AsyncWrite + Unpin> fmt::Debug for Guarded<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guarded").field("guard", &self.guard).finish_non_exhaustive()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        let came = buf.filled().get(before..).unwrap_or_default();
        Poll::Ready(self.guard.take(came).map_err(io::Error::other))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.guard.asked();
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream for Guarded<S> {
    fn channel_binding(&self) -> ChannelBinding {
        (self.binding)(&self.inner)
    }
}

/// Puts a guard on a connection without TLS. To the library it is TLS that begins at once (its mode
/// `Require`, negotiated `Direct`) and happens to change nothing: there is no other way in.
#[derive(Clone, Debug)]
pub(super) struct Plain(pub(super) Guard);

impl<S: AsyncRead + AsyncWrite + Unpin> MakeTlsConnect<S> for Plain {
    type Stream = Guarded<S>;
    type TlsConnect = Self;
    type Error = Infallible;

    fn make_tls_connect(&mut self, _: &str) -> Result<Self, Infallible> {
        Ok(self.clone())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> TlsConnect<S> for Plain {
    type Stream = Guarded<S>;
    type Error = Infallible;
    type Future = Ready<Result<Guarded<S>, Infallible>>;

    fn connect(self, inner: S) -> Self::Future {
        ready(Ok(Guarded { inner, guard: self.0, binding: |_| ChannelBinding::none() }))
    }
}

/// Puts a guard on a connection behind its TLS.
#[derive(Clone)]
pub(super) struct Sealed<C>(pub(super) C, pub(super) Guard);

impl<S, C: MakeTlsConnect<S>> MakeTlsConnect<S> for Sealed<C>
where
    <C::TlsConnect as TlsConnect<S>>::Future: Send + 'static,
{
    type Stream = Guarded<C::Stream>;
    type TlsConnect = Sealed<C::TlsConnect>;
    type Error = C::Error;

    fn make_tls_connect(&mut self, domain: &str) -> Result<Self::TlsConnect, C::Error> {
        Ok(Sealed(self.0.make_tls_connect(domain)?, self.1.clone()))
    }
}

impl<S, C: TlsConnect<S>> TlsConnect<S> for Sealed<C>
where
    C::Future: Send + 'static,
{
    type Stream = Guarded<C::Stream>;
    type Error = C::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Guarded<C::Stream>, C::Error>> + Send>>;

    fn connect(self, stream: S) -> Self::Future {
        let Self(connector, guard) = self;
        let connecting = connector.connect(stream);
        Box::pin(async move {
            Ok(Guarded { inner: connecting.await?, guard, binding: TlsStream::channel_binding })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, content: &[u8]) -> Vec<u8> {
        let length = u32::try_from(content.len() + 4).unwrap().to_be_bytes();
        [&[kind], &length[..], content].concat()
    }

    /// What a guard says of these bytes, whether they come at once or one by one.
    fn said(allows_weak_auth: bool, bytes: &[u8]) -> Option<String> {
        let mut guard = Guard::new(allows_weak_auth);
        let at_once = guard.take(bytes).err().map(|it| it.to_string());
        let mut guard = Guard::new(allows_weak_auth);
        let mut singly = bytes.chunks(1);
        let singly = singly.find_map(|it| guard.take(it).err()).map(|it| it.to_string());
        assert_eq!(at_once, singly);
        at_once
    }

    #[test]
    fn a_password_is_given_away_only_where_that_is_allowed() {
        let (ok, clear) = (message(b'R', &[0, 0, 0, 0]), message(b'R', &[0, 0, 0, 3]));
        let md5 = message(b'R', &[0, 0, 0, 5, 1, 2, 3, 4]);
        let scram = message(b'R', b"\0\0\0\x0aSCRAM-SHA-256\0\0");
        let notice = message(b'N', b"R\0\0\0\x08\0\0\0\x03");
        for (case, bytes, expected) in [
            ("none", ok.clone(), None),
            ("scram", [&scram[..], &ok].concat(), None),
            ("clear", clear.clone(), Some("it asks for the password in clear text")),
            ("md5", md5, Some("it asks for the password as an MD5 hash")),
            ("what only looks like it", notice.clone(), None),
            (
                "after another message",
                [&notice[..], &clear].concat(),
                Some("it asks for the password in clear text"),
            ),
        ] {
            assert_eq!(said(false, &bytes).as_deref(), expected, "{case}");
            assert_eq!(said(true, &bytes), None, "{case}");
        }
    }

    #[test]
    fn what_is_announced_has_a_limit() {
        for (bytes, expected) in [
            (
                &b"R\x7f\xff\xff\xff\0\0\0\0"[..],
                Some("it announces a message of 2147483647 bytes: that is none of PostgreSQL"),
            ),
            (
                b"HTTP/1.1 400 Bad Request\r\n",
                Some("it announces a message of 1414811695 bytes: that is none of PostgreSQL"),
            ),
            // No message is so short; the library says so.
            (b"Z\0\0\0\0", None),
            (b"D\0\x40\0\0", None),
        ] {
            assert_eq!(said(false, bytes).as_deref(), expected, "{bytes:?}");
        }
    }

    #[test]
    fn what_comes_has_a_limit_from_question_to_question() {
        let notice = message(b'N', &vec![b'x'; 65_531]);
        let mut guard = Guard::new(false);
        for _ in 0..64 {
            guard.take(&notice).unwrap();
        }
        assert_eq!(guard.take(b"N").unwrap_err().to_string(), "it sends more than 4194304 bytes");
        let mut guard = Guard::new(false);
        for _ in 0..1000 {
            guard.take(&notice).unwrap();
            guard.asked();
        }
        // These are kept by name as long as the connection.
        let parameter = message(b'S', &vec![b'x'; 65_536]);
        for _ in 0..16 {
            guard.take(&parameter).unwrap();
            guard.asked();
        }
        let error = guard.take(&parameter).unwrap_err();
        assert_eq!(error.to_string(), "it sends more than 1048576 bytes");
    }
}
