//! Kinesin's agent as a library: what the binary and the tests are made of.
//!
//! Arrows point one way: `kinesin-abi` ← `kinesin-core` ← `datapath`, `net`, `source` ← `actors` ← `app` ← `cli`.

pub mod actor;
pub mod actors;
pub mod address;
pub mod admin;
pub mod app;
pub mod cli;
pub mod clock;
pub mod config;
pub mod datapath;
pub mod footprint;
pub mod lab;
pub mod level;
pub mod machine;
pub mod metrics;
pub mod net;
pub mod source;
pub mod supervisor;
mod sync;
pub mod table;
pub mod trace;
pub mod world;
