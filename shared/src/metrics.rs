//! The metrics registry: its prefix, who is running, and the exposition format.

use std::fmt;

use prometheus_client::encoding::text;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// The `Content-Type` of [`encode`]'s result: OpenMetrics 1.0, the only format this client writes.
///
/// Source: the OpenMetrics specification, "Overall structure".
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The `Content-Type` of [`classic`]'s result.
pub const CLASSIC_CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Returns an empty registry whose metrics begin with `pgmesh_`.
pub fn registry() -> Registry {
    Registry::with_prefix("pgmesh")
}

/// Registers `pgmesh_build_info{service,version}`, always 1.
///
/// A gauge, not the OpenMetrics type `info`: `promtool check metrics` refuses that.
pub fn build_info(registry: &mut Registry, service: &'static str, version: &'static str) {
    let info = Family::<[(&'static str, &'static str); 2], Gauge>::default();
    info.get_or_create(&[("service", service), ("version", version)]).set(1);
    registry.register("build_info", "Which agent runs here, and its version", info);
}

/// Encodes every metric of `registry` as OpenMetrics text.
///
/// # Errors
///
/// Only when a collector of our own fails to encode.
pub fn encode(registry: &Registry) -> Result<String, fmt::Error> {
    let mut exposition = String::new();
    text::encode(&mut exposition, registry)?;
    Ok(exposition)
}

/// Turns `openmetrics`, a result of [`encode`], into the older text format, in which `promtool
/// check metrics` reads: there a counter is named with its `_total` in the lines about it too.
pub fn classic(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len());
    let mut help = None;
    for line in openmetrics.lines() {
        let comment = line.strip_prefix("# ").and_then(|it| it.split_once(' '));
        match comment {
            Some(("HELP", about)) => help = Some(about),
            Some(("TYPE", about)) => {
                let suffix = if about.ends_with(" counter") { "_total" } else { "" };
                for (keyword, about) in [("HELP", help.take()), ("TYPE", Some(about))] {
                    let Some((name, about)) = about.and_then(|it| it.split_once(' ')) else {
                        continue;
                    };
                    text.extend(["# ", keyword, " ", name, suffix, " ", about, "\n"]);
                }
            }
            // `# UNIT`, and `# EOF`.
            _ if line.starts_with('#') => {}
            _ => text.extend([line, "\n"]),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;
    use prometheus_client::registry::Unit;

    use super::*;

    #[test]
    fn build_info_is_a_gauge_of_one() {
        let mut registry = registry();
        build_info(&mut registry, "backup-agent", "0.1.0");
        assert_eq!(
            encode(&registry).unwrap(),
            "# HELP pgmesh_build_info Which agent runs here, and its version.\n\
             # TYPE pgmesh_build_info gauge\n\
             pgmesh_build_info{service=\"backup-agent\",version=\"0.1.0\"} 1\n\
             # EOF\n"
        );
    }

    #[test]
    fn the_older_format_names_counters_in_full() {
        let mut registry = registry();
        let (runs, size) = (Counter::<u64>::default(), Gauge::<i64>::default());
        registry.register("runs", "Runs that ended", runs);
        registry.register_with_unit("last_size", "Size of the last run", Unit::Bytes, size);
        assert_eq!(
            classic(&encode(&registry).unwrap()),
            "# HELP pgmesh_runs_total Runs that ended.\n\
             # TYPE pgmesh_runs_total counter\n\
             pgmesh_runs_total 0\n\
             # HELP pgmesh_last_size_bytes Size of the last run.\n\
             # TYPE pgmesh_last_size_bytes gauge\n\
             pgmesh_last_size_bytes 0\n"
        );
    }
}
