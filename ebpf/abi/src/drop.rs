//! Why packets are dropped: Cilium's numbers and texts, so that dashboards and habits carry over.

/// Which way a packet went when it was counted.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Direction {
    /// Into the node.
    Ingress = 0,
    /// Out of the node.
    Egress = 1,
}

/// One element of the per-CPU counters.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DropCounter {
    /// Packets.
    pub packets: u64,
    /// Bytes, link-layer header included.
    pub bytes: u64,
}

/// Number of elements: every reason in both directions.
pub const DROP_SLOTS: u32 = 512;

/// In place of a reason: packets that the XDP program has sent, which are none of those at 0.
pub const COUNT_ACCELERATED: u8 = 1;

/// Index of a reason's counter. `reason` 0 counts what was forwarded by all other programs.
#[inline(always)]
pub const fn drop_slot(reason: u8, direction: Direction) -> u32 {
    direction as u32 * 256 + reason as u32
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        /// Why a program dropped a packet.
        // A word: see the verdicts of the programs.
        #[repr(u32)]
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
        pub enum DropReason { $($(#[$doc])* $name = $number,)* }

        impl DropReason {
            /// Every reason, by number.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The text used in metrics and by the command line.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

reasons! {
    /// The packet ends before its headers do, or they contradict each other.
    InvalidPacket = 134, "Invalid packet";
    /// Too long for the way to where it must go; with `don't fragment` the sender is told.
    FragmentationNeeded = 136, "Fragmentation needed";
    /// A store into the packet was refused.
    WriteError = 141, "Error writing to packet";
    /// A transport that services do not use, to an address that is ours.
    UnknownL4 = 142, "Unknown L4 protocol";
    /// ICMP to an address that is ours, which is neither answered nor about a connection.
    UnknownIcmpType = 144, "Unknown ICMPv4 type";
    /// The same of ICMPv6.
    UnknownIcmp6Type = 146, "Unknown ICMPv6 type";
    /// A port of SCTP that would have to be rewritten.
    CsumL4 = 154, "Error while correcting L4 checksum";
    /// The connection could not be recorded.
    FlowInsertFailed = 155, "CT: Map insertion failed";
    /// Extension headers that are cut short, or lead to another address, to an address that is ours.
    Extension = 156, "Invalid IPv6 extension header";
    /// A fragment where fragments are not followed, or of ICMP.
    Fragment = 157, "IP fragmentation not supported";
    /// No backend, or a port of our address that no service has.
    NoBackend = 158, "Service backend not found";
    /// An ICMP error to an address that is ours, about no connection that we know.
    UnknownConnection = 163, "Unknown connection tracking state";
    /// No free source port for translation.
    NoNatMapping = 167, "No mapping for NAT masquerade";
    /// No route, or no neighbour, to where the packet must go.
    FibLookupFailed = 169, "FIB lookup failed";
    /// A packet that another node has wrapped, and that is for no service.
    Encapsulated = 170, "Encapsulation traffic is prohibited";
    /// A ClusterIP addressed from outside.
    IsClusterIp = 174, "Is a ClusterIP";
    /// A fragment that is not the first, whose first one has not been seen or was of no connection.
    FragmentNotFound = 175, "First logical datagram fragment not found";
    /// `loadBalancerSourceRanges` does not contain the client.
    SourceRange = 177, "Denied by LB src range check";
    /// The packet's hop limit ran out here.
    TtlExceeded = 196, "TTL exceeded";
}

crate::pod! { DropCounter = 16 }
