//! The clock that ages are taken by: it runs through sleep, and nobody sets it.

use std::time::Duration;

use shared::lease::BootInstant;

/// Time since this host started, by `CLOCK_BOOTTIME`.
pub fn now() -> Duration {
    BootInstant::now().since_boot()
}
