//! Follows EndpointSlices.
//!
//! owns: the slices table
//! hears: the source's stream of EndpointSlices
//! says: changed keys to the table's subscribers
//! restart story: re-lists from the source; the rows stay until the new list is complete
//!
//! Deliberately absent: any interpretation of the objects.

use kinesin_core::objects::EndpointSlice;

use super::feed::Watcher;

/// The actor; see [`super::feed`] for what all watchers share.
pub type EndpointWatcher = Watcher<EndpointSlice>;
