//! The hooks of loaded programs: which there are, how each is, and what to do about those that are not as they should be.
//!
//! Each hook is on its own: one that fails leaves the others working, says so, and is tried again when the owner says
//! (R34). What others attach beside ours is never touched, and what they take away of ours comes back (R48).

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::{ProgramError, ProgramFd, SchedClassifier, Xdp};

use super::attach::{self, Attachment, DeviceHooks, Found, HookStatus, Place, chain};
use super::clsact;
use super::device::{has_ethernet_header, is_veth};
use super::loader::Datapath;
use super::options::{Acceleration, AttachMode};

/// The program of drivers.
pub(super) const XDP: &str = "cil_xdp_entry";
/// The programs of Ethernet devices and of devices without link-layer header, in the order of [`Place::ALL`].
pub(super) const ETHERNET: [&str; 5] = ["cil_from_netdev", "cil_to_netdev", "cil_from_netdev6", "cil_to_netdev6", XDP];
const LAYER3: [&str; 4] = ["cil_from_l3dev", "cil_to_l3dev", "cil_from_l3dev6", "cil_to_l3dev6"];

/// The socket programs with their `enum bpf_attach_type`.
pub(super) const SOCKETS: [(&str, u32); 10] = [
    ("cil_sock4_connect", 10),
    ("cil_sock6_connect", 11),
    ("cil_sock4_sendmsg", 14),
    ("cil_sock6_sendmsg", 15),
    ("cil_sock4_recvmsg", 19),
    ("cil_sock6_recvmsg", 20),
    ("cil_sock4_getpeername", 29),
    ("cil_sock6_getpeername", 30),
    ("cil_sock4_post_bind", 12),
    ("cil_sock6_post_bind", 13),
];

/// A device cannot be looked at.
#[derive(Debug, thiserror::Error)]
#[error("attach to device {name} (index {ifindex}): {source}")]
pub struct AttachError {
    /// The device.
    pub name: String,
    /// Its index.
    pub ifindex: u32,
    /// The kernel's answer.
    pub source: io::Error,
}

/// A place for one program.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Hook {
    Device { ifindex: u32, name: String, place: Place, program: &'static str },
    Cgroup { root: PathBuf, program: &'static str, attach_type: u32 },
}

impl Hook {
    fn program(&self) -> &'static str {
        match self {
            Self::Device { program, .. } | Self::Cgroup { program, .. } => program,
        }
    }

    fn xdp(ifindex: u32, name: String) -> Self {
        Self::Device { ifindex, name, place: Place::Xdp, program: XDP }
    }

    /// Index and name of the device.
    fn device(&self) -> Option<(u32, &str)> {
        match self {
            Self::Device { ifindex, name, .. } => Some((*ifindex, name)),
            Self::Cgroup { .. } => None,
        }
    }

    /// The device, of the hook that each one with Ethernet headers has.
    fn ethernet(&self) -> Option<(u32, String)> {
        let (ifindex, name) = self.device()?;
        (self.program() == ETHERNET[0]).then(|| (ifindex, name.to_owned()))
    }

    /// For people.
    fn place(&self) -> String {
        match self {
            Self::Device { name, place, .. } => {
                let way = match place {
                    Place::Xdp => "xdp",
                    place if place.is_egress() => "egress",
                    _ => "ingress",
                };
                format!("{name} {way}")
            }
            Self::Cgroup { root, .. } => root.display().to_string(),
        }
    }
}

impl Datapath {
    /// Attaches both directions of a device of the calling thread's network namespace, or replaces the programs that
    /// are attached. A hook that fails says so in its status and leaves the others working.
    ///
    /// # Errors
    /// The device is not there.
    pub fn attach_device(&mut self, name: &str, ifindex: u32) -> Result<DeviceHooks, AttachError> {
        let failed = |source| AttachError { name: name.to_owned(), ifindex, source };
        let programs: &[_] = if has_ethernet_header(name).map_err(failed)? { &ETHERNET } else { &LAYER3 };
        // A device of this index is this one now, and has the programs of its kind.
        self.hooks.retain(|hook, _| !matches!(hook, Hook::Device { ifindex: of, .. } if *of == ifindex));
        self.spared.remove(&ifindex);
        // Where IPv6 or XDP was served before. What remains finds no service, or what it always found, and the next attempt
        // removes it.
        let gone = Place::ALL.into_iter().filter(|place| !self.has(*place) || programs.get(*place as usize).is_none());
        if let Err(error) = attach::detach(ifindex, gone, &self.links) {
            tracing::warn!(device = name, %error, "programs of IPv6 or XDP not detached");
        }
        let [ingress, egress, in6, out6, xdp] = Place::ALL;
        let mut attach = |place: Place| {
            let program = programs.get(place as usize)?;
            self.has(place).then(|| self.attach(Hook::Device { ifindex, name: name.to_owned(), place, program }).1)
        };
        // Replies first: the new program finds what the old one records, but not the other way round.
        let [egress, ingress] = [egress, ingress].map(|place| attach(place).expect("IPv4 has its places always"));
        let out6 = attach(out6);
        let ipv6 = attach(in6).zip(out6).map(<[HookStatus; 2]>::from);
        // It goes by what the others record.
        let xdp = attach(xdp).filter(|_| !self.spared.contains_key(&ifindex));
        Ok(DeviceHooks { ingress, egress, ipv6, xdp })
    }

