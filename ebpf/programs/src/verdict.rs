//! What becomes of a packet, and its count.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use kinesin_abi::{Direction, DropReason};

use crate::{frame::Frame, lookup, skb::Skb};

/// The decision about one packet. Every kind carries a word, and so does a reason to drop: where one of them had none, or a
/// byte, the compiler would merge it with the others as undefined bytes, which the verifier refuses to see read.
pub enum Verdict {
    /// Translated, and sent or let go on; the hook's code.
    Sent(i32),
    /// Counted already where it counts: an answer of our own, or what another function has finished; or not ours. The hook's
    /// code.
    Answered(i32),
    /// No backend: to be dropped, counted and refused; see `reject`.
    Refused(DropReason),
}

impl Verdict {
    /// Not ours: untouched, to whoever comes next.
    pub const PASS: Self = Self::Answered(TC_ACT_UNSPEC);
    /// Translated; the host's stack and its policies go on with it.
    pub const TRANSLATED: Self = Self::Sent(TC_ACT_UNSPEC);
}

/// Counts, and turns the decision into the code of a tc hook.
///
/// `TC_ACT_UNSPEC` hands on to the next program of the hook, so that those of a CNI beside us see the packet too.
#[inline(always)]
pub fn finish(skb: Skb, direction: Direction, verdict: Result<Verdict, DropReason>) -> i32 {
    match verdict {
        Ok(Verdict::Answered(code)) => code,
        Ok(Verdict::Refused(_)) => TC_ACT_SHOT,
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
