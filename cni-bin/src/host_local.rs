//! What the reference IPAM plugin `host-local` wrote on this node: a file for each address that it gave, and whose it
//! is. A network that ran on the node before Plat gave its pods their addresses by it (bridge, ptp, flannel, kindnet).
//!
//! ```text
//! /var/lib/cni/networks/<network>/10.244.3.7          <container ID>\r\n<interface>
//! /var/lib/cni/networks/<network>/last_reserved_ip.0  10.244.3.7
//! /var/lib/cni/networks/<network>/lock                held (flock) while any of them changes
//! ```
//! kindnet has them in `/run/cni-ipam-state` instead of `networks`. A file alone proves nothing: the plugin forgets addresses whose DEL it never got, and the folder outlives reboots.

use std::fs::{self, File};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::FlockOperation;

/// Where libcni and the reference plugins keep their state.
pub const STATE_DIR: &str = "/var/lib/cni";
/// Where kindnet has the plugin keep its files (`ipam.dataDir`).
const KINDNET_DIR: &str = "/run/cni-ipam-state";
/// Longer files than this are none of the plugin's.
const MAX_FILE: usize = 4096;
/// So often the lock is tried: for two seconds.
const LOCK_TRIES: u32 = 200;
/// The pause in between.
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// The files of all networks of a node.
#[derive(Clone, Debug)]
pub struct HostLocal {
    /// Folders with a folder for each network.
    states: Vec<PathBuf>,
}

/// Who was given an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The runtime's ID of the pod's sandbox.
    pub container_id: String,
    /// The interface in the pod; empty in files of the plugin's versions before 0.8.
    pub ifname: String,
    /// How long ago the file was written.
    pub age: Duration,
    file: PathBuf,
}

impl HostLocal {
    /// The files below that state folder; where it is the usual one, kindnet's too.
    pub fn at(state: &Path) -> HostLocal {
        let kindnet = Some(PathBuf::from(KINDNET_DIR)).filter(|_| state == Path::new(STATE_DIR));
        HostLocal { states: [state.join("networks")].into_iter().chain(kindnet).collect() }
    }

    /// Who was given an address last, by any network or by that one. A folder that cannot be read is as good as none:
    /// what runs is proven by the kernel.
    pub fn owner(&self, address: &IpAddr, network: Option<&str>) -> Option<Owner> {
        self.owners(address, network).into_iter().min_by_key(|owner| owner.age)
    }

    /// Everyone whom some network gave an address: what a network that is gone has left may name it too.
    fn owners(&self, address: &IpAddr, network: Option<&str>) -> Vec<Owner> {
        let folders: Vec<PathBuf> = match network {
            Some(network) => self.states.iter().map(|state| state.join(network)).collect(),
            None => self.states.iter().flat_map(fs::read_dir).flatten().flatten().map(|e| e.path()).collect(),
        };
        folders.iter().filter_map(|folder| read(&folder.join(address.to_string()))).collect()
    }

    /// Gives up an address, as the plugin's DEL does, if that container still has it. Says whether it had.
    pub fn release(&self, address: &IpAddr, container_id: &str) -> bool {
        let owners = self.owners(address, None);
        let owners = owners.iter().filter(|owner| owner.container_id == container_id);
        owners.filter(|owner| release(owner)).count() > 0
    }
}

fn release(owner: &Owner) -> bool {
    let Some(folder) = owner.file.parent() else { return false };
    // The plugin holds this lock while it looks for a free address. Without it, someone removed the folder.
    let Ok(lock) = File::open(folder.join("lock")) else { return false };
    if !is_locked(&lock) {
        return false;
    }
    let still = read(&owner.file).is_some_and(|now| now.container_id == owner.container_id);
    still && fs::remove_file(&owner.file).is_ok()
}

/// Takes the lock, unless somebody keeps it for longer than a plugin does.
fn is_locked(lock: &File) -> bool {
    (0..LOCK_TRIES).any(|_| {
        let got = rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok();
        if !got {
            std::thread::sleep(LOCK_PAUSE);
        }
        got
    })
}

fn read(file: &Path) -> Option<Owner> {
    let meta = fs::symlink_metadata(file).ok().filter(|meta| meta.is_file())?;
    if meta.len() > MAX_FILE as u64 {
        return None;
    }
    let text = fs::read(file).ok()?;
    let (container_id, ifname) = parse(&text)?;
    let written = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    // A file from the future is a wrong clock: it counts as just written, which is the safe side.
    let age = SystemTime::now().duration_since(written).unwrap_or_default();
    Some(Owner { container_id, ifname, age, file: file.to_owned() })
}

