//! The one clock that ages are measured with.
//!
//! It stands still while a hypervisor pauses this host, as for a snapshot or the end of a live
//! migration, and so does the wall clock: nothing here can tell. What was written before is then
//! thought to be younger, by as long as the pause: lower bounds stay true, upper ones may be too
//! low by that, until the history has passed on. `clock_skew_seconds` of all servers jumps at once
//! then, as it does when this host's clock is set.

use std::time::Duration;

use shared::lease::BootInstant;

/// Time since this host was started, by `CLOCK_BOOTTIME`: nobody sets it, and unlike the monotonic
/// clock it goes on while the host is suspended. It is the same for all processes until the next
/// boot.
pub fn now() -> Duration {
    BootInstant::now().since_boot()
}
