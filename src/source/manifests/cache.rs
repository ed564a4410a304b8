//! Files by name, read again only when they changed; what disappears stays for a moment.
//!
//! A file that is being written is shorter than it was, an editor that saves by renaming leaves a moment without the file,
//! and an object that moves to another file is gone from the first before it is in the second. Therefore an object is
//! taken as removed only after [`SETTLE`], while additions and changes count at once.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use kinesin_core::objects::{Object, ObjectKey};

use super::document::{self, Problem, Reading};
use super::kinds::{AnyObject, Kind};

/// How long an object has to be absent from its file before it is gone.
pub(super) const SETTLE: Duration = Duration::from_millis(250);
/// How long a file that a writer holds open is left alone.
pub(super) const WRITER_PATIENCE: Duration = Duration::from_secs(1);
/// Timestamps of files are this coarse at worst: a file changed more recently may change again without looking different.
const RACY: Duration = Duration::from_millis(20);

/// What tells two versions of a file apart without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// The stamp of a file, or `None` when the file is so fresh that its stamp proves nothing.
    fn of(meta: &fs::Metadata) -> Option<Self> {
        let fresh = meta.modified().is_ok_and(|at| match SystemTime::now().duration_since(at) {
            Ok(age) => age < RACY,
            Err(ahead) => ahead.duration() < RACY,
        });
        (!fresh).then(|| Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

/// The identity of an object of any kind.
pub(super) type Identity = (&'static str, ObjectKey);

impl AnyObject {
    pub(super) fn identity(&self) -> Identity {
        fn of<T: Object>(object: &Arc<T>) -> Identity {
            (T::KIND, object.key())
        }
        match self {
            Self::Service(object) => of(object),
            Self::EndpointSlice(object) => of(object),
            Self::Node(object) => of(object),
            Self::Pod(object) => of(object),
            Self::Pool(object) => of(object),
            Self::L2Policy(object) => of(object),
        }
    }
}

/// What is known about one manifest file.
#[derive(Debug, Default)]
struct ManifestFile {
    stamp: Option<Stamp>,
    reading: Reading,
    /// Objects that were in the file and are not now.
    kept: Vec<AnyObject>,
    /// When `kept` is given up; `None` while the file has problems.
    keep_until: Option<Instant>,
}

impl ManifestFile {
    fn replace(&mut self, reading: Reading, now: Instant) {
        let present: BTreeSet<Identity> = reading.objects.iter().map(AnyObject::identity).collect();
        let before = std::mem::take(&mut self.reading).objects.into_iter().chain(std::mem::take(&mut self.kept));
        self.kept = before.filter(|object| !present.contains(&object.identity())).collect();
        self.keep_until = reading.problems.is_empty().then(|| now + SETTLE);
        self.reading = reading;
    }
}

/// The files of the manifest directory.
#[derive(Debug)]
pub(super) struct Manifests {
    dir: PathBuf,
    files: BTreeMap<String, ManifestFile>,
    directory_problem: Option<String>,
}

/// What a scan found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Scan {
    /// Whether anything differs from the scan before.
    pub(super) changed: bool,
    /// When to look again although nobody reported a change.
    pub(super) again_in: Option<Duration>,
}

impl Scan {
    pub(super) fn merge(&mut self, other: Scan) {
        self.changed |= other.changed;
        if let Some(wait) = other.again_in {
            self.look_again(wait);
        }
    }

    fn look_again(&mut self, wait: Duration) {
        self.again_in = Some(self.again_in.map_or(wait, |known| known.min(wait)));
    }
}

impl Manifests {
    pub(super) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), files: BTreeMap::new(), directory_problem: None }
    }

    /// Reads what changed. `writing` are files that somebody holds open for writing, with the time since which.
    pub(super) fn scan(&mut self, now: Instant, writing: &BTreeMap<PathBuf, Instant>) -> Scan {
        let mut scan = Scan::default();
        let names = match file_names(&self.dir, &["yaml", "yml", "json"]) {
            Ok(names) => names,
            Err(error) => {
                let text = format!("{}: {error}; the objects read before stay", self.dir.display());
                scan.changed = self.directory_problem.as_ref() != Some(&text);
                self.directory_problem = Some(text);
                return scan;
            }
        };
        scan.changed = self.directory_problem.take().is_some();
        for name in &names {
            let path = self.dir.join(name);
            if let Some(since) = writing.get(&path) {
                scan.look_again((*since + WRITER_PATIENCE).saturating_duration_since(now));
                continue;
            }
            scan.merge(self.read_file(name, &path, now));
        }
        for (name, file) in &mut self.files {
            if !names.contains(name) && (!file.reading.objects.is_empty() || file.stamp.take().is_some()) {
                file.replace(Reading::default(), now);
                scan.changed = true;
            }
            match file.keep_until {
                Some(until) if until <= now => {
                    file.keep_until = None;
                    scan.changed |= !std::mem::take(&mut file.kept).is_empty();
                }
                Some(until) if !file.kept.is_empty() => scan.look_again(until - now),
                _ => {}
            }
        }
        self.files.retain(|name, file| names.contains(name) || !file.kept.is_empty());
        scan
    }

    fn read_file(&mut self, name: &str, path: &Path, now: Instant) -> Scan {
        let mut scan = Scan::default();
        let known = self.files.entry(name.to_owned()).or_default();
        let stamp = match fs::metadata(path) {
            Ok(meta) if meta.is_dir() => return scan,
            Ok(meta) => Stamp::of(&meta),
            Err(_) => None,
        };
        if stamp.is_none() {
            scan.look_again(RACY + Duration::from_millis(5));
        } else if stamp == known.stamp {
            return scan;
        }
        let reading = match fs::read(path).map(String::from_utf8) {
            Ok(Ok(text)) => document::read(name, &text),
            Ok(Err(_)) => unreadable(name, "is not UTF-8 text"),
            // A dangling link, or removed since the directory was listed: absent, like a file that vanished.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Reading::default(),
            Err(error) => unreadable(name, &error.to_string()),
        };
        known.stamp = stamp;
        scan.changed = true;
        known.replace(reading, now);
        scan
    }

    /// All objects: first those that are in a file now, in the order of file names, then those that are kept.
    /// An object that two files contain is taken from the first; the second is a problem.
    pub(super) fn collect(&self, problems: &mut BTreeSet<Problem>, notes: &mut BTreeSet<Problem>) -> Vec<&AnyObject> {
        let mut from: BTreeMap<Identity, &str> = BTreeMap::new();
        let mut objects = Vec::new();
        for (name, file) in &self.files {
            for object in &file.reading.objects {
                let identity = object.identity();
                match from.get(&identity) {
                    None => {
                        from.insert(identity, name);
                        objects.push(object);
                    }
                    Some(first) => {
                        let (kind, key) = identity;
                        problems.insert(Problem {
                            kind: kind.to_owned(),
                            text: format!("{name}: {kind} {key} is already in {first}, which counts; remove one"),
                        });
                    }
                }
            }
            problems.extend(file.reading.problems.iter().cloned());
            for note in &file.reading.notes {
                let told = !document::is_known_kind(&note.kind) && notes.iter().any(|known| known.kind == note.kind);
                if !told {
                    notes.insert(note.clone());
                }
            }
        }
        for object in self.files.values().flat_map(|file| &file.kept) {
            if let std::collections::btree_map::Entry::Vacant(entry) = from.entry(object.identity()) {
                entry.insert("");
                objects.push(object);
            }
        }
        if let Some(text) = &self.directory_problem {
            problems.insert(Problem { kind: String::new(), text: text.clone() });
        }
        objects
    }
}