/// Container and interface; `None` if it does not look like them. Pure.
fn parse(text: &[u8]) -> Option<(String, String)> {
    let text = std::str::from_utf8(text).ok()?;
    let mut lines = text.lines().map(str::trim);
    let container_id = lines.next().filter(|id| is_word(id))?;
    let ifname = lines.next().filter(|name| is_word(name)).unwrap_or_default();
    Some((container_id.to_owned(), ifname.to_owned()))
}

/// What can stand in a lease and in an alias.
fn is_word(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= plat_crds::lease::MAX_CONTAINER_ID
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(files: &[(&str, &str)]) -> tempfile::TempDir {
        let state = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let file = state.path().join("networks").join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        state
    }

    #[test]
    fn the_owner_of_an_address_is_found_in_any_network_or_in_one() {
        let state = state(&[
            ("cbr0/10.244.1.5", "c5\r\neth0"),
            ("cbr0/fd00::5", "c5\r\neth0"),
            ("old/10.244.1.6", "c6"),
            ("cbr0/last_reserved_ip.0", "10.244.1.7"),
            ("cbr0/lock", ""),
        ]);
        let files = HostLocal::at(state.path());
        let owner = |address: &str, network| {
            let owner = files.owner(&address.parse().unwrap(), network)?;
            Some(format!("{} {}", owner.container_id, owner.ifname))
        };
        assert_eq!(owner("10.244.1.5", None).as_deref(), Some("c5 eth0"));
        assert_eq!(owner("fd00::5", None).as_deref(), Some("c5 eth0"));
        assert_eq!(owner("10.244.1.6", None).as_deref(), Some("c6 "));
        assert_eq!(owner("10.244.1.6", Some("cbr0")), None);
        assert_eq!(owner("10.244.1.7", None), None);
        assert_eq!(
            HostLocal::at(Path::new("/nonexistent")).owner(&"10.244.1.5".parse().unwrap(), None),
            None
        );
    }

    #[test]
    fn only_its_own_container_gives_an_address_up() {
        let state = state(&[("n/10.244.1.5", "c5\r\neth0"), ("n/lock", "")]);
        let (files, address) = (HostLocal::at(state.path()), "10.244.1.5".parse().unwrap());
        assert!(!files.release(&address, "other"));
        assert!(files.owner(&address, None).is_some());
        assert!(files.release(&address, "c5"));
        assert_eq!(files.owner(&address, None), None);
        assert!(!files.release(&address, "c5"));
    }

    #[test]
    fn of_several_files_the_youngest_tells_the_owner_and_each_container_gives_up_its_own() {
        let files = ["a", "b", "c", "d"].map(|n| (format!("{n}/10.244.1.5"), format!("c{n}\r\neth0")));
        let mut files: Vec<_> = files.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
        files.extend(["a/lock", "b/lock", "c/lock", "d/lock"].map(|name| (name, "")));
        for young in ["a", "b", "c", "d"] {
            let state = state(&files);
            for network in ["a", "b", "c", "d"].iter().filter(|network| **network != young) {
                let file = state.path().join("networks").join(network).join("10.244.1.5");
                let written = SystemTime::now() - Duration::from_secs(1000);
                File::options().write(true).open(file).unwrap().set_modified(written).unwrap();
            }
            let (files, address) = (HostLocal::at(state.path()), "10.244.1.5".parse().unwrap());
            let owner = files.owner(&address, None).unwrap();
            assert_eq!(owner.container_id, format!("c{young}"));
            assert!(owner.age < Duration::from_secs(500));
            for network in ["a", "b", "c", "d"] {
                assert!(files.release(&address, &format!("c{network}")), "{network}");
                assert!(!files.release(&address, &format!("c{network}")), "{network}");
            }
            assert_eq!(files.owner(&address, None), None);
        }
    }

    #[test]
    fn whatever_stands_in_a_file_is_no_panic_and_no_strange_word() {
        for text in [&b""[..], b"\r\n", b"\xff\xfe", b"a b\r\neth0", b"../../etc\r\n", &[b'a'; 300]] {
            let found = parse(text);
            assert!(found.as_ref().is_none_or(|(id, _)| is_word(id)), "{found:?}");
        }
        assert_eq!(parse(b"c1\r\nsp ace"), Some(("c1".into(), String::new())));
    }
}
