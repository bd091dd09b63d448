//! Which endpoint to ask next. The client library does not fail over: each of its clients has
//! one endpoint here, and this walks them.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Error, TlsOptions};
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use super::error::{EtcdError, code, code_of, is_final, reason, tls_trouble};
use crate::secret::Secret;

/// Limit on one attempt at one endpoint: what a frozen endpoint costs, once. An election takes
/// etcd 1 to 2 s; requests then wait, and the next attempt meets the new leader.
const ATTEMPT_LIMIT: Duration = Duration::from_millis(1500);
/// Limit on a request with all its attempts. Three endpoints of which two are frozen need 3 s,
/// an election on top of it fits as well.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// Between two rounds over all endpoints.
const ROUND_PAUSE: Duration = Duration::from_millis(200);
/// How long an endpoint that failed is asked only after all others have failed too.
const AVOID: Duration = Duration::from_secs(30);
/// Limit on the TCP connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(1);
/// HTTP/2 pings while requests are open. etcd closes the connection of a client that sends them
/// more often than `--grpc-keepalive-min-time`, 5 s, or without open requests.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));

/// The endpoints and what is known of them.
pub(super) struct Endpoints {
    urls: Vec<String>,
    login: Option<(String, Secret)>,
    tls: Option<TlsOptions>,
    state: Mutex<State>,
}

struct State {
    /// The one that answered last.
    current: usize,
    each: Vec<Endpoint>,
}

#[derive(Default)]
struct Endpoint {
    client: Option<Client>,
    avoided_until: Option<Instant>,
}

/// Says the addresses only.
impl fmt::Debug for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Endpoints").field(&self.urls).finish()
    }
}

impl Endpoints {
    pub(super) fn new(
        urls: Vec<String>,
        login: Option<(String, Secret)>,
        tls: Option<TlsOptions>,
    ) -> Self {
        let each = urls.iter().map(|_| Endpoint::default()).collect();
        Self { urls, login, tls, state: Mutex::new(State { current: 0, each }) }
    }

    /// Asks one endpoint after the other until one answers, for at most 5 s.
    ///
    /// `operation` may be carried out more than once, so it must not matter if it is.
    pub(super) async fn call<T, F>(
        &self,
        what: &'static str,
        operation: impl Fn(Client) -> F,
    ) -> Result<T, EtcdError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        self.call_at(what, operation).await.map(|(_, answer)| answer)
    }

    /// Like [`call`](Self::call), and returns the number of the endpoint that answered.
    pub(super) async fn call_at<T, F>(
        &self,
        what: &'static str,
        operation: impl Fn(Client) -> F,
    ) -> Result<(usize, T), EtcdError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let deadline = Instant::now() + CALL_LIMIT;
        let mut failures = vec![None; self.urls.len()];
        // A handshake that fails looks different each time: what names the cause is kept.
        let mut causes = failures.clone();
        loop {
            let order = self.lock().order(Instant::now());
            for index in order {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    let failures = causes.into_iter().zip(failures).map(|(cause, it)| cause.or(it));
                    return Err(self.unreachable(what, failures));
                }
                let attempt = async { operation(self.client(index).await?).await };
                let failure = match timeout(ATTEMPT_LIMIT.min(left), attempt).await {
                    Ok(Ok(answer)) => {
                        self.answered(index);
                        return Ok((index, answer));
                    }
                    Ok(Err(error)) if is_final(&error) => {
                        return Err(self.refused(what, index, &error));
                    }
                    Ok(Err(error)) => match tls_trouble(&error) {
                        Some(cause) => causes[index].insert(cause).clone(),
                        None => reason(&error),
                    },
                    Err(_) => "no answer in time".to_owned(),
                };
                self.failed(index, &failure);
                failures[index] = Some(failure);
            }
            tokio::time::sleep(ROUND_PAUSE).await;
        }
    }

    /// Notes that an endpoint broke or fell silent, so that another is asked first.
    pub(super) fn failed(&self, index: usize, failure: &str) {
        let mut state = self.lock();
        let endpoint = &mut state.each[index];
        // A connection whose other side went away without a word would stay silent for long.
        endpoint.client = None;
        let now = Instant::now();
        let is_news = endpoint.avoided_until.is_none();
        endpoint.avoided_until = Some(now + AVOID);
        drop(state);
        if is_news {
            let endpoint = &self.urls[index];
            warn!(endpoint, error = failure, "etcd endpoint avoided");
        }
    }

    fn answered(&self, index: usize) {
        let mut state = self.lock();
        state.current = index;
        if state.each[index].avoided_until.take().is_some() {
            drop(state);
            info!(endpoint = self.urls[index], "etcd endpoint answers again");
        }
    }

    /// The client of one endpoint. Without a login this does not talk to it yet.
    async fn client(&self, index: usize) -> Result<Client, Error> {
        let kept = self.lock().each[index].client.clone();
        if let Some(client) = kept {
            return Ok(client);
        }
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_LIMIT)
            .with_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1)
            .with_keep_alive_while_idle(false)
            // A member that is cut off from the others says so at once, instead of serving what
            // may be old.
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if let Some((user, password)) = &self.login {
            options = options.with_user(user, password.expose());
        }
        if let Some(tls) = &self.tls {
            options = options.with_tls(tls.clone());
        }
        let client = Client::connect([&self.urls[index]], Some(options)).await?;
        self.lock().each[index].client = Some(client.clone());
        Ok(client)
    }

    fn unreachable(
        &self,
        what: &'static str,
        failures: impl Iterator<Item = Option<String>>,
    ) -> EtcdError {
        let describe = |(url, failure): (&String, Option<String>)| {
            format!("{url}: {}", failure.as_deref().unwrap_or("not asked in time"))
        };
        let failures = self.urls.iter().zip(failures).map(describe).collect();
        EtcdError::Unreachable { what, failures }
    }

    fn refused(&self, what: &'static str, index: usize, error: &Error) -> EtcdError {
        let code = code_of(error);
        if code == Some(code::UNAUTHENTICATED) {
            // The next request logs in afresh.
            self.lock().each[index].client = None;
        }
        EtcdError::Refused { what, endpoint: self.urls[index].clone(), code, reason: reason(error) }
    }

    /// No code that holds this lock can panic halfway through a change.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The numbers of the endpoints in the order to ask them: from the one that answered last,
    /// those that failed a short time ago after the others, the longest ago first.
    fn order(&self, now: Instant) -> Vec<usize> {
        let count = self.each.len();
        let mut order: Vec<_> = (0..count).map(|step| (self.current + step) % count).collect();
        order.sort_by_key(|&index| self.each[index].avoided_until.filter(|until| now < *until));
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_endpoint_that_answered_last_comes_first_and_failed_ones_last() {
        let now = Instant::now();
        let later = |seconds| Some(now + Duration::from_secs(seconds));
        for (case, current, avoided, expected) in [
            ("at first, as configured", 0, [None, None, None], [0, 1, 2]),
            ("from the one that answered", 1, [None, None, None], [1, 2, 0]),
            ("a failed one is last", 0, [later(30), None, None], [1, 2, 0]),
            ("the longest ago first", 0, [later(30), later(10), None], [2, 1, 0]),
            ("all failed: all are asked", 2, [later(1), later(3), later(2)], [0, 2, 1]),
            ("what is over does not count", 0, [Some(now), None, None], [0, 1, 2]),
        ] {
            let each = avoided
                .into_iter()
                .map(|avoided_until| Endpoint { client: None, avoided_until })
                .collect();
            assert_eq!(State { current, each }.order(now), expected, "{case}");
        }
    }
}
