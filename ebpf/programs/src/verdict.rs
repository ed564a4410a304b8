//! What becomes of a packet, and its count.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use kinesin_abi::{Direction, DropReason};

use crate::{lookup, skb::Skb};

/// The decision about one packet.
pub enum Verdict {
    /// Not ours: untouched, to whoever comes next.
    Pass,
    /// Translated; the host's stack and its policies go on with it.
    Translated,
    /// Translated and sent; the code of the redirect helper.
    Sent(i32),
    /// Counted already where it counts: an answer of our own, or what another function has finished; the hook's code.
    Answered(i32),
    /// No backend: to be dropped, counted and refused; see `reject`.
    Refused,
}

/// Counts, and turns the decision into the code of a tc hook.
///
/// `TC_ACT_UNSPEC` hands on to the next program of the hook, so that those of a CNI beside us see the packet too.
#[inline(always)]
pub fn finish(skb: Skb, direction: Direction, verdict: Result<Verdict, DropReason>) -> i32 {
    match verdict {
        Ok(Verdict::Pass) => TC_ACT_UNSPEC,
        Ok(Verdict::Answered(code)) => code,
        Ok(Verdict::Refused) => TC_ACT_SHOT,
        Ok(Verdict::Translated) => {
            lookup::count(0, direction, skb.len());
            TC_ACT_UNSPEC
        }
        Ok(Verdict::Sent(code)) => {
            lookup::count(0, direction, skb.len());
            code
        }
        Err(reason) => {
            lookup::count(reason as u8, direction, skb.len());
            TC_ACT_SHOT
        }
    }
}
