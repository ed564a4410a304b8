//! Constants that the loader sets before the verifier sees the programs: it takes them for known, and removes what they rule
//! out.
//!
//! They have a section of their own. To the compiler they are constants like any other, and in the common section it lets one
//! stand for whatever else has the same bytes: a map's key of 0 once became what the loader had set to 1.

use kinesin_abi::MAGLEV_TABLE_SIZE;

macro_rules! loaded {
    ($(#[$doc:meta])* $static:ident, $reader:ident: $type:ty = $value:expr) => {
        #[unsafe(no_mangle)]
        #[unsafe(link_section = ".rodata.loaded")]
        static $static: $type = $value;

        $(#[$doc])*
        #[inline(always)]
        pub fn $reader() -> $type {
            // SAFETY: a constant of the loaded program; volatile, as the compiler knows only the value it was built with.
            unsafe { (&raw const $static).read_volatile() }
        }
    };
}

loaded! {
    /// Cookie of the agent's network namespace; 0 where the kernel does not tell it (before 5.14), and then the node is the
    /// initial namespace.
    NODE_NETNS, node_netns: u64 = 0
}
loaded! {
    /// How many entries of TCP connections that are not established yet each CPU may have in the table of those that are.
    MOST_OPENING, most_opening: u32 = 0
}
loaded! {
    /// Entries of the Maglev tables (`bpf-lb-maglev-table-size`).
    MAGLEV_SIZE, maglev_size: u32 = MAGLEV_TABLE_SIZE
}
