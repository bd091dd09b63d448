//! `HAProxy`, by its statistics page.

use reqwest::{StatusCode, Url};
use serde::Deserialize;
use shared::secret::Secret;

use super::http::{self, Http, wrong};
use super::{Probe, SetupError};
use crate::config::HaproxyConfig;
use crate::facts::Failure;

/// What the page says of the servers behind the two ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HaproxyFacts {
    /// Behind the port for writes, if one is configured; empty if the page does not know it.
    pub write: Option<Vec<Server>>,
    /// Behind the port for reads, if one is configured; empty if the page does not know it.
    pub read: Option<Vec<Server>>,
}

/// A server of a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// Its name there.
    pub name: String,
    /// It gets traffic.
    pub is_up: bool,
    /// `UP`, `DOWN`, `MAINT` … and what the last check said.
    pub state: String,
}

/// Asks one `HAProxy`.
#[derive(Debug)]
pub struct HaproxyProbe {
    url: Url,
    http: Http,
    user: Option<String>,
    password: Option<Secret>,
    write_backend: Option<String>,
    read_backend: Option<String>,
}

impl HaproxyProbe {
    /// Reads the password and the certificates.
    ///
    /// # Errors
    ///
    /// Fails when a file cannot be used.
    pub fn new(config: &HaproxyConfig) -> Result<Self, SetupError> {
        let key = format!("haproxy {}", config.name);
        // So the page is asked for as CSV: a parameter of its path, not of a query.
        let url = http::address(&format!("{};csv", config.url), &key)?;
        let http = Http::for_url(&url, config.ca_file.as_deref(), &key)?;
        let key = || format!("{key}.password_file");
        let password = SetupError::secret(config.password_file.as_deref(), key)?;
        let (write_backend, read_backend) =
            (config.write_backend.clone(), config.read_backend.clone());
        Ok(Self { url, http, user: config.user.clone(), password, write_backend, read_backend })
    }
}

impl Probe for HaproxyProbe {
    type Facts = HaproxyFacts;

    async fn ask(&mut self) -> Result<HaproxyFacts, Failure> {
        let login = self.user.as_deref().map(|user| (user, self.password.as_ref()));
        let page = self.http.get(self.url.clone(), login).await?;
        if page.status != StatusCode::OK {
            return Err(wrong(format!("the statistics page says {}", page.status)));
        }
        let rows = read(&page.body)?;
        let backend = |name: &Option<String>| name.as_ref().map(|name| servers(&rows, name));
        Ok(HaproxyFacts { write: backend(&self.write_backend), read: backend(&self.read_backend) })
    }
}

/// A row of the page.
/// Source: HAProxy Management Guide, 9.1 "CSV format".
#[derive(Deserialize)]
struct Row {
    #[serde(rename = "# pxname")]
    proxy: String,
    svname: String,
    status: String,
    /// Of a backup server 1.
    bck: Option<u32>,
    check_status: Option<String>,
    check_code: Option<u32>,
    last_chk: Option<String>,
}

fn read(page: &[u8]) -> Result<Vec<Row>, Failure> {
    if !page.starts_with(b"# pxname,") {
        return Err(wrong("the statistics are not CSV".to_owned()));
    }
    let rows: Result<_, csv::Error> = csv::Reader::from_reader(page).into_deserialize().collect();
    rows.map_err(|error| wrong(format!("the statistics are not CSV: {error}")))
}

fn servers(rows: &[Row], backend: &str) -> Vec<Server> {
    let rows = rows
        .iter()
        .filter(|it| it.proxy == backend && !matches!(it.svname.as_str(), "FRONTEND" | "BACKEND"));
    let is_up = |row: &Row| row.status.starts_with("UP") || row.status == "no check";
    let is_backup = |row: &Row| row.bck == Some(1);
    // A backup server gets traffic where no other is there.
    let has_others = rows.clone().any(|row| is_up(row) && !is_backup(row));
    rows.map(|row| Server {
        name: row.svname.clone(),
        is_up: is_up(row) && !(has_others && is_backup(row)),
        state: state(row),
    })
    .collect()
}

/// `DOWN (L7STS 503: Service Unavailable)`.
fn state(row: &Row) -> String {
    let code = row.check_code.map(|code| code.to_string());
    let check = [row.check_status.clone(), code].into_iter().flatten().filter(|it| !it.is_empty());
    let check = check.collect::<Vec<_>>().join(" ");
    match row.last_chk.as_deref().filter(|it| !it.is_empty()) {
        _ if check.is_empty() => row.status.clone(),
        Some(said) => format!("{} ({check}: {said})", row.status),
        None => format!("{} ({check})", row.status),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_read_with_what_their_last_check_said() {
        let page = b"# pxname,svname,status,act,bck,check_status,check_code,last_chk,\n\
            stats,FRONTEND,OPEN,,,,,,\n\
            primary,a,UP,1,0,L7OK,200,OK,\n\
            primary,b,DOWN,1,0,L7STS,503,\"Service, \"\"Unavailable\"\"\",\n\
            primary,c,MAINT,1,0,,,,\n\
            primary,d,UP 1/3,0,1,L4OK,,,\n\
            primary,BACKEND,UP,1,1,,,,\n\
            replicas,a,no check,0,1,,,,\n";
        let rows = read(page).unwrap();
        let server = |name: &str, is_up, state: &str| Server {
            name: name.to_owned(),
            is_up,
            state: state.to_owned(),
        };
        assert_eq!(
            servers(&rows, "primary"),
            [
                server("a", true, "UP (L7OK 200: OK)"),
                server("b", false, "DOWN (L7STS 503: Service, \"Unavailable\")"),
                server("c", false, "MAINT"),
                server("d", false, "UP 1/3 (L4OK)"),
            ]
        );
        assert_eq!(servers(&rows, "replicas"), [server("a", true, "no check")], "a backup alone");
        assert_eq!(servers(&rows, "none"), []);
        for page in [&b"<html>\n<body>\n"[..], b"<html></html>", b""] {
            assert!(read(page).is_err());
        }
        assert_eq!(
            read(b"# pxname,svname,status,bck,check_status,check_code,last_chk,\n").unwrap().len(),
            0
        );
    }
}
