//! `kinesin services`

use super::CliError;
use super::client::Connection;
use super::output::{Output, Table, lines};
use crate::admin::views::Frontend;

/// What clients can connect to, and the backends behind it
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: Output,
}

pub(super) fn run(args: &Args) -> Result<(), CliError> {
    let services: Vec<Frontend> = args.connection.client().get("/v1/services")?;
    args.output.print(&services, || table(&services, args.output.wide()))
}

fn table(services: &[Frontend], wide: bool) -> String {
    let mut table = Table::new(&["ADDRESS", "TYPE", "SERVICE", "PORT", "SCOPE", "STATUS", "BACKENDS"]);
    for frontend in services {
        let backends: Vec<String> = frontend.backends.iter().map(|b| backend(b, wide)).collect();
        table.row(vec![
            frontend.address.clone(),
            frontend.kind.clone(),
            frontend.service.clone(),
            frontend.port_name.clone(),
            frontend.scope.clone(),
            frontend.status.clone(),
            lines(&backends, wide),
        ]);
    }
    table.render("no services")
}

/// `10.42.0.5:8080 pi-1`, with the state where it is not the usual one.
fn backend(backend: &crate::admin::views::Backend, wide: bool) -> String {
    let mut parts = vec![backend.address.as_str()];
    parts.extend((!backend.node.is_empty()).then_some(backend.node.as_str()));
    parts.extend((wide && !backend.zone.is_empty()).then_some(backend.zone.as_str()));
    let state = format!("({})", backend.state);
    parts.extend((wide || backend.state != "active").then_some(state.as_str()));
    parts.join(" ")
}
