//! Tests that need no kernel are here; those that do are in `tests/datapath.rs`.
