//! `kinesin vips`

use super::CliError;
use super::client::Connection;
use super::output::{Output, Table, ago, lines};
use crate::admin::views::VipView;

/// Addresses announced on the LAN, and who answers for them
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: Output,
}

pub(super) fn run(args: &Args) -> Result<(), CliError> {
    let vips: Vec<VipView> = args.connection.client().get("/v1/vips")?;
    args.output.print(&vips, || table(&vips, args.output.wide()))
}

fn table(vips: &[VipView], wide: bool) -> String {
    let mut table = Table::new(&["ADDRESS", "OWNER", "INTERFACE", "MAC", "STATE", "SINCE", "POOL", "SERVICES"]);
    for vip in vips {
        table.row(vec![
            vip.address.clone(),
            vip.owner.clone().unwrap_or_default(),
            vip.interface.clone().unwrap_or_default(),
            vip.mac.clone().unwrap_or_default(),
            vip.state.clone(),
            vip.since.map(ago).unwrap_or_default(),
            vip.pool.clone().unwrap_or_default(),
            lines(&vip.services, wide),
        ]);
    }
    table.render("no addresses")
}
