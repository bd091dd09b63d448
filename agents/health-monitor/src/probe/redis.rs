//! Redis, by its own protocol: three commands and four kinds of reply, each time on a new connection.

use shared::secret::Secret;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::{Probe, SetupError, bare};
use crate::config::RedisConfig;
use crate::facts::{Failure, Stage};

/// Longest reply to read, in bytes: `INFO` has some KiB.
const REPLY_BYTES_MAX: usize = 256 << 10;
/// Longest line to read, in bytes: an error has less than 200.
const LINE_BYTES_MAX: u64 = 4096;

/// Room for a command, in bytes: for a password of usual length.
const COMMAND_BYTES: usize = 1024;

/// What `INFO` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RedisFacts {
    /// Its version.
    pub version: String,
    /// `master` or `slave`, in Redis' words.
    pub role: String,
    /// A replica's link to its master is up.
    pub link_is_up: Option<bool>,
    /// It reads its data in and answers nothing else.
    pub is_loading: bool,
    /// The last save, or the last write of the append-only file, went wrong.
    pub save_failed: bool,
    /// Bytes in use, and how many may be; 0 for no limit.
    pub memory: (u64, u64),
}

/// Asks one server.
#[derive(Debug)]
pub struct RedisProbe {
    host: String,
    port: u16,
    user: Option<String>,
    password: Option<Secret>,
}

impl RedisProbe {
    /// Reads the password.
    ///
    /// # Errors
    ///
    /// Fails when its file cannot be used.
    pub fn new(config: &RedisConfig) -> Result<Self, SetupError> {
        let key = || format!("redis {}.password_file", config.name);
        let password = SetupError::secret(config.password_file.as_deref(), key)?;
        Ok(Self {
            host: config.host.clone(),
            port: config.port,
            user: config.user.clone(),
            password,
        })
    }
}

impl Probe for RedisProbe {
    type Facts = RedisFacts;

    async fn ask(&mut self) -> Result<RedisFacts, Failure> {
        let connected = TcpStream::connect((self.host.as_str(), self.port)).await;
        let stream = connected.map_err(|error| {
            failure(Stage::of_dial(&error), format!("no connection: {}", bare(&error)))
        })?;
        let mut stream = BufReader::new(stream);
        if let Some(password) = &self.password {
            let mut login = vec!["AUTH"];
            login.extend(self.user.as_deref());
            login.push(password.expose());
            if let Reply::Refused(why) = command(&mut stream, &login).await? {
                return Err(failure(Stage::Login, format!("it refuses the login: {why}")));
            }
        }
        match command(&mut stream, &["PING"]).await? {
            Reply::Refused(why) if why.starts_with("NOAUTH") => {
                return Err(failure(Stage::Login, format!("it asks for a password: {why}")));
            }
            // What INFO says as well, and better.
            Reply::Refused(why)
                if ["LOADING", "MISCONF", "MASTERDOWN"].iter().any(|it| why.starts_with(it)) => {}
            Reply::Refused(why) => {
                return Err(failure(Stage::Answer, format!("it refuses PING: {why}")));
            }
            Reply::Text(text) if text == "PONG" => {}
            Reply::Text(text) => {
                let text: String = text.chars().take(50).collect();
                return Err(failure(Stage::Answer, format!("it answers PING with `{text}`")));
            }
        }
        match command(&mut stream, &["INFO"]).await? {
            Reply::Text(text) => {
                read(&text).ok_or_else(|| failure(Stage::Answer, "INFO leaves out the role"))
            }
            Reply::Refused(why) => Err(failure(Stage::Answer, format!("it refuses INFO: {why}"))),
        }
    }
}

fn failure(stage: Stage, error: impl Into<String>) -> Failure {
    Failure { stage, error: error.into() }
}

/// A reply to one of our commands.
#[derive(Debug, PartialEq, Eq)]
enum Reply {
    Text(String),
    Refused(String),
}

/// Sends a command, as an array of bulk strings, and reads its reply.
async fn command(stream: &mut BufReader<TcpStream>, words: &[&str]) -> Result<Reply, Failure> {
    // At full size from the start: growing would leave copies of a password behind.
    let mut text = String::with_capacity(COMMAND_BYTES);
    for part in ["*", &words.len().to_string(), "\r\n"] {
        text.push_str(part);
    }
    for word in words {
        for part in ["$", &word.len().to_string(), "\r\n", word, "\r\n"] {
            text.push_str(part);
        }
    }
    let text = Secret::new(text);
    stream.write_all(text.expose().as_bytes()).await.map_err(|error| broken(&error))?;
    read_reply(stream).await
}

