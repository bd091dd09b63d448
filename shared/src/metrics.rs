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

#[cfg(test)]
mod tests {
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
}
