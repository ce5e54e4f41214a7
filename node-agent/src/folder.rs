//! Folders that others read while we write: every file is written under a temporary name in the same
//! folder and renamed over the old one, so a reader sees one whole file or the other.
//!
//! The temporary name starts with a dot and carries no suffix that a container runtime looks for.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Why a file could not be put into a folder.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody else's folder.
    #[error("cannot write to {}: it belongs to uid {owner} and this agent runs as uid {uid} without the right to override (CAP_DAC_OVERRIDE); run 'chown {uid} {}' on the node, or point the agent at another folder", dir.display(), dir.display())]
    Owner {
        /// The folder.
        dir: PathBuf,
        /// Its owner.
        owner: u32,
        /// Whose rights we have.
        uid: u32,
    },
    /// The folder was removed and made anew while a mount of it still shows the old one.
    #[error("{} was removed under this agent, which still sees the old folder through its mount; it must be started anew to see the new one", .0.display())]
    Vanished(PathBuf),
    /// No space, or a read-only file system.
    #[error("cannot write to {}: {source}; free some space or make it writable", dir.display())]
    Full {
        /// The folder.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Anything else.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What failed.
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Error {
    /// Whether only a restart, with fresh mounts, can help.
    pub fn needs_restart(&self) -> bool {
        matches!(self, Error::Vanished(_))
    }
}

/// A folder on the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folder {
    dir: PathBuf,
}

impl Folder {
    /// The folder at that path; it need not exist yet.
    pub fn new(dir: &Path) -> Folder {
        Folder { dir: dir.to_owned() }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Makes the folder if it is not there, and finds out whether it was removed under a mount.
    pub fn ensure(&self) -> Result<(), Error> {
        match fs::metadata(&self.dir) {
            // A removed directory has no links left (but on btrfs, where creating a file will tell).
            Ok(meta) if meta.is_dir() && meta.nlink() == 0 => Err(Error::Vanished(self.dir.clone())),
            Ok(meta) if meta.is_dir() => Ok(()),
            _ => fs::create_dir_all(&self.dir)
                .map_err(|source| self.classify(source, "create folder", &self.dir)),
        }
    }

    /// The file's content; `None` if there is no such file.
    pub fn get(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let path = self.dir.join(name);
        match fs::read(&path) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::Io { what: "read", path, source }),
        }
    }

    /// Makes the file hold `content`, with those permissions; returns whether it had to be written.
    pub fn put(&self, name: &str, content: &[u8], mode: u32) -> Result<bool, Error> {
        self.ensure()?;
        let path = self.dir.join(name);
        if self.holds(&path, content, mode) {
            return Ok(false);
        }
        let temporary = self.dir.join(format!(".{name}.tmp"));
        let written = self.write(&temporary, content, mode).and_then(|()| {
            fs::rename(&temporary, &path).map_err(|source| self.classify(source, "rename to", &path))
        });
        if written.is_err() {
            // Best effort: the name is ours, and the next attempt overwrites it.
            let _ = fs::remove_file(&temporary);
        }
        written.map(|()| true)
    }

    fn holds(&self, path: &Path, content: &[u8], mode: u32) -> bool {
        let Ok(meta) = fs::symlink_metadata(path) else { return false };
        let same_size = meta.is_file() && meta.len() == content.len() as u64;
        same_size
            && meta.permissions().mode() & 0o7777 == mode
            && fs::read(path).is_ok_and(|there| there == content)
    }

    fn write(&self, temporary: &Path, content: &[u8], mode: u32) -> Result<(), Error> {
        let _ = fs::remove_file(temporary);
        // A new file, never through a link that somebody put there.
        let open = OpenOptions::new().write(true).create_new(true).mode(mode).open(temporary);
        let mut file: File = open.map_err(|source| self.classify(source, "create", temporary))?;
        let fill =
            file.write_all(content).and_then(|()| file.set_permissions(fs::Permissions::from_mode(mode)));
        fill.and_then(|()| file.sync_all()).map_err(|source| self.classify(source, "write", temporary))
    }

    /// Removes the file; returns whether it was there.
    pub fn remove(&self, name: &str) -> Result<bool, Error> {
        let path = self.dir.join(name);
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(self.classify(source, "remove", &path)),
        }
    }

    fn classify(&self, source: io::Error, what: &'static str, path: &Path) -> Error {
        let dir = self.dir.clone();
        match source.kind() {
            io::ErrorKind::PermissionDenied => {
                let uid = rustix::process::geteuid().as_raw();
                match fs::metadata(&dir).map(|meta| meta.uid()) {
                    Ok(owner) if owner != uid => Error::Owner { dir, owner, uid },
                    _ => Error::Io { what, path: path.to_owned(), source },
                }
            }
            // The folder answers, but nothing can be made in it: it is a removed one.
            io::ErrorKind::NotFound if fs::metadata(&dir).is_ok_and(|meta| meta.is_dir()) => {
                Error::Vanished(dir)
            }
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::ReadOnlyFilesystem => {
                Error::Full { dir, source }
            }
            _ => Error::Io { what, path: path.to_owned(), source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> (tempfile::TempDir, Folder) {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::new(&root.path().join("a/b"));
        (root, folder)
    }

    fn names(folder: &Folder) -> Vec<String> {
        fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_is_written_once_and_again_only_when_it_differs() {
        let (_root, folder) = folder();
        assert!(folder.put("f", b"one", 0o755).unwrap());
        assert!(!folder.put("f", b"one", 0o755).unwrap());
        let inode = fs::metadata(folder.path().join("f")).unwrap().ino();
        assert!(folder.put("f", b"two", 0o755).unwrap());
        assert_ne!(fs::metadata(folder.path().join("f")).unwrap().ino(), inode, "replaced, not overwritten");
        fs::set_permissions(folder.path().join("f"), fs::Permissions::from_mode(0o600)).unwrap();
        assert!(folder.put("f", b"two", 0o755).unwrap(), "lost permissions are damage too");
        assert_eq!(names(&folder), ["f"]);
    }

    #[test]
    fn a_link_in_the_way_is_replaced_and_never_written_through() {
        let (root, folder) = folder();
        folder.ensure().unwrap();
        let victim = root.path().join("victim");
        fs::write(&victim, "mine").unwrap();
        for name in ["f", ".f.tmp"] {
            std::os::unix::fs::symlink(&victim, folder.path().join(name)).unwrap();
        }
        folder.put("f", b"ours", 0o644).unwrap();
        assert_eq!(fs::read(&victim).unwrap(), b"mine");
        assert!(fs::symlink_metadata(folder.path().join("f")).unwrap().is_file());
    }

    #[test]
    fn a_folder_that_was_removed_under_an_open_handle_needs_a_restart() {
        let (_root, folder) = folder();
        folder.ensure().unwrap();
        // What a bind mount shows of a removed folder, this shows without one.
        let handle = File::open(folder.path()).unwrap();
        fs::remove_dir(folder.path()).unwrap();
        fs::create_dir(folder.path()).unwrap();
        let through =
            Folder::new(Path::new(&format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&handle))));
        let error = through.put("f", b"x", 0o644).unwrap_err();
        assert!(error.needs_restart(), "{error}");
        assert!(folder.put("f", b"x", 0o644).is_ok());
    }

    #[test]
    fn removing_twice_is_no_error() {
        let (_root, folder) = folder();
        folder.put("f", b"x", 0o644).unwrap();
        assert!(folder.remove("f").unwrap());
        assert!(!folder.remove("f").unwrap());
        assert_eq!(folder.get("f").unwrap(), None);
    }
}
