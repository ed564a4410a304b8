//! Every legal client position × frontend × policy × protocol, with real agents, real sockets and real packets: who
//! answers, whom the pod sees as its client, and what is refused. One lab per family and mode, shared by all its cells; those
//! of dispatches that cross routers have the other backends' node behind one.

#![allow(clippy::unwrap_used, reason = "a panic here is a failed test")]
#![allow(clippy::print_stdout, reason = "what is left out is told in the test's output")]

#[path = "node/matrix/cells.rs"]
mod cells;
#[path = "node/matrix/ground.rs"]
mod ground;
#[path = "node/matrix/rules.rs"]
mod rules;

use std::time::Duration;

use cells::{Cell, Family, Plan, cells};
use ground::Ground;
use kinesin::lab::programs::How;
use rules::{Expected, excluded};

/// How packets reach backends on other nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mode {
    /// Configuration keys and their values.
    pub(crate) keys: &'static [(&'static str, &'static str)],
    /// Whether a backend on another node sees the client's address, by TCP and by UDP.
    keeps_client: [bool; 2],
    /// Segments that the nodes are on.
    segments: usize,
}

impl Mode {
    pub(crate) fn keeps(self, how: How) -> bool {
        self.keeps_client[usize::from(how != How::Tcp)]
    }
}

/// To pods by the host's stack in these labs, whoever is in it.
const BY_STACK: (&str, &str) = ("enable-host-legacy-routing", "true");
const L2: Mode = Mode { keys: &[("bpf-lb-mode", "l2"), BY_STACK], keeps_client: [true, true], segments: 1 };
const SNAT: Mode = Mode { keys: &[("bpf-lb-mode", "snat"), BY_STACK], keeps_client: [false, false], segments: 1 };
const IPIP: Mode = Mode {
    keys: &[("bpf-lb-mode", "dsr"), ("bpf-lb-dsr-dispatch", "ipip"), BY_STACK],
    keeps_client: [true, true],
    segments: 2,
};
const OPT: Mode = Mode { keys: &[("bpf-lb-mode", "dsr"), ("bpf-lb-dsr-dispatch", "opt"), BY_STACK], ..IPIP };
const HYBRID: Mode = Mode {
    keys: &[("bpf-lb-mode", "hybrid"), ("bpf-lb-dsr-dispatch", "ipip"), BY_STACK],
    keeps_client: [true, false],
    segments: 2,
};
/// The same, and straight to pods where that works.
const L2_STRAIGHT: Mode = Mode { keys: &[("bpf-lb-mode", "l2"), STRAIGHT], ..L2 };
const IPIP_STRAIGHT: Mode = Mode { keys: &[("bpf-lb-mode", "dsr"), ("bpf-lb-dsr-dispatch", "ipip"), STRAIGHT], ..IPIP };
const STRAIGHT: (&str, &str) = ("enable-host-legacy-routing", "false");

/// Runs all cells of one lab, and says everything that is wrong with it at once.
async fn holds(name: &str, family: Family, mode: Mode) {
    let plan = Plan { family, segments: mode.segments };
    let ground = Ground::new(name, plan, mode).await;
    let all: Vec<Cell> = cells(plan);
    let (skipped, wanted): (Vec<Cell>, Vec<Cell>) = all.into_iter().partition(|cell| excluded(cell, mode).is_some());
    for cell in &skipped {
        println!("excluded: {cell}: {}", excluded(cell, mode).unwrap_or_default());
    }
    let expected: Vec<Expected> = wanted.iter().map(|cell| rules::expected(cell, mode)).collect();
    let limits = expected.iter().map(|expected| match expected {
        // Long enough for two retransmissions; what is wrongly answered is answered sooner.
        Expected::Silent => Duration::from_millis(1500),
        _ => Duration::from_secs(20),
    });
    let seen = ground.ask(&wanted, limits.collect::<Vec<_>>()).await;
    let mut wrong: Vec<String> = Vec::new();
    for ((cell, expected), seen) in wanted.iter().zip(&expected).zip(&seen) {
        if let Err(problem) = expected.meets(seen, cell) {
            wrong.push(format!("{cell}: {problem}"));
        }
    }
    wrong.extend(ground.traces(&wanted, &expected).await);
    println!("{name}: {} cells, {} excluded, {} wrong", wanted.len(), skipped.len(), wrong.len());
    assert!(
        wrong.is_empty(),
        "{} of {} are wrong:\n{}\n{}",
        wrong.len(),
        wanted.len(),
        wrong.join("\n"),
        ground.words()
    );
}

macro_rules! labs {
    ($($test:ident: $name:literal, $family:ident, $mode:ident;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                holds($name, Family::$family, $mode).await;
            }
        )*
    };
}

labs! {
    ipv4_snat: "matrix-snat", V4, SNAT;
    ipv6_snat: "matrix-snat6", V6, SNAT;
    ipv4_l2: "matrix-l2", V4, L2;
    ipv6_l2: "matrix-l2-6", V6, L2;
    ipv4_ipip: "matrix-ipip", V4, IPIP;
    ipv6_ipip: "matrix-ipip6", V6, IPIP;
    ipv4_opt: "matrix-opt", V4, OPT;
    ipv6_opt: "matrix-opt6", V6, OPT;
    ipv4_hybrid: "matrix-hybrid", V4, HYBRID;
    ipv6_hybrid: "matrix-hybrid6", V6, HYBRID;
    ipv4_l2_straight: "matrix-l2-straight", V4, L2_STRAIGHT;
    ipv6_l2_straight: "matrix-l2-straight6", V6, L2_STRAIGHT;
    ipv4_ipip_straight: "matrix-ipip-straight", V4, IPIP_STRAIGHT;
    ipv6_ipip_straight: "matrix-ipip-straight6", V6, IPIP_STRAIGHT;
}
