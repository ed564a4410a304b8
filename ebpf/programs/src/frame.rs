//! A packet at a hook, of whichever kind: what reading and rewriting need of its context. Each program is compiled for the
//! context that it has.

use kinesin_abi::DropReason;

/// A packet at a hook.
pub trait Frame: Copy {
    /// Whether extension headers of IPv6 are followed here.
    const FOLLOWS_EXTENSIONS: bool;

    /// Bytes from the link-layer header on.
    fn len(self) -> u32;
    fn data(self) -> usize;
    fn data_end(self) -> usize;
    /// Payload of each segment where several were merged or are still to be made; else 0.
    fn segment(self) -> u32;
    /// Makes `len` bytes readable directly; the old data pointers are void after it.
    fn pull(self, len: u32);
    fn store<T>(self, offset: u32, value: &T) -> Result<(), DropReason>;
    /// [`Self::store`], which also tells the kernel where a device has summed the packet up (`CHECKSUM_COMPLETE`).
    fn store_and_sum<T>(self, offset: u32, value: &T) -> Result<(), DropReason>;
    /// Applies a checksum difference of address fields to the transport checksum at `offset`.
    fn replace_pseudo(self, offset: u32, difference: u32, protocol: u8) -> Result<(), DropReason>;
    /// Applies the change of a four-byte field of the transport header to its checksum at `offset`.
    fn replace_word(self, offset: u32, from: u32, to: u32, protocol: u8) -> Result<(), DropReason>;
}
