//! `kinesin agent`: every key of the configuration is a flag.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command, FromArgMatches};

use super::CliError;
use crate::config::{self, Inputs, WITHOUT_EFFECT, logging};

/// Run the agent of this node.
///
/// Every key of the ConfigMap cilium-config is a flag, and an environment variable (KINESIN_<KEY>, upper case with
/// underscores). Flags win over the environment, the environment over --config-dir. K8S_NODE_NAME names the node.
#[derive(clap::Args)]
pub(super) struct Args {
    /// A directory with one file per key, as a ConfigMap is mounted; followed without a restart
    #[arg(long, value_name = "DIR")]
    config_dir: Option<PathBuf>,
    /// How log lines look
    #[arg(long, env = "KINESIN_LOG_FORMAT", value_enum, default_value_t, value_name = "FORMAT")]
    log_format: logging::LogFormat,
    #[command(flatten)]
    keys: KeyFlags,
}

/// The flags that were given, made from the table of keys.
struct KeyFlags(Vec<(String, String)>);

impl clap::Args for KeyFlags {
    fn augment_args(mut command: Command) -> Command {
        for key in config::all_keys() {
            let default = if key.default.is_empty() { String::new() } else { format!(" [default: {}]", key.default) };
            let help = format!("{}{default}", key.doc.trim_end_matches('.'));
            let mut arg = Arg::new(key.name)
                .long(key.name)
                .value_name(key.type_name())
                .help(help)
                .help_heading(key.group)
                .action(ArgAction::Append);
            if !key.alias.is_empty() {
                arg = arg.alias(key.alias);
            }
            if key.is_switch() {
                // As with Go's flags, `--debug` alone means true and a value needs the equals sign.
                arg = arg.num_args(0..=1).require_equals(true).default_missing_value("true");
            }
            command = command.arg(arg);
        }
        for name in WITHOUT_EFFECT {
            let arg = Arg::new(*name).long(*name).hide(true).num_args(0..=1).default_missing_value("true");
            command = command.arg(arg.action(ArgAction::Append));
        }
        command
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for KeyFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let names = config::all_keys().map(|key| key.name).chain(WITHOUT_EFFECT.iter().copied());
        // A list given in several flags is one list; of anything else the last one counts.
        let value = |name, mut all: clap::parser::ValuesRef<'_, String>| {
            if config::keys::find(name).is_some_and(config::KeyDef::is_list) {
                return Some(all.cloned().collect::<Vec<_>>().join(","));
            }
            all.next_back().cloned()
        };
        let given = |name: &'static str| Some((name.to_string(), value(name, matches.get_many(name)?)?));
        Ok(Self(names.filter_map(given).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

pub(super) fn run(args: Args) -> Result<(), CliError> {
    let inputs = Inputs::from_process(args.config_dir, args.keys.0);
    // The level is needed before the agent reads its configuration for good; errors are the agent's to report.
    let level = config::load(&inputs).map(|(config, _)| config.observe.log_level()).unwrap_or_default();
    logging::init(args.log_format, level);
    crate::app::run(inputs).map_err(|error| CliError::Answered(format!("{error:#}")))
}
