//! How many entries the maps have, from what was asked for and how much memory there is.
//!
//! What grows with traffic takes a share of the memory (`bpf-map-dynamic-size-ratio`) between documented bounds. The
//! memory is the machine's, or what the agent's cgroup may use where that is less: the kernel charges maps to whoever
//! makes them, and a share of the machine's memory would get an agent with a small limit killed. Below such a limit the
//! lower bounds give way too.
//!
//! Deliberately absent: reading the limits.

#[cfg(test)]
mod tests;

/// What there is, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// The machine's.
    pub total: u64,
    /// What the agent's cgroup may use, if it is limited.
    pub limit: Option<u64>,
}

/// What was asked for, entries; 0 means that nothing was.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Wishes {
    /// `bpf-map-dynamic-size-ratio`, a share of the memory; 0 keeps what grows with traffic at [`STATIC`].
    pub ratio: f32,
    /// `bpf-lb-map-max`; not 0.
    pub lb: u32,
    /// `bpf-lb-service-map-max`
    pub services: u32,
    /// `bpf-lb-service-backend-map-max`
    pub backends: u32,
    /// `bpf-lb-maglev-map-max`
    pub maglev: u32,
    /// `bpf-lb-source-range-map-max`
    pub ranges: u32,
    /// `bpf-lb-affinity-map-max`
    pub affinity: u32,
    /// `bpf-sock-rev-map-max`
    pub sockets: u32,
    /// `bpf-ct-global-tcp-max`
    pub tcp: u32,
    /// `bpf-ct-global-any-max`
    pub any: u32,
    /// `bpf-nat-global-max`: connections whose source is translated are counted nowhere else, so it is a lower bound of
    /// both tables of connections together.
    pub nat: u32,
}

/// Entries of each map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Frontends.
    pub frontends: u32,
    /// Members of all backend sets.
    pub slots: u32,
    /// Backends.
    pub backends: u32,
    /// Maglev tables.
    pub maglev: u32,
    /// Source ranges.
    pub ranges: u32,
    /// Clients of services with session affinity.
    pub affinity: u32,
    /// Translated sockets.
    pub sockets: u32,
    /// Established TCP connections, two entries each.
    pub tcp: u32,
    /// Other flows, two entries each.
    pub any: u32,
}

/// No map has fewer or more entries.
pub const BOUNDS: (u32, u32) = (1 << 10, 1 << 24);
/// Entries of the tables for TCP, for other flows and for sockets where the ratio is 0.
pub const STATIC: [u32; 3] = [512 << 10, 256 << 10, 256 << 10];
/// The fewest that a share of the memory comes to, unless the agent's cgroup is limited.
const LEAST: [u32; 3] = [128 << 10, 64 << 10, 64 << 10];
/// Kernel bytes of an entry of these tables, and of one for affinity: its header, key, value and place in the index.
const BYTES: [u64; 4] = [48 + 40 + 56 + 16, 48 + 40 + 56 + 16, 48 + 32 + 24 + 16, 48 + 24 + 16 + 16];
/// All of them together may take one of so many parts of the agent's limit.
const PART_OF_LIMIT: u64 = 4;

/// Decides, and says what was asked for and does not fit.
pub fn sizes(memory: Memory, wishes: &Wishes) -> (Sizes, Vec<String>) {
    let usable = memory.limit.map_or(memory.total, |limit| limit.min(memory.total));
    let asked = [wishes.tcp, wishes.any, wishes.sockets, wishes.affinity];
    let shared = shares(usable, wishes.ratio);
    let mut chosen = [shared[0], shared[1], shared[2], wishes.lb];
    if wishes.nat > 0 {
        // Split as the shares are.
        let (tcp, both) = (u64::from(chosen[0]), u64::from(chosen[0]) + u64::from(chosen[1]));
        let nat = u64::from(wishes.nat.clamp(BOUNDS.0, BOUNDS.1));
        if nat > both {
            let more = (nat * tcp / both.max(1)) as u32;
            chosen[0] = more.max(chosen[0]);
            chosen[1] = ((nat - u64::from(more)) as u32).max(chosen[1]);
        }
    }
    let mut problems = Vec::new();
    if let Some(limit) = memory.limit {
        fit(&mut chosen, &asked, limit / PART_OF_LIMIT);
    }
    for (size, asked) in chosen.iter_mut().zip(asked) {
        *size = if asked > 0 { asked.clamp(BOUNDS.0, BOUNDS.1) } else { (*size).clamp(BOUNDS.0, BOUNDS.1) };
    }
    let bytes = total(&chosen);
    if let Some(limit) = memory.limit.filter(|limit| bytes > limit / 2) {
        const MIB: u64 = 1 << 20;
        problems.push(format!(
            "maps of connections, sockets and affinity may take {} MiB, the agent's memory limit is {} MiB: raise the limit, or lower bpf-ct-global-tcp-max, bpf-ct-global-any-max, bpf-sock-rev-map-max or bpf-lb-affinity-map-max",
            bytes / MIB,
            limit / MIB
        ));
    }
    let or = |own: u32| if own > 0 { own } else { wishes.lb };
    let services = or(wishes.services);
    let [tcp, any, sockets, affinity] = chosen;
    let sizes = Sizes {
        frontends: services,
        slots: or(wishes.services.max(wishes.backends)).saturating_mul(4),
        backends: or(wishes.backends),
        maglev: or(wishes.maglev),
        ranges: or(wishes.ranges),
        affinity,
        sockets,
        tcp,
        any,
    };
    (sizes, problems)
}

/// What a share of the memory comes to: the static sizes, scaled.
fn shares(usable: u64, ratio: f32) -> [u32; 3] {
    if ratio <= 0.0 {
        return STATIC;
    }
    let all: u64 = STATIC.iter().zip(BYTES).map(|(entries, bytes)| u64::from(*entries) * bytes).sum();
    let scale = usable as f64 * f64::from(ratio) / all as f64;
    let mut sizes = STATIC.map(|entries| (f64::from(entries) * scale).min(f64::from(BOUNDS.1)) as u32);
    for (size, least) in sizes.iter_mut().zip(LEAST) {
        *size = (*size).max(least);
    }
    sizes
}

/// Scales down what nobody asked for, so that all fits into so many bytes if it can.
fn fit(chosen: &mut [u32; 4], asked: &[u32; 4], budget: u64) {
    let of = |which: &dyn Fn(u32) -> bool, sizes: &[u32; 4]| -> u64 {
        let all = sizes.iter().zip(asked).zip(BYTES).filter(|((_, asked), _)| which(**asked));
        all.map(|((size, asked), bytes)| u64::from(if *asked > 0 { *asked } else { *size }) * bytes).sum()
    };
    let (fixed, free) = (of(&|asked| asked > 0, chosen), of(&|asked| asked == 0, chosen));
    let left = budget.saturating_sub(fixed);
    if free > left {
        let scale = left as f64 / free as f64;
        for size in chosen.iter_mut() {
            *size = (f64::from(*size) * scale) as u32;
        }
    }
}

fn total(sizes: &[u32; 4]) -> u64 {
    sizes.iter().zip(BYTES).map(|(entries, bytes)| u64::from(*entries) * bytes).sum()
}
