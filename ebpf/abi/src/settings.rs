//! What the agent tells the programs about the node, its devices and its addresses on the LAN.

use crate::{Addr, Be16, Timeouts};

/// Numbers of entries that Maglev tables may have (`bpf-lb-maglev-table-size`): primes, each right below a power of two.
pub const MAGLEV_TABLE_SIZES: [u32; 10] =
    [251, 509, 1021, 2039, 4093, 8191, MAGLEV_TABLE_SIZE, 32_749, 65_521, 131_071];

/// The default of them.
pub const MAGLEV_TABLE_SIZE: u32 = 16_381;

/// Words of a stored table of so many entries: the verifier bounds an index only to the next multiple, so it is padded with
/// zeros.
pub const fn maglev_words(size: u32) -> u32 {
    size.next_power_of_two()
}

/// Entries of a stored table of so many words; none for what is no table's.
pub fn maglev_size(words: usize) -> Option<u32> {
    MAGLEV_TABLE_SIZES.into_iter().find(|size| maglev_words(*size) as usize == words)
}

/// The single element of a Maglev table's map, as the programs are compiled: backend ids. One element, so that one system
/// call replaces the table. For another size the agent changes the type when it loads them.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct MaglevTable {
    /// [`MAGLEV_TABLE_SIZE`] backend ids, then zeros.
    pub ids: [crate::BackendId; maglev_words(MAGLEV_TABLE_SIZE) as usize],
}

/// The only element of the settings array; written by the agent while the programs run. Fields are only ever added at the
/// end, where zero means what was before: so a start with another layout keeps what both know.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Settings {
    /// CLOCK_MONOTONIC nanoseconds of the agent's last sign of life; 0 before the first.
    pub alive_at: u64,
    /// For how many nanoseconds after `alive_at` the programs answer ARP and NDP.
    pub alive_for: u64,
    /// `SETTING_*`
    pub flags: u32,
    /// First source port for translated connections, host order (inclusive).
    pub snat_min: u16,
    /// Last source port for translated connections, host order (inclusive).
    pub snat_max: u16,
    /// Seed of the hash that indexes Maglev tables (behaviour of `bpf-lb-maglev-hash-seed`).
    pub maglev_seed: u32,
    /// For how long silent connections are kept.
    pub timeouts: Timeouts,
    /// First port of NodePorts, host order (inclusive); 0 together with the last one for none.
    pub node_port_min: u16,
    /// Last port of NodePorts, host order (inclusive).
    pub node_port_max: u16,
    /// Zero.
    pub pad: u32,
}

impl Settings {
    /// Whether the agent lives at a time of CLOCK_MONOTONIC, without whom nobody must answer for addresses: what the maps
    /// say of them may be out of date.
    #[inline(always)]
    pub const fn is_alive(&self, now: u64) -> bool {
        self.was_alive_within(self.alive_for, now)
    }

    /// Whether the agent's last sign of life is no older than so many nanoseconds.
    #[inline(always)]
    const fn was_alive_within(&self, nanos: u64, now: u64) -> bool {
        self.alive_at != 0 && now.saturating_sub(self.alive_at) <= nanos
    }

    /// Whether packets to pods of this node, and their answers, pass the host's stack by at a time of CLOCK_MONOTONIC.
    #[inline(always)]
    pub const fn goes_straight(&self, now: u64) -> bool {
        let watched = self.was_alive_within(WATCHED_FOR, now);
        self.flags & SETTING_DIRECT_TO_PODS != 0 && (self.flags & SETTING_DIRECT_WATCHED == 0 || watched)
    }

    /// First source port for translated connections, and how many there are; none where there is no usable range.
    #[inline(always)]
    pub const fn snat_ports(&self) -> (u32, u32) {
        if self.snat_max >= self.snat_min && self.snat_min != 0 {
            (self.snat_min as u32, self.snat_max as u32 - self.snat_min as u32 + 1)
        } else {
            (0, 0)
        }
    }

