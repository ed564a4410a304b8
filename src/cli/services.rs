//! `kinesin services`

use super::CliError;
use super::client::Connection;
use super::output::{Output, Table, age, lines};
use crate::admin::views::{Backend, Frontend, WideBackend, WideFrontend};

/// What clients can connect to, and the backends behind it
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: Output,
    /// Also policies, selection, affinity, source ranges, and why a backend is not used; as `-o wide`, and with -o json or yaml
    #[arg(long)]
    wide: bool,
}

pub(super) fn run(args: &Args) -> Result<(), CliError> {
    if args.wide || args.output.wide() {
        let services: Vec<WideFrontend> = args.connection.client().get("/v1/services/wide")?;
        return args.output.print(&services, || wide_table(&services));
    }
    let services: Vec<Frontend> = args.connection.client().get("/v1/services")?;
    args.output.print(&services, || table(&services))
}

fn table(services: &[Frontend]) -> String {
    let mut table = Table::new(&["ADDRESS", "TYPE", "SERVICE", "PORT", "SCOPE", "STATUS", "BACKENDS"]);
    for frontend in services {
        let backends: Vec<String> = frontend.backends.iter().map(backend).collect();
        table.row(vec![
            frontend.address.clone(),
            frontend.kind.clone(),
            frontend.service.clone(),
            frontend.port_name.clone(),
            frontend.scope.clone(),
            frontend.status.clone(),
            lines(&backends, false),
        ]);
    }
    table.render("no services")
}

/// `10.42.0.5:8080 pi-1`, with the state where it is not the usual one.
fn backend(backend: &Backend) -> String {
    let state = format!("({})", backend.state);
    let mut parts = vec![backend.address.as_str()];
    parts.extend((!backend.node.is_empty()).then_some(backend.node.as_str()));
    parts.extend((backend.state != "active").then_some(state.as_str()));
    parts.join(" ")
}

fn wide_table(services: &[WideFrontend]) -> String {
    let headings = [
        "ADDRESS",
        "TYPE",
        "SERVICE",
        "PORT",
        "SCOPE",
        "STATUS",
        "POLICY OUT/IN",
        "SELECTION",
        "AFFINITY",
        "CLIENTS",
        "HEALTH PORT",
        "BACKENDS",
    ];
    let mut table = Table::new(&headings);
    for frontend in services {
        let backends: Vec<String> = frontend.backends.iter().map(wide_backend).collect();
        table.row(vec![
            frontend.address.clone(),
            frontend.kind.clone(),
            frontend.service.clone(),
            frontend.port_name.clone(),
            frontend.scope.clone(),
            frontend.status.clone(),
            format!("{}/{}", frontend.external_traffic_policy, frontend.internal_traffic_policy),
            frontend.algorithm.clone(),
            frontend.session_affinity_seconds.map(|seconds| age(seconds.into())).unwrap_or_default(),
            clients(frontend),
            frontend.health_check_node_port.map(|port| port.to_string()).unwrap_or_default(),
            lines(&backends, true),
        ]);
    }
    table.render("no services")
}

/// Who may connect: `all`, `cluster`, `allow 192.0.2.0/24`, `deny …`.
fn clients(frontend: &WideFrontend) -> String {
    match &frontend.source_ranges_policy {
        Some(policy) => format!("{policy} {}", frontend.source_ranges.join(",")),
        None => String::from(if frontend.routable { "all" } else { "cluster" }),
    }
}

/// `10.42.0.5:8080 pi-1 zone-a (active)`, and why it is not used.
fn wide_backend(backend: &WideBackend) -> String {
    let state = format!("({})", backend.state);
    let unused = backend.unused.as_ref().map(|why| format!("not used: {why}"));
    let parts = [&backend.address, &backend.node, &backend.zone, &state];
    let shown = parts.into_iter().chain(unused.as_ref()).filter(|part| !part.is_empty());
    shown.map(String::as_str).collect::<Vec<_>>().join(" ")
}
