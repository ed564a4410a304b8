//! Connection state: what a packet's tuple becomes, and what a translated socket believes to talk to.

use crate::{Addr, BackendId, Be16};

/// A packet's tuple as it arrives at a hook.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct FlowKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port.
    pub sport: Be16,
    /// Destination port.
    pub dport: Be16,
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: [u8; 3],
}

impl FlowKey {
    /// The tuple of packets the other way.
    #[inline(always)]
    pub const fn reversed(&self) -> Self {
        Self { src: self.dst, dst: self.src, sport: self.dport, dport: self.sport, ..*self }
    }
}

/// What the tuple of [`FlowKey`] is rewritten to. Each connection has two entries, one per direction, so that one lookup
/// and one rewrite serve client packets and replies alike.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FlowValue {
    /// `bpf_ktime_get_ns` (CLOCK_MONOTONIC) of the last packet in this direction.
    pub last_seen: u64,
    /// New source address.
    pub src: Addr,
    /// New destination address.
    pub dst: Addr,
    /// New source port.
    pub sport: Be16,
    /// New destination port.
    pub dport: Be16,
    /// [`FLOW_REPLY`], [`FLOW_REDIRECT`], [`FLOW_FROM_LAN`], [`FLOW_HANDED_ON`], [`FLOW_DIRECT`].
    pub flags: u8,
    /// `TCP_SEEN_*` of both directions; kept in both entries, so that either tells whether the connection is over.
    pub tcp: u8,
    /// Zero.
    pub pad: [u8; 2],
    /// The backend chosen; checked against the backends array for connectionless protocols.
    pub backend: BackendId,
    /// Where the client's direction of a connectionless flow last found its backend among the members of its service; 0
    /// before the first look. Of TCP that was handed on: the [`crate::NodeTag`] of the node that has it.
    pub slot: u32,
}

/// This entry is of the backend's direction.
pub const FLOW_REPLY: u8 = 1;
/// After the rewrite the packet leaves by route and neighbour lookup, not through the host's stack (whose source
/// validation would refuse it).
pub const FLOW_REDIRECT: u8 = 2;
/// The client's packets come in on a device (as opposed to a local socket).
pub const FLOW_FROM_LAN: u8 = 4;
/// The packets go to the backend's node as they are, which translates them and answers the client itself. There is no
/// entry of the other direction, whose packets do not come by here; the new addresses only say which backend was meant.
/// With [`FLOW_REDIRECT`] they go to the backend itself instead, with the client's address, and say which service is meant.
pub const FLOW_HANDED_ON: u8 = 8;
/// The client's packets come in addressed to the backend, as another node has made them, and only the answers are
/// translated. The entry of the client's direction has the service's address as its new one, for no packet but for
/// its partner.
pub const FLOW_DIRECT: u8 = 16;

/// The client's side sent FIN.
pub const TCP_SEEN_FIN: u8 = 1;
/// The backend's side sent FIN.
pub const TCP_SEEN_FIN_REPLY: u8 = 2;
/// Either side sent RST.
pub const TCP_SEEN_RST: u8 = 4;
/// The backend has answered.
pub const TCP_SEEN_REPLY: u8 = 8;
/// The client has gone on after that: the connection is established, and nobody made it up who cannot see the answers.
pub const TCP_SEEN_ACK: u8 = 16;

impl FlowValue {
    /// The key of the entry of the other direction, from that of this one. Its padding comes along: three zero bytes
    /// would be a call of the programs.
    #[inline(always)]
    pub const fn partner_key(&self, key: &FlowKey) -> FlowKey {
        if self.flags & FLOW_DIRECT != 0 {
            return key.reversed();
        }
        self.translated_key(key)
    }

    /// [`Self::partner_key`] of a connection whose packets are translated both ways: none of [`FLOW_DIRECT`].
    #[inline(always)]
    pub const fn translated_key(&self, key: &FlowKey) -> FlowKey {
        FlowKey { src: self.dst, dst: self.src, sport: self.dport, dport: self.sport, ..*key }
    }

