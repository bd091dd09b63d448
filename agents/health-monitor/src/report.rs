//! What `check` prints.

use std::fmt::Write as _;

use serde_json::{Value, json};
use shared::table::Table;

use crate::advice::Scaling;
use crate::catalogue::CHECKS;
use crate::check::{Level, Measure, Reading, Status};
use crate::cli::CheckArgs;
use crate::component::Component;
use crate::config::Config;
use crate::monitor::State;

/// The readings that were asked for, the worst first.
#[derive(Debug)]
pub struct Report {
    cluster: String,
    readings: Vec<(Component, Reading)>,
    scaling: Scaling,
    level: Level,
}

impl Report {
    /// What the state has of what the arguments ask for.
    pub fn new(state: &State, args: &CheckArgs) -> Self {
        let mut readings: Vec<_> = state
            .checks
            .iter()
            .filter(|(component, _)| args.wants(component.kind, &component.name))
            .flat_map(|(component, checks)| {
                checks.values().map(|it| (component.clone(), it.reading.clone()))
            })
            .filter(|(_, reading)| reading.check.level <= args.level)
            .collect();
        readings.sort_by_key(|(_, reading)| std::cmp::Reverse(reading.status));
        let (cluster, scaling) = (state.cluster.clone(), state.scaling());
        Self { cluster, readings, scaling, level: args.level }
    }

    /// The worst of it; unknown if there is nothing.
    pub fn status(&self) -> Status {
        self.readings.iter().map(|(_, it)| it.status).max().unwrap_or(Status::Unknown)
    }

    fn count(&self, status: Status) -> usize {
        self.readings.iter().filter(|(_, it)| it.status == status).count()
    }

    fn summary(&self) -> String {
        if self.readings.is_empty() {
            return "nothing of that is configured, or it never answered".to_owned();
        }
        let parts = Status::ALL.iter().rev().filter(|it| self.count(**it) > 0);
        let parts: Vec<_> = parts.map(|it| format!("{} {it}", self.count(*it))).collect();
        parts.join(", ")
    }

    /// A table of what is wrong, with what to do, and a line about the rest.
    pub fn text(&self) -> String {
        let mut table = Table::new(&["STATUS", "COMPONENT", "CHECK", "WHY"]);
        let mut steps = String::new();
        for (component, reading) in self.readings.iter().filter(|(_, it)| it.status != Status::Ok) {
            let status = reading.status.name().to_uppercase();
            let check = reading.check.name.to_owned();
            table.row([status, component.to_string(), check, reading.reason.clone()]);
            writeln!(steps, "{component}: {}", reading.next_step()).ok();
        }
        let mut text = String::new();
        if !table.is_empty() {
            write!(text, "{table}\nWhat to do\n{steps}\n").ok();
        }
        text += &self.scaling.text(self.level == Level::Comprehensive);
        writeln!(text, "{}: {}", self.cluster, self.summary()).ok();
        text
    }

    /// All of it.
    ///
    /// # Errors
    ///
    /// Never: what is known can be written.
    pub fn json(&self) -> anyhow::Result<String> {
        let checks: Vec<Value> = self
            .readings
            .iter()
            .map(|(component, reading)| {
                let mut value = serde_json::to_value(reading).unwrap_or_default();
                value["component"] = json!(component);
                value["level"] = json!(reading.check.level);
                value["next"] = json!(reading.next_step());
                value
            })
            .collect();
        let all = json!({
            "cluster": self.cluster,
            "status": self.status(),
            "checks": checks,
            "scaling": self.scaling,
        });
        Ok(serde_json::to_string_pretty(&all)? + "\n")
    }

    /// One line with performance data; what is wrong on the lines after it.
    /// Source: draft-kaestle-monitoring-plugins-interface, "Output".
    pub fn nagios(&self) -> String {
        let state = self.status().name().to_uppercase();
        let mut text = format!("HEALTH {state}: {}", self.summary());
        // Many show this line alone.
        let worst = self.readings.first().filter(|(_, it)| it.status != Status::Ok);
        if let Some((component, reading)) = worst {
            let (check, reason) = (reading.check.name, unpiped(&reading.reason));
            write!(text, "; {component}: {check}: {reason}").ok();
        }
        let data: Vec<_> = self
            .readings
            .iter()
            .flat_map(|(component, reading)| {
                reading.measures.iter().map(move |it| performance(component, reading, it))
            })
            .collect();
        if !data.is_empty() {
            write!(text, " | {}", data.join(" ")).ok();
        }
        text.push('\n');
        for (component, reading) in self.readings.iter().filter(|(_, it)| it.status != Status::Ok) {
            let reason = unpiped(&reading.reason);
            let status = reading.status.name().to_uppercase();
            writeln!(text, "{status} {component}: {}: {reason}", reading.check.name).ok();
        }
        text
    }
}