    /// Whether programs hang at such a place at all.
    pub(super) fn has(&self, place: Place) -> bool {
        match place {
            Place::Xdp => self.options.acceleration != Acceleration::Disabled,
            place => self.options.ipv6 || !place.is_ipv6(),
        }
    }

    /// Attaches the XDP program to the devices that have the others, or takes it off them; connections go on.
    pub fn accelerate(&mut self, acceleration: Acceleration) {
        self.options.acceleration = acceleration;
        self.refused.remove(XDP);
        self.spared.clear();
        self.hooks.retain(|hook, _| hook.program() != XDP);
        let devices: Vec<(u32, String)> = self.hooks.keys().filter_map(Hook::ethernet).collect();
        for (ifindex, name) in devices {
            if self.has(Place::Xdp) {
                self.attach(Hook::xdp(ifindex, name));
            } else if let Err(error) = attach::detach(ifindex, std::iter::once(Place::Xdp), &self.links) {
                tracing::error!(device = %name, %error, "XDP program not detached");
            }
        }
    }

    /// The devices whose drivers run the XDP program, by index.
    pub fn accelerated(&self) -> BTreeSet<u32> {
        let running = self.hooks.iter().filter(|(hook, status)| hook.program() == XDP && status.is_ok());
        running.filter_map(|(hook, _)| Some(hook.device()?.0)).collect()
    }

    /// The devices that do without it under [`Acceleration::BestEffort`], and why.
    pub fn unaccelerated(&self) -> impl Iterator<Item = (&str, &str)> {
        self.spared.values().map(|(name, why)| (name.as_str(), why.as_str()))
    }

    /// Takes the programs off a device; a device that has gone is no error.
    pub fn detach_device(&mut self, name: &str, ifindex: u32) -> Result<(), AttachError> {
        self.hooks.retain(|hook, _| !matches!(hook, Hook::Device { ifindex: of, .. } if *of == ifindex));
        self.spared.remove(&ifindex);
        attach::detach(ifindex, Place::ALL.into_iter(), &self.links).map_err(|source| AttachError {
            name: name.to_owned(),
            ifindex,
            source,
        })
    }

    /// Attaches the socket programs to a cgroup2 directory, or replaces those that are attached; each on its own.
    pub fn attach_cgroup(&mut self, cgroup_root: &Path) -> Vec<HookStatus> {
        let hooks =
            SOCKETS.map(|(program, attach_type)| Hook::Cgroup { root: cgroup_root.to_owned(), program, attach_type });
        hooks.into_iter().map(|hook| self.attach(hook).1).collect()
    }

    /// Looks at every hook that is attached, and attaches again what somebody has taken away (R48). Returns how many
    /// that were.
    pub fn verify_hooks(&mut self) -> usize {
        // What was in the way may have gone.
        for (ifindex, (name, _)) in std::mem::take(&mut self.spared) {
            self.attach(Hook::xdp(ifindex, name));
        }
        let attached: Vec<Hook> = self.hooks_where(HookStatus::is_ok);
        attached.into_iter().filter(|hook| self.attach(hook.clone()).0 == Some(Found::Nothing)).count()
    }

    /// Tries again to load what was refused, and to attach what is not. Returns how many hooks and programs still fail.
    pub fn retry(&mut self) -> usize {
        for program in std::mem::take(&mut self.refused).into_keys() {
            self.load_program(&program);
        }
        for hook in self.hooks_where(|status| !status.is_ok()) {
            self.attach(hook);
        }
        self.failing()
    }

    /// How many hooks and programs fail.
    pub fn failing(&self) -> usize {
        self.hooks().iter().filter(|status| status.error.is_some()).count()
    }

    fn hooks_where(&self, condition: impl Fn(&HookStatus) -> bool) -> Vec<Hook> {
        self.hooks.iter().filter(|(_, status)| condition(status)).map(|(hook, _)| hook.clone()).collect()
    }