    /// [`Self::translated_key`], written to where it is needed: the programs' stacks are short.
    #[inline(always)]
    pub const fn write_translated_key(&self, key: &FlowKey, to: &mut FlowKey) {
        (to.src, to.dst) = (self.dst, self.src);
        (to.sport, to.dport) = (self.dport, self.sport);
        (to.proto, to.pad) = (key.proto, key.pad);
    }

    /// The backend that packets of the client's direction get to.
    #[inline(always)]
    pub const fn backend_end(&self, key: &FlowKey) -> (Addr, Be16) {
        if self.flags & FLOW_DIRECT != 0 { (key.dst, key.dport) } else { (self.dst, self.dport) }
    }

    /// Whether a TCP connection is over, as far as it comes by here: of one that was handed on only the client's half
    /// does.
    #[inline(always)]
    pub const fn is_over(&self) -> bool {
        tcp_closed(self.tcp) || half_closed(self.flags, self.tcp)
    }
}

/// Whether the client has closed its half of a connection whose other half does not come by here.
#[inline(always)]
const fn half_closed(flags: u8, tcp: u8) -> bool {
    flags & FLOW_HANDED_ON != 0 && tcp & TCP_SEEN_FIN != 0
}

/// Whether the client of a TCP connection has gone on after the backend's answer.
#[inline(always)]
pub const fn tcp_established(tcp: u8) -> bool {
    tcp & TCP_SEEN_ACK != 0
}

/// Whether a TCP connection is over: reset, or closed from both sides.
#[inline(always)]
pub const fn tcp_closed(tcp: u8) -> bool {
    const BOTH: u8 = TCP_SEEN_FIN | TCP_SEEN_FIN_REPLY;
    tcp & TCP_SEEN_RST != 0 || tcp & BOTH == BOTH
}

/// For how many seconds of silence connections are kept (the `bpf-ct-timeout-*` keys). 0 stands for the default of
/// [`Timeouts::DEFAULT`], so that settings that nobody has written yet end no connection.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Timeouts {
    /// Established TCP connections of services (`bpf-ct-timeout-service-tcp`).
    pub service_tcp: u32,
    /// Connectionless flows of services (`bpf-ct-timeout-service-any`).
    pub service_any: u32,
    /// A limit on `service_tcp` where the source address is translated too (`bpf-ct-timeout-regular-tcp`).
    pub regular_tcp: u32,
    /// The same for `service_any` (`bpf-ct-timeout-regular-any`).
    pub regular_any: u32,
    /// TCP connections that are not established yet (`bpf-ct-timeout-regular-tcp-syn`).
    pub syn: u32,
    /// TCP connections that are over (`bpf-ct-timeout-regular-tcp-fin`).
    pub fin: u32,
    /// Established TCP connections whose backend takes no new ones, or is gone (`bpf-ct-timeout-service-tcp-grace`).
    pub grace: u32,
}

impl Timeouts {
    /// The documented defaults.
    pub const DEFAULT: Self =
        Self { service_tcp: 8000, service_any: 60, regular_tcp: 8000, regular_any: 60, syn: 60, fin: 10, grace: 60 };

    /// How many seconds of silence end a connection, by its protocol number, its [`FlowValue::flags`] and its
    /// [`FlowValue::tcp`].
    #[inline(always)]
    pub const fn of(&self, protocol: u8, flags: u8, tcp: u8) -> u32 {
        const D: Timeouts = Timeouts::DEFAULT;
        let translated = flags & FLOW_REDIRECT != 0;
        if protocol != crate::proto::TCP {
            return lesser(or(self.service_any, D.service_any), or(self.regular_any, D.regular_any), translated);
        }
        if tcp_closed(tcp) {
            return or(self.fin, D.fin);
        }
        if !tcp_established(tcp) {
            return or(self.syn, D.syn);
        }
        let open = lesser(or(self.service_tcp, D.service_tcp), or(self.regular_tcp, D.regular_tcp), translated);
        lesser(open, self.leaving(), half_closed(flags, tcp))
    }

    /// The limit for established connections to a backend that takes no new ones, and for those that were handed on and
    /// that their client has closed: the backend may go on sending for as long as it likes, and its end is seen by nobody
    /// here, but what is sent is acknowledged.
    #[inline(always)]
    pub const fn leaving(&self) -> u32 {
        or(self.grace, Self::DEFAULT.grace)
    }
}