/// Source: Redis serialization protocol specification, RESP2.
async fn read_reply(stream: &mut (impl AsyncBufRead + Unpin)) -> Result<Reply, Failure> {
    let mut line = String::new();
    let mut limited = (&mut *stream).take(LINE_BYTES_MAX);
    limited.read_line(&mut line).await.map_err(|error| broken(&error))?;
    let no_reply = || {
        let shown: String = line.chars().take(50).collect();
        failure(Stage::Answer, format!("the answer is none of Redis: `{}`", shown.trim_end()))
    };
    let content = line.strip_suffix("\r\n");
    match content.and_then(|it| it.split_at_checked(1)) {
        Some(("+", text)) => Ok(Reply::Text(text.to_owned())),
        Some(("-", text)) => Ok(Reply::Refused(text.to_owned())),
        Some(("$", length)) => {
            let length = length.parse().ok().filter(|length: &usize| *length <= REPLY_BYTES_MAX);
            let mut content = vec![0; length.ok_or_else(no_reply)? + 2];
            stream.read_exact(&mut content).await.map_err(|error| broken(&error))?;
            content.truncate(content.len() - 2);
            Ok(Reply::Text(String::from_utf8_lossy(&content).into_owned()))
        }
        _ if line.is_empty() => Err(broken(&std::io::ErrorKind::UnexpectedEof.into())),
        _ => Err(no_reply()),
    }
}

fn broken(error: &std::io::Error) -> Failure {
    failure(Stage::Answer, format!("the connection broke: {}", bare(error)))
}

/// Reads what `INFO` says; `None` if it does not say what role it has.
fn read(info: &str) -> Option<RedisFacts> {
    let field = |name: &str| {
        info.lines().find_map(|line| line.trim_end().strip_prefix(name)?.strip_prefix(':'))
    };
    let number = |name| field(name).and_then(|it| it.parse().ok()).unwrap_or_default();
    let failed = |name| field(name).is_some_and(|it| it != "ok");
    Some(RedisFacts {
        version: field("redis_version").unwrap_or_default().to_owned(),
        role: field("role")?.to_owned(),
        link_is_up: field("master_link_status").map(|it| it == "up"),
        is_loading: field("loading") == Some("1"),
        save_failed: failed("rdb_last_bgsave_status") || failed("aof_last_write_status"),
        memory: (number("used_memory"), number("maxmemory")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn replies_are_read_and_what_is_none_is_refused() {
        let text = |text: &str| Ok(Reply::Text(text.to_owned()));
        for (bytes, expected) in [
            ("+PONG\r\n", text("PONG")),
            ("$5\r\na\r\nbc\r\n", text("a\r\nbc")),
            ("$0\r\n\r\n", text("")),
            (
                "-NOAUTH Authentication required.\r\n",
                Ok(Reply::Refused("NOAUTH Authentication required.".to_owned())),
            ),
            ("", Err("the connection broke: unexpected end of file")),
            ("$5\r\nabc", Err("the connection broke: early eof")),
            (
                "HTTP/1.1 400 Bad Request\r\n",
                Err("the answer is none of Redis: `HTTP/1.1 400 Bad Request`"),
            ),
            ("$999999999\r\n", Err("the answer is none of Redis: `$999999999`")),
            ("$-1\r\n", Err("the answer is none of Redis: `$-1`")),
            ("+PONG", Err("the answer is none of Redis: `+PONG`")),
        ] {
            let reply = read_reply(&mut bytes.as_bytes()).await.map_err(|it| it.error);
            assert_eq!(reply, expected.map_err(str::to_owned), "{bytes:?}");
        }
    }

    #[test]
    fn info_is_read_line_by_line() {
        let info = "# Server\r\nredis_version:8.0.2\r\n# Memory\r\nused_memory:100\r\nmaxmemory:200\r\n\
                    maxmemory_policy:noeviction\r\nloading:0\r\nrdb_last_bgsave_status:ok\r\n\
                    aof_last_write_status:err\r\nrole:slave\r\nmaster_link_status:down\r\n";
        let expected = RedisFacts {
            version: "8.0.2".to_owned(),
            role: "slave".to_owned(),
            link_is_up: Some(false),
            is_loading: false,
            save_failed: true,
            memory: (100, 200),
        };
        assert_eq!(read(info), Some(expected));
        assert_eq!(read("loading:1\r\n"), None);
    }
}
