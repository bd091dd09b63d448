//! What agents tell each other in etcd, so that they keep out of each other's way: what is under way in a
//! group, and which groups are to be emptied.

use crate::etcd::{Etcd, EtcdError};
use crate::lease;

/// Below [`rebalancing`]: the groups that operators want emptied, each by its number.
pub const DRAIN: &str = "request/drain/";

/// What is under way: below it `<kind>/<group>`, each for as long as a lease lives.
pub fn activities(cluster: &str) -> String {
    format!("/pgmesh/{cluster}/activity/")
}

/// What is asked and known of moves between groups.
pub fn rebalancing(cluster: &str) -> String {
    format!("/pgmesh/{cluster}/rebalance/")
}

/// Works, and tells meanwhile that `kind` is under way in a group. It is not waited for etcd: while that is
/// away nobody can be told, and who must know takes not knowing for no.
pub async fn during<W: Future>(
    etcd: &Etcd,
    cluster: &str,
    kind: &str,
    group: u32,
    work: W,
) -> W::Output {
    let key = format!("{}{kind}/{group}", activities(cluster));
    lease::during(etcd, &key, &lease::replica_name(), work).await
}

/// Whether operators want a group emptied.
///
/// # Errors
///
/// etcd does not answer.
pub async fn is_drained(etcd: &Etcd, cluster: &str, group: u32) -> Result<bool, EtcdError> {
    let key = format!("{}{DRAIN}{group}", rebalancing(cluster));
    Ok(etcd.get(&key).await?.is_some())
}
