//! The tests against real servers. One binary, so that it links once.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod harness;
