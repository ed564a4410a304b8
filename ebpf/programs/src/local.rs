//! Whether the node itself has a connection already.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_tuple},
    helpers::generated as h,
};
use kinesin_abi::{FlowKey, proto};

use crate::{family::Family, skb::Skb};

/// `BPF_F_CURRENT_NETNS`.
const THIS_NETNS: u64 = u64::MAX;
/// `BPF_TCP_LISTEN`. Who listens at a port hears nothing of a connection's replies.
const LISTENS: u32 = 10;
/// Of `struct bpf_sock_tuple`, by which the kernel tells the families.
const TUPLE4: u32 = 12;
const TUPLE6: u32 = 36;

#[repr(C)]
struct Tuple4 {
    src: u32,
    dst: u32,
    ports: [u16; 2],
}

// The kernel reads a tuple of IPv6 out of the key.
const _: () = assert!(core::mem::offset_of!(FlowKey, dst) == 16 && core::mem::offset_of!(FlowKey, sport) == 32);
const _: () = assert!(core::mem::offset_of!(FlowKey, dport) == 34);

/// Whether a socket of this node would get packets of this tuple: a connection, or for UDP any socket at the port, which
/// may talk to whom it likes.
#[inline(never)]
pub fn has_socket<F: Family>(skb: Skb, key: &FlowKey) -> u32 {
    let short;
    let (tuple, len): (*const c_void, u32) = if F::LONG_ADDRESSES {
        ((&raw const *key).cast(), TUPLE6)
    } else {
        let ports = [key.sport.raw(), key.dport.raw()];
        short = Tuple4 { src: key.src.v4_raw(), dst: key.dst.v4_raw(), ports };
        ((&raw const short).cast(), TUPLE4)
    };
    let tuple: *mut bpf_sock_tuple = tuple.cast_mut().cast();
    match key.proto {
        proto::TCP => {
            // SAFETY: the tuple is as long as said, and only read.
            let socket = unsafe { h::bpf_skc_lookup_tcp(skb.context(), tuple, len, THIS_NETNS, 0) };
            if socket.is_null() {
                return 0;
            }
            let state = state_of(socket);
            // SAFETY: from the lookup, and not used any more.
            unsafe { h::bpf_sk_release(socket.cast()) };
            (state != LISTENS) as u32
        }
        proto::UDP => {
            // SAFETY: as above.
            let socket = unsafe { h::bpf_sk_lookup_udp(skb.context(), tuple, len, THIS_NETNS, 0) };
            if socket.is_null() {
                return 0;
            }
            // SAFETY: as above.
            unsafe { h::bpf_sk_release(socket.cast()) };
            1
        }
        _ => 0,
    }
}

#[inline(always)]
fn state_of(socket: *mut bpf_sock) -> u32 {
    // SAFETY: not null and not released. Volatile, because the verifier allows one field at a time.
    unsafe { (&raw const (*socket).state).read_volatile() }
}
