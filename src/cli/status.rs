//! `kinesin status`

use super::CliError;
use super::client::Connection;
use super::output::{Output, Table, age, ago};
use crate::admin::views::{ConnectionsView, KprView, StatusView};

/// The agent at a glance: source, programs, maps, members, problems
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: Output,
    /// Everything; for people who type what they know
    #[arg(long)]
    verbose: bool,
}

pub(super) fn run(args: &Args) -> Result<(), CliError> {
    let status: StatusView = args.connection.client().get("/v1/status")?;
    args.output.print(&status, || text(&status, args.verbose || args.output.wide()))
}

fn text(status: &StatusView, verbose: bool) -> String {
    let mut sections = vec![head(status)];
    let kpr = &status.kube_proxy_replacement;
    if verbose {
        sections.push(kpr_details(kpr));
    }
    let broken = status.hooks.iter().any(|hook| !hook.ok);
    if verbose || broken {
        sections.push(hooks(status));
    }
    if verbose {
        sections.push(maps(status));
        sections.push(connections(&status.connections));
    }
    if !status.members.is_empty() {
        sections.push(members(status));
    }
    if !status.problems.is_empty() {
        sections.push(format!("Problems:\n{}", indent(&status.problems.join("\n"))));
    }
    sections.join("\n\n")
}

fn head(status: &StatusView) -> String {
    let source = &status.source;
    let health = if source.healthy { "Ok" } else { "Failing" };
    let detail = [source.location.as_str(), source.detail.as_str()].map(|part| format!(" {part}"));
    let detail: String = detail.into_iter().filter(|part| part.len() > 1).collect();
    let kpr = &status.kube_proxy_replacement;
    let devices = if kpr.devices.is_empty() { String::new() } else { format!("   [{}]", kpr.devices.join(", ")) };
    let waiting: Vec<&str> = status.sync.iter().filter(|sync| !sync.complete).map(|sync| sync.kind.as_str()).collect();
    let objects: u64 = status.sync.iter().map(|sync| sync.objects).sum();
    let sync = if waiting.is_empty() { "complete".into() } else { format!("waiting for {}", waiting.join(", ")) };
    let attached = status.hooks.iter().filter(|hook| hook.ok).count();
    let report = &status.config.report;
    let bad = report.problems().len();
    let config = if bad == 0 { "Ok".into() } else { format!("{bad} problems, see `kinesin config`") };
    let rows = [
        ("Node", format!("{}   kinesin {}, up {}", status.node, status.version, age(status.uptime_seconds))),
        ("Source", format!("{}: {health}{detail}", source.kind)),
        ("KubeProxyReplacement", format!("{}{devices}", if kpr.enabled { "True" } else { "False" })),
        ("Families", status.families.join(", ")),
        ("Lists", format!("{sync} ({objects} objects)")),
        ("Programs", format!("{attached}/{} attached", status.hooks.len())),
        ("Configuration", format!("{}: {config}", status.config.generation)),
        ("Leader", status.leader.clone().unwrap_or_else(|| "-".into())),
    ];
    rows.map(|(name, value)| format!("{:<24}{value}", format!("{name}:"))).join("\n")
}

fn kpr_details(kpr: &KprView) -> String {
    let on = |on: bool| String::from(if on { "Enabled" } else { "Disabled" });
    let or = |text: &str, other: &str| String::from(if text.is_empty() { other } else { text });
    let rows = [
        ("Status", String::from(if kpr.enabled { "True" } else { "False" })),
        ("Socket LB", on(kpr.socket_lb)),
        ("Devices", or(&kpr.devices.join(", "), "-")),
        ("Mode", or(&kpr.mode, "-")),
        ("Backend Selection", or(&kpr.backend_selection, "-")),
        ("Session Affinity", on(kpr.session_affinity)),
        ("XDP Acceleration", or(&kpr.xdp_acceleration, "Disabled")),
        ("Host Routing", or(&kpr.host_routing, "Legacy")),
    ];
    let mut out = String::from("KubeProxyReplacement Details:");
    for (name, value) in rows {
        out.push_str(&format!("\n  {:<22}{value}", format!("{name}:")));
    }
    out.push_str("\n  Services:");
    for (name, value) in &kpr.services {
        out.push_str(&format!("\n  - {:<20}{value}", format!("{name}:")));
    }
    out
}

fn hooks(status: &StatusView) -> String {
    let mut table = Table::new(&["PROGRAM", "TARGET", "HOW", "STATE"]);
    for hook in &status.hooks {
        let state = match &hook.error {
            None if hook.ok => "ok".into(),
            None => "error".into(),
            Some(error) => format!("error: {error}"),
        };
        table.row(vec![hook.program.clone(), hook.target.clone(), hook.how.clone(), state]);
    }
    format!("Programs:\n{}", indent(&table.render("none")))
}

fn maps(status: &StatusView) -> String {
    let mut table = Table::new(&["MAP", "USED", "MAX", "FULL"]);
    for map in &status.maps {
        let share =
            if map.max == 0 { String::new() } else { format!("{:.1}%", map.used as f64 * 100.0 / map.max as f64) };
        table.row(vec![map.name.clone(), map.used.to_string(), map.max.to_string(), share]);
    }
    format!("Maps:\n{}", indent(&table.render("none")))
}

fn connections(view: &ConnectionsView) -> String {
    let looked = match view.looked_seconds_ago {
        Some(seconds) => format!("{} ago, in {} ms", age(seconds), view.took_ms),
        None => "not yet".into(),
    };
    let rows = [
        ("Established", view.established.to_string()),
        ("Other", view.transient.to_string()),
        ("Expired", view.expired.to_string()),
        ("Forgotten early", view.forgotten.to_string()),
        ("Without room", view.unsettled.to_string()),
        ("Last look", looked),
    ];
    let rows: Vec<String> = rows.iter().map(|(name, value)| format!("{:<22}{value}", format!("{name}:"))).collect();
    format!("Connections (entries, two for each):\n{}", indent(&rows.join("\n")))
}

fn members(status: &StatusView) -> String {
    let mut table = Table::new(&["NODE", "STATE", "SEEN", "FORWARDING"]);
    for member in &status.members {
        let seen = member.last_seen.map(ago).unwrap_or_default();
        table.row(vec![member.node.clone(), member.state.clone(), seen, member.forwarding.clone()]);
    }
    format!("Members:\n{}", indent(&table.render("none")))
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}