#[inline(always)]
const fn or(value: u32, default: u32) -> u32 {
    if value == 0 { default } else { value }
}

/// The first, or the lesser of both where `limited`.
#[inline(always)]
const fn lesser(first: u32, second: u32, limited: bool) -> u32 {
    if limited && second < first { second } else { first }
}

/// Elements of the counts array: what happens to connections, per CPU.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum FlowCount {
    /// Entries that the programs have added to the table of transient flows.
    Created = 0,
    /// Entries that the programs have removed from it.
    Removed = 1,
    /// Entries that the agent has removed from it; written by the agent alone.
    Collected = 2,
    /// Entries of the table of TCP connections that became those of established ones, there or on their way to it.
    Settled = 3,
    /// Times that one did not get there, because that table is full; tried again once a second per connection with traffic.
    Unsettled = 4,
    /// Entries that the programs have added to that table.
    Opened = 5,
    /// Of those, what is neither settled nor there any more; written by the agent alone. Opened less settled and written off
    /// is what is not established yet, and may become no more than a share of the table.
    WrittenOff = 6,
}

impl FlowCount {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 7] =
        [Self::Created, Self::Removed, Self::Collected, Self::Settled, Self::Unsettled, Self::Opened, Self::WrittenOff];

    /// The name that the command line shows.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Created => "flows created",
            Self::Removed => "flows removed",
            Self::Collected => "flows collected",
            Self::Settled => "flows settled",
            Self::Unsettled => "flows not settled",
            Self::Opened => "flows opened",
            Self::WrittenOff => "flows written off",
        }
    }
}

/// Number of elements of the counts array; some are left for later.
pub const FLOW_COUNTS: u32 = 16;

/// Key of the sockets map: a translated socket and the backend that it really talks to.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct SocketKey {
    /// `bpf_get_socket_cookie`.
    pub cookie: u64,
    /// The backend's address.
    pub addr: Addr,
    /// The backend's port.
    pub port: Be16,
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: [u8; 5],
}

/// Value of the sockets map: what the application asked for.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct SocketValue {
    /// The service's address.
    pub addr: Addr,
    /// The service's port.
    pub port: Be16,
    /// Zero.
    pub pad: u16,
    /// The backend chosen.
    pub backend: BackendId,
}

/// Key of the fragments map: what all fragments of a packet have in common.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FragmentKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Identification in wire order; of IPv4 in its lower half as loaded.
    pub id: u32,
    /// IP protocol number; 0 for IPv6, whose later fragments do not say.
    pub proto: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// Value of the fragments map: what only the first fragment says.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FragmentValue {
    /// CLOCK_MONOTONIC nanoseconds when it came.
    pub at: u64,
    /// Source port.
    pub sport: Be16,
    /// Destination port.
    pub dport: Be16,
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: [u8; 3],
}

crate::pod! { FragmentKey = 40, FragmentValue = 16, FlowKey = 40, FlowValue = 56, SocketKey = 32, SocketValue = 24 }

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_noted_connection_each_half_leads_to_the_other_and_names_the_backend() {
        let end = |last, port| (Addr::from_v4_raw(last), Be16::new(port));
        let ((client, cport), (pod, pport), (service, sport)) = (end(1, 40_000), end(2, 8080), end(3, 80));
        let key = FlowKey { src: client, dst: pod, sport: cport, dport: pport, proto: 6, pad: [0; 3] };
        let flags = FLOW_DIRECT | FLOW_FROM_LAN;
        let value = FlowValue { src: client, dst: service, sport: cport, dport: sport, flags, ..FlowValue::default() };
        let other = value.partner_key(&key);
        assert_eq!((other.src, other.dst, other.sport, other.dport), (pod, client, pport, cport));
        let reply = FlowValue { src: service, dst: client, sport, dport: cport, flags: flags | FLOW_REPLY, ..value };
        assert_eq!(reply.partner_key(&other), key);
        assert_eq!(value.backend_end(&key), (pod, pport));
        let translated = FlowValue { dst: pod, dport: pport, flags: FLOW_FROM_LAN, ..value };
        assert_eq!(translated.backend_end(&FlowKey { dst: service, dport: sport, ..key }), (pod, pport));
    }
}
