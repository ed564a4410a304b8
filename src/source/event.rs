//! What a source says about the objects of one kind.

use futures::stream::BoxStream;
use kinesin_core::objects::ObjectKey;

/// A step in the life of all objects of one kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Event<T> {
    /// A new complete list begins; what is known stays valid until [`Event::InitDone`].
    Init,
    /// An object of that list.
    InitApply(T),
    /// The list is complete: objects that were not in it are gone. Never sent for a list that could not be read.
    InitDone,
    /// An object appeared or changed.
    Apply(T),
    /// An object is gone.
    Delete(ObjectKey),
    /// Something about the input is wrong; the last good state stays. One line that names the object, the field and the fix.
    Problem(String),
}

/// Events of one kind. Does not end while the source lives; retries inside, with back-off and jitter.
pub type Events<T> = BoxStream<'static, Event<T>>;
