//! The packet's kernel context: the fields and helpers that the programs use, without any decision.

use aya_ebpf::{
    EbpfContext,
    bindings::{
        __sk_buff, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_F_ADJ_ROOM_FIXED_GSO,
        BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM,
    },
    helpers::generated as h,
    programs::TcContext,
};
use kinesin_abi::{DropReason, proto};

use crate::frame::Frame;

/// Length of an Ethernet header.
pub const ETHERNET: u32 = 14;
/// Devices whose packets start with the IP header.
pub const NO_LINK_HEADER: u32 = 0;

/// `PACKET_HOST`: addressed to this device.
pub const TO_US: u32 = 0;
/// `PACKET_MULTICAST`.
pub const TO_GROUP: u32 = 2;
/// `PACKET_OTHERHOST`: flooded to us although addressed to another MAC.
pub const TO_ANOTHER_HOST: u32 = 3;

/// Marks a packet that ingress has translated, so that egress of the device it leaves by does not do it again. The
/// field survives a redirect and nothing else on the way of such a packet reads it.
const TRANSLATED: u16 = 0x4b69;

/// `BPF_ADJ_ROOM_MAC`: grow or shrink between the link-layer header and what follows.
const ADJ_ROOM_MAC: u32 = 1;
/// `BPF_ADJ_ROOM_NET`: grow or shrink behind an IP header without options.
const ADJ_ROOM_NET: u32 = 0;

/// A packet at a tc hook.
#[derive(Clone, Copy)]
pub struct Skb(*mut __sk_buff);

macro_rules! field {
    ($skb:expr, $field:ident) => {
        // SAFETY: the pointer is the program's context. Volatile, because the verifier allows context loads only one
        // field at a time and the compiler would merge neighbours.
        unsafe { (&raw const (*$skb.0).$field).read_volatile() }
    };
}

impl Skb {
    #[inline(always)]
    pub fn new(ctx: &TcContext) -> Self {
        Self(ctx.as_ptr().cast())
    }

    /// For helpers that take the packet.
    #[inline(always)]
    pub fn context(self) -> *mut core::ffi::c_void {
        self.0.cast()
    }

    #[inline(always)]
    pub fn packet_type(self) -> u32 {
        field!(self, pkt_type)
    }

    /// EtherType in wire order.
    #[inline(always)]
    pub fn protocol(self) -> u16 {
        field!(self, protocol) as u16
    }

    /// The device whose hook runs.
    #[inline(always)]
    pub fn ifindex(self) -> u32 {
        field!(self, ifindex)
    }

    /// Whether the packet belongs to a VLAN device on top of this one, where it will be seen again.
    #[inline(always)]
    pub fn belongs_to_vlan(self) -> bool {
        field!(self, vlan_present) != 0 && field!(self, vlan_tci) & 0xfff != 0
    }

    /// Notes that the packet is on its way out, translated.
    #[inline(always)]
    pub fn mark_translated(self) {
        // SAFETY: a tc program may write this field of its context.
        unsafe { (&raw mut (*self.0).tc_index).write_volatile(TRANSLATED as u32) }
    }

    /// Whether [`Self::mark_translated`] was called on the way in; forgets it.
    #[inline(always)]
    pub fn take_translated(self) -> bool {
        let is = field!(self, tc_index) == TRANSLATED as u32;
        if is {
            // SAFETY: as in `mark_translated`.
            unsafe { (&raw mut (*self.0).tc_index).write_volatile(0) }
        }
        is
    }

    #[inline(always)]
    fn write<T>(self, offset: u32, value: &T, flags: u64) -> Result<(), DropReason> {
        let from = core::ptr::from_ref(value).cast();
        // SAFETY: `value` is readable for its size, and the helper checks the offset.
        let ret = unsafe { h::bpf_skb_store_bytes(self.0, offset, from, size_of::<T>() as u32, flags) };
        if ret == 0 { Ok(()) } else { Err(DropReason::WriteError) }
    }

    #[inline(always)]
    fn replace(self, offset: u32, from: u64, to: u64, flags: u64) -> Result<(), DropReason> {
        // SAFETY: the helper checks the offset.
        let ret = unsafe { h::bpf_l4_csum_replace(self.0, offset, from, to, flags) };
        if ret == 0 { Ok(()) } else { Err(DropReason::WriteError) }
    }

