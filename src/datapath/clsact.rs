//! Hooks of kernels without tcx (before 6.6): filters of the clsact qdisc, which are found again by what their pins are
//! called, and replaced in place.
//!
//! Filters of others stay where they are (R48): ours has a handle of its own, and a priority that no filter of another
//! kind holds. Deliberately absent: removing the qdisc. Whoever else uses it may have found it made, and its absence would
//! take their filters along.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use aya::programs::links::Link;
use aya::programs::tc::{NlOptions, SchedClassifierLink, SchedClassifierLinkId, TcAttach, TcError, TcHandle};
use aya::programs::{ProgramError, SchedClassifier, tc};

use super::attach::{Found, Place, chain, device_pin};
use super::sys;

/// Among filters of one priority, ours are those with these handles, the second for IPv6.
const HANDLES: [TcHandle; 2] = [TcHandle::new(0, 0x4b69), TcHandle::new(0, 0x4b6a)];
/// All filters of one priority are of one kind and one protocol (`tcf_proto` of the kernel): where another kind has the
/// first, the next one is tried. Ours goes first where it may.
const PRIORITIES: std::ops::RangeInclusive<u16> = 1..=32;
/// Pins of programs in filters have this between the hook and the priority; they only mark that the filter is ours.
/// (No dot: bpffs reserves it.)
const MARK: &str = "-clsact-";

/// A filter of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Filter {
    ifindex: u32,
    place: Place,
    priority: u16,
}

impl Filter {
    /// What a pin stands for, if it is one of a filter.
    pub(crate) fn of_pin(name: &str) -> Option<Self> {
        let (hook, priority) = name.split_once(MARK)?;
        let (ifindex, name) = hook.split_once('-')?;
        let place = Place::ALL.into_iter().find(|place| place.name() == name)?;
        Some(Self { ifindex: ifindex.parse().ok()?, place, priority: priority.parse().ok()? })
    }

    fn pin(self) -> String {
        format!("{}{MARK}{}", device_pin(self.ifindex, self.place), self.priority)
    }

    fn link(self) -> io::Result<SchedClassifierLink> {
        SchedClassifierLink::attached(self.ifindex, self.place.direction().into(), self.priority, self.handle(), None)
    }

    fn handle(self) -> TcHandle {
        HANDLES[usize::from(self.place.is_ipv6())]
    }

    /// Whether its device has gone, and the filter with it.
    pub(crate) fn has_no_device(self) -> bool {
        let mut name = [0; libc::IF_NAMESIZE];
        // SAFETY: the buffer has the room that the call needs. (nix's wrapper takes its null for a success.)
        unsafe { libc::if_indextoname(self.ifindex, name.as_mut_ptr()).is_null() }
    }

    /// Removes it. A device that has gone has taken its filters along, and what somebody else has removed is gone too.
    pub(crate) fn remove(self) -> io::Result<()> {
        match self.link()?.detach() {
            Err(error) if !matches!(code(&error), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) => {
                Err(io::Error::other(chain(&error)))
            }
            _ => Ok(()),
        }
    }
}

/// What the kernel answered.
fn code(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::TcError(TcError::NetlinkError(error)) => error.raw_os_error(),
        _ => None,
    }
}

/// Attaches, replacing our own filter if there is one.
pub(crate) fn attach(program: &mut SchedClassifier, ifindex: u32, place: Place, links: &Path) -> Result<Found, String> {
    // Usually it is there already; if it could not be made, attaching fails and says this too.
    let qdisc = tc::qdisc_add_clsact(ifindex).err();
    let ours = pinned(ifindex, place, links).find(|filter| replace(program, *filter).is_ok());
    let (filter, found) = match ours {
        Some(filter) => (filter, Found::Ours),
        None => create(program, ifindex, place).map_err(|error| match &qdisc {
            Some(qdisc) => format!("{error}; clsact: {}", chain(qdisc)),
            None => error,
        })?,
    };
    // The pin is made anew: it names the priority and holds the program.
    for stale in pinned(ifindex, place, links) {
        let _ = fs::remove_file(links.join(stale.pin()));
    }
    let fd = program.fd().map_err(|error| chain(&error))?;
    sys::pin(fd.as_fd(), &links.join(filter.pin())).map_err(|error| error.to_string())?;
    Ok(found)
}

/// Removes our filters of a hook, and their pins.
pub(crate) fn detach(ifindex: u32, place: Place, links: &Path) -> io::Result<()> {
    let mut result = Ok(());
    for filter in pinned(ifindex, place, links) {
        result = result.and(filter.remove()).and(fs::remove_file(links.join(filter.pin())));
    }
    result
}

/// Our filters of a hook, as their pins say.
fn pinned(ifindex: u32, place: Place, links: &Path) -> impl Iterator<Item = Filter> {
    let pins = fs::read_dir(links).into_iter().flatten().flatten();
    let all: Vec<_> = pins.filter_map(|pin| Filter::of_pin(&pin.file_name().to_string_lossy())).collect();
    all.into_iter().filter(move |filter| filter.ifindex == ifindex && filter.place == place)
}

/// Puts the program into a filter that is there.
fn replace(program: &mut SchedClassifier, filter: Filter) -> Result<(), String> {
    let old = filter.link().map_err(|error| error.to_string())?;
    let id = program.attach_to_link(old).map_err(|error| chain(&error))?;
    keep(program, id)
}

/// Makes a filter of the first priority that takes one, or replaces ours whose pin was lost.
fn create(program: &mut SchedClassifier, ifindex: u32, place: Place) -> Result<(Filter, Found), String> {
    let mut last = String::new();
    for priority in PRIORITIES {
        let filter = Filter { ifindex, place, priority };
        let options = NlOptions { priority, handle: filter.handle(), classid: None };
        match program.attach(ifindex, TcAttach::Netlink { parent: place.direction().into(), options }) {
            Ok(id) => return keep(program, id).map(|()| (filter, Found::Nothing)),
            Err(error) if code(&error) == Some(libc::EEXIST) => {
                return replace(program, filter).map(|()| (filter, Found::Ours));
            }
            // Of another kind or protocol; what else may be wrong is in the message of the last attempt.
            Err(error) if code(&error) == Some(libc::EINVAL) => last = chain(&error),
            Err(error) => return Err(chain(&error)),
        }
    }
    Err(last)
}

/// The filter holds the program; dropping the link would remove the filter.
fn keep(program: &mut SchedClassifier, id: SchedClassifierLinkId) -> Result<(), String> {
    std::mem::forget(program.take_link(id).map_err(|error| chain(&error))?);
    Ok(())
}
