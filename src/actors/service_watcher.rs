//! Follows Services.
//!
//! owns: the services table
//! hears: the source's stream of Services
//! says: changed keys to the table's subscribers
//! restart story: re-lists from the source; the rows stay until the new list is complete
//!
//! Deliberately absent: any interpretation of the objects.

use kinesin_core::objects::Service;

use super::feed::Watcher;

/// The actor; see [`super::feed`] for what all watchers share.
pub type ServiceWatcher = Watcher<Service>;