fn unreadable(name: &str, error: &str) -> Reading {
    let text = format!("{name}: {error}; what was read from this file before stays");
    Reading { problems: vec![Problem { kind: String::new(), text }], ..Reading::default() }
}

/// Names of the visible files with one of these extensions, sorted. Hidden ones are a ConfigMap's `..data`, and editors'.
fn file_names(dir: &Path, extensions: &[&str]) -> io::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir)? {
        let Ok(name) = entry?.file_name().into_string() else { continue };
        let matches = Path::new(&name).extension().is_some_and(|e| extensions.iter().any(|known| e == *known));
        if matches && !name.starts_with('.') {
            names.insert(name);
        }
    }
    Ok(names)
}

/// The files of one kind in the state directory: written whole by renaming, so they are taken as they are.
#[derive(Debug)]
pub(super) struct StateFiles<T> {
    dir: PathBuf,
    files: BTreeMap<String, (Option<Stamp>, Parsed<T>)>,
}

/// A good object, or what is wrong with the file.
type Parsed<T> = Result<Arc<T>, String>;

impl<T: Kind> StateFiles<T> {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir, files: BTreeMap::new() }
    }

    /// Reads what changed with `parse`.
    pub(super) fn scan(&mut self, parse: impl Fn(&[u8]) -> Result<T, serde_json::Error>) -> Scan {
        let mut scan = Scan::default();
        let Ok(names) = file_names(&self.dir, &["json"]) else { return scan };
        for name in &names {
            let path = self.dir.join(name);
            let Ok(meta) = fs::metadata(&path) else { continue };
            let stamp = Stamp::of(&meta);
            let known = self.files.get(name);
            if stamp.is_none() {
                scan.look_again(RACY + Duration::from_millis(5));
            } else if known.is_some_and(|(before, _)| *before == stamp) {
                continue;
            }
            let Ok(bytes) = fs::read(&path) else { continue };
            let parsed = match parse(&bytes) {
                Ok(object) => match known {
                    Some((_, Ok(before))) if **before == object => Ok(before.clone()),
                    _ => Ok(Arc::new(object)),
                },
                // The last good state stays.
                Err(error) => match known {
                    Some((_, Ok(before))) => Ok(before.clone()),
                    _ => Err(format!("{}: {error}; delete the file", path.display())),
                },
            };
            let same = match (known.map(|(_, before)| before), &parsed) {
                (Some(Ok(before)), Ok(now)) => Arc::ptr_eq(before, now),
                (Some(Err(before)), Err(now)) => before == now,
                _ => false,
            };
            scan.changed |= !same;
            self.files.insert(name.clone(), (stamp, parsed));
        }
        let before = self.files.len();
        self.files.retain(|name, _| names.contains(name));
        scan.changed |= self.files.len() != before;
        scan
    }

    /// The good ones, by key.
    pub(super) fn table(&self) -> BTreeMap<ObjectKey, Arc<T>> {
        self.files.values().filter_map(|(_, parsed)| parsed.as_ref().ok()).map(|o| (o.key(), o.clone())).collect()
    }

    pub(super) fn problems(&self) -> impl Iterator<Item = Problem> {
        let bad = self.files.values().filter_map(|(_, parsed)| parsed.as_ref().err());
        bad.map(|text| Problem { kind: T::KIND.to_owned(), text: text.clone() })
    }
}
