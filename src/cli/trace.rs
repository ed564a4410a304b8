//! `kinesin trace`

use std::path::PathBuf;
use std::sync::Arc;

use kinesin_core::trace::{Question, Step, Trace, Way};
use serde::{Deserialize, Serialize};

use super::CliError;
use super::client::{Connection, percent_encode};
use super::output::{Output, Table};
use crate::datapath::{KernelMaps, pinned_hooks};
use crate::trace::{Live, TraceError, answer};

/// Ways shown to people who did not ask for all.
const SHOWN: usize = 8;

/// What would happen to a packet, step by step, from the maps as they are now
///
/// The maps and routing tables are read, nothing is sent and nothing changes. Without an agent the pinned maps are read.
///
/// Examples:
///   kinesin trace 192.168.1.50 10.0.0.100:80          a client on the LAN
///   kinesin trace 192.168.1.50:40000@eth0 10.0.0.100:80
///   kinesin trace host 10.96.0.1:443                  a process of this node
///   kinesin trace pod 10.96.0.10:53 --proto udp       a pod of this node
///   kinesin trace 192.168.1.50 10.0.0.100 --proto icmp
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    /// Who sends: an address with or without :port and @device, or host, or pod
    src: String,
    /// Where to: address:port, or an address for ICMP
    dst: String,
    /// tcp, udp, sctp or icmp
    #[arg(long, default_value = "tcp")]
    proto: String,
    /// The device that the packet comes in by [default: the one that the route to the source leaves by]
    #[arg(long, default_value = "")]
    device: String,
    /// packet or socket: which hooks are asked [default: those of sockets for clients on this node]
    #[arg(long, default_value = "")]
    hook: String,
    /// Where the maps are pinned, for when no agent answers
    #[arg(long, env = "KINESIN_BPF_ROOT", default_value = "/sys/fs/bpf", value_name = "DIR")]
    bpf_root: PathBuf,
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: Output,
}

/// A trace, and who gave it.
#[derive(Serialize, Deserialize)]
struct Answer {
    /// `agent` or `pinned-maps`
    from: String,
    #[serde(flatten)]
    trace: Trace,
}

pub(super) fn run(args: &Args) -> Result<(), CliError> {
    let question = Question {
        src: args.src.clone(),
        dst: args.dst.clone(),
        proto: args.proto.clone(),
        device: args.device.clone(),
        hook: args.hook.clone(),
    };
    question.parse().map_err(|error| CliError::Usage(error.to_string()))?;
    let answer = match args.connection.client().get(&path(&question)) {
        Ok(trace) => Answer { from: "agent".into(), trace },
        Err(unreachable @ CliError::Unreachable { .. }) => match from_pins(args, &question)? {
            Some(trace) => Answer { from: "pinned-maps".into(), trace },
            None => return Err(unreachable),
        },
        Err(error) => return Err(error),
    };
    args.output.print(&answer, || text(&answer, args.output.wide()))
}

fn path(question: &Question) -> String {
    let Question { src, dst, proto, device, hook } = question;
    let fields = [("src", src), ("dst", dst), ("proto", proto), ("device", device), ("hook", hook)];
    let query: Vec<String> = fields.map(|(name, value)| format!("{name}={}", percent_encode(value))).to_vec();
    format!("/v1/trace?{}", query.join("&"))
}

/// From the maps that an agent has left; none where there are none.
fn from_pins(args: &Args, question: &Question) -> Result<Option<Trace>, CliError> {
    let failed = |what: &str, error: &dyn std::fmt::Display| CliError::Answered(format!("{what}: {error}"));
    let root = &args.bpf_root;
    let maps = KernelMaps::open_pinned(root)
        .map_err(|error| failed(&format!("no agent answers, and the maps below {}", root.display()), &error))?;
    let Some(maps) = maps else { return Ok(None) };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.map_err(|error| failed("cannot start", &error))?;
    let live = Live::open(Arc::new(maps), pinned_hooks(root), runtime.handle().clone());
    let live = live.map_err(|error| failed("cannot read", &error))?;
    match answer(&live, question) {
        Ok(trace) => Ok(Some(trace)),
        Err(TraceError::Question(text)) => Err(CliError::Usage(text)),
        Err(error) => Err(failed("cannot read", &error)),
    }
}

fn text(answer: &Answer, wide: bool) -> String {
    let Trace { packet, steps, ways } = &answer.trace;
    let mut lines = vec![packet.clone()];
    if answer.from != "agent" {
        lines.push("no agent answers: this is what the pinned maps say".into());
    }
    number(&mut lines, steps, 1);
    match ways.as_slice() {
        [only] => {
            number(&mut lines, &only.steps, steps.len() + 1);
            lines.push(format!("=> {}", only.verdict));
        }
        many if wide => {
            for way in many {
                lines.push(String::new());
                lines.push(format!("with a chance of {}:", percent(way.chance)));
                number(&mut lines, &way.steps, steps.len() + 1);
                lines.push(format!("=> {}", way.verdict));
            }
        }
        many => lines.push(table(many)),
    }
    lines.join("\n")
}

fn number(lines: &mut Vec<String>, steps: &[Step], first: usize) {
    lines.extend((first..).zip(steps).map(|(n, step)| format!("{n:>2}  {:<14}{step}", step.title())));
}

fn table(ways: &[Way]) -> String {
    let mut table = Table::new(&["CHANCE", "BACKEND", "STATE", "WHERE", "OUTCOME"]);
    for way in ways.iter().take(SHOWN) {
        let backend = way.backend.as_ref();
        table.row(vec![
            percent(way.chance),
            backend.map(|member| member.address.to_string()).unwrap_or_default(),
            backend.map(|member| member.state.clone()).unwrap_or_default(),
            backend.map(|member| if member.local { "this node" } else { "elsewhere" }.into()).unwrap_or_default(),
            way.verdict.to_string(),
        ]);
    }
    let rest = ways.len().saturating_sub(SHOWN);
    let more = if rest > 0 { format!("\n… and {rest} more; see -o wide") } else { String::new() };
    format!("{}{more}", table.render("nobody"))
}

fn percent(chance: f64) -> String {
    format!("{:.1} %", chance * 100.0)
}
