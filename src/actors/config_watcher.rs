//! Follows the configuration.
//!
//! owns: the watch on the configuration directory
//! hears: changes of files
//! says: the config level; problems of keys and values
//! restart story: reads everything again; an invalid value never replaces a good one
//!
//! Deliberately absent: applying settings. Each actor follows the level and does its own part.

use std::sync::Arc;

use crate::actor::{Actor, Failure};
use crate::address::{Address, Label};
use crate::config::{self, Inputs, Report};
use crate::level::Level;
use crate::source::Source;
use crate::world::World;

/// What the watcher hears.
pub enum ConfigWatcherMsg {
    /// Files may have changed.
    Changed,
}

impl Label for ConfigWatcherMsg {
    fn label(&self) -> &'static str {
        "Changed"
    }
}

/// What the watcher needs.
#[derive(Clone)]
pub struct ConfigWatcherArgs {
    /// The level that it writes.
    pub world: World,
    /// Its rate limit is a setting.
    pub source: Arc<dyn Source>,
    /// Where settings come from.
    pub inputs: Arc<Inputs>,
    /// The latest report, for status.
    pub report: Level<Report>,
}

/// The actor.
pub struct ConfigWatcher {
    args: ConfigWatcherArgs,
    pump: Option<tokio::task::JoinHandle<()>>,
}

impl Actor for ConfigWatcher {
    type Msg = ConfigWatcherMsg;
    type Args = ConfigWatcherArgs;

    async fn start(args: Self::Args, me: Address<ConfigWatcherMsg>) -> Result<Self, Failure> {
        let pump = args.inputs.config_dir.as_ref().map(|dir| {
            let (mut watch, me) = (config::watch(dir), me.clone());
            tokio::spawn(async move {
                loop {
                    watch.changed().await;
                    me.cast(ConfigWatcherMsg::Changed);
                }
            })
        });
        // What changed while nobody watched.
        me.cast(ConfigWatcherMsg::Changed);
        Ok(Self { args, pump })
    }

    async fn handle(&mut self, ConfigWatcherMsg::Changed: ConfigWatcherMsg) -> Result<(), Failure> {
        let ConfigWatcherArgs { world, source, inputs, report } = &self.args;
        let last_good = world.config();
        let reloaded = config::reload(inputs, &last_good);
        world.problems.set("configuration", reloaded.report.problems());
        report.set(reloaded.report);
        if world.config.set(reloaded.config) {
            let generation = world.config().generation.clone();
            config::logging::set_level(world.config().observe.log_level());
            source.set_rate_limit(world.config().kubernetes.qps.into(), world.config().kubernetes.burst);
            tracing::info!(keys = reloaded.changed_keys.join(" "), generation, "configuration applied");
            metrics::counter!("kinesin_config_reloads_total").increment(1);
        }
        Ok(())
    }
}

impl Drop for ConfigWatcher {
    fn drop(&mut self) {
        if let Some(pump) = &self.pump {
            pump.abort();
        }
    }
}