    #[inline(always)]
    fn adjust_room(self, len: i32, mode: u32, flags: u64) -> Result<(), DropReason> {
        // SAFETY: the context is valid.
        let ret = unsafe { h::bpf_skb_adjust_room(self.0, len, mode, flags) };
        if ret == 0 { Ok(()) } else { Err(DropReason::WriteError) }
    }

    /// Inserts `len` zero bytes behind a link-layer header of any length.
    #[inline(always)]
    pub fn insert_after_link_header(self, len: i32) -> Result<(), DropReason> {
        self.adjust_room(len, ADJ_ROOM_MAC, 0)
    }

    /// Makes room for an outer IP header of `len` bytes behind the link-layer header. What is segmented later is segmented
    /// as it would have been without, each segment with a copy of the header.
    #[inline(always)]
    pub fn wrap(self, len: i32, v4: bool) -> Result<(), DropReason> {
        let outer = if v4 { BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 } else { BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 };
        let flags = (BPF_F_ADJ_ROOM_FIXED_GSO | outer) as u64;
        self.adjust_room(len, ADJ_ROOM_MAC, flags)
    }

    /// Removes an outer IP header of `len` bytes; the old data pointers are void after it.
    #[inline(always)]
    pub fn unwrap(self, len: i32) -> Result<(), DropReason> {
        self.adjust_room(-len, ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO as u64)
    }

    /// Inserts or removes so many bytes behind an IP header without options, in each segment of what is segmented later.
    #[inline(always)]
    pub fn adjust_options(self, len: i32) -> Result<(), DropReason> {
        self.adjust_room(len, ADJ_ROOM_NET, BPF_F_ADJ_ROOM_FIXED_GSO as u64)
    }

    /// Cuts or grows the packet to `len` bytes.
    #[inline(always)]
    pub fn resize(self, len: u32) -> Result<(), DropReason> {
        // SAFETY: the context is valid.
        let ret = unsafe { h::bpf_skb_change_tail(self.0, len, 0) };
        if ret == 0 { Ok(()) } else { Err(DropReason::WriteError) }
    }

    #[inline(always)]
    pub fn as_ptr(self) -> *mut __sk_buff {
        self.0
    }
}

impl Frame for Skb {
    const FOLLOWS_EXTENSIONS: bool = true;

    #[inline(always)]
    fn len(self) -> u32 {
        field!(self, len)
    }

    #[inline(always)]
    fn data(self) -> usize {
        field!(self, data) as usize
    }

    #[inline(always)]
    fn data_end(self) -> usize {
        field!(self, data_end) as usize
    }

    #[inline(always)]
    fn segment(self) -> u32 {
        field!(self, gso_size)
    }

    #[inline(always)]
    fn pull(self, len: u32) {
        // SAFETY: the context is valid. A failure shows at the bounds check that follows.
        unsafe { h::bpf_skb_pull_data(self.0, len) };
    }

    #[inline(always)]
    fn store<T>(self, offset: u32, value: &T) -> Result<(), DropReason> {
        self.write(offset, value, 0)
    }

    #[inline(always)]
    fn store_and_sum<T>(self, offset: u32, value: &T) -> Result<(), DropReason> {
        self.write(offset, value, BPF_F_RECOMPUTE_CSUM as u64)
    }

    /// Addresses are part of the pseudo header, which is all that a packet with offloaded checksum carries.
    #[inline(always)]
    fn replace_pseudo(self, offset: u32, difference: u32, protocol: u8) -> Result<(), DropReason> {
        let flags = BPF_F_PSEUDO_HDR as u64 | unchecked(protocol);
        self.replace(offset, 0, difference as u64, flags)
    }

    #[inline(always)]
    fn replace_word(self, offset: u32, from: u32, to: u32, protocol: u8) -> Result<(), DropReason> {
        self.replace(offset, from as u64, to as u64, 4 | unchecked(protocol))
    }
}

/// A UDP checksum of zero means that there is none (RFC 768), and must neither be changed nor arise.
#[inline(always)]
fn unchecked(protocol: u8) -> u64 {
    if protocol == proto::UDP { BPF_F_MARK_MANGLED_0 as u64 } else { 0 }
}
