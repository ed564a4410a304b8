//! Chaos, with the real agent on lab nodes under traffic that counts every loss: killed actors and agents, tampered maps,
//! power cuts, bad input. Needs root.

#![allow(clippy::unwrap_used, reason = "a panic here is a failed test")]

#[path = "support/bpf.rs"]
mod bpf;
#[path = "chaos/rig.rs"]
mod rig;

#[path = "chaos/actors.rs"]
mod actors;
#[path = "chaos/agents.rs"]
mod agents;
#[path = "chaos/escalation.rs"]
mod escalation;
#[path = "chaos/flows.rs"]
mod flows;
#[path = "chaos/hooks.rs"]
mod hooks;
#[path = "chaos/input.rs"]
mod input;
#[path = "chaos/memory.rs"]
mod memory;
#[path = "chaos/ports.rs"]
mod ports;
#[path = "chaos/power.rs"]
mod power;
#[path = "chaos/tampering.rs"]
mod tampering;
#[path = "chaos/upgrade.rs"]
mod upgrade;
