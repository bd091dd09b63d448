//! The page `/`, for a person who was just woken up.
//!
//! It is made here, whole, for each request, so it shows the state without any script; the script asks for
//! the page again every few seconds, and says when there is no answer. Nothing is loaded from elsewhere, and
//! by its policy nothing can be: names and reasons come from outside.

mod backups;
mod groups;
mod notes;
mod strip;
mod told;
mod view;

use askama::Template;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};

use crate::monitor::Monitor;
use crate::notify::board::Telling;
use crate::settle::Now;
use view::Page;

const STYLE: &str = include_str!("../../templates/page.css");
const SCRIPT: &str = include_str!("../../templates/page.js");

/// Which `Content-Security-Policy` the page needs: its own style and script, and answers of this server.
pub fn policy() -> String {
    let hash = |text: &str| STANDARD.encode(Sha256::digest(text));
    format!(
        "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src 'self'; \
         img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash(STYLE),
        hash(SCRIPT)
    )
}

/// The page as HTML.
pub fn render(monitor: &Monitor, telling: &Telling, now: Now) -> String {
    let not_ready = monitor.not_ready();
    let page = Page::of(&monitor.state(), not_ready, telling, now);
    // Writing to a string does not fail.
    page.render().unwrap_or_default()
}

#[cfg(test)]
mod tests;
