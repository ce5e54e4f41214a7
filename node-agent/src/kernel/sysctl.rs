//! Sysctls below `/proc/sys/net`: written only when they differ, and put back by `plat-agent cleanup`.
//!
//! With the first write of each, its former value goes into `/run/plat/sysctls.json`. Only values recorded
//! there are ever put back, and only where the present value is still ours: what an administrator set
//! since then stays.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::fabric::Sysctl;
use crate::folder::{self, Folder};

/// Why a sysctl could not be read, written or remembered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading failed.
    #[error("read sysctl {}: {source}; is /proc/sys/net mounted there?", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Writing failed.
    #[error("set sysctl {} to {value}: {source}; mount the node's /proc/sys/net writable and point --sysctl-dir at it", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The value.
        value: String,
        /// Why.
        source: io::Error,
    },
}

/// One sysctl that was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Former {
    /// The value before this agent.
    was: String,
    /// The value that this agent set.
    set: String,
}

/// The sysctls of one node.
#[derive(Clone, Debug)]
pub struct Sysctls {
    dir: PathBuf,
    run: Folder,
    file: String,
    record: BTreeMap<String, Former>,
}

impl Sysctls {
    /// Sysctls below `dir`, whose former values are kept in `file` of `run`.
    pub fn new(dir: &Path, run: &Folder, file: &str) -> Sysctls {
        // A record that cannot be read is taken as empty: putting back wrong values would be worse than none.
        let text = std::fs::read(run.path().join(file)).unwrap_or_default();
        let record = serde_json::from_slice(&text).unwrap_or_default();
        Sysctls { dir: dir.to_owned(), run: run.clone(), file: file.to_owned(), record }
    }

