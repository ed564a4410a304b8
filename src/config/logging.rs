//! The log: text for people, JSON for collectors, and a level that changes while the agent runs.

use std::io::IsTerminal;
use std::sync::OnceLock;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

use super::model::LogLevel;

/// How lines look. Unlike the level it is fixed at start: it is a flag of the process, not a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// One line with fields.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

type SetLevel = Box<dyn Fn(EnvFilter) + Send + Sync>;
static SET_LEVEL: OnceLock<SetLevel> = OnceLock::new();

/// Starts logging to standard error. A second call changes nothing, so that tests may call it too.
pub fn init(format: LogFormat, level: LogLevel) {
    let (filter, handle) = reload::Layer::new(filter(level));
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let registry = tracing_subscriber::registry().with(filter);
    let started = match format {
        LogFormat::Text => {
            registry.with(tracing_subscriber::fmt::layer().with_ansi(colour).with_writer(std::io::stderr)).try_init()
        }
        LogFormat::Json => registry
            .with(tracing_subscriber::fmt::layer().json().flatten_event(true).with_writer(std::io::stderr))
            .try_init(),
    };
    if started.is_ok() {
        let _ = SET_LEVEL.set(Box::new(move |filter| {
            // Fails only when the subscriber is gone, which means that the process ends.
            let _ = handle.reload(filter);
        }));
    }
}

/// Changes the level from now on.
pub fn set_level(level: LogLevel) {
    if let Some(set) = SET_LEVEL.get() {
        set(filter(level));
    }
}

/// `level` for our own crates; libraries log per connection below that, which only `trace` shows.
fn filter(level: LogLevel) -> EnvFilter {
    EnvFilter::new(match level {
        LogLevel::Trace => "trace".to_string(),
        LogLevel::Debug => "info,kinesin=debug,kinesin_core=debug".to_string(),
        other => other.to_string(),
    })
}
