//! A packet in the driver's memory: the context of XDP, which has no helpers that write, so that this does.
//!
//! Deliberately absent: packets in several buffers (the program does not say that it takes them, so that drivers hand it
//! none), and checksums that a device has yet to fill in, which the hook cannot tell from others: see `accelerate`.

use aya_ebpf::{EbpfContext, bindings::xdp_md, programs::XdpContext};
use kinesin_abi::{DropReason, proto};

use crate::{
    frame::Frame,
    rewrite::{add, updated},
};

/// No header that is written to starts further behind. All ones, so that the verifier sees a bound.
const FURTHEST: u32 = 0x7f;

/// A packet at the XDP hook.
#[derive(Clone, Copy)]
pub struct Xdp(*mut xdp_md);

macro_rules! field {
    ($xdp:expr, $field:ident) => {
        // SAFETY: the pointer is the program's context. Volatile, because the verifier allows context loads only one
        // field at a time and the compiler would merge neighbours.
        unsafe { (&raw const (*$xdp.0).$field).read_volatile() }
    };
}

impl Xdp {
    #[inline(always)]
    pub fn new(ctx: &XdpContext) -> Self {
        Self(ctx.as_ptr().cast())
    }

    /// The device whose hook runs.
    #[inline(always)]
    pub fn ifindex(self) -> u32 {
        field!(self, ingress_ifindex)
    }

    #[inline(always)]
    pub fn as_ptr(self) -> *mut xdp_md {
        self.0
    }

    /// A place in the headers, if the packet reaches that far.
    #[inline(always)]
    fn at<T>(self, offset: u32) -> Result<*mut T, DropReason> {
        let start = self.data() + (offset & FURTHEST) as usize;
        if start + size_of::<T>() > self.data_end() {
            return Err(DropReason::WriteError);
        }
        Ok(start as *mut T)
    }

    /// Brings a transport checksum up to date. One of UDP of zero means that there is none (RFC 768), and must neither be
    /// changed nor arise.
    #[inline(always)]
    fn replace(self, offset: u32, difference: u32, protocol: u8) -> Result<(), DropReason> {
        let place = self.at::<u16>(offset)?;
        // SAFETY: within the packet, which nobody else has.
        let check = unsafe { place.read_unaligned() };
        let udp = protocol == proto::UDP;
        if udp && check == 0 {
            return Ok(());
        }
        let check = updated(check, difference);
        // SAFETY: as above.
        unsafe { place.write_unaligned(if udp && check == 0 { 0xffff } else { check }) };
        Ok(())
    }
}

impl Frame for Xdp {
    const FOLLOWS_EXTENSIONS: bool = false;

    #[inline(always)]
    fn len(self) -> u32 {
        (self.data_end() - self.data()) as u32
    }

    #[inline(always)]
    fn data(self) -> usize {
        field!(self, data) as usize
    }

    #[inline(always)]
    fn data_end(self) -> usize {
        field!(self, data_end) as usize
    }

    /// Merging comes after this hook.
    #[inline(always)]
    fn segment(self) -> u32 {
        0
    }

    /// There is one buffer, which holds all.
    #[inline(always)]
    fn pull(self, _len: u32) {}

    #[inline(always)]
    fn store<T>(self, offset: u32, value: &T) -> Result<(), DropReason> {
        let place = self.at::<T>(offset)?;
        // SAFETY: within the packet, which nobody else has; what is stored are integers.
        unsafe { core::ptr::copy_nonoverlapping(value, place, 1) };
        Ok(())
    }

    /// What a device has summed up is forgotten behind this hook.
    #[inline(always)]
    fn store_and_sum<T>(self, offset: u32, value: &T) -> Result<(), DropReason> {
        self.store(offset, value)
    }

    #[inline(always)]
    fn replace_pseudo(self, offset: u32, difference: u32, protocol: u8) -> Result<(), DropReason> {
        self.replace(offset, difference, protocol)
    }

    #[inline(always)]
    fn replace_word(self, offset: u32, from: u32, to: u32, protocol: u8) -> Result<(), DropReason> {
        self.replace(offset, add(!from, to), protocol)
    }
}
