//! `kinesin config`

use super::CliError;
use super::client::Connection;
use super::output::{Output, Table};
use crate::admin::views::ConfigView;
use crate::config::Reload;

/// The configuration in effect, and where each value was set
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: Output,
    /// Only what somebody set
    #[arg(long)]
    set: bool,
}

pub(super) fn run(args: &Args) -> Result<(), CliError> {
    let mut config: ConfigView = args.connection.client().get("/v1/config")?;
    if args.set {
        config.report.settings.retain(|setting| setting.source != "default");
    }
    args.output.print(&config, || text(&config, args.output.wide()))
}

fn text(config: &ConfigView, wide: bool) -> String {
    let mut table = Table::new(&["KEY", "VALUE", "SOURCE", "CHANGE"]);
    for setting in &config.report.settings {
        let change = match setting.reload {
            Reload::Live => "live",
            Reload::Reattach => "reattach",
        };
        table.row(vec![setting.key.clone(), setting.value.clone(), setting.source.clone(), change.into()]);
    }
    let mut out =
        format!("Node {}, generation {}\n\n{}\n", config.node, config.generation, table.render("nothing is set"));
    for problem in config.report.problems() {
        out.push_str(&format!("\n! {problem}"));
    }
    let ignored = &config.report.accepted_without_effect;
    if !ignored.is_empty() {
        let which = if wide || ignored.len() <= 8 { ignored.join(" ") } else { "see -o wide".into() };
        out.push_str(&format!("\nAccepted, no effect: {} ({which})", ignored.len()));
    }
    out
}
