//! The alert rules of the stack's Prometheus.

use std::path::Path;

use harness::{program, skip};

use crate::exporter::LIMIT;

#[tokio::test]
async fn each_alert_fires_when_it_should_and_none_when_all_is_well() {
    let promtool = "/usr/bin/promtool";
    if !Path::new(promtool).exists() {
        skip(&format!("{promtool} is not installed"));
        return;
    }
    let rules = concat!(env!("CARGO_MANIFEST_DIR"), "/prometheus/alerts.yml");
    program::finish(program::command(promtool).args(["test", "rules", rules]), LIMIT)
        .await
        .assert_success();
}
