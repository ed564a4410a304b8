//! Configuration: what was written (a directory of keys, the environment, flags) and what it means (a [`Config`]).
//!
//! Keys are those of Cilium's `cilium-config` ConfigMap. [`keys::all`] is the only list of them: parsing, flags, the
//! commented default file, its schema and the documentation are all made from it. A bad value never takes the agent
//! down: the default (at start) or the last good value (on reload) is used and the [`Report`] says so.
//!
//! Deliberately absent: what the settings do. Actors take a `Config`; nothing here opens a map or a socket.

pub mod docs;
pub mod inputs;
pub mod keys;
mod known;
pub mod logging;
mod model;
mod report;
mod resolve;
mod rules;
mod value;
mod watch;

pub use inputs::Inputs;
pub use keys::{KeyDef, Reload, all as all_keys};
pub use known::WITHOUT_EFFECT;
pub use model::{
    Acceleration, Algorithm, Choice, Config, CtTimeouts, DefaultIpam, DsrDispatch, Families, Kubernetes, L2, LbIpam,
    LbMode, ListenAddr, LogLevel, MaglevSeed, NoBackend, Observe, Paths, PortRange, Ratio, Services, SizeKeys,
    SourceConfig, SourceKind,
};
pub use report::{Invalid, Report, Setting, Unknown};
pub use resolve::{ConfigError, Reloaded, load, reload};
pub use value::{format_duration, parse_duration};
pub use watch::{Watch, watch};

#[cfg(test)]
mod tests;