    /// Attaches, and notes how that went; with it what was there before, unless it failed.
    fn attach(&mut self, hook: Hook) -> (Option<Found>, HookStatus) {
        let result = self.try_attach(&hook);
        let found = result.as_ref().ok().map(|(_, found)| *found);
        if let (Err(why), Some((ifindex, name)), Acceleration::BestEffort) =
            (&result, hook.device(), self.options.acceleration)
            && hook.program() == XDP
            && !self.refused.contains_key(XDP)
        {
            self.spared.insert(ifindex, (name.to_owned(), why.clone()));
            self.hooks.remove(&hook);
            return (None, HookStatus::new(XDP, hook.place(), result.map(|(attachment, _)| attachment)));
        }
        let status = HookStatus::new(hook.program(), hook.place(), result.map(|(attachment, _)| attachment));
        self.hooks.insert(hook, status.clone());
        (found, status)
    }

    fn try_attach(&mut self, hook: &Hook) -> Result<(Attachment, Found), String> {
        let program = hook.program();
        if (LAYER3.contains(&program) || program == XDP) && !self.refused.contains_key(program) {
            self.load_program(program);
        }
        if let Some(error) = self.refused.get(program) {
            return Err(error.clone());
        }
        match hook {
            Hook::Device { ifindex, place: Place::Xdp, name, .. } => self.try_xdp(*ifindex, name),
            Hook::Device { ifindex, place, .. } => self.try_device(program, *ifindex, *place),
            Hook::Cgroup { root, attach_type, .. } => self.try_cgroup(program, root, *attach_type),
        }
    }

    fn try_device(&mut self, program: &str, ifindex: u32, place: Place) -> Result<(Attachment, Found), String> {
        let fd = self.program_fd(program)?;
        if self.options.attach == AttachMode::Auto {
            match attach::tcx(fd.as_fd(), ifindex, place, &self.links) {
                Ok(found) => return Ok((Attachment::Tcx, found)),
                // What kernels before 6.6 say.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        let loaded = classifier(&mut self.ebpf, program)?;
        clsact::attach(loaded, ifindex, place, &self.links).map(|found| (Attachment::Clsact, found))
    }

    /// A loaded program of tc, or why the verifier has refused it.
    pub(super) fn program_fd(&mut self, program: &str) -> Result<ProgramFd, String> {
        if let Some(error) = self.refused.get(program) {
            return Err(error.clone());
        }
        let fd = classifier(&mut self.ebpf, program)?.fd().map_err(|error| chain(&error))?;
        fd.try_clone().map_err(|error| chain(&error))
    }

    fn try_xdp(&self, ifindex: u32, name: &str) -> Result<(Attachment, Found), String> {
        if self.options.acceleration == Acceleration::BestEffort && is_veth(name).map_err(|error| error.to_string())? {
            let _ = attach::detach(ifindex, std::iter::once(Place::Xdp), &self.links);
            return Err("a veth delivers what XDP sends only to a peer that runs XDP, too: ask for native".into());
        }
        let program = self.ebpf.program(XDP).ok_or("not in the object")?;
        let loaded: &Xdp = program.try_into().map_err(|error: ProgramError| chain(&error))?;
        let fd = loaded.fd().map_err(|error| chain(&error))?;
        attach::xdp(fd.as_fd(), ifindex, &self.links).map(|found| (Attachment::Xdp, found)).map_err(|error| match error
            .raw_os_error()
        {
            Some(libc::EBUSY | libc::EEXIST) => "another XDP program is on the device, and stays".into(),
            Some(libc::EOPNOTSUPP) => "its driver has no native XDP".into(),
            Some(libc::ERANGE | libc::EINVAL) => {
                format!("its driver refuses XDP, as many do above an MTU of about 3500: {error}")
            }
            _ => error.to_string(),
        })
    }

    fn try_cgroup(&self, program: &str, root: &Path, attach_type: u32) -> Result<(Attachment, Found), String> {
        let opened = File::open(root).and_then(|dir| Ok((dir.metadata()?.ino(), dir)));
        let (id, cgroup) = opened.map_err(|error| format!("open {}: {error}", root.display()))?;
        let loaded = self.ebpf.program(program).ok_or("not in the object")?;
        let fd = loaded.fd().map_err(|error| chain(&error))?;
        let path = self.links.join(format!("cgroup-{program}"));
        attach::cgroup(fd.as_fd(), (cgroup.as_fd(), id), attach_type, &path)
            .map(|found| (Attachment::Cgroup, found))
            .map_err(|error| error.to_string())
    }

    /// Every hook that was attached or tried, and every program that the verifier refused.
    pub fn hooks(&self) -> Vec<HookStatus> {
        let mut all: Vec<HookStatus> = self.hooks.values().chain(self.pods.status()).cloned().collect();
        for (program, error) in &self.refused {
            if !all.iter().any(|status| status.program == *program) {
                all.push(HookStatus::new(program, String::new(), Err(error.clone())));
            }
        }
        all
    }
}

/// A program of tc.
fn classifier<'a>(ebpf: &'a mut Ebpf, program: &str) -> Result<&'a mut SchedClassifier, String> {
    let program = ebpf.program_mut(program).ok_or("not in the object")?;
    program.try_into().map_err(|error: ProgramError| chain(&error))
}