/// Whatever stands after a | is performance data.
fn unpiped(reason: &str) -> String {
    reason.replace('|', "/")
}

/// `'label'=value[UOM];warn;crit;min;max`.
fn performance(component: &Component, reading: &Reading, measure: &Measure) -> String {
    let label = format!("{component} {} {}", reading.check.name, measure.name).replace('\'', "''");
    let label = label.replace('=', "_");
    let limits = measure.limits.map_or_else(
        || ";".to_owned(),
        |it| {
            // A range: below the limit is bad where critical is the lower of the two.
            let suffix = if it.critical < it.warning { ":" } else { "" };
            format!("{}{suffix};{}{suffix}", it.warning, it.critical)
        },
    );
    let max = measure.max.map(|it| it.to_string()).unwrap_or_default();
    let value = (measure.value * 1000.0).round() / 1000.0;
    format!("'{label}'={value}{};{limits};;{max}", measure.unit.symbol())
}

/// What would be checked, with the limits that hold.
pub fn list(config: &Config, args: &CheckArgs) -> String {
    let mut table = Table::new(&["KIND", "CHECK", "LEVEL", "WARNING", "CRITICAL", "WHAT"]);
    let wanted = CHECKS.iter().filter(|it| args.wants(it.kind, "") && it.level <= args.level);
    for check in wanted {
        let unit = check.limits.as_ref().map(|it| it.unit.symbol()).unwrap_or_default();
        let limits = config.limits.of(check);
        let show = |value: Option<f64>| value.map(|it| format!("{it}{unit}")).unwrap_or_default();
        table.row([
            check.kind.to_string(),
            check.name.to_owned(),
            Level::name(check.level).to_owned(),
            show(limits.map(|it| it.warning)),
            show(limits.map(|it| it.critical)),
            check.what.to_owned(),
        ]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::{CONNECTIONS, REACHABLE, ROLE};
    use crate::check::{Limits, Unit};
    use crate::component::Kind;

    fn report() -> Report {
        let server = |name: &str| Component::of_group(Kind::Postgres, 0, name);
        let limits = Some(Limits { warning: 80.0, critical: 90.0 });
        let (value, unit, max) = (85.5, Unit::Percent, Some(100.0));
        let measure = Measure { name: "used", value, unit, limits, max };
        let busy = "91 of 97 connections | busy";
        Report {
            cluster: "demo".to_owned(),
            scaling: Scaling::default(),
            level: Level::Standard,
            readings: vec![
                (server("b"), Reading::new(&REACHABLE, Status::Critical, "refused")),
                (
                    server("a"),
                    Reading::new(&CONNECTIONS, Status::Warning, busy).with_measure(measure),
                ),
                (server("a"), Reading::new(&ROLE, Status::Ok, "it is the primary")),
            ],
        }
    }

    #[test]
    fn a_plugin_says_the_worst_first_with_numbers() {
        assert_eq!(
            report().nagios(),
            "HEALTH CRITICAL: 1 critical, 1 warning, 1 ok; postgres b of group 0: reachable: refused | \
             'postgres a of group 0 connections used'=85.5%;80;90;;100\n\
             CRITICAL postgres b of group 0: reachable: refused\n\
             WARNING postgres a of group 0: connections: 91 of 97 connections / busy\n"
        );
        assert_eq!(report().status(), Status::Critical);
    }

    #[test]
    fn nothing_is_not_well() {
        let report = Report { readings: vec![], ..report() };
        assert_eq!(report.status(), Status::Unknown);
        assert!(report.text().contains("nothing of that is configured"), "{}", report.text());
    }

    #[test]
    fn people_read_what_is_wrong_and_what_to_do() {
        let text = report().text();
        assert!(text.contains("91 of 97 connections"), "{text}");
        assert!(
            text.contains("What to do\npostgres b of group 0: see whether the server runs"),
            "{text}"
        );
        assert!(text.ends_with("demo: 1 critical, 1 warning, 1 ok\n"), "{text}");
    }
}