    /// The folder that stands for `/proc/sys/net`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The present value; `None` if the kernel has no such sysctl (a link that is gone, no IPv6).
    pub fn read(&self, path: &str) -> Result<Option<String>, Error> {
        let file = self.dir.join(path);
        match std::fs::read_to_string(&file) {
            Ok(text) => Ok(Some(text.trim_end().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.dir.is_dir() => Ok(None),
            Err(source) => Err(Error::Read { path: file, source }),
        }
    }

    /// Sets a value, with its former one on record.
    pub fn write(&mut self, sysctl: &Sysctl) -> Result<(), Error> {
        let Some(present) = self.read(&sysctl.path)? else { return Ok(()) };
        let former = Former { was: present, set: String::new() };
        self.record.entry(sysctl.path.clone()).or_insert(former).set.clone_from(&sysctl.value);
        // A full or read-only folder must not keep a node from forwarding: the record is in memory, and is
        // kept as soon as it can be.
        if let Err(error) = self.keep_record() {
            tracing::warn!(sysctl = %sysctl.path, %error, "the former value is not kept yet");
        }
        self.put(&sysctl.path, &sysctl.value)
    }

    fn put(&self, path: &str, value: &str) -> Result<(), Error> {
        let path = self.dir.join(path);
        std::fs::write(&path, value).map_err(|source| Error::Write { path, value: value.to_owned(), source })
    }

    /// Puts the record where it belongs, also after somebody removed it.
    pub fn keep_record(&self) -> Result<(), folder::Error> {
        if self.record.is_empty() {
            return Ok(());
        }
        let text = serde_json::to_vec_pretty(&self.record).unwrap_or_default();
        self.run.put(&self.file, &text, 0o600).map(|_| ())
    }

    /// Puts every value back that still is as this agent set it, in the reverse order of need: forwarding
    /// before `accept_ra`. Returns the paths, and goes on after an error.
    pub fn restore(&self) -> (Vec<String>, Vec<Error>) {
        let (mut restored, mut errors) = (Vec::new(), Vec::new());
        let mut record: Vec<_> = self.record.clone().into_iter().collect();
        record.sort_by_key(|(path, _)| path.ends_with("accept_ra"));
        for (path, former) in record {
            let outcome = match self.read(&path) {
                Ok(Some(present)) if present == former.set && present != former.was => {
                    self.put(&path, &former.was)
                }
                Ok(_) => continue,
                Err(error) => Err(error),
            };
            match outcome {
                Ok(()) => restored.push(path),
                Err(error) => errors.push(error),
            }
        }
        (restored, errors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake {
        root: tempfile::TempDir,
        sysctls: Sysctls,
    }

    fn fake() -> Fake {
        let root = tempfile::tempdir().unwrap();
        for (path, value) in [("ipv4/ip_forward", "0\n"), ("ipv6/conf/eth0.100/accept_ra", "1\n")] {
            let file = root.path().join("net").join(path);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, value).unwrap();
        }
        let sysctls =
            Sysctls::new(&root.path().join("net"), &Folder::new(&root.path().join("run")), "sysctls.json");
        Fake { root, sysctls }
    }

    impl Fake {
        fn value(&self, path: &str) -> String {
            std::fs::read_to_string(self.root.path().join("net").join(path)).unwrap().trim().to_owned()
        }
    }

    #[test]
    fn cleanup_puts_back_what_was_there_before_the_first_write() {
        let mut fake = fake();
        for value in ["1", "1", "2"] {
            fake.sysctls.write(&Sysctl::new("ipv4/ip_forward", value)).unwrap();
        }
        fake.sysctls.write(&Sysctl::new("ipv6/conf/eth0.100/accept_ra", "2")).unwrap();
        let (restored, errors) = fake.sysctls.restore();
        assert_eq!(restored, ["ipv4/ip_forward", "ipv6/conf/eth0.100/accept_ra"]);
        assert!(errors.is_empty());
        assert_eq!(
            (fake.value("ipv4/ip_forward"), fake.value("ipv6/conf/eth0.100/accept_ra")),
            ("0".into(), "1".into())
        );
    }

    #[test]
    fn what_somebody_set_since_then_stays() {
        let mut fake = fake();
        fake.sysctls.write(&Sysctl::new("ipv6/conf/eth0.100/accept_ra", "2")).unwrap();
        std::fs::write(fake.root.path().join("net/ipv6/conf/eth0.100/accept_ra"), "0\n").unwrap();
        assert_eq!(fake.sysctls.restore().0, Vec::<String>::new());
        assert_eq!(fake.value("ipv6/conf/eth0.100/accept_ra"), "0");
    }

    #[test]
    fn a_removed_record_comes_back_and_a_new_life_reads_it() {
        let mut fake = fake();
        fake.sysctls.write(&Sysctl::new("ipv4/ip_forward", "1")).unwrap();
        std::fs::remove_dir_all(fake.root.path().join("run")).unwrap();
        fake.sysctls.keep_record().unwrap();
        let next = Sysctls::new(
            &fake.root.path().join("net"),
            &Folder::new(&fake.root.path().join("run")),
            "sysctls.json",
        );
        assert_eq!(next.restore().0, ["ipv4/ip_forward"]);
    }

    #[test]
    fn a_sysctl_of_a_link_that_is_gone_is_nothing_and_a_missing_folder_is_an_error() {
        let mut fake = fake();
        assert_eq!(fake.sysctls.read("ipv6/conf/gone/accept_ra").unwrap(), None);
        fake.sysctls.write(&Sysctl::new("ipv6/conf/gone/accept_ra", "2")).unwrap();
        let nowhere = Sysctls::new(Path::new("/nonexistent"), &Folder::new(fake.root.path()), "s");
        assert!(
            nowhere
                .read("ipv4/ip_forward")
                .unwrap_err()
                .to_string()
                .contains("is /proc/sys/net mounted there")
        );
    }

    #[test]
    fn a_record_that_cannot_be_kept_now_is_kept_later() {
        let mut fake = fake();
        let in_the_way = fake.root.path().join("run");
        std::fs::write(&in_the_way, "a file in the way").unwrap();
        fake.sysctls.write(&Sysctl::new("ipv4/ip_forward", "1")).unwrap();
        assert_eq!(fake.value("ipv4/ip_forward"), "1");
        assert!(fake.sysctls.keep_record().is_err());
        std::fs::remove_file(&in_the_way).unwrap();
        fake.sysctls.keep_record().unwrap();
        assert!(in_the_way.join("sysctls.json").exists());
    }
}