    /// The source port that a translated connection gets if it cannot keep the client's own and nobody has this one: the
    /// same each time that the client comes from the port again, and another for each of its ports, as far as there are
    /// enough. A backend that still waits in TIME-WAIT for a connection's last segments takes its SYN of another connection
    /// for an old one by its timestamp, which Linux draws for each pair of ends (RFC 6191, RFC 7323 section 5.4); from
    /// the same pair it accepts it. Zero where there is no usable range.
    #[inline(always)]
    pub const fn usual_snat_port(&self, client: &Addr, port: Be16) -> u32 {
        let (min, span) = self.snat_ports();
        let [a, b, c, d] = client.words;
        // Clients of one LAN differ in their last bits: the product takes them to the upper half.
        let start = u32::from_be(a ^ b ^ c ^ d).wrapping_mul(0x9e37_79b1) >> 16;
        match span {
            0 => 0,
            _ => min + (start + port.get() as u32) % span,
        }
    }
}

/// Answer packets to a frontend without backends with ICMP port unreachable instead of silence.
pub const SETTING_REJECT_NO_BACKEND: u32 = 1;

/// Answer ICMP echo requests to addresses that are ours on the LAN.
pub const SETTING_ANSWER_PING: u32 = 2;

/// Refuse to bind a socket of the node to a NodePort.
pub const SETTING_PROTECT_NODE_PORTS: u32 = 4;

/// Packets to backends of this node go straight to their pod's device, where that is a [`DEVICE_POD`].
pub const SETTING_DIRECT_TO_PODS: u32 = 8;

/// That only while the agent lives, who looks whether somebody in the host's stack wants to see them.
pub const SETTING_DIRECT_WATCHED: u32 = 16;

/// For how long after the agent's last sign of life that holds, in nanoseconds: longer than a restart takes.
pub const WATCHED_FOR: u64 = 30_000_000_000;

/// Value of the devices hash (key: ifindex, `u32`): a device that the programs are attached to or may send from.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DeviceValue {
    /// The device's MAC; zero for devices without Ethernet header.
    pub mac: [u8; 6],
    /// [`DEVICE_ETHERNET`], [`DEVICE_XDP`], [`DEVICE_POD`], [`DEVICE_SERVED`], [`DEVICE_ACROSS`].
    pub flags: u16,
    /// Primary IPv4 address in wire order; 0 for none. Source of translated connections.
    pub ipv4: u32,
    /// Primary global IPv6 address; unspecified for none.
    pub ipv6: Addr,
}

/// The device has Ethernet headers.
pub const DEVICE_ETHERNET: u16 = 1;

/// The device's driver runs the XDP program, and so sends what that of another device hands it.
pub const DEVICE_XDP: u16 = 2;

/// The device is the host's end of a veth pair whose other end is in another network namespace, a pod's, and nothing is to
/// happen on the way through it.
pub const DEVICE_POD: u16 = 4;

/// The device carries our programs, so that answers of pods may leave by it straight from the pod's device.
pub const DEVICE_SERVED: u16 = 8;

/// The device is one end of a veth pair as [`DEVICE_POD`] is, but to the LAN: this node is a container.
pub const DEVICE_ACROSS: u16 = 16;

/// Translate fragments of IPv4 packets.
pub const SETTING_FOLLOW_FRAGMENTS4: u32 = 1 << 8;

/// Translate fragments of IPv6 packets.
pub const SETTING_FOLLOW_FRAGMENTS6: u32 = 1 << 9;

/// Key of the l2 hash: an address that this node answers for, and on which device.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct L2Key {
    /// The address on the LAN.
    pub addr: Addr,
    /// Where requests come in.
    pub ifindex: u32,
}

/// Value of the l2 hash.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct L2Value {
    /// Replies sent by the responder; written by the programs.
    pub responses_sent: u64,
}

crate::pod! { MaglevTable = 65536, Settings = 64, DeviceValue = 28, L2Key = 20, L2Value = 8 }
