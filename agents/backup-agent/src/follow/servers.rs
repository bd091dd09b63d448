//! One kept connection to each server of a group, for the looks every few seconds: to log in costs
//! both sides more than what is asked.

use std::time::Duration;

use futures_util::future::join_all;
use shared::pg::connect::connect;
use shared::pg::{Connection, Node, Settings};
use shared::topology::{Group, NodeState, Observation, ObserveError, ask};
use tokio::time::{Instant, timeout};

/// A connection is made anew after so long: a kept one may be answered by a server that lets nobody
/// in any more.
const KEPT_MAX: Duration = Duration::from_mins(1);
/// A kept connection that does not answer within this is given up for a new one, which has its own
/// limits.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// The servers that were looked at, with their connections.
#[derive(Debug, Default)]
pub(super) struct Servers {
    kept: Vec<Kept>,
}

#[derive(Debug)]
struct Kept {
    connection: Connection,
    since: Instant,
}

impl Servers {
    /// Asks the nodes of group `number`, all at the same time. Connections to others are closed.
    pub(super) async fn look(&mut self, settings: &Settings, nodes: &[Node], number: u32) -> Group {
        let mut kept = std::mem::take(&mut self.kept);
        let in_group = nodes.iter().filter(|node| node.group == number);
        let looks: Vec<_> = in_group
            .map(|node| {
                let own = kept.iter().position(|it| it.connection.node() == node);
                look(settings, node, own.map(|own| kept.swap_remove(own)))
            })
            .collect();
        let mut group = Group { number, nodes: Vec::new() };
        for (observation, kept) in join_all(looks).await {
            group.nodes.push(observation);
            self.kept.extend(kept);
        }
        group
    }

    /// The connection to a server that answered.
    pub(super) fn connection(&self, node: &Node) -> Option<&Connection> {
        self.kept.iter().map(|it| &it.connection).find(|connection| connection.node() == node)
    }
}

/// Asks one node; on a new connection if the kept one is old or does not answer.
async fn look(settings: &Settings, node: &Node, kept: Option<Kept>) -> (Observation, Option<Kept>) {
    let node = node.clone();
    if let Some(kept) = kept.filter(|it| it.since.elapsed() < KEPT_MAX)
        && let Ok(Ok(state)) = timeout(ANSWER_LIMIT, ask(&kept.connection)).await
    {
        return (Observation { node, state: Ok(state) }, Some(kept));
    }
    match look_anew(settings, &node).await {
        Ok((state, kept)) => (Observation { node, state: Ok(state) }, Some(kept)),
        Err(error) => (Observation { node, state: Err(error) }, None),
    }
}

async fn look_anew(settings: &Settings, node: &Node) -> Result<(NodeState, Kept), ObserveError> {
    let connection = connect(settings, node).await?;
    let state = ask(&connection).await?;
    Ok((state, Kept { connection, since: Instant::now() }))
}
