//! Which replica of an agent may act, on which groups, and until when it may believe so.
//!
//! Each replica has one etcd lease that it keeps alive, and holds groups by keys that live as
//! long as that lease. It may act on a group while it has a valid [`Claim`], and that it judges
//! by its own clock alone: a process that was stopped and wakes up knows before it asks anybody
//! that its time is over. How groups are shared out among the replicas that are there is
//! [`share()`]; carrying it out, [`Sharing`]; what may be acted on now, [`Shares`].
//!
//! Keys, all below `/pgmesh/<cluster>/` and bound to the lease:
//!
//! | Key | Value |
//! |---|---|
//! | `replica/<agent>/<replica>` | the replica: it is there |
//! | `lease/<agent>/<group>` | the replica that holds the group |
//! | `lease/<agent>` | the replica that leads, of an agent that does not share groups |
//!
//! A claim narrows the window in which two could act, and cannot close it: between asking
//! [`Claim::is_valid`] and the end of what is done then, time passes. So what must never happen
//! twice also needs a name or a condition of its own.

mod claim;
mod holder;
mod present;
mod share;
mod shares;
mod sharing;
mod view;

pub use claim::{BootInstant, Claim};
pub use present::during;
pub use share::share;
pub use shares::{Identity, Leadership, Shares, TTL, holders, leader, replica_name};
pub use sharing::Sharing;
